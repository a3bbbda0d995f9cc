//! Rows of length one.

use super::columns::{index_of, retype};
use super::concat::{complete, with_widths};
use super::estimator::{names, of_columns};
use super::numbers::Numbers;
use super::robust::or_one;
use super::{Estimator, Preprocessor, Transform};
use crate::Dataset;
use crate::error::Result;
use arrow::datatypes::Schema;
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What counts as the length of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Norm {
    /// The sum of the absolute values.
    L1,
    /// The root of the sum of squares.
    #[default]
    L2,
    /// The largest absolute value.
    Max,
}

impl Norm {
    fn add(self, sum: f64, x: f64) -> f64 {
        match self {
            Self::L1 => sum + x.abs(),
            Self::L2 => sum + x * x,
            Self::Max => sum.max(x.abs()),
        }
    }

    fn of_sum(self, sum: f64) -> f64 {
        or_one(if self == Self::L2 { sum.sqrt() } else { sum })
    }
}

/// Divides the numbers of a row, in all the columns listed together, by the row's length. A row of
/// zeros stays. Gives `Float32`; a missing value is an error, since such a row has no length.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Normalizer {
    columns: Vec<String>,
    norm: Norm,
}

of_columns!(Normalizer);

impl Normalizer {
    /// For these columns, by [`Norm::L2`].
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: names(columns), norm: Norm::L2 }
    }

    /// Another length.
    pub fn with_norm(self, norm: Norm) -> Self {
        Self { norm, ..self }
    }
}

#[typetag::serde]
impl Estimator for Normalizer {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let columns = with_widths(dataset, &self.columns)?;
        Ok(Preprocessor::new(Normalization { columns, norm: self.norm }))
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Normalization {
    columns: Vec<(String, usize)>,
    norm: Norm,
}

#[typetag::serde(name = "Normalizer")]
impl Transform for Normalization {
    fn transform(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let part = |(column, width): &(String, usize)| {
            complete(batch, column, *width, "a batch to normalize")
        };
        let parts = self.columns.iter().map(part).collect::<Result<Vec<_>>>()?;
        let lengths = self.lengths(&parts, batch.num_rows());
        let schema = batch.schema_ref();
        let (mut fields, mut arrays) = (schema.fields().to_vec(), batch.columns().to_vec());
        for ((column, _), part) in self.columns.iter().zip(parts) {
            let (index, width) = (index_of(schema, column)?, part.width.max(1));
            arrays[index] = part.map_all(|i, x| x / lengths[i / width])?;
            retype(&mut fields[index], arrays[index].data_type());
        }
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?)
    }

    fn without(&self, column: &str) -> Preprocessor {
        let columns = self.columns.iter().filter(|(name, _)| name != column).cloned().collect();
        Preprocessor::new(Self { columns, norm: self.norm })
    }
}

impl Normalization {
    fn lengths(&self, parts: &[Numbers], rows: usize) -> Vec<f64> {
        let mut sums = vec![0.0; rows];
        for part in parts {
            for (sum, row) in sums.iter_mut().zip(part.values.values().chunks(part.width.max(1))) {
                *sum = row.iter().fold(*sum, |sum, x| self.norm.add(sum, *x));
            }
        }
        sums.into_iter().map(|sum| self.norm.of_sum(sum)).collect()
    }
}
