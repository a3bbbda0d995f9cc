//! Making values look normal.

use super::affine::{Affine, deviation};
use super::columns::{PerColumn, transform_each};
use super::estimator::{names, of_columns};
use super::minimize::minimize;
use super::numbers::Numbers;
use super::sample::Sample;
use super::{Estimator, Preprocessor};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::ArrayRef;
use serde::{Deserialize, Serialize};

/// Which family of power transforms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Power {
    /// For all numbers (Yeo and Johnson, *A New Family of Power Transformations to Improve Normality
    /// or Symmetry*, 2000).
    #[default]
    YeoJohnson,
    /// For numbers above 0 (Box and Cox, *An Analysis of Transformations*, 1964).
    BoxCox,
}

/// Transforms by the power that makes the values as normal as can be, by maximum likelihood, then
/// scales to mean 0 and standard deviation 1. `FixedSizeList` columns element by element. A
/// constant is only centred. Gives `Float32`; missing values stay missing.
///
/// Fitting keeps the columns in memory, 8 bytes a value, for a moment twice that.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PowerTransformer {
    columns: Vec<String>,
    power: Power,
}

of_columns!(PowerTransformer);

impl PowerTransformer {
    /// For these columns, by [`Power::YeoJohnson`].
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: names(columns), power: Power::YeoJohnson }
    }

    /// Another family.
    pub fn with_power(self, power: Power) -> Self {
        Self { power, ..self }
    }
}

#[typetag::serde]
impl Estimator for PowerTransformer {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let samples = self.columns.iter().zip(Sample::of(dataset, &self.columns)?);
        let fitted = samples.map(|(column, sample)| Powers::fit(self.power, column, sample));
        Ok(Preprocessor::new(fitted.collect::<Result<Vec<_>>>()?))
    }
}

/// A fitted transformer of one column: the powers, then the scaler.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Powers {
    power: Power,
    lambdas: Vec<f64>,
    scaler: Affine,
}

transform_each!("PowerTransformer", Powers);

impl Powers {
    fn fit(power: Power, column: &str, Sample(elements): Sample) -> Result<Self> {
        let column = column.to_owned();
        power.must_take(&column, elements.iter().flatten().copied())?;
        let (mut lambdas, mut offset, mut scale) = (Vec::new(), Vec::new(), Vec::new());
        for mut values in elements {
            let constant = values.iter().all(|x| *x == values[0]);
            let lambda = if constant { 1.0 } else { power.likeliest(&values) };
            values.iter_mut().for_each(|x| *x = power.apply(lambda, *x));
            let (mean, variance) = moments(&values);
            lambdas.push(lambda);
            offset.push(if constant { values[0] } else { mean });
            let count = values.len() as f64;
            scale.push(if constant { 1.0 } else { deviation(count, mean, variance) });
        }
        Ok(Self { power, lambdas, scaler: Affine { column, offset, scale } })
    }
}

impl PerColumn for Powers {
    fn column(&self) -> &str {
        &self.scaler.column
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let numbers = Numbers::with_width(self.column(), array, self.lambdas.len())?;
        self.power.must_take(self.column(), numbers.complete().flatten().copied())?;
        let Affine { offset, scale, .. } = &self.scaler;
        numbers.map(|i, x| (self.power.apply(self.lambdas[i], x) - offset[i]) / scale[i])
    }
}

impl Power {
    fn must_take(self, column: &str, mut values: impl Iterator<Item = f64>) -> Result<()> {
        match values.find(|x| self == Self::BoxCox && *x <= 0.0) {
            None => Ok(()),
            Some(value) => Err(Error::OutOfRange {
                column: column.to_owned(),
                value,
                expected: "numbers above 0, as Box-Cox takes; use Power::YeoJohnson for others",
            }),
        }
    }

    fn apply(self, lambda: f64, x: f64) -> f64 {
        match self {
            Self::BoxCox => power_of(x.ln(), lambda),
            Self::YeoJohnson if x < 0.0 => -power_of((-x).ln_1p(), 2.0 - lambda),
            Self::YeoJohnson => power_of(x.ln_1p(), lambda),
        }
    }

    /// The logarithm of the slope of the transform at `x` is this times `lambda - 1`.
    fn slope(self, x: f64) -> f64 {
        match self {
            Self::BoxCox => x.ln(),
            Self::YeoJohnson => x.abs().ln_1p().copysign(x),
        }
    }

    /// The lambda under which normal values are likeliest to become these.
    fn likeliest(self, values: &[f64]) -> f64 {
        let slopes: f64 = values.iter().map(|x| self.slope(*x)).sum();
        let mut transformed = vec![0.0; values.len()];
        let unlikely = |lambda: f64| {
            let pairs = transformed.iter_mut().zip(values);
            pairs.for_each(|(y, x)| *y = self.apply(lambda, *x));
            let (_, variance) = moments(&transformed);
            let unlikely = 0.5 * values.len() as f64 * variance.ln() - (lambda - 1.0) * slopes;
            // A variance of zero or infinity is a number that did not fit, not a good transform.
            if unlikely.is_finite() { unlikely } else { f64::INFINITY }
        };
        let (low, high) = self.bounds(values);
        minimize(unlikely, low, high)
    }

    /// Lambdas between which the variance of transformed values fits a number, as SciPy has them.
    fn bounds(self, values: &[f64]) -> (f64, f64) {
        let most = |spare: f64| {
            let slopes = values.iter().map(|x| self.slope(spare * x).abs());
            slopes.fold(0.0, f64::max).max(f64::MIN_POSITIVE)
        };
        let eps = f64::EPSILON.ln();
        let (tiny, huge) = ((f64::MIN_POSITIVE.ln() - eps) / 2.0, (f64::MAX.ln() + eps) / 2.0);
        let most = if self == Self::BoxCox { most(1.0) } else { most(20.0) };
        let (low, high) = (tiny / most, huge / most);
        let negative = |x: &f64| self == Self::YeoJohnson && *x < 0.0;
        match (values.iter().any(negative), values.iter().all(negative)) {
            (_, true) => (2.0 - high, 2.0 - low),
            (true, false) => (low.max(2.0 - high), high.min(2.0 - low)),
            (false, false) => (low, high),
        }
    }
}

/// `(x^lambda - 1) / lambda` of a logarithm of `x`; the logarithm where lambda is 0.
fn power_of(logarithm: f64, lambda: f64) -> f64 {
    let zero = lambda.abs() < f64::EPSILON;
    if zero { logarithm } else { (lambda * logarithm).exp_m1() / lambda }
}

/// Mean and variance, in two passes.
fn moments(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    (mean, values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count)
}
