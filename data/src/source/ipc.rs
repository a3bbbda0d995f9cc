//! Arrow IPC files, which Feather (version 2) files are too: a block is a record batch.

use super::file::{Opened, Stamped, each};
use super::{BatchIter, Blocks, Source, columns, hash};
use crate::error::{Error, Result};
use crate::remote::is_url;
use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::ipc::reader::{FileReader, read_footer_length};
use arrow::ipc::{Block, root_as_footer, root_as_message};
use serde::{Deserialize, Serialize};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 6] = b"ARROW1";
const FEATHER_1: &[u8; 4] = b"FEA1";

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ipc {
    pub(crate) files: Vec<PathBuf>,
}

#[typetag::serde(name = "ipc")]
impl Source for Ipc {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let files = each(&self.files, |path| is_url(path), |path| IpcFile::open(path))?;
        let first = files.first().ok_or(Error::Empty { after: "" })?;
        let schema = first.schema.clone();
        files.iter().try_for_each(|file| file.must_have(&schema))?;
        let batches_of =
            |(at, file): (usize, &IpcFile)| (0..file.rows.len()).map(move |batch| (at, batch));
        let batches = files.iter().enumerate().flat_map(batches_of).collect();
        Ok(Arc::new(IpcBlocks { schema, files, batches }))
    }

    fn summary(&self) -> String {
        super::paths::listed(&self.files)
    }
}

#[derive(Debug)]
struct IpcBlocks {
    schema: SchemaRef,
    files: Vec<IpcFile>,
    /// File and record batch of each block.
    batches: Vec<(usize, usize)>,
}

impl Blocks for IpcBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.batches.iter().map(|&(file, batch)| self.files[file].rows[batch]).collect()
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
        let (file, batch) = self.batches[block];
        format!("{} (record batch {batch})", self.files[file].stamped.path.display())
    }

    fn file(&self, block: usize) -> Option<usize> {
        Some(self.batches[block].0)
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let (file, batch) = self.batches[block];
        self.files[file].read(batch, projection)
    }
}

#[derive(Debug)]
struct IpcFile {
    stamped: Stamped,
    schema: SchemaRef,
    /// Rows of each record batch.
    rows: Vec<u64>,
}

impl IpcFile {
    fn open(path: &Path) -> Result<Self> {
        let stamped = Stamped::new(path)?;
        let mut file = stamped.open()?;
        let rows = batch_rows(&mut file, stamped.length).map_err(|why| corrupt(path, why));
        let rows = stamped.blame(rows)?;
        let schema =
            guarded(path, || Ok(FileReader::try_new(BufReader::new(file), None)?.schema()));
        let schema = stamped.blame(schema)?;
        // Without the metadata that writers add.
        let schema = Arc::new(Schema::new(schema.fields().clone()));
        Ok(Self { stamped, schema, rows })
    }

    fn must_have(&self, expected: &SchemaRef) -> Result<()> {
        if self.schema == *expected {
            return Ok(());
        }
        let (path, got) = (self.stamped.path.clone(), columns(&self.schema));
        Err(Error::SchemaDiffers { path, expected: columns(expected), got })
    }

    fn read(&self, batch: usize, projection: &[usize]) -> Result<BatchIter> {
        let file = BufReader::new(self.stamped.open()?);
        let rows = guarded(&self.stamped.path, || {
            let mut reader = FileReader::try_new(file, Some(projection.to_vec()))?;
            reader.set_index(batch)?;
            reader.next().transpose()
        });
        let rows = self.stamped.blame(rows)?;
        let schema = Arc::new(self.schema.project(projection)?);
        // `with_schema` would insist on the metadata.
        let rows = rows.map(|rows| {
            let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
            Ok(RecordBatch::try_new_with_options(schema, rows.columns().to_vec(), &options)?)
        });
        Ok(Box::new(rows.into_iter()))
    }
}

/// Rows of each record batch, out of the heads of the batches.
fn batch_rows(file: &mut Opened, length: u64) -> Result<Vec<u64>, String> {
    let mut magic = [0; 6];
    file.read_exact(&mut magic).map_err(text)?;
    if magic.starts_with(FEATHER_1) {
        return Err("it is Feather version 1; write it again as version 2".to_owned());
    }
    if magic != *MAGIC {
        return Err(format!(
            "it starts with {magic:?}, expected {MAGIC:?} (an IPC stream is another format)"
        ));
    }
    let mut tail = [0; 10];
    read_at(file, length.saturating_sub(10), &mut tail)?;
    let footer = read_footer_length(tail).map_err(text)?;
    let start = (length - 10).checked_sub(footer as u64).ok_or("its footer is cut off")?;
    let mut bytes = vec![0; footer];
    read_at(file, start, &mut bytes)?;
    let footer = root_as_footer(&bytes).map_err(text)?;
    footer.schema().ok_or("its footer has no schema")?;
    for block in footer.dictionaries().iter().flatten() {
        extent(block, start)?;
    }
    let blocks = footer.recordBatches().ok_or("its footer has no record batches")?;
    blocks.iter().map(|block| rows_of(file, block, start)).collect()
}

/// Where a message lies: it must end before `end`, since readers trust it.
fn extent(block: &Block, end: u64) -> Result<(u64, usize), String> {
    let parts = [block.offset(), i64::from(block.metaDataLength()), block.bodyLength()];
    let [start, head, body] = parts.map(|part| u64::try_from(part).unwrap_or(u64::MAX));
    let last = start.checked_add(head).and_then(|last| last.checked_add(body));
    match last {
        Some(last) if last <= end && head >= 8 => Ok((start, head as usize)),
        _ => Err("a record batch lies outside of it".to_owned()),
    }
}

fn rows_of(file: &mut Opened, block: &Block, end: u64) -> Result<u64, String> {
    let (start, head) = extent(block, end)?;
    let mut bytes = vec![0; head];
    read_at(file, start, &mut bytes)?;
    // Newer files have a marker before the length.
    let skip = if bytes.starts_with(&[0xff; 4]) { 8 } else { 4 };
    let message = root_as_message(&bytes[skip..]).map_err(text)?;
    let batch = message.header_as_record_batch().ok_or("a record batch is none")?;
    u64::try_from(batch.length()).map_err(text)
}

/// What Arrow's reader makes of a file. It checks less than its input can get wrong, and panics.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T, ArrowError>) -> Result<T> {
    // Nothing that a panic may have left half done is used again.
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|error| corrupt(path, error)),
        Err(_) => Err(corrupt(path, "its record batches contradict themselves")),
    }
}

fn read_at(file: &mut Opened, start: u64, bytes: &mut [u8]) -> Result<(), String> {
    file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(bytes)).map_err(text)
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn corrupt(path: &Path, reason: impl ToString) -> Error {
    let reason = reason.to_string();
    Error::Corrupt { path: path.to_owned(), format: "Arrow IPC", reason }
}
