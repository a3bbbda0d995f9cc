//! WebDataset shards: tar files in which neighbours of one name are a row.

use super::file::Pieces;
use super::records::{Decode, Packer, RecordBlocks, Span};
use super::{Blocks, Source};
use crate::error::{Error, Result};
use arrow::array::{ArrayRef, BinaryArray, RecordBatchOptions, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use tar::{Archive, Entry};

const FORMAT: &str = "WebDataset tar";
const KEY: &str = "__key__";
const SECTOR: u64 = 512;

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WebDataset {
    pub(crate) files: Vec<PathBuf>,
}

#[typetag::serde(name = "webdataset")]
impl Source for WebDataset {
    /// The columns are the extensions of any row, in alphabetical order.
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let (mut extensions, mut files) = (BTreeSet::new(), Vec::new());
        for path in &self.files {
            let file = Pieces::open(path, FORMAT)?;
            let reason = |error: std::io::Error| error.to_string();
            let corrupt = |reason| Error::Corrupt { path: path.clone(), format: FORMAT, reason };
            let spans = scan(&file, &mut extensions);
            let spans = spans.and_then(|spans| spans.map_err(reason).map_err(corrupt));
            let spans = file.blame(spans)?;
            files.push((file, spans));
        }
        let bytes = extensions.iter().map(|name| Field::new(name, DataType::Binary, true));
        let fields = [Field::new(KEY, DataType::Utf8, false)].into_iter().chain(bytes);
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        Ok(Arc::new(RecordBlocks::new(schema, files, Arc::new(TarDecode))))
    }

    fn summary(&self) -> String {
        super::paths::listed(&self.files)
    }
}

/// Goes from head to head of the members, without reading them.
fn scan(file: &Pieces, extensions: &mut BTreeSet<String>) -> Result<std::io::Result<Vec<Span>>> {
    let mut archive = Archive::new(file.reader()?);
    Ok(spans(&mut archive, file.length(), extensions))
}

fn spans(
    archive: &mut Archive<impl Read + std::io::Seek>,
    length: u64,
    extensions: &mut BTreeSet<String>,
) -> std::io::Result<Vec<Span>> {
    let mut packer = Packer::default();
    let (mut end, mut row) = (0, None::<(String, u64)>);
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        let start = end;
        end = entry.raw_file_position() + entry.size().next_multiple_of(SECTOR);
        if end > length {
            return Err(std::io::Error::other("its last member is cut off"));
        }
        let Some((key, extension)) = name(&entry)? else { continue };
        extensions.insert(extension);
        match &row {
            Some((last, _)) if *last == key => {}
            Some((_, first)) => {
                packer.record(*first..start);
                row = Some((key, start));
            }
            None => row = Some((key, start)),
        }
    }
    row.into_iter().for_each(|(_, first)| packer.record(first..end));
    Ok(packer.finish())
}

/// Key and extension of a member that is a file: `a/b.c.d` is `a/b` and `c.d`.
fn name(entry: &Entry<'_, impl Read>) -> std::io::Result<Option<(String, String)>> {
    if !entry.header().entry_type().is_file() {
        return Ok(None);
    }
    let path = entry.path_bytes();
    let path = str::from_utf8(&path).map_err(std::io::Error::other)?;
    let (folder, file) = path.rsplit_once('/').map_or(("", path), |(folder, file)| (folder, file));
    // Hidden files, and those without an extension, are no samples.
    let Some((stem, extension)) = file.split_once('.').filter(|(stem, _)| !stem.is_empty()) else {
        return Ok(None);
    };
    let key = if folder.is_empty() { stem.to_owned() } else { format!("{folder}/{stem}") };
    Ok(Some((key, extension.to_owned())))
}

#[derive(Debug)]
struct TarDecode;

impl Decode for TarDecode {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn decode(
        &self,
        bytes: &[u8],
        _rows: usize,
        schema: &SchemaRef,
        projection: &[usize],
    ) -> Result<Vec<RecordBatch>, ArrowError> {
        let rows = rows(bytes)?;
        let column = |at: &usize| -> ArrayRef {
            let keys = rows.iter().map(|(key, _)| key.as_str());
            let members = rows.iter().map(|(_, row)| row.get(schema.field(*at).name()));
            match at {
                0 => Arc::new(StringArray::from_iter_values(keys)),
                _ => Arc::new(members.collect::<BinaryArray>()),
            }
        };
        let columns = projection.iter().map(column).collect();
        let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
        let schema = Arc::new(schema.project(projection)?);
        Ok(vec![RecordBatch::try_new_with_options(schema, columns, &options)?])
    }
}

/// Keys, and the members of each by their extensions.
type Rows = Vec<(String, HashMap<String, Vec<u8>>)>;

fn rows(bytes: &[u8]) -> std::io::Result<Rows> {
    let mut rows = Rows::new();
    for entry in Archive::new(bytes).entries()? {
        let mut entry = entry?;
        let Some((key, extension)) = name(&entry)? else { continue };
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        if rows.last().is_none_or(|(last, _)| *last != key) {
            rows.push((key, HashMap::new()));
        }
        let Some((key, row)) = rows.last_mut() else { continue };
        if row.insert(extension.clone(), bytes).is_some() {
            let twice = format!("the sample {key:?} has two members .{extension}");
            return Err(std::io::Error::other(twice));
        }
    }
    Ok(rows)
}
