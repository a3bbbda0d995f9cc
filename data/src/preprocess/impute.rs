//! Filling missing values.

use super::affine::Moments;
use super::categories::{Category, Counts};
use super::columns::{PerColumn, index_of, transform_each};
use super::estimator::names;
use super::statistic::compute;
use super::{Estimator, Preprocessor, Step};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, Float64Array, Int64Array, Scalar, StringArray};
use arrow::compute::kernels::zip::zip;
use arrow::compute::{cast, is_not_null};
use arrow::datatypes::DataType;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Fills the missing values of scalar columns.
///
/// A whole number or text keeps the column's type; a mean makes a float of an integer column.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SimpleImputer(Vec<String>, Fill);

impl SimpleImputer {
    /// With the mean of the column.
    pub fn mean<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Step {
        Self(names(columns), Fill::Mean).into()
    }

    /// With the text or whole number that occurs most often; the first of them in order, if
    /// there are several.
    pub fn most_frequent<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Step {
        Self(names(columns), Fill::MostFrequent).into()
    }

    /// With a given number or text.
    pub fn constant<S: Into<String>>(
        columns: impl IntoIterator<Item = S>,
        value: impl Into<Value>,
    ) -> Step {
        Self(names(columns), Fill::Constant(value.into())).into()
    }
}

#[typetag::serde]
impl Estimator for SimpleImputer {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        Ok(Preprocessor::new(fit(dataset, &self.0, &self.1)?))
    }
}

/// What missing values are filled with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Fill {
    /// The mean.
    Mean,
    /// The most frequent value.
    MostFrequent,
    /// This value.
    Constant(Value),
}

/// A number or text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Value {
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    Text(String),
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<Category> for Value {
    fn from(value: Category) -> Self {
        match value {
            Category::Int(value) => Self::Int(value),
            Category::Text(value) => Self::Text(value),
        }
    }
}

/// A fitted imputer of one column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Imputation {
    column: String,
    fill: Value,
}

transform_each!("SimpleImputer", Imputation);

fn fit(dataset: &Dataset, columns: &[String], fill: &Fill) -> Result<Vec<Imputation>> {
    let fills = match fill {
        Fill::Constant(value) => vec![value.clone(); columns.len()],
        Fill::Mean => means(dataset, columns)?,
        Fill::MostFrequent => modes(dataset, columns)?,
    };
    let schema = dataset.schema()?;
    let pair = |(column, fill): (&String, Value)| {
        if matches!(fill, Value::Float(value) if !value.is_finite()) {
            let reason = "missing values would become infinite or not a number".to_owned();
            return Err(Error::CannotFit { column: column.clone(), reason });
        }
        let imputation = Imputation { column: column.clone(), fill };
        imputation.filler(schema.field(index_of(&schema, column)?).data_type())?;
        Ok(imputation)
    };
    columns.iter().zip(fills).map(pair).collect()
}

fn means(dataset: &Dataset, columns: &[String]) -> Result<Vec<Value>> {
    let moments: Vec<Moments> = compute(dataset, columns)?;
    let mean = |(column, moments): (&String, Moments)| {
        moments.mean.first().map(|m| Value::Float(*m)).ok_or_else(|| no_values(column))
    };
    columns.iter().zip(moments).map(mean).collect()
}

fn modes(dataset: &Dataset, columns: &[String]) -> Result<Vec<Value>> {
    let counts: Vec<Counts> = compute(dataset, columns)?;
    let mode = |(column, counts): (&String, Counts)| {
        counts.mode().map(Value::from).ok_or_else(|| no_values(column))
    };
    columns.iter().zip(counts).map(mode).collect()
}

fn no_values(column: &str) -> Error {
    Error::CannotFit { column: column.to_owned(), reason: "it has no values".to_owned() }
}

impl PerColumn for Imputation {
    fn column(&self) -> &str {
        &self.column
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let filler = self.filler(array.data_type())?;
        let array = cast(array, filler.data_type())?;
        if array.null_count() == 0 {
            return Ok(array);
        }
        Ok(zip(&is_not_null(&array)?, &array, &Scalar::new(filler))?)
    }
}

impl Imputation {
    /// The fill value as an array of one, of the type that the column is to have.
    fn filler(&self, column: &DataType) -> Result<ArrayRef> {
        let (value, target): (ArrayRef, _) = match &self.fill {
            Value::Int(value) => (Arc::new(Int64Array::from(vec![*value])), column),
            Value::Float(value) if column.is_integer() => {
                (Arc::new(Float64Array::from(vec![*value])), &DataType::Float64)
            }
            Value::Float(value) => (Arc::new(Float64Array::from(vec![*value])), column),
            Value::Text(value) => (Arc::new(StringArray::from(vec![value.as_str()])), column),
        };
        let text = matches!(self.fill, Value::Text(_));
        let fits =
            (text && !column.is_numeric() || !text && column.is_numeric()) && !column.is_nested();
        match cast(&value, target) {
            Ok(value) if fits && value.null_count() == 0 => Ok(value),
            _ => Err(Error::ColumnType {
                column: self.column.clone(),
                expected: "a scalar column that can hold the value that replaces missing ones",
                got: column.to_string(),
                hint: "",
            }),
        }
    }
}
