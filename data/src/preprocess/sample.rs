//! All values of a column, for what no small statistic tells: 8 bytes a value while it is fitted,
//! and twice that while blocks are put together.

use super::affine::must_have_values;
use super::numbers::Numbers;
use super::statistic::{Statistic, compute};
use crate::Dataset;
use crate::error::Result;
use arrow::array::ArrayRef;

/// The values of each element of a row, in the order of the rows. Rows with a missing value do not
/// count.
#[derive(Clone, Default)]
pub(super) struct Sample(pub(super) Vec<Vec<f64>>);

impl Sample {
    /// The values of each column, all of them finite, at least one.
    pub(super) fn of(dataset: &Dataset, columns: &[String]) -> Result<Vec<Self>> {
        let samples: Vec<Self> = compute(dataset, columns)?;
        for (column, Self(elements)) in columns.iter().zip(&samples) {
            let count = elements.first().map_or(0, Vec::len);
            must_have_values(column, count as f64, elements.iter().flatten())?;
        }
        Ok(samples)
    }
}

impl Statistic for Sample {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        for row in Numbers::of(column, array)?.complete() {
            self.0.resize_with(row.len(), Vec::new);
            self.0.iter_mut().zip(row).for_each(|(values, x)| values.push(*x));
        }
        Ok(())
    }

    fn merge(&mut self, later: Self) {
        if self.0.is_empty() {
            *self = later;
            return;
        }
        self.0.iter_mut().zip(later.0).for_each(|(values, more)| values.extend(more));
    }
}

/// Sorts finite numbers.
pub(super) fn sort(values: &mut [f64]) {
    values.sort_unstable_by(f64::total_cmp);
}

/// What a share `q` of the sorted values is below, on the line between the two nearest: NumPy's
/// `linear`.
pub(super) fn linear_quantile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

/// The value below which a share `q` of the sorted values is; the mean of two, where it is between
/// them: NumPy's `averaged_inverted_cdf`.
pub(super) fn step_quantile(sorted: &[f64], q: f64) -> f64 {
    let (place, last) = (q * sorted.len() as f64 - 1.0, sorted.len() - 1);
    let (below, above) = ((place.max(0.0) as usize).min(last), (place.floor() + 1.0) as usize);
    let above = sorted[above.min(last)];
    if place < 0.0 || place.fract() > 0.0 { above } else { (sorted[below] + above) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_as_numpy_has_them() {
        let sorted = [1.0, 2.0, 4.0, 8.0];
        let linear = [0.0, 0.25, 0.5, 0.9, 1.0].map(|q| linear_quantile(&sorted, q));
        assert_eq!(linear, [1.0, 1.75, 3.0, 6.800000000000001, 8.0]);
        let step = [0.0, 0.2, 0.25, 0.3, 0.5, 1.0].map(|q| step_quantile(&sorted, q));
        assert_eq!(step, [1.0, 1.0, 1.5, 2.0, 3.0, 8.0]);
        assert_eq!((linear_quantile(&[3.0], 0.7), step_quantile(&[3.0], 0.7)), (3.0, 3.0));
    }
}
