//! The built-in sources, by their formats.

use crate::Dataset;
use crate::error::Result;
use crate::source::avro::Avro;
use crate::source::csv::{Csv, CsvOptions};
use crate::source::idx::Idx;
use crate::source::ipc::Ipc;
use crate::source::json::Json;
use crate::source::memory::MemoryTable;
use crate::source::npy::{Npy, Npz};
use crate::source::parquet::{Parquet, ParquetOptions};
use crate::source::range::Range;
use crate::source::text::Text;
use crate::source::tfrecord::TfRecord;
use crate::source::webdataset::WebDataset;
use crate::source::whole::{BinaryFiles, Images};
use crate::source::{partitioned, paths};
use arrow::record_batch::RecordBatch;
use std::path::Path;

/// Where datasets come from. A path or a pattern may be a URL of an object store, such as
/// `s3://bucket/data/*.parquet`.
///
/// Files may lie in folders named `column=value`, as Hive, Spark and Arrow write them: a folder that has
/// such folders is read at any depth, and what they, or the folders that a pattern leaves open, say
/// of a file are columns of its rows, behind those of the file (unless it has one of that name
/// itself). They are `Int64` if all values are whole numbers, and text otherwise; reading nothing
/// else costs no reading of the files, and files that a [`filter`](Self::filter) on them leaves out
/// are not read. All files must have the same such columns. `.npz`, images, IDX and files as they
/// are have none.
impl Dataset {
    /// Parquet files: a path, a folder, or a pattern such as `data/part-*.parquet`, which are
    /// read in alphabetical order. Errors when no file matches, when one is not Parquet, and when
    /// their columns differ.
    pub fn read_parquet(pattern: impl AsRef<str>) -> Result<Self> {
        Self::read_parquet_with(pattern, ParquetOptions::default())
    }

    /// The same of files that may differ, or be damaged in part.
    pub fn read_parquet_with(pattern: impl AsRef<str>, options: ParquetOptions) -> Result<Self> {
        partitioned::read(pattern.as_ref(), "parquet", |files| Parquet::new(files, options))
    }

    /// CSV files: a path, a folder or a pattern, gzipped or not. Types are inferred from all rows:
    /// the files are read once when they are opened, and in pieces when rows are needed.
    pub fn read_csv(pattern: impl AsRef<str>, options: CsvOptions) -> Result<Self> {
        partitioned::read(pattern.as_ref(), "csv", |files| Ok(Csv { files, options }))
    }

    /// Files of JSON lines (an object a line): a path, a folder (its `*.jsonl` files) or a pattern,
    /// gzipped or not. Columns and types are those of all lines: what a line does not have is
    /// missing, numbers widen to floats, other mixed values to text. Read as CSV files are.
    pub fn read_json(pattern: impl AsRef<str>) -> Result<Self> {
        partitioned::read(pattern.as_ref(), "jsonl", |files| Ok(Json { files }))
    }

    /// Text files: a path, a folder (its `*.txt` files) or a pattern, gzipped or not. A line is a
    /// row of the column `text`, without its end. Read as CSV files are; they must be UTF-8.
    pub fn read_text(pattern: impl AsRef<str>) -> Result<Self> {
        partitioned::read(pattern.as_ref(), "txt", |files| Ok(Text { files }))
    }

    /// Arrow IPC files: a path, a folder (its `*.arrow` files) or a pattern. Feather files (version
    /// 2) are the same. A block is a record batch.
    pub fn read_ipc(pattern: impl AsRef<str>) -> Result<Self> {
        partitioned::read(pattern.as_ref(), "arrow", |files| Ok(Ipc { files }))
    }

    /// Avro's object container files: a path, a folder (its `*.avro` files) or a pattern, not compressed
    /// or with deflate, Snappy or Zstandard. Columns are the fields of the record, by the types that
    /// Arrow has for them: a union with null is a column whose values may be missing, enums are
    /// dictionaries, other unions are unions. Blocks of the file make blocks of up to 4,096 rows.
    /// Errors when a block is cut off or does not end as it should, and when the files' columns differ.
    pub fn read_avro(pattern: impl AsRef<str>) -> Result<Self> {
        partitioned::read(pattern.as_ref(), "avro", |files| Ok(Avro { files }))
    }

    /// NumPy's `.npy` files: a path, a folder or a pattern. The first axis has the rows of the
    /// column `data`; a row of more than a number is a flat list. Numbers and booleans in C order.
    pub fn read_npy(pattern: impl AsRef<str>) -> Result<Self> {
        partitioned::read(pattern.as_ref(), "npy", |files| Ok(Npy { files }))
    }

    /// NumPy's `.npz` files: a path, a folder or a pattern. An array is a column, as in
    /// [`read_npy`](Self::read_npy); all must have as many rows. They are kept in memory.
    pub fn read_npz(pattern: impl AsRef<str>) -> Result<Self> {
        let files = paths::expand(pattern.as_ref(), "npz")?;
        Self::from_source(Npz { files })
    }

    /// Files as they are: a path, a folder (all files in it, at any depth) or a pattern. Columns:
    /// `path` (absolute) and `bytes`.
    pub fn read_binary_files(pattern: impl AsRef<str>) -> Result<Self> {
        let files = paths::expand_in(pattern.as_ref(), "**/*")?;
        Self::from_source(BinaryFiles { files })
    }

    /// PNG and JPEG images: a path, a folder (those in it, at any depth) or a pattern. Columns:
    /// `path` (absolute) and `image`, a list of `height * width * 3` bytes: red, green and blue of
    /// each pixel, row by row, resized (bilinear) to `[height, width]` whatever their shape was.
    pub fn read_images(pattern: impl AsRef<str>, [height, width]: [u32; 2]) -> Result<Self> {
        let files = paths::expand_images(pattern.as_ref())?;
        Self::from_source(Images { files, height, width })
    }

    /// TFRecord files of `tf.train.Example`: a path, a folder (its `*.tfrecord` files) or a pattern,
    /// gzipped or not. A feature is a column: bytes, 32-bit floats or 64-bit integers; a list of
    /// fixed length if all of the first 100 records have as many values, or a value if they have
    /// one. A later record that has others is an error when it is read. What a record does not
    /// have is missing.
    pub fn read_tfrecord(pattern: impl AsRef<str>) -> Result<Self> {
        partitioned::read(pattern.as_ref(), "tfrecord", |files| Ok(TfRecord { files }))
    }

    /// WebDataset shards: a tar file, a folder of them or a pattern, gzipped or not. Neighbouring
    /// members whose names are the same up to the first dot are a row: `__key__` and a column of
    /// bytes for each extension, missing where the row has none.
    pub fn read_webdataset(pattern: impl AsRef<str>) -> Result<Self> {
        partitioned::read(pattern.as_ref(), "tar", |files| Ok(WebDataset { files }))
    }

    /// A pair of IDX files as MNIST and Fashion-MNIST have them, gzipped or not. Columns: `image`
    /// (a list of `height * width` bytes) and `label` (a byte). The rows are kept in memory.
    pub fn read_idx(images: impl AsRef<Path>, labels: impl AsRef<Path>) -> Result<Self> {
        let (images, labels) =
            (paths::existing(images.as_ref())?, paths::existing(labels.as_ref())?);
        Self::from_source(Idx { images, labels })
    }

    /// Record batches of one schema. They travel with the description: for small data.
    pub fn from_batches(batches: impl IntoIterator<Item = RecordBatch>) -> Result<Self> {
        let table = MemoryTable::new(batches.into_iter().collect())?;
        Self::from_source(table)
    }

    /// The numbers from 0 up to `rows`, without it, in the column `id`.
    pub fn range(rows: u64) -> Result<Self> {
        Self::from_source(Range { rows })
    }
}
