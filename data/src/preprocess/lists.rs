//! Columns of lists, whatever kind of list it is.

use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, ListArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field};
use std::ops::Range;
use std::sync::Arc;

/// The type of a list's items, or nothing if it is no list.
pub(super) fn item(data_type: &DataType) -> Option<&DataType> {
    match data_type {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            Some(item.data_type())
        }
        _ => None,
    }
}

/// The column as lists of items of type `to`, or as they are.
pub(super) fn of(column: &str, array: &ArrayRef, to: Option<DataType>) -> Result<ListArray> {
    let Some(item) = item(array.data_type()) else {
        return Err(Error::ColumnType {
            column: column.to_owned(),
            expected: "lists",
            got: array.data_type().to_string(),
            hint: "; split text with Tokenizer",
        });
    };
    let item = Field::new("item", to.unwrap_or_else(|| item.clone()), true);
    Ok(cast(array, &DataType::List(Arc::new(item)))?.as_list::<i32>().clone())
}

/// The items of all rows, one after another.
pub(super) fn items(lists: &ListArray) -> ArrayRef {
    let offsets = lists.value_offsets();
    let (start, end) = (offsets[0] as usize, offsets[lists.len()] as usize);
    lists.values().slice(start, end - start)
}

/// The places of each row's items among all items; none where the list is missing.
pub(super) fn rows(lists: &ListArray) -> impl Iterator<Item = Range<usize>> + '_ {
    let offsets = lists.value_offsets();
    let row = move |row: usize| {
        let [start, end] = [row, row + 1].map(|i| (offsets[i] - offsets[0]) as usize);
        start..if lists.nulls().is_none_or(|nulls| nulls.is_valid(row)) { end } else { start }
    };
    (0..lists.len()).map(row)
}
