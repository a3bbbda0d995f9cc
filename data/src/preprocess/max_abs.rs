//! Scaling by the largest absolute value.

use super::affine::{Affine, must_have_values};
use super::estimator::{names, of_columns};
use super::numbers::Numbers;
use super::robust::or_one;
use super::statistic::{Statistic, compute};
use super::{Estimator, Preprocessor};
use crate::Dataset;
use crate::error::Result;
use arrow::array::ArrayRef;
use serde::{Deserialize, Serialize};

/// Scales to the range -1 to 1 by the largest absolute value, so that zeros stay zeros; otherwise
/// as [`StandardScaler`](crate::StandardScaler).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MaxAbsScaler(Vec<String>);

of_columns!(MaxAbsScaler);

impl MaxAbsScaler {
    /// For these columns.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self(names(columns))
    }
}

#[typetag::serde]
impl Estimator for MaxAbsScaler {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let most: Vec<MaxAbs> = compute(dataset, &self.0)?;
        let scaler = |(column, most): (&String, MaxAbs)| {
            must_have_values(column, most.count, most.values.iter())?;
            let offset = vec![0.0; most.values.len()];
            let scale = most.values.into_iter().map(or_one).collect();
            Ok(Affine { column: column.clone(), offset, scale })
        };
        let columns = self.0.iter().zip(most).map(scaler).collect::<Result<Vec<_>>>()?;
        Ok(Preprocessor::new(columns))
    }
}

#[derive(Clone, Default)]
struct MaxAbs {
    count: f64,
    values: Vec<f64>,
}

impl MaxAbs {
    fn raise(&mut self, count: f64, values: &[f64]) {
        self.count += count;
        self.values.resize(self.values.len().max(values.len()), 0.0);
        // Not f64::max, which would pass over a NaN in silence.
        let raise =
            |most: &mut f64, x: f64| *most = if x > *most || x.is_nan() { x } else { *most };
        self.values.iter_mut().zip(values).for_each(|(most, x)| raise(most, x.abs()));
    }
}

impl Statistic for MaxAbs {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        for row in Numbers::of(column, array)?.complete() {
            self.raise(1.0, row);
        }
        Ok(())
    }

    fn merge(&mut self, later: Self) {
        self.raise(later.count, &later.values);
    }
}
