//! Where rows go: folders of files, whole or not there.

mod folder;
mod formats;
mod npy;
mod part;
mod partition;
mod remote;
mod webdataset;

pub use formats::{CsvSink, IpcSink, JsonSink, ParquetCompression, ParquetSink};
pub(crate) use webdataset::RowKeys;
pub use webdataset::WebDatasetSink;

use crate::Dataset;
use crate::dataset::Op;
use crate::error::{Error, Result};
use crate::plan::Compiled;
use crate::remote::is_url;
use crate::runtime::{block_on, joined, threads};
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use folder::NewFolder;
use futures::{FutureExt, StreamExt, stream};
use part::{Part, PartWriter, WrittenPart, parts};
use partition::Partitioning;
use remote::RemoteFolder;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Says of a folder that it may be replaced, since it was written and not typed.
pub(crate) const LIST: &str = "_written.json";

/// Rows of a file, unless told otherwise.
const FILE_ROWS: u64 = 1 << 20;

/// Blocks of a file that are read at the same time.
const BLOCKS_AHEAD: usize = 2;

/// A format that [`Dataset::write`] writes files of. Implement it, and [`SinkFile`], for a format
/// that Mobula does not write itself.
pub trait Sink: Debug + Send + Sync {
    /// The extension of the files' names, such as `parquet`.
    fn extension(&self) -> &str;

    /// Refuses columns that the format cannot hold, before anything is written. Default: it can
    /// hold all.
    fn check(&self, _schema: &SchemaRef) -> Result<()> {
        Ok(())
    }

    /// Begins a file, in which rows of these columns will be.
    fn begin(&self, file: File, schema: &SchemaRef) -> Result<Box<dyn SinkFile>>;
}

/// A file that is being written.
pub trait SinkFile: Send {
    /// Appends rows.
    fn write(&mut self, batch: &RecordBatch) -> Result<()>;

    /// Ends the file.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// How [`Dataset::write`] and its relatives write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WriteOptions {
    /// The most rows of a file (default: 1,048,576). Files hold whole blocks where these fit.
    pub rows_per_file: u64,
    /// Whether a folder that was written before is replaced (default: no, it is an error).
    pub overwrite: bool,
    /// The columns whose values name the folders that files lie in, the outermost first (default:
    /// none, all files lie in one folder).
    pub partition_by: Vec<String>,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self { rows_per_file: FILE_ROWS, overwrite: false, partition_by: Vec::new() }
    }
}

impl WriteOptions {
    /// Sets the most rows of a file.
    pub fn with_rows_per_file(self, rows_per_file: u64) -> Self {
        Self { rows_per_file, ..self }
    }

    /// Says whether a folder that was written before is replaced.
    pub fn with_overwrite(self, overwrite: bool) -> Self {
        Self { overwrite, ..self }
    }

    /// Sets the columns whose values name folders: `["year", "city"]` makes files such as
    /// `year=2024/city=Oslo/part-00000.parquet`, which do not have these columns. Values are
    /// percent-encoded, and a missing one is `__HIVE_DEFAULT_PARTITION__`, as Hive and Spark have it.
    ///
    /// They must be whole numbers, text, booleans or days, and leave a column for the files. Rows are
    /// sorted by them first, as [`Dataset::sort`] does it: so there are few files, of which few are
    /// open, and those of a folder have its rows in the order of the dataset.
    pub fn with_partition_by<S: Into<String>>(self, columns: impl IntoIterator<Item = S>) -> Self {
        Self { partition_by: columns.into_iter().map(Into::into).collect(), ..self }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// The files, in the order of the rows; where there are folders by values, in the order of these.
    pub files: Vec<WrittenFile>,
}

impl Written {
    /// Rows of all files.
    pub fn rows(&self) -> u64 {
        self.files.iter().map(|file| file.rows).sum()
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenFile {
    /// Its name in the folder, behind those of the folders that it lies in there.
    pub name: PathBuf,
    /// Its rows.
    pub rows: u64,
    /// Its length.
    pub bytes: u64,
}

/// What writes rows: `part-00000.parquet` and so on in a folder, in the order of the rows, and a
/// list of them, `_written.json`.
///
/// The folder is whole or not there: files are written into a hidden one beside it, which gets the
/// folder's name at the end. Several blocks are written at once, and no more than these are in
/// memory. A dataset without rows is one file without rows, that has all columns.
///
/// A folder may be a URL of an object store, such as `s3://bucket/folder`. There is no renaming there: files
/// are sent as they are made, under names that are new, and are data from the moment on in which
/// `_written.json` lists them, to Mobula; other programs see them as they come. What was replaced is
/// removed then.
impl Dataset {
    /// Writes files of the format that `sink` knows.
    pub fn write(
        &self,
        folder: impl AsRef<Path>,
        sink: impl Sink + 'static,
        options: WriteOptions,
    ) -> Result<Written> {
        if options.rows_per_file == 0 {
            let expected = "at least 1".to_owned();
            let option = "rows_per_file";
            return Err(Error::InvalidOption { option, expected, got: "0".to_owned() });
        }
        let partitioning = Partitioning::new(&self.schema()?, &options.partition_by)?;
        sink.check(partitioning.schema_of_files())?;
        let new = New::begin(folder.as_ref(), options.overwrite)?;
        let compiled = match partitioning.order() {
            None => self.compile()?,
            Some(columns) => self.sort(columns)?.compile()?,
        };
        let sink: Arc<dyn Sink> = Arc::new(sink);
        let to = Target {
            folder: new.here().into(),
            remote: new.remote(),
            sink: sink.clone(),
            partitioning: Partitioning::new(&compiled.schema(), &options.partition_by)?,
            most: options.rows_per_file,
        };
        let parts = write_parts(compiled, Arc::new(to))?;
        new.commit(sink.extension(), &parts)
    }

    /// Writes Parquet files with the default [`ParquetSink`]: ZSTD, row groups of 8192 rows.
    pub fn write_parquet(
        &self,
        folder: impl AsRef<Path>,
        options: WriteOptions,
    ) -> Result<Written> {
        self.write(folder, ParquetSink::default(), options)
    }

    /// Writes CSV files with a header; missing values are empty.
    pub fn write_csv(&self, folder: impl AsRef<Path>, options: WriteOptions) -> Result<Written> {
        self.write(folder, CsvSink::default(), options)
    }

    /// Writes files of JSON lines, `.jsonl`; missing values are `null`.
    pub fn write_json(&self, folder: impl AsRef<Path>, options: WriteOptions) -> Result<Written> {
        self.write(folder, JsonSink::default(), options)
    }

    /// Writes Arrow IPC files, `.arrow`, not compressed.
    pub fn write_ipc(&self, folder: impl AsRef<Path>, options: WriteOptions) -> Result<Written> {
        self.write(folder, IpcSink::default(), options)
    }

    /// Writes WebDataset shards, `.tar`, as [`WebDatasetSink`] does. A row without a column `__key__`
    /// is named by its position, such as `000042`; this counts the rows first, which computes what is
    /// done to them where that drops or adds some.
    ///
    /// Errors for columns that have no form, for keys that are no names of files or are those of the
    /// row before, and for rows without a value.
    pub fn write_webdataset(
        &self,
        folder: impl AsRef<Path>,
        options: WriteOptions,
    ) -> Result<Written> {
        if self.schema()?.index_of(webdataset::KEY).is_ok() {
            return self.write(folder, WebDatasetSink::default(), options);
        }
        let keys = RowKeys::new(&self.count_blocks()?);
        self.with_op(Op::RowKeys(keys))?.write(folder, WebDatasetSink::default(), options)
    }
}

/// A folder that is being written, here or in an object store.
enum New {
    Here(NewFolder),
    Remote(Arc<RemoteFolder>),
}

impl New {
    fn begin(folder: &Path, overwrite: bool) -> Result<Self> {
        Ok(match is_url(folder) {
            true => Self::Remote(Arc::new(RemoteFolder::begin(folder, overwrite)?)),
            false => Self::Here(NewFolder::begin(folder, overwrite)?),
        })
    }

    /// Where files are written.
    fn here(&self) -> &Path {
        match self {
            Self::Here(folder) => folder.path(),
            Self::Remote(folder) => folder.here(),
        }
    }

    fn remote(&self) -> Option<Arc<RemoteFolder>> {
        if let Self::Remote(folder) = self { Some(folder.clone()) } else { None }
    }

    fn commit(self, extension: &str, parts: &[WrittenPart]) -> Result<Written> {
        match self {
            Self::Here(folder) => folder.commit(extension, parts),
            Self::Remote(folder) => folder.commit(parts),
        }
    }
}

/// Where parts are written, and how.
#[derive(Debug)]
struct Target {
    folder: PathBuf,
    /// Where they are sent, if not left there.
    remote: Option<Arc<RemoteFolder>>,
    sink: Arc<dyn Sink>,
    partitioning: Partitioning,
    /// Rows of a file.
    most: u64,
}

/// Writes all rows; gives the files that were made, in order.
fn write_parts(compiled: Compiled, to: Arc<Target>) -> Result<Vec<WrittenPart>> {
    let rows: Vec<_> = compiled.source().blocks().iter().map(|block| block.rows).collect();
    block_on(async move {
        let failed = Arc::new(AtomicBool::new(false));
        let write = |part: Part| {
            let writer = PartWriter::new(to.clone(), part.number);
            let work = write_part(compiled.clone(), part, writer, failed.clone());
            tokio::spawn(work).map(joined)
        };
        // To the end, whatever fails: nobody may still write when the folder is removed.
        let written = stream::iter(parts(&rows, to.most)).map(write).buffered(threads());
        let written = written.collect::<Vec<_>>().await;
        let mut files = written.into_iter().collect::<Result<Vec<_>>>()?.concat();
        if files.is_empty() {
            files = PartWriter::new(to, rows.len()).finish_empty()?;
        }
        Ok(files)
    })
}

/// Writes a part, unless another one has `failed`.
async fn write_part(
    compiled: Compiled,
    part: Part,
    mut writer: PartWriter,
    failed: Arc<AtomicBool>,
) -> Result<Vec<WrittenPart>> {
    let read = |block| {
        let compiled = compiled.clone();
        tokio::spawn(async move { compiled.execute(block).await }).map(joined)
    };
    let mut blocks = stream::iter(part.blocks).map(read).buffered(BLOCKS_AHEAD);
    while let Some(batches) = blocks.next().await {
        if failed.load(Ordering::Relaxed) {
            break;
        }
        let written = batches.and_then(|b| b.iter().try_for_each(|batch| writer.write(batch)));
        written.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
    }
    writer.finish().inspect_err(|_| failed.store(true, Ordering::Relaxed))
}
