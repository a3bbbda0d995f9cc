//! NumPy's `.npy` files: the first axis has the rows.

mod header;
mod npz;

pub(crate) use npz::Npz;

use super::file::Stamped;
use super::{BatchIter, Blocks, Source, columns, hash};
use crate::error::{Error, Result};
use arrow::array::RecordBatchOptions;
use arrow::datatypes::{Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use header::Header;
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const BLOCK_ROWS: usize = 4096;

/// A block of wide rows has fewer.
const BLOCK_BYTES: usize = 16 << 20;

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Npy {
    pub(crate) files: Vec<PathBuf>,
}

#[typetag::serde(name = "npy")]
impl Source for Npy {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let files =
            self.files.iter().map(|path| NpyFile::open(path)).collect::<Result<Vec<_>>>()?;
        let first = files.first().ok_or(Error::Empty { after: "" })?;
        let schema = first.schema();
        files.iter().try_for_each(|file| file.must_have(&schema))?;
        let pieces = files.iter().enumerate();
        let pieces = pieces.flat_map(|(at, file)| file.pieces().map(move |(s, n)| (at, s, n)));
        let pieces = pieces.collect();
        Ok(Arc::new(NpyBlocks { schema, files, pieces }))
    }

    fn summary(&self) -> String {
        super::paths::listed(&self.files)
    }
}

#[derive(Debug)]
struct NpyBlocks {
    schema: SchemaRef,
    files: Vec<NpyFile>,
    /// File, first row and number of rows of each block.
    pieces: Vec<(usize, usize, usize)>,
}

impl Blocks for NpyBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.pieces.iter().map(|(.., rows)| *rows as u64).collect()
    }

    fn fingerprint(&self) -> Result<String> {
        let parts = self.files.iter().map(|file| file.stamped.fingerprint());
        let parts = parts.collect::<Result<Vec<_>>>()?;
        Ok(hash(parts.iter().map(String::as_bytes)))
    }

    fn waits(&self) -> bool {
        self.files.iter().any(|file| file.stamped.is_remote())
    }

    fn name(&self, block: usize) -> String {
        let (file, start, rows) = self.pieces[block];
        let path = self.files[file].stamped.path.display();
        format!("{path} (rows {start} to {})", start + rows - 1)
    }

    fn file(&self, block: usize) -> Option<usize> {
        Some(self.pieces[block].0)
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let (file, start, rows) = self.pieces[block];
        let schema = Arc::new(self.schema.project(projection)?);
        let column = |_: &usize| self.files[file].read(start, rows);
        let columns = projection.iter().map(column).collect::<Result<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let batch = RecordBatch::try_new_with_options(schema, columns, &options)?;
        Ok(Box::new(std::iter::once(Ok(batch))))
    }
}

#[derive(Debug)]
struct NpyFile {
    stamped: Stamped,
    header: Header,
}

impl NpyFile {
    fn open(path: &Path) -> Result<Self> {
        let stamped = Stamped::new(path)?;
        let header = Header::read(&mut stamped.open()?).map_err(|reason| corrupt(path, reason));
        let header = stamped.blame(header)?;
        let expected = header.start + (header.rows * header.row_bytes()) as u64;
        if stamped.length != expected {
            let got = stamped.length;
            let reason = format!("it has {got} bytes, by its header it should have {expected}");
            return Err(corrupt(path, reason));
        }
        Ok(Self { stamped, header })
    }

    fn schema(&self) -> SchemaRef {
        Arc::new(Schema::new(vec![Field::new("data", self.header.data_type(), false)]))
    }

    fn must_have(&self, expected: &SchemaRef) -> Result<()> {
        let got = self.schema();
        if got == *expected {
            return Ok(());
        }
        let (expected, got) = (columns(expected), columns(&got));
        Err(Error::SchemaDiffers { path: self.stamped.path.clone(), expected, got })
    }

    /// First row and number of rows of each block.
    fn pieces(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let rows = self.header.rows;
        let most = (BLOCK_BYTES / self.header.row_bytes().max(1)).clamp(1, BLOCK_ROWS);
        (0..rows).step_by(most).map(move |start| (start, most.min(rows - start)))
    }

    fn read(&self, start: usize, rows: usize) -> Result<arrow::array::ArrayRef> {
        let row_bytes = self.header.row_bytes();
        let at = self.header.start + (start * row_bytes) as u64;
        let bytes = self.stamped.read_one(at..at + (rows * row_bytes) as u64)?;
        self.header.array(bytes.into(), rows)
    }
}

fn corrupt(path: &Path, reason: impl Display) -> Error {
    Error::Corrupt { path: path.to_owned(), format: "NumPy", reason: reason.to_string() }
}
