//! What databases of any kind have in common.

use crate::error::{Error, Result};
use crate::source::columns;
use crate::source::memory::MemoryTable;
use arrow::array::{Array, ArrayRef};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use arrow::util::display::array_value_to_string;
use serde::{Deserialize, Serialize};

/// What becomes of a table that is there already when a dataset is written to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IfExists {
    /// It stays as it is, and writing is an error.
    #[default]
    Fail,
    /// It keeps its rows and gets the new ones. Columns are matched by name.
    Append,
    /// It is dropped, and made again with the columns of the dataset.
    Replace,
}

/// The columns of a result as part of a description.
pub(crate) fn described(schema: SchemaRef) -> Result<MemoryTable> {
    MemoryTable::new(vec![RecordBatch::new_empty(schema)])
}

/// Refuses a result in which two columns have one name.
pub(crate) fn must_differ(schema: &Schema) -> Result<()> {
    let fields = schema.fields();
    let is_twice = |(at, name): &(usize, &String)| fields[..*at].iter().any(|f| f.name() == *name);
    match fields.iter().map(|field| field.name()).enumerate().find(is_twice) {
        Some((_, column)) => Err(Error::ColumnTwice { column: column.clone() }),
        None => Ok(()),
    }
}

/// Refuses a result whose columns are others than when the dataset was made.
pub(crate) fn must_be(
    expected: &SchemaRef,
    got: &SchemaRef,
    database: &str,
    sql: &str,
) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    let reason = format!(
        "its columns are [{}] now, they were [{}] when the dataset was made; make it again",
        columns(got),
        columns(expected)
    );
    Err(Error::DatabaseQuery {
        database: database.to_owned(),
        sql: sql.to_owned(),
        position: None,
        reason,
    })
}

/// Line and column, from 1 on, of a character in a text.
pub(crate) fn line_and_column(text: &str, characters_before: usize) -> (usize, usize) {
    let before: String = text.chars().take(characters_before).collect();
    let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count());
    (before.matches('\n').count() + 1, column + 1)
}

/// A column as another type, or else the first row that does not fit, from 0 on, and its value as text.
pub(crate) fn fitted(column: &ArrayRef, to: &DataType) -> Result<Result<ArrayRef, (u64, String)>> {
    let strict = CastOptions { safe: false, ..CastOptions::default() };
    let fits = |column: &dyn Array| cast_with_options(column, to, &strict);
    match fits(column) {
        Ok(made) => Ok(Ok(made)),
        Err(error) => {
            let row = (0..column.len()).find(|row| fits(&*column.slice(*row, 1)).is_err());
            let row = row.ok_or(error)?;
            Ok(Err((row as u64, array_value_to_string(column, row)?)))
        }
    }
}

/// A name in SQL, whatever it is made of.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_texts_count_characters() {
        assert_eq!(line_and_column("SELECT x", 7), (1, 8));
        assert_eq!(line_and_column("SELECT 'ä',\n  x", 14), (2, 3));
        assert_eq!(line_and_column("", 0), (1, 1));
    }
}
