//! CSV files, read whole when the dataset is opened.

use super::memory::{MemorySource, columns};
use crate::error::{Error, Result};
use arrow::csv::ReaderBuilder;
use arrow::csv::reader::Format;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use mobula_core::error::AtPath;
use regex::Regex;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How to read CSV.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CsvOptions {
    /// Whether the first line names the columns (default: yes; otherwise `column_1`, …).
    pub has_header: bool,
    /// The byte between two values (default: `,`).
    pub delimiter: u8,
    /// Values that mean "missing" (default: the empty one and `NA`).
    pub null_values: Vec<String>,
}

impl Default for CsvOptions {
    fn default() -> Self {
        let null_values = vec![String::new(), "NA".to_owned()];
        Self { has_header: true, delimiter: b',', null_values }
    }
}

impl CsvOptions {
    /// Says whether the first line names the columns.
    pub fn with_header(self, has_header: bool) -> Self {
        Self { has_header, ..self }
    }

    /// Sets the byte between two values, such as `b';'`.
    pub fn with_delimiter(self, delimiter: u8) -> Self {
        Self { delimiter, ..self }
    }

    /// Sets the values that mean "missing".
    pub fn with_null_values<S: Into<String>>(self, values: impl IntoIterator<Item = S>) -> Self {
        Self { null_values: values.into_iter().map(Into::into).collect(), ..self }
    }

    fn format(&self) -> Result<Format> {
        let values: Vec<String> = self.null_values.iter().map(|v| regex::escape(v)).collect();
        let nulls = Regex::new(&format!("^({})$", values.join("|")))
            .map_err(|error| Error::Internal(error.to_string()))?;
        let format = Format::default().with_header(self.has_header);
        Ok(format.with_delimiter(self.delimiter).with_null_regex(nulls))
    }
}

/// Reads all files, in order, with the columns' types inferred from all rows of all files.
pub(crate) fn read(files: &[PathBuf], options: &CsvOptions) -> Result<MemorySource> {
    let format = options.format()?;
    let mut schema: Option<Schema> = None;
    for file in files {
        let found = infer(file, &format)?;
        schema = Some(match schema {
            None => found,
            Some(known) => widen(&known, &found, file)?,
        });
    }
    let schema = Arc::new(schema.ok_or(Error::Empty { after: "" })?);
    let mut batches = Vec::new();
    for file in files {
        batches.extend(read_file(file, &schema, &format)?);
    }
    MemorySource::from_whole(schema, batches)
}

fn infer(path: &Path, format: &Format) -> Result<Schema> {
    let file = File::open(path).at("open", path)?;
    let (schema, _) = format.infer_schema(file, None).map_err(corrupt(path))?;
    Ok(schema)
}

fn read_file(path: &Path, schema: &SchemaRef, format: &Format) -> Result<Vec<RecordBatch>> {
    let file = File::open(path).at("open", path)?;
    let builder = ReaderBuilder::new(schema.clone()).with_format(format.clone());
    let reader = builder.build(file).map_err(corrupt(path))?;
    reader.collect::<Result<_, _>>().map_err(corrupt(path))
}

/// The types that can hold the values of both.
fn widen(known: &Schema, found: &Schema, path: &Path) -> Result<Schema> {
    let names =
        |schema: &Schema| schema.fields().iter().map(|f| f.name().clone()).collect::<Vec<_>>();
    if names(known) != names(found) {
        let text = |schema: &Schema| columns(&Arc::new(schema.clone()));
        let (expected, got) = (text(known), text(found));
        return Err(Error::SchemaDiffers { path: path.to_owned(), expected, got });
    }
    let fields = known.fields().iter().zip(found.fields());
    let both = |(a, b): (&Arc<Field>, &Arc<Field>)| {
        Field::new(a.name(), wider(a.data_type(), b.data_type()), true)
    };
    Ok(Schema::new(fields.map(both).collect::<Vec<_>>()))
}

fn wider(a: &DataType, b: &DataType) -> DataType {
    use DataType::{Float64, Int64, Null, Utf8};
    match (a, b) {
        (a, b) if a == b => a.clone(),
        (Null, other) | (other, Null) => other.clone(),
        (Int64, Float64) | (Float64, Int64) => Float64,
        _ => Utf8,
    }
}

fn corrupt(path: &Path) -> impl Fn(ArrowError) -> Error + '_ {
    move |error| Error::Corrupt { path: path.to_owned(), format: "CSV", reason: error.to_string() }
}
