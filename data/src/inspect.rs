//! What is in a file: its columns and rows and, of Parquet, how they are stored.

use crate::Dataset;
use crate::error::{Error, Result};
use crate::source::file::Stamped;
use arrow::array::{Array, ArrayRef};
use arrow::datatypes::Field;
use arrow::record_batch::RecordBatch;
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

mod parquet;

/// A file as [`inspect`] sees it. As JSON it has these fields, and no others.
#[derive(Clone, Debug, Serialize)]
pub struct FileInfo {
    /// The file.
    pub path: PathBuf,
    /// The ending of its name, such as `parquet`.
    pub format: String,
    /// Length of the file.
    pub bytes: u64,
    /// Number of rows.
    pub rows: u64,
    /// Bytes of all rows in memory, as Arrow has them: an estimate from the first rows.
    pub memory_bytes: u64,
    /// In the order of the file.
    pub columns: Vec<ColumnInfo>,
    /// The row groups of a Parquet file; of others none.
    pub row_groups: Vec<RowGroupInfo>,
    #[serde(skip)]
    dataset: Dataset,
}

/// A column of a file. What the file does not say is `None` or empty.
#[derive(Clone, Debug, Serialize)]
pub struct ColumnInfo {
    /// Its name.
    pub name: String,
    /// Its Arrow type, such as `Int64` or `List(Utf8)`.
    #[serde(rename = "type")]
    pub data_type: String,
    /// Whether values may be missing.
    pub nullable: bool,
    /// Bytes in the file, compressed.
    pub bytes: Option<u64>,
    /// Bytes in the file before they were compressed.
    pub uncompressed_bytes: Option<u64>,
    /// Such as `SNAPPY`; several if parts differ.
    pub compression: Vec<String>,
    /// Such as `PLAIN` and `RLE_DICTIONARY`.
    pub encodings: Vec<String>,
    /// How many values are missing.
    pub nulls: Option<u64>,
    /// The least value: a number, a boolean, or text.
    pub min: Option<Value>,
    /// The greatest value.
    pub max: Option<Value>,
}

/// A row group of a Parquet file.
#[derive(Clone, Debug, Serialize)]
pub struct RowGroupInfo {
    /// Number of rows.
    pub rows: u64,
    /// Bytes in the file, compressed.
    pub bytes: u64,
    /// Bytes in the file before they were compressed.
    pub uncompressed_bytes: u64,
}

/// Looks at a file that [`Dataset::read`] knows. Of Parquet it reads the footer and the first rows; CSV
/// and JSON it reads once.
///
/// ```
/// # std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).unwrap();
/// let info = mobula_data::inspect::inspect("examples/data/digits-0.parquet")?;
/// assert_eq!((info.columns[1].name.as_str(), info.columns[1].nulls), ("label", Some(0)));
/// # Ok::<(), mobula_data::Error>(())
/// ```
pub fn inspect(path: impl AsRef<Path>) -> Result<FileInfo> {
    let path = crate::source::paths::existing(path.as_ref())?;
    let dataset = open(&path)?;
    let (schema, rows) = (dataset.schema()?, dataset.count()?);
    let format = crate::formats::ending(&path);
    let mut info = FileInfo {
        bytes: Stamped::new(&path)?.length,
        memory_bytes: memory(&dataset.head(SAMPLE_ROWS)?, rows),
        columns: schema.fields().iter().map(|field| ColumnInfo::of(field)).collect(),
        row_groups: Vec::new(),
        dataset,
        format,
        rows,
        path,
    };
    if info.format == "parquet" {
        parquet::add(&mut info)?;
    }
    Ok(info)
}

impl ColumnInfo {
    fn of(field: &Field) -> Self {
        Self {
            name: field.name().clone(),
            data_type: field.data_type().to_string(),
            nullable: field.is_nullable(),
            bytes: None,
            uncompressed_bytes: None,
            compression: Vec::new(),
            encodings: Vec::new(),
            nulls: None,
            min: None,
            max: None,
        }
    }
}

impl FileInfo {
    /// The first `rows` rows of the file.
    pub fn head(&self, rows: usize) -> Result<RecordBatch> {
        self.dataset.head(rows)
    }
}

fn open(path: &Path) -> Result<Dataset> {
    let name = path.to_str().ok_or_else(|| Error::InvalidOption {
        option: "the path",
        expected: "UTF-8".to_owned(),
        got: path.display().to_string(),
    })?;
    Dataset::read(name)
}

/// Rows that the estimate of memory comes from.
const SAMPLE_ROWS: usize = 1000;

fn memory(sample: &RecordBatch, rows: u64) -> u64 {
    let bytes = |column: &ArrayRef| {
        // Of a type without a layout of known size nothing is known.
        column.to_data().get_slice_memory_size().unwrap_or_default()
    };
    let bytes: usize = sample.columns().iter().map(bytes).sum();
    (bytes as f64 / sample.num_rows().max(1) as f64 * rows as f64).round() as u64
}
