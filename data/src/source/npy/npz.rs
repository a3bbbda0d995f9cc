//! NumPy's `.npz` files, a zip of arrays, read whole when opened: a column an array.

use super::corrupt;
use super::header::Header;
use crate::error::{Error, Result};
use crate::source::file::Stamped;
use crate::source::memory::MemoryBlocks;
use crate::source::{Blocks, Source, columns};
use arrow::array::ArrayRef;
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zip::ZipArchive;

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Npz {
    pub(crate) files: Vec<PathBuf>,
}

#[typetag::serde(name = "npz")]
impl Source for Npz {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let batches = self.files.iter().map(|path| read(path)).collect::<Result<Vec<_>>>()?;
        let schema = batches.first().ok_or(Error::Empty { after: "" })?.schema();
        for (path, batch) in self.files.iter().zip(&batches) {
            if batch.schema() != schema {
                let (expected, got) = (columns(&schema), columns(&batch.schema()));
                return Err(Error::SchemaDiffers { path: path.clone(), expected, got });
            }
        }
        Ok(Arc::new(MemoryBlocks::new(schema, batches)))
    }

    fn summary(&self) -> String {
        crate::source::paths::listed(&self.files)
    }
}

fn read(path: &Path) -> Result<RecordBatch> {
    let bytes = Stamped::new(path)?.read_all()?;
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|error| corrupt(path, error))?;
    let mut arrays: Vec<(String, ArrayRef)> = Vec::new();
    for at in 0..archive.len() {
        let mut member = archive.by_index(at).map_err(|error| corrupt(path, error))?;
        let name = member.name().map_err(|error| corrupt(path, error))?;
        let name = name.strip_suffix(".npy").unwrap_or(&name).to_owned();
        let array = read_array(&mut member);
        let array = array.map_err(|reason| corrupt(path, format!("array {name:?}: {reason}")))?;
        if let Some((first, longest)) = arrays.first()
            && longest.len() != array.len()
        {
            let (expected, got) = (longest.len(), array.len());
            let reason = format!("array {name:?} has {got} rows, {first:?} has {expected}");
            return Err(corrupt(path, reason));
        }
        arrays.push((name, array));
    }
    if arrays.is_empty() {
        return Err(corrupt(path, "it has no arrays"));
    }
    let arrays = arrays.into_iter().map(|(name, array)| (name, array, false));
    Ok(RecordBatch::try_from_iter_with_nullable(arrays)?)
}

fn read_array(member: &mut impl Read) -> Result<ArrayRef, String> {
    let header = Header::read(member)?;
    let expected = header.rows * header.row_bytes();
    let mut bytes = Vec::new();
    // One more, to find out that there are too many.
    let read = member.take(expected as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| error.to_string())?;
    if bytes.len() != expected {
        return Err(format!("it has not the {expected} bytes that its header says"));
    }
    header.array(bytes, header.rows).map_err(|error| error.to_string())
}
