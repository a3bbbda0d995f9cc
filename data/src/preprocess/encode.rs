//! Encoders: categories as numbers.

use super::numbers::list;
use super::statistic::{Statistic, compute};
use super::{PerColumn, Preprocessor, Step, names};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, Float32Array, UInt32Array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// What to do with a value that was not there when the encoder was fitted, or is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unknown {
    /// An error that names the value.
    #[default]
    Error,
    /// All zeros in a one-hot code; the number after the last class in an ordinal one.
    Ignore,
}

/// Replaces a column of text, whole numbers or booleans by a `FixedSizeList<Float32>` with a 1
/// for the row's category, in the categories' order, and 0 elsewhere.
#[derive(Debug)]
pub struct OneHotEncoder;

impl OneHotEncoder {
    /// The step, not fitted; an unknown category is an error.
    pub fn of<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Step {
        Step::OneHotEncoder(names(columns), Unknown::Error)
    }

    /// Fits it on the rows of a dataset: give it the training side of a split.
    pub fn fit<S: Into<String>>(
        dataset: &Dataset,
        columns: impl IntoIterator<Item = S>,
    ) -> Result<Preprocessor> {
        Self::of(columns).fit(dataset)
    }
}

/// Replaces a column of text, whole numbers or booleans by the number of its category (`UInt32`),
/// counted from 0 in the categories' order.
#[derive(Debug)]
pub struct OrdinalEncoder;

impl OrdinalEncoder {
    /// The step, not fitted; an unknown category is an error.
    pub fn of<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Step {
        Step::OrdinalEncoder(names(columns), Unknown::Error)
    }

    /// Fits it on the rows of a dataset: give it the training side of a split.
    pub fn fit<S: Into<String>>(
        dataset: &Dataset,
        columns: impl IntoIterator<Item = S>,
    ) -> Result<Preprocessor> {
        Self::of(columns).fit(dataset)
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

impl Step {
    /// Says what an encoder does with a value it does not know. Other steps stay as they are.
    pub fn with_unknown(self, unknown: Unknown) -> Self {
        match self {
            Self::OneHotEncoder(columns, _) => Self::OneHotEncoder(columns, unknown),
            Self::OrdinalEncoder(columns, _) => Self::OrdinalEncoder(columns, unknown),
            other => other,
        }
    }
}

/// A value of a categorical column. Numbers are in the order of numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Category {
    Int(i64),
    Text(String),
}

impl fmt::Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

/// The category of every row; `None` where the value is missing.
fn categories(column: &str, array: &ArrayRef) -> Result<Vec<Option<Category>>> {
    let is_text = matches!(
        array.data_type(),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Boolean
    );
    if array.data_type().is_integer() {
        let array = cast(array, &DataType::Int64)?;
        let values = array.as_primitive::<Int64Type>().iter();
        Ok(values.map(|value| value.map(Category::Int)).collect())
    } else if is_text {
        let array = cast(array, &DataType::Utf8)?;
        let values = array.as_string::<i32>().iter();
        Ok(values.map(|value| value.map(|text| Category::Text(text.to_owned()))).collect())
    } else {
        Err(Error::ColumnType {
            column: column.to_owned(),
            expected: "text, whole numbers or booleans",
            got: array.data_type().to_string(),
            hint: "",
        })
    }
}

/// How often each category occurs.
#[derive(Default)]
pub(super) struct Counts(BTreeMap<Category, u64>);

impl Counts {
    /// The most frequent category; the first of them in order, if there are several.
    pub(super) fn mode(self) -> Option<Category> {
        let most = self.0.values().copied().max()?;
        self.0.into_iter().find(|(_, count)| *count == most).map(|(category, _)| category)
    }
}

impl Statistic for Counts {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        for category in categories(column, array)?.into_iter().flatten() {
            *self.0.entry(category).or_default() += 1;
        }
        Ok(())
    }

    fn merge(&mut self, later: Self) {
        for (category, count) in later.0 {
            *self.0.entry(category).or_default() += count;
        }
    }
}

/// A fitted encoder of one column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Codes {
    column: String,
    /// Sorted.
    categories: Vec<Category>,
    unknown: Unknown,
}

impl Codes {
    fn fit(dataset: &Dataset, columns: &[String], unknown: Unknown) -> Result<Vec<Self>> {
        let counts: Vec<Counts> = compute(dataset, columns)?;
        let codes = |(column, counts): (&String, Counts)| {
            let (column, categories) = (column.clone(), counts.0.into_keys().collect::<Vec<_>>());
            if categories.is_empty() {
                return Err(Error::CannotFit { column, reason: "it has no values".to_owned() });
            }
            Ok(Self { column, categories, unknown })
        };
        columns.iter().zip(counts).map(codes).collect()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.categories.iter().map(Category::to_string).collect()
    }

    /// The number of each row's category; `None` if it is unknown or missing, and that is allowed.
    fn encode(&self, array: &ArrayRef) -> Result<Vec<Option<usize>>> {
        if self.unknown == Unknown::Error && array.null_count() > 0 {
            let (column, rows) = (self.column.clone(), array.null_count());
            return Err(Error::Nulls { column, rows, place: "a batch to encode".to_owned() });
        }
        let values = categories(&self.column, array)?;
        values.into_iter().map(|value| value.map_or(Ok(None), |v| self.code(v))).collect()
    }

    fn code(&self, value: Category) -> Result<Option<usize>> {
        match (self.categories.binary_search(&value), self.unknown) {
            (Ok(code), _) => Ok(Some(code)),
            (Err(_), Unknown::Ignore) => Ok(None),
            (Err(_), Unknown::Error) => Err(Error::UnknownCategory {
                column: self.column.clone(),
                value: format!("{:?}", value.to_string()),
                known: self.names(),
            }),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct OneHot(pub(super) Codes);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Ordinal(pub(super) Codes);

pub(super) fn one_hot(
    dataset: &Dataset,
    columns: &[String],
    unknown: Unknown,
) -> Result<Vec<OneHot>> {
    Ok(Codes::fit(dataset, columns, unknown)?.into_iter().map(OneHot).collect())
}

pub(super) fn ordinal(
    dataset: &Dataset,
    columns: &[String],
    unknown: Unknown,
) -> Result<Vec<Ordinal>> {
    Ok(Codes::fit(dataset, columns, unknown)?.into_iter().map(Ordinal).collect())
}

impl PerColumn for OneHot {
    fn column(&self) -> &str {
        &self.0.column
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let width = self.0.categories.len();
        let mut values = vec![0.0; array.len() * width];
        for (row, code) in self.0.encode(array)?.into_iter().enumerate() {
            if let Some(code) = code {
                values[row * width + code] = 1.0;
            }
        }
        Ok(Arc::new(list(Float32Array::from(values), width, None)?))
    }
}

impl PerColumn for Ordinal {
    fn column(&self) -> &str {
        &self.0.column
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let unknown = self.0.categories.len();
        let codes = self.0.encode(array)?.into_iter();
        let codes: Vec<u32> = codes.map(|code| code.unwrap_or(unknown) as u32).collect();
        Ok(Arc::new(UInt32Array::from(codes)))
    }
}
