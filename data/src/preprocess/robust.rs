//! Scaling by median and quantiles.

use super::affine::Affine;
use super::estimator::{names, of_columns};
use super::sample::{Sample, linear_quantile, sort};
use super::{Estimator, Preprocessor};
use crate::Dataset;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Takes the median away and divides by the range between two quantiles, 25 % and 75 % by default:
/// outliers do not count. Otherwise as [`StandardScaler`](crate::StandardScaler).
///
/// The quantiles are exact: fitting keeps the columns in memory, 8 bytes a value, for a
/// moment twice that.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RobustScaler {
    columns: Vec<String>,
    quantile_range: (f64, f64),
}

of_columns!(RobustScaler);

impl RobustScaler {
    /// For these columns.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: names(columns), quantile_range: (25.0, 75.0) }
    }

    /// Other quantiles, in percent.
    pub fn with_quantile_range(self, low: f64, high: f64) -> Self {
        Self { quantile_range: (low, high), ..self }
    }
}

#[typetag::serde]
impl Estimator for RobustScaler {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let (low, high) = self.quantile_range;
        if !(0.0 <= low && low < high && high <= 100.0) {
            return Err(Error::InvalidOption {
                option: "quantile_range",
                expected: "two percentages from 0 to 100, the lower one first".to_owned(),
                got: format!("{low} to {high}"),
            });
        }
        let samples = self.columns.iter().zip(Sample::of(dataset, &self.columns)?);
        let scalers = samples.map(|(column, sample)| scaler(column, sample, low, high));
        Ok(Preprocessor::new(scalers.collect::<Vec<_>>()))
    }
}

fn scaler(column: &str, Sample(elements): Sample, low: f64, high: f64) -> Affine {
    let center_and_scale = |mut values: Vec<f64>| {
        sort(&mut values);
        let quantile = |percent: f64| linear_quantile(&values, percent / 100.0);
        (quantile(50.0), or_one(quantile(high) - quantile(low)))
    };
    let (offset, scale) = elements.into_iter().map(center_and_scale).unzip();
    Affine { column: column.to_owned(), offset, scale }
}

/// What is no more than rounding is no spread to divide by, as in scikit-learn.
pub(super) fn or_one(spread: f64) -> f64 {
    if spread < 10.0 * f64::EPSILON { 1.0 } else { spread }
}
