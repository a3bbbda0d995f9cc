//! Joining columns into one feature vector.

use super::columns::{column_of, index_of, join};
use super::estimator::names;
use super::numbers::{Numbers, list, not_numeric, width};
use super::{Estimator, Preprocessor, Step, Transform};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::Float32Array;
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Joins numeric columns and lists into one `FixedSizeList<Float32>`, the feature vector. The
/// columns go, the new one comes last.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Concatenator(Vec<String>, String);

impl Concatenator {
    /// The step, which makes `output`.
    pub fn of<S: Into<String>>(
        columns: impl IntoIterator<Item = S>,
        output: impl Into<String>,
    ) -> Step {
        Self(names(columns), output.into()).into()
    }
}

#[typetag::serde]
impl Estimator for Concatenator {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let Self(columns, output) = self;
        let (columns, output) = (with_widths(dataset, columns)?, output.clone());
        Ok(Preprocessor::new(Concatenation { columns, output }))
    }
}

/// Which columns, how wide each was when fitted, and what they become.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Concatenation {
    columns: Vec<(String, usize)>,
    output: String,
}

/// The columns and how wide they are.
pub(super) fn with_widths(dataset: &Dataset, columns: &[String]) -> Result<Vec<(String, usize)>> {
    let schema = dataset.schema()?;
    let with_width = |column: &String| {
        let data_type = schema.field(index_of(&schema, column)?).data_type();
        let width = width(data_type).ok_or_else(|| not_numeric(column, data_type))?;
        Ok((column.clone(), width))
    };
    columns.iter().map(with_width).collect()
}

#[typetag::serde(name = "Concatenator")]
impl Transform for Concatenation {
    fn transform(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let parts = self
            .columns
            .iter()
            .map(|(column, width)| complete(batch, column, *width, "a batch to concatenate"))
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
        let used = self.columns.iter().map(|(column, _)| column.as_str());
        join(batch, used, &self.output, Arc::new(joined))
    }

    fn without(&self, column: &str) -> Preprocessor {
        let columns = self.columns.iter().filter(|(name, _)| name != column).cloned().collect();
        Preprocessor::new(Self { columns, output: self.output.clone() })
    }
}

/// The numbers of a column that has no missing values.
pub(super) fn complete(
    batch: &RecordBatch,
    column: &str,
    width: usize,
    place: &str,
) -> Result<Numbers> {
    let numbers = Numbers::with_width(column, column_of(batch, column)?, width)?;
    let missing = batch.num_rows() - numbers.complete().count();
    if missing > 0 {
        let (column, place) = (column.to_owned(), place.to_owned());
        return Err(Error::Nulls { column, rows: missing, place });
    }
    Ok(numbers)
}
