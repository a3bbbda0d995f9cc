//! Encoders: categories as numbers.

use super::categories::{Codes, Counts, Unknown};
use super::columns::{PerColumn, transform_each};
use super::estimator::{names, of_columns};
use super::numbers::list;
use super::statistic::compute;
use super::{Estimator, Preprocessor, Step};
use crate::Dataset;
use crate::error::Result;
use arrow::array::{ArrayRef, Float32Array, UInt32Array};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Replaces a column of text, whole numbers or booleans by a `FixedSizeList<Float32>` with a 1
/// for the row's category, in the categories' order, and 0 elsewhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OneHotEncoder {
    columns: Vec<String>,
    unknown: Unknown,
}

of_columns!(OneHotEncoder);

impl OneHotEncoder {
    /// For these columns; an unknown category is an error.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: names(columns), unknown: Unknown::Error }
    }

    /// What it does with a value it does not know.
    pub fn with_unknown(self, unknown: Unknown) -> Self {
        Self { unknown, ..self }
    }
}

#[typetag::serde]
impl Estimator for OneHotEncoder {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let codes = codes(dataset, &self.columns, self.unknown)?;
        Ok(Preprocessor::new(codes.into_iter().map(OneHot).collect::<Vec<_>>()))
    }
}

/// Replaces a column of text, whole numbers or booleans by the number of its category (`UInt32`),
/// counted from 0 in the categories' order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrdinalEncoder {
    columns: Vec<String>,
    unknown: Unknown,
}

of_columns!(OrdinalEncoder);

impl OrdinalEncoder {
    /// For these columns; an unknown category is an error.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: names(columns), unknown: Unknown::Error }
    }

    /// What it does with a value it does not know.
    pub fn with_unknown(self, unknown: Unknown) -> Self {
        Self { unknown, ..self }
    }
}

#[typetag::serde]
impl Estimator for OrdinalEncoder {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let codes = codes(dataset, &self.columns, self.unknown)?;
        Ok(Preprocessor::new(codes.into_iter().map(Ordinal).collect::<Vec<_>>()))
    }
}

/// An [`OrdinalEncoder`] for the one column that is the class to predict.
#[derive(Debug)]
pub struct LabelEncoder;

impl LabelEncoder {
    /// The step, not fitted; an unknown class is an error.
    pub fn of(column: impl Into<String>) -> Step {
        OrdinalEncoder::of([column])
    }

    /// Fits it on the rows of a dataset.
    pub fn fit(dataset: &Dataset, column: impl Into<String>) -> Result<Preprocessor> {
        Self::of(column).fit(dataset)
    }
}

fn codes(dataset: &Dataset, columns: &[String], unknown: Unknown) -> Result<Vec<Codes>> {
    let counts: Vec<Counts> = compute(dataset, columns)?;
    columns.iter().zip(counts).map(|(column, counts)| Codes::new(column, counts, unknown)).collect()
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
struct OneHot(Codes);

transform_each!("OneHotEncoder", OneHot);

impl PerColumn for OneHot {
    fn column(&self) -> &str {
        &self.0.column
    }

    fn classes(&self) -> Option<Vec<String>> {
        Some(self.0.names())
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let width = self.0.len();
        let mut values = vec![0.0; array.len() * width];
        self.0.encode(array, |row, code| {
            if let Some(code) = code {
                values[row * width + code] = 1.0;
            }
        })?;
        Ok(Arc::new(list(Float32Array::from(values), width, None)?))
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
struct Ordinal(Codes);

transform_each!("OrdinalEncoder", Ordinal);

impl PerColumn for Ordinal {
    fn column(&self) -> &str {
        &self.0.column
    }

    fn classes(&self) -> Option<Vec<String>> {
        Some(self.0.names())
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let (unknown, mut codes) = (self.0.len(), Vec::with_capacity(array.len()));
        self.0.encode(array, |_, code| codes.push(code.unwrap_or(unknown) as u32))?;
        Ok(Arc::new(UInt32Array::from(codes)))
    }
}
