//! Rows for people and for programs.

use crate::error::Result;
use arrow::json::WriterBuilder;
use arrow::json::writer::JsonArray;
use arrow::record_batch::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use serde_json::Value;

/// The rows as text, a cell a value; what is missing is `null`.
pub fn text(batch: &RecordBatch) -> Result<Vec<Vec<String>>> {
    let options = FormatOptions::new().with_null("null");
    let columns = batch.columns().iter().map(|column| ArrayFormatter::try_new(column, &options));
    let columns = columns.collect::<Result<Vec<_>, _>>()?;
    let cell = |column: &ArrayFormatter<'_>, row| Ok(column.value(row).try_to_string()?);
    let row = |row| columns.iter().map(|column| cell(column, row)).collect();
    (0..batch.num_rows()).map(row).collect()
}

/// The rows as a JSON array of objects, with all columns in each. Times are ISO 8601, bytes
/// hexadecimal, and numbers that JSON does not have are `null`, as what is missing.
pub fn json(batch: &RecordBatch) -> Result<Value> {
    let writer = WriterBuilder::new().with_explicit_nulls(true);
    let mut writer = writer.build::<_, JsonArray>(Vec::new());
    writer.write(batch)?;
    writer.finish()?;
    let bytes = writer.into_inner();
    // The writer writes nothing at all for no rows.
    if bytes.is_empty() {
        return Ok(Value::Array(Vec::new()));
    }
    Ok(serde_json::from_slice(&bytes).map_err(mobula_core::Error::layer)?)
}
