//! Scalers: `(x - offset) / scale`, element by element.

use super::columns::{PerColumn, transform_each};
use super::estimator::{names, of_columns};
use super::numbers::Numbers;
use super::robust::or_one;
use super::statistic::{Statistic, compute};
use super::{Estimator, Preprocessor};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::ArrayRef;
use serde::{Deserialize, Serialize};

/// Scales to mean 0 and standard deviation 1 (of the population): numeric columns as a whole,
/// `FixedSizeList` columns element by element. A constant is only centred. Gives `Float32`;
/// missing values stay missing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StandardScaler(Vec<String>);

of_columns!(StandardScaler);

impl StandardScaler {
    /// For these columns.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self(names(columns))
    }
}

#[typetag::serde]
impl Estimator for StandardScaler {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        Ok(Preprocessor::new(standard(dataset, &self.0)?))
    }
}

/// Scales to the range 0 to 1, by the minimum and the maximum; otherwise as [`StandardScaler`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MinMaxScaler(Vec<String>);

of_columns!(MinMaxScaler);

impl MinMaxScaler {
    /// For these columns.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self(names(columns))
    }
}

#[typetag::serde]
impl Estimator for MinMaxScaler {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        Ok(Preprocessor::new(min_max(dataset, &self.0)?))
    }
}

/// A fitted scaler of one column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Affine {
    pub(super) column: String,
    pub(super) offset: Vec<f64>,
    pub(super) scale: Vec<f64>,
}

transform_each!("Affine", Affine);

impl PerColumn for Affine {
    fn column(&self) -> &str {
        &self.column
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let numbers = Numbers::with_width(&self.column, array, self.offset.len())?;
        numbers.map(|i, x| (x - self.offset[i]) / self.scale[i])
    }
}

fn standard(dataset: &Dataset, columns: &[String]) -> Result<Vec<Affine>> {
    let moments: Vec<Moments> = compute(dataset, columns)?;
    let fit = |(column, moments): (&String, Moments)| {
        must_have_values(column, moments.count, moments.mean.iter().chain(&moments.squares))?;
        let scale = moments.mean.iter().zip(&moments.squares);
        let scale =
            scale.map(|(mean, squares)| deviation(moments.count, *mean, squares / moments.count));
        let scale = scale.collect();
        Ok(Affine { column: column.clone(), offset: moments.mean, scale })
    };
    columns.iter().zip(moments).map(fit).collect()
}

fn min_max(dataset: &Dataset, columns: &[String]) -> Result<Vec<Affine>> {
    let ranges: Vec<Range> = compute(dataset, columns)?;
    let fit = |(column, range): (&String, Range)| {
        must_have_values(column, range.count, range.least.iter().chain(&range.most))?;
        let scale = range.least.iter().zip(&range.most).map(|(a, b)| or_one(b - a)).collect();
        Ok(Affine { column: column.clone(), offset: range.least, scale })
    };
    columns.iter().zip(ranges).map(fit).collect()
}

/// What to divide by: 1 where rounding alone could make the variance, as of a constant
/// (scikit-learn's bound: Chan, Golub and LeVeque 1983).
pub(super) fn deviation(count: f64, mean: f64, variance: f64) -> f64 {
    let rounding = count * f64::EPSILON * variance + (count * mean * f64::EPSILON).powi(2);
    if variance <= rounding { 1.0 } else { variance.sqrt() }
}

pub(super) fn must_have_values<'a>(
    column: &str,
    count: f64,
    mut values: impl Iterator<Item = &'a f64>,
) -> Result<()> {
    let reason = match (count > 0.0, values.all(|v| v.is_finite())) {
        (true, true) => return Ok(()),
        (false, _) => "it has no values",
        (true, false) => "it has values that are infinite or not a number",
    };
    Err(Error::CannotFit { column: column.to_owned(), reason: reason.to_owned() })
}

/// Count, mean and sum of squared deviations. Rows with a missing value do not count.
#[derive(Clone, Default)]
pub(super) struct Moments {
    pub(super) count: f64,
    pub(super) mean: Vec<f64>,
    squares: Vec<f64>,
}

impl Statistic for Moments {
    /// Two passes over a batch: no cancellation.
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        let numbers = Numbers::of(column, array)?;
        let (mut mean, mut squares) = (vec![0.0; numbers.width], vec![0.0; numbers.width]);
        let mut count = 0.0;
        for row in numbers.complete() {
            count += 1.0;
            mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        if count == 0.0 {
            return Ok(());
        }
        mean.iter_mut().for_each(|sum| *sum /= count);
        for row in numbers.complete() {
            let deviations = row.iter().zip(&mean).map(|(x, m)| x - m);
            squares.iter_mut().zip(deviations).for_each(|(sum, d)| *sum += d * d);
        }
        self.merge(Self { count, mean, squares });
        Ok(())
    }

    /// Chan, Golub and LeVeque 1979.
    fn merge(&mut self, later: Self) {
        if self.count == 0.0 {
            *self = later;
            return;
        }
        if later.count == 0.0 {
            return;
        }
        let count = self.count + later.count;
        for i in 0..self.mean.len() {
            let delta = later.mean[i] - self.mean[i];
            self.mean[i] += delta * later.count / count;
            self.squares[i] += later.squares[i] + delta * delta * self.count * later.count / count;
        }
        self.count = count;
    }
}

#[derive(Clone, Default)]
struct Range {
    count: f64,
    least: Vec<f64>,
    most: Vec<f64>,
}

impl Statistic for Range {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        for row in Numbers::of(column, array)?.complete() {
            self.widen(1.0, row, row);
        }
        Ok(())
    }

    fn merge(&mut self, later: Self) {
        self.widen(later.count, &later.least, &later.most);
    }
}

impl Range {
    fn widen(&mut self, count: f64, least: &[f64], most: &[f64]) {
        if self.count == 0.0 {
            *self = Self { count, least: least.to_vec(), most: most.to_vec() };
            return;
        }
        self.count += count;
        // Not f64::min, which would pass over a NaN in silence.
        let lower = |a: &mut f64, b: f64| *a = if b < *a || b.is_nan() { b } else { *a };
        let raise = |a: &mut f64, b: f64| *a = if b > *a || b.is_nan() { b } else { *a };
        self.least.iter_mut().zip(least).for_each(|(a, b)| lower(a, *b));
        self.most.iter_mut().zip(most).for_each(|(a, b)| raise(a, *b));
    }
}
