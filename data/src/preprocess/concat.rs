//! Joining columns into one feature vector.

use super::index_of;
use super::numbers::{Numbers, list, not_numeric, width};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::{Array, Float32Array};
use arrow::datatypes::{Field, Schema};
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Which columns, how wide each was when fitted, and what they become.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Concatenation {
    columns: Vec<(String, usize)>,
    output: String,
}

impl Concatenation {
    pub(super) fn fit(dataset: &Dataset, columns: &[String], output: &str) -> Result<Self> {
        let schema = dataset.schema()?;
        let with_width = |column: &String| {
            let data_type = schema.field(index_of(&schema, column)?).data_type();
            let width = width(data_type).ok_or_else(|| not_numeric(column, data_type))?;
            Ok((column.clone(), width))
        };
        let columns = columns.iter().map(with_width).collect::<Result<_>>()?;
        Ok(Self { columns, output: output.to_owned() })
    }

    pub(super) fn without(&self, column: &str) -> Self {
        let columns = self.columns.iter().filter(|(name, _)| name != column).cloned().collect();
        Self { columns, output: self.output.clone() }
    }

    pub(super) fn apply(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let schema = batch.schema();
        let parts = self
            .columns
            .iter()
            .map(|(column, width)| part(batch, column, *width))
            .collect::<Result<Vec<_>>>()?;
        let width = self.columns.iter().map(|(_, width)| width).sum();
        let mut joined = Vec::with_capacity(batch.num_rows() * width);
        for row in 0..batch.num_rows() {
            for part in &parts {
                let values = &part.values.values()[row * part.width..(row + 1) * part.width];
                joined.extend(values.iter().map(|value| *value as f32));
            }
        }
        let joined = list(Float32Array::from(joined), width, None)?;

        let used = |name: &str| name == self.output || self.columns.iter().any(|(c, _)| c == name);
        let kept = (0..schema.fields().len()).filter(|i| !used(schema.field(*i).name()));
        let (mut fields, mut columns): (Vec<_>, Vec<_>) =
            kept.map(|i| (schema.fields()[i].clone(), batch.column(i).clone())).unzip();
        fields.push(Arc::new(Field::new(&self.output, joined.data_type().clone(), false)));
        columns.push(Arc::new(joined));
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
    }
}

fn part(batch: &RecordBatch, column: &str, width: usize) -> Result<Numbers> {
    let array = batch.column(index_of(&batch.schema(), column)?);
    let numbers = Numbers::of(column, array)?;
    if numbers.width != width {
        let (column, got) = (column.to_owned(), numbers.width);
        return Err(Error::Width { column, expected: width, got });
    }
    let missing = batch.num_rows() - numbers.complete().count();
    if missing > 0 {
        let (column, place) = (column.to_owned(), "a batch to concatenate".to_owned());
        return Err(Error::Nulls { column, rows: missing, place });
    }
    Ok(numbers)
}
