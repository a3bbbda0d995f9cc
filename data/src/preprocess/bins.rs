//! Numbers as the number of an interval.

use super::columns::{PerColumn, transform_each};
use super::estimator::{names, of_columns};
use super::numbers::Numbers;
use super::sample::{Sample, sort, step_quantile};
use super::{Estimator, Preprocessor};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, UInt32Array};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Where one bin ends and the next begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Strategy {
    /// Bins of equal width.
    Uniform,
    /// Bins that have as many rows each as can be.
    #[default]
    Quantile,
}

/// Replaces a number by the number of the bin that it is in (`UInt32`, from 0; what is below the
/// first bin or above the last counts as in it). Missing values stay missing. Encode the result
/// with [`OneHotEncoder`](crate::OneHotEncoder) for a vector.
///
/// Bins of quantiles that would be narrower than 1e-8 are joined, so that there may be fewer; a
/// constant has one bin. The quantiles are exact (NumPy's `averaged_inverted_cdf`): fitting keeps
/// the columns in memory, 8 bytes a value, for a moment twice that.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KBinsDiscretizer {
    columns: Vec<String>,
    bins: usize,
    strategy: Strategy,
}

of_columns!(KBinsDiscretizer);

impl KBinsDiscretizer {
    /// For these columns, into 5 bins by [`Strategy::Quantile`].
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: names(columns), bins: 5, strategy: Strategy::Quantile }
    }

    /// Another number of bins, 2 or more.
    pub fn with_bins(self, bins: usize) -> Self {
        Self { bins, ..self }
    }

    /// Other bounds.
    pub fn with_strategy(self, strategy: Strategy) -> Self {
        Self { strategy, ..self }
    }

    fn bounds(&self, mut values: Vec<f64>) -> Vec<f64> {
        sort(&mut values);
        let (least, most) = (values[0], values[values.len() - 1]);
        let edge = |i: usize| match self.strategy {
            // As NumPy's linspace, to the bit.
            Strategy::Uniform => i as f64 * ((most - least) / self.bins as f64) + least,
            Strategy::Quantile => {
                step_quantile(&values, i as f64 * (100.0 / self.bins as f64) / 100.0)
            }
        };
        let mut edges = vec![least];
        edges.extend((1..self.bins).map(edge));
        edges.push(most);
        if self.strategy == Strategy::Quantile {
            edges = apart(edges);
        }
        let inner = 1..edges.len().saturating_sub(1).max(1);
        if least == most { Vec::new() } else { edges[inner].to_vec() }
    }
}

/// Without edges that are less than 1e-8 above the one before.
fn apart(edges: Vec<f64>) -> Vec<f64> {
    let far = |i: usize| i == 0 || edges[i] - edges[i - 1] > 1e-8;
    (0..edges.len()).filter(|i| far(*i)).map(|i| edges[i]).collect()
}

#[typetag::serde]
impl Estimator for KBinsDiscretizer {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        if self.bins < 2 {
            let (option, got) = ("bins", self.bins.to_string());
            return Err(Error::InvalidOption { option, expected: "2 or more".to_owned(), got });
        }
        let samples = self.columns.iter().zip(Sample::of(dataset, &self.columns)?);
        let bins = samples.map(|(column, Sample(elements))| Bins {
            column: column.clone(),
            bounds: elements.into_iter().next().map_or_else(Vec::new, |x| self.bounds(x)),
        });
        let bins = Preprocessor::new(bins.collect::<Vec<_>>());
        // Of no rows: whether the columns are numbers, and not lists of them.
        dataset.preprocess(&bins)?;
        Ok(bins)
    }
}

/// The fitted bins of one column.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Bins {
    column: String,
    /// Each is the first value of the bin above it.
    bounds: Vec<f64>,
}

transform_each!("KBinsDiscretizer", Bins);

impl PerColumn for Bins {
    fn column(&self) -> &str {
        &self.column
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let values = Numbers::of_scalars(&self.column, array)?.values;
        if let Some(value) = values.iter().flatten().find(|x| x.is_nan()) {
            let (column, expected) = (self.column.clone(), "numbers that are in some bin");
            return Err(Error::OutOfRange { column, value, expected });
        }
        let bin = |x: &f64| self.bounds.partition_point(|bound| bound <= x) as u32;
        let bins = values.values().iter().map(bin).collect();
        Ok(Arc::new(UInt32Array::new(bins, values.nulls().cloned())))
    }
}
