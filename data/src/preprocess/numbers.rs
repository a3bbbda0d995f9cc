//! Numeric columns as numbers: a scalar column and a `FixedSizeList` are the same thing here, a
//! table of `rows × width` values.

use super::categories::is_text;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, FixedSizeListArray, Float32Array, Float64Array};
use arrow::buffer::NullBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Float64Type};
use std::sync::Arc;

/// The values of a column, row by row, `width` to a row.
pub(crate) struct Numbers {
    pub(crate) values: Float64Array,
    pub(crate) width: usize,
    /// Some for lists: which rows have no list at all.
    list: Option<Option<NullBuffer>>,
}

impl Numbers {
    pub(crate) fn of(column: &str, array: &ArrayRef) -> Result<Self> {
        let (values, width, list) = match array.data_type() {
            DataType::FixedSizeList(_, width) => {
                let lists = array.as_fixed_size_list();
                (lists.values(), *width as usize, Some(lists.nulls().cloned()))
            }
            _ => (array, 1, None),
        };
        if !is_number(values.data_type()) {
            return Err(not_numeric(column, array.data_type()));
        }
        let values = cast(values, &DataType::Float64)?;
        Ok(Self { values: values.as_primitive::<Float64Type>().clone(), width, list })
    }

    /// The same for a column that was as wide when a preprocessor was fitted.
    pub(crate) fn with_width(column: &str, array: &ArrayRef, expected: usize) -> Result<Self> {
        let numbers = Self::of(column, array)?;
        if numbers.width != expected {
            let (column, got) = (column.to_owned(), numbers.width);
            return Err(Error::Width { column, expected, got });
        }
        Ok(numbers)
    }

    /// The numbers of a column that is no list.
    pub(crate) fn of_scalars(column: &str, array: &ArrayRef) -> Result<Self> {
        if array.data_type().is_nested() {
            return Err(Error::ColumnType {
                column: column.to_owned(),
                expected: "a number a row",
                got: array.data_type().to_string(),
                hint: "",
            });
        }
        Self::of(column, array)
    }

    /// The rows that have all their values.
    pub(crate) fn complete(&self) -> impl Iterator<Item = &[f64]> {
        let rows = self.values.len() / self.width.max(1);
        let values = self.values.values();
        (0..rows).filter(|row| self.is_complete(*row)).map(move |row| {
            let start = row * self.width;
            &values[start..start + self.width]
        })
    }

    fn is_complete(&self, row: usize) -> bool {
        let list = self.list.as_ref().and_then(Option::as_ref);
        let elements = row * self.width..(row + 1) * self.width;
        list.is_none_or(|nulls| nulls.is_valid(row))
            && (self.values.null_count() == 0
                || elements.into_iter().all(|i| self.values.is_valid(i)))
    }

    /// The column with `function(element in the row, value)` for every value that is not missing.
    pub(crate) fn map(self, function: impl Fn(usize, f64) -> f64) -> Result<ArrayRef> {
        let width = self.width.max(1);
        self.map_all(|i, value| function(i % width, value))
    }

    /// The same with the place of the value among all values: `row * width + element`.
    pub(crate) fn map_all(self, function: impl Fn(usize, f64) -> f64) -> Result<ArrayRef> {
        let values = self.values.values().iter().enumerate();
        let mapped = values.map(|(i, value)| function(i, *value) as f32);
        let nulls = self.values.nulls().cloned();
        let mapped = Float32Array::new(mapped.collect(), nulls);
        Ok(match self.list {
            None => Arc::new(mapped),
            Some(nulls) => Arc::new(list(mapped, self.width, nulls)?),
        })
    }
}

/// A list column of 32-bit floats.
pub(crate) fn list(
    values: Float32Array,
    width: usize,
    nulls: Option<NullBuffer>,
) -> Result<FixedSizeListArray> {
    // Elements of a missing list count as valid, so the item type may not depend on the rows.
    let item = Arc::new(Field::new("item", DataType::Float32, true));
    Ok(FixedSizeListArray::try_new(item, width as i32, Arc::new(values), nulls)?)
}

/// Numbers of a row of this type, or nothing if it is no numeric column.
pub(crate) fn width(data_type: &DataType) -> Option<usize> {
    match data_type {
        DataType::FixedSizeList(item, width) if is_number(item.data_type()) => {
            Some(*width as usize)
        }
        other => is_number(other).then_some(1),
    }
}

pub(crate) fn not_numeric(column: &str, got: &DataType) -> Error {
    let hint = match got {
        text if is_text(text) => "; encode it with OneHotEncoder, OrdinalEncoder or StringLookup",
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _)
            if is_text(item.data_type()) =>
        {
            "; encode its text with StringLookup"
        }
        DataType::List(_) | DataType::LargeList(_) => {
            "; give every row the same number of values, or TensorSpec::with_length the largest"
        }
        _ => "",
    };
    Error::ColumnType {
        column: column.to_owned(),
        expected: "a number or a FixedSizeList of numbers",
        got: got.to_string(),
        hint,
    }
}

pub(crate) fn is_number(data_type: &DataType) -> bool {
    data_type.is_numeric() || *data_type == DataType::Boolean
}
