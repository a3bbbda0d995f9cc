//! WebDataset shards: a tar file of samples, each of which is some files of one name.

use super::npy;
use super::{Sink, SinkFile};
use crate::batch_fn::BatchMap;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use arrow::json::EncoderOptions;
use arrow::json::writer::make_encoder;
use arrow::record_batch::RecordBatch;
use mobula_core::BoxError;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::Arc;
use tar::{Builder, Header};

/// The column with the names of the samples.
pub(super) const KEY: &str = "__key__";

/// Of a key that is a row's number, at least: as examples of WebDataset have it.
const KEY_DIGITS: usize = 6;

/// Members that the Python library reads as whole numbers.
const WHOLE: [&str; 7] = ["cls", "cls2", "class", "count", "index", "inx", "id"];

/// Writes WebDataset shards, `.tar`: a row is a sample, whose name is in the column `__key__`. Any
/// other column is a member, `<key>.<column>`, where it has a value.
///
/// Bytes and text are written as they are. Other values are written by what the column is called
/// behind its last dot: `npy` as an array of NumPy, of numbers and of lists of numbers; anything
/// else as JSON, which of a number is what `cls` and `txt` have. The Python library decodes `cls`,
/// `json`, `npy`, `txt` and the names of images, and leaves what is called otherwise as bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WebDatasetSink {}

impl Sink for WebDatasetSink {
    fn extension(&self) -> &str {
        "tar"
    }

    fn check(&self, schema: &SchemaRef) -> Result<()> {
        let key = schema.field_with_name(KEY);
        let key = key.map_err(|_| Error::no_such_column(KEY, schema))?;
        if !is_text(key.data_type()) {
            return Err(unfit(key, "text, to name samples", ""));
        }
        if schema.fields().len() == 1 {
            return Err(Error::InvalidOption {
                option: "the columns of a sample",
                expected: format!("one at least beside {KEY}"),
                got: "none".to_owned(),
            });
        }
        members(schema).try_for_each(|(_, field)| Form::of(field).map(drop))
    }

    fn begin(&self, file: File, schema: &SchemaRef) -> Result<Box<dyn SinkFile>> {
        let (key, _) =
            schema.column_with_name(KEY).ok_or_else(|| Error::no_such_column(KEY, schema))?;
        let form = |(at, field): (usize, &FieldRef)| Ok((at, field.clone(), Form::of(field)?));
        let columns = members(schema).map(form).collect::<Result<_>>()?;
        let tar = Builder::new(BufWriter::new(file));
        Ok(Box::new(Shard { tar, key, columns, last: String::new() }))
    }
}

/// The columns that are members, and where they are.
fn members(schema: &SchemaRef) -> impl Iterator<Item = (usize, &FieldRef)> {
    schema.fields().iter().enumerate().filter(|(_, field)| field.name() != KEY)
}

/// How the values of a column are written.
#[derive(Clone, Copy, Debug)]
enum Form {
    Bytes,
    Npy,
    Json,
}

impl Form {
    fn of(field: &Field) -> Result<Self> {
        let (name, of) = (field.name(), field.data_type());
        if name.is_empty() || name.contains(['/', '\0']) {
            return Err(Error::InvalidOption {
                option: "a column's name",
                expected: "one that a file's name can end in".to_owned(),
                got: format!("{name:?}"),
            });
        }
        let ending = name.rsplit('.').next().unwrap_or(name).to_lowercase();
        let is_plain = of.is_integer() || of.is_floating() || *of == DataType::Boolean;
        match ending.as_str() {
            _ if is_bytes(of) => Ok(Self::Bytes),
            "npy" if npy::holds(of) => Ok(Self::Npy),
            "npy" => {
                Err(unfit(field, "numbers, or lists of them of one shape, to write an array", ""))
            }
            _ if is_text(of) => Ok(Self::Bytes),
            whole if WHOLE.contains(&whole) && !of.is_integer() => Err(unfit(
                field,
                "whole numbers, as its name says",
                "; give it a name that ends in json",
            )),
            _ if is_plain || of.is_nested() => Ok(Self::Json),
            _ => Err(unfit(
                field,
                "bytes, text, numbers, booleans, or lists and structs of them",
                "; make it text with CAST(... AS VARCHAR)",
            )),
        }
    }

    /// The file of each row; none where it has no value.
    fn files(self, field: &FieldRef, column: &ArrayRef) -> Result<Vec<Option<Vec<u8>>>> {
        match self {
            Self::Bytes => {
                let bytes = cast(column, &DataType::LargeBinary)?;
                Ok(bytes.as_binary::<i64>().iter().map(|value| value.map(<[u8]>::to_vec)).collect())
            }
            Self::Npy => npy::files(field.name(), column),
            Self::Json => json(field, column),
        }
    }
}

fn is_text(of: &DataType) -> bool {
    match of {
        DataType::Dictionary(_, values) => is_text(values),
        _ => matches!(of, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View),
    }
}

fn is_bytes(of: &DataType) -> bool {
    use DataType::{Binary, BinaryView, FixedSizeBinary, LargeBinary};
    matches!(of, Binary | LargeBinary | BinaryView | FixedSizeBinary(_))
}

fn unfit(field: &Field, expected: &'static str, hint: &'static str) -> Error {
    let (column, got) = (field.name().clone(), field.data_type().to_string());
    Error::ColumnType { column, expected, got, hint }
}

fn json(field: &FieldRef, column: &ArrayRef) -> Result<Vec<Option<Vec<u8>>>> {
    let options = EncoderOptions::default().with_explicit_nulls(true);
    let mut encoder = make_encoder(field, column, &options)?;
    let file = |row| {
        (!column.is_null(row)).then(|| {
            let mut text = Vec::new();
            encoder.encode(row, &mut text);
            text
        })
    };
    Ok((0..column.len()).map(file).collect())
}

/// Names rows that have none by where they are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RowKeys {
    /// Rows before each block, and all.
    starts: Vec<u64>,
}

impl RowKeys {
    pub(super) fn new(rows_of_blocks: &[u64]) -> Self {
        let mut starts = vec![0];
        for rows in rows_of_blocks {
            starts.push(starts.last().unwrap_or(&0) + rows);
        }
        Self { starts }
    }
}

impl BatchMap for RowKeys {
    fn columns(&self, input: &SchemaRef) -> Result<SchemaRef> {
        let key = Arc::new(Field::new(KEY, DataType::Utf8, false));
        let fields = input.fields().iter().cloned().chain([key]).collect::<Vec<_>>();
        Ok(Arc::new(Schema::new(fields)))
    }

    fn map(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        self.map_at(batch, 0, 0)
    }

    fn map_at(&self, batch: &RecordBatch, block: usize, row: u64) -> Result<RecordBatch> {
        let all = self.starts.last().copied().unwrap_or_default();
        let digits = all.saturating_sub(1).to_string().len().max(KEY_DIGITS);
        let first = self.starts[block] + row;
        let rows = first..first + batch.num_rows() as u64;
        let keys = StringArray::from_iter_values(rows.map(|row| format!("{row:0digits$}")));
        let columns = batch.columns().iter().cloned().chain([Arc::new(keys) as ArrayRef]).collect();
        Ok(RecordBatch::try_new(self.columns(&batch.schema())?, columns)?)
    }
}

struct Shard {
    tar: Builder<BufWriter<File>>,
    /// Where the keys are.
    key: usize,
    columns: Vec<(usize, FieldRef, Form)>,
    /// The key of the last sample.
    last: String,
}

impl SinkFile for Shard {
    fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let keys = cast(batch.column(self.key), &DataType::LargeUtf8)?;
        let files =
            |(at, field, form): &(usize, FieldRef, Form)| form.files(field, batch.column(*at));
        let files = self.columns.iter().map(files).collect::<Result<Vec<_>>>()?;
        for (row, key) in keys.as_string::<i64>().iter().enumerate() {
            let key = key.unwrap_or_default();
            self.begin_sample(key)?;
            let members: Vec<_> = self.columns.iter().zip(&files).collect();
            let mut is_empty = true;
            for ((_, field, _), files) in members {
                let Some(bytes) = &files[row] else { continue };
                append(&mut self.tar, &format!("{key}.{}", field.name()), bytes)?;
                is_empty = false;
            }
            if is_empty {
                return Err(refused(
                    key,
                    "it has no value in any column, so no reader would see it",
                ));
            }
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.tar.into_inner().and_then(|mut file| file.flush()).map_err(failed)
    }
}

impl Shard {
    /// Readers take neighbours of one key for one sample.
    fn begin_sample(&mut self, key: &str) -> Result<()> {
        let (folders, name) = key.rsplit_once('/').unwrap_or(("", key));
        let is_path = !key.starts_with('/') && !folders.split('/').any(|part| part == "..");
        if name.is_empty() || name.contains('.') || key.contains('\0') || !is_path {
            let expected = "a key is a relative path whose last part has no dot: readers take what \
                            is behind it for the name of a column";
            return Err(refused(key, expected));
        }
        if self.last == key {
            return Err(refused(key, "the sample in front of it has the same key"));
        }
        key.clone_into(&mut self.last);
        Ok(())
    }
}

fn append(tar: &mut Builder<BufWriter<File>>, name: &str, bytes: &[u8]) -> Result<()> {
    let mut head = Header::new_gnu();
    head.set_size(bytes.len() as u64);
    head.set_mode(0o644);
    tar.append_data(&mut head, name, bytes).map_err(failed)
}

fn refused(key: &str, reason: &'static str) -> Error {
    Error::Sample { key: key.to_owned(), reason }
}

fn failed(error: std::io::Error) -> Error {
    Error::Engine { action: "write rows", source: BoxError::from(error) }
}
