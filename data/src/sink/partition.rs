//! Rows by the folders that they belong into.

use crate::error::{Error, Result};
use crate::frame::quoted;
use crate::hive;
use arrow::array::{ArrayRef, AsArray};
use arrow::compute::{cast, partition};
use arrow::datatypes::{DataType, FieldRef, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// Which columns are in the names of folders, and which are in the files.
#[derive(Debug)]
pub(super) struct Partitioning {
    by: Vec<usize>,
    rest: Vec<usize>,
    schema: SchemaRef,
    /// Of `rest` alone.
    files: SchemaRef,
}

impl Partitioning {
    /// Errors for columns that there are not, that no folder can be named by, and for all of them.
    pub(super) fn new(schema: &SchemaRef, columns: &[String]) -> Result<Self> {
        let mut by = Vec::new();
        for column in columns {
            let at = schema.index_of(column).map_err(|_| Error::no_such_column(column, schema))?;
            must_name_folders(schema, at)?;
            if by.contains(&at) {
                return Err(Error::ColumnTwice { column: column.clone() });
            }
            by.push(at);
        }
        let rest: Vec<_> = (0..schema.fields().len()).filter(|at| !by.contains(at)).collect();
        if rest.is_empty() && !by.is_empty() {
            return Err(Error::InvalidOption {
                option: "partition_by",
                expected: "fewer columns than there are: files have the others".to_owned(),
                got: format!("all of them, [{}]", columns.join(", ")),
            });
        }
        let files = Arc::new(schema.project(&rest)?);
        Ok(Self { by, rest, schema: schema.clone(), files })
    }

    /// What puts the rows of a folder together, as SQL; `None` if there is one folder alone.
    pub(super) fn order(&self) -> Option<Vec<String>> {
        let names = self.by.iter().map(|at| quoted(self.schema.field(*at).name()));
        (!self.by.is_empty()).then(|| names.collect())
    }

    /// The columns of the files.
    pub(super) fn schema_of_files(&self) -> &SchemaRef {
        &self.files
    }

    /// The columns of a file that no folder has, since it is without rows: all.
    pub(super) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Neighbouring rows of the same folder, with the columns that its files have.
    pub(super) fn cut(&self, batch: &RecordBatch) -> Result<Vec<(PathBuf, RecordBatch)>> {
        if self.by.is_empty() {
            return Ok(vec![(PathBuf::new(), batch.clone())]);
        }
        let keys = batch.project(&self.by)?;
        let ranges = partition(keys.columns())?.ranges();
        let rest = batch.project(&self.rest)?;
        let piece = |rows: Range<usize>| {
            let folder = folder(&keys.slice(rows.start, 1))?;
            Ok((folder, rest.slice(rows.start, rows.len())))
        };
        ranges.into_iter().map(piece).collect()
    }
}

/// The folder of the only row of `keys`.
fn folder(keys: &RecordBatch) -> Result<PathBuf> {
    let schema = keys.schema();
    let level = |(field, column): (&FieldRef, &ArrayRef)| {
        let text = cast(column, &DataType::Utf8)?;
        let value = text.as_string::<i32>().iter().next().flatten();
        Ok(hive::folder(field.name(), value))
    };
    schema.fields().iter().zip(keys.columns()).map(level).collect()
}

/// Whole numbers, text, booleans and days have one name each.
fn must_name_folders(schema: &Schema, at: usize) -> Result<()> {
    let field = schema.field(at);
    let mut of = field.data_type();
    if let DataType::Dictionary(_, values) = of {
        of = values;
    }
    let is_text = matches!(of, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
    if is_text || of.is_integer() || matches!(of, DataType::Boolean | DataType::Date32) {
        return Ok(());
    }
    Err(Error::ColumnType {
        column: field.name().clone(),
        expected: "whole numbers, text, booleans or days, to name folders by",
        got: field.data_type().to_string(),
        hint: "; make it one of these, such as text with CAST(... AS VARCHAR)",
    })
}
