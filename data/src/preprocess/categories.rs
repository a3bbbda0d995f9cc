//! Values that are names, not amounts: what there are, and the number of each.

use super::statistic::Statistic;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, Int64Array, StringArray};
use arrow::compute::{CastOptions, cast, cast_with_options};
use arrow::datatypes::{DataType, Int64Type};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt;

/// What to do with a value that was not there when the encoder was fitted, or is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unknown {
    /// An error that names the value.
    #[default]
    Error,
    /// All zeros in a one-hot or multi-hot code; the number after the last class in an ordinal one.
    Ignore,
}

/// A value of a categorical column. Numbers are in the order of numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Category {
    Int(i64),
    Text(String),
}

/// The same, borrowed from a column; in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Key<'a> {
    Int(i64),
    Text(&'a str),
}

impl Category {
    fn key(&self) -> Key<'_> {
        match self {
            Self::Int(value) => Key::Int(*value),
            Self::Text(value) => Key::Text(value),
        }
    }
}

impl From<Key<'_>> for Category {
    fn from(key: Key<'_>) -> Self {
        match key {
            Key::Int(value) => Self::Int(value),
            Key::Text(value) => Self::Text(value.to_owned()),
        }
    }
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

/// The values of a categorical column.
pub(super) enum Values {
    Int(Int64Array),
    Text(StringArray),
}

impl Values {
    pub(super) fn of(column: &str, array: &ArrayRef) -> Result<Self> {
        let got = array.data_type();
        if let DataType::Dictionary(_, values) = got {
            return Self::of(column, &cast(array, values)?);
        }
        if got.is_integer() {
            // Without a value that is no longer there.
            let strict = CastOptions { safe: false, ..CastOptions::default() };
            let array = cast_with_options(array, &DataType::Int64, &strict)?;
            return Ok(Self::Int(array.as_primitive::<Int64Type>().clone()));
        }
        if is_text(got) || *got == DataType::Boolean {
            return Ok(Self::Text(cast(array, &DataType::Utf8)?.as_string::<i32>().clone()));
        }
        Err(Error::ColumnType {
            column: column.to_owned(),
            expected: "text, whole numbers or booleans",
            got: got.to_string(),
            hint: "",
        })
    }

    pub(super) fn get(&self, place: usize) -> Option<Key<'_>> {
        match self {
            Self::Int(values) => values.is_valid(place).then(|| Key::Int(values.value(place))),
            Self::Text(values) => values.is_valid(place).then(|| Key::Text(values.value(place))),
        }
    }
}

pub(super) fn is_text(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
}

/// How often each category occurs.
#[derive(Clone, Default)]
pub(super) struct Counts(BTreeMap<Category, u64>);

impl Counts {
    /// The most frequent category; the first of them in order, if there are several.
    pub(super) fn mode(self) -> Option<Category> {
        let most = self.0.values().copied().max()?;
        self.0.into_iter().find(|(_, count)| *count == most).map(|(category, _)| category)
    }
}

impl Counts {
    /// Counts the values at the places given.
    pub(super) fn add_at(&mut self, values: &Values, places: impl Iterator<Item = usize>) {
        let mut here = HashMap::<_, u64>::new();
        for key in places.filter_map(|place| values.get(place)) {
            *here.entry(key).or_default() += 1;
        }
        for (key, count) in here {
            *self.0.entry(key.into()).or_default() += count;
        }
    }
}

impl Statistic for Counts {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        self.add_at(&Values::of(column, array)?, 0..array.len());
        Ok(())
    }

    fn merge(&mut self, later: Self) {
        for (category, count) in later.0 {
            *self.0.entry(category).or_default() += count;
        }
    }
}

/// The numbers that the categories of a column were given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Codes {
    pub(super) column: String,
    /// Sorted.
    categories: Vec<Category>,
    unknown: Unknown,
}

impl Codes {
    /// For every category that was counted.
    pub(super) fn new(column: &str, counts: Counts, unknown: Unknown) -> Result<Self> {
        let (column, categories) = (column.to_owned(), counts.0.into_keys().collect::<Vec<_>>());
        if categories.is_empty() {
            return Err(Error::CannotFit { column, reason: "it has no values".to_owned() });
        }
        Ok(Self { column, categories, unknown })
    }

    pub(super) fn len(&self) -> usize {
        self.categories.len()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.categories.iter().map(|category| category.key().to_string()).collect()
    }

    /// Calls `found(row, code)` for every row; no code if its value is unknown or missing, and
    /// that is allowed.
    pub(super) fn encode(
        &self,
        array: &ArrayRef,
        mut found: impl FnMut(usize, Option<usize>),
    ) -> Result<()> {
        self.refuse_missing(array.null_count())?;
        let values = Values::of(&self.column, array)?;
        (0..array.len()).try_for_each(|row| {
            found(row, self.code(values.get(row))?);
            Ok(())
        })
    }

    pub(super) fn refuse_missing(&self, rows: usize) -> Result<()> {
        if self.unknown == Unknown::Ignore || rows == 0 {
            return Ok(());
        }
        let (column, place) = (self.column.clone(), "a batch to encode".to_owned());
        Err(Error::Nulls { column, rows, place })
    }

    /// The number of a value, if it has one, or may have none.
    pub(super) fn code(&self, value: Option<Key<'_>>) -> Result<Option<usize>> {
        let Some(key) = value else {
            return self.refuse_missing(1).map(|()| None);
        };
        match (self.categories.binary_search_by(|c| c.key().cmp(&key)), self.unknown) {
            (Ok(code), _) => Ok(Some(code)),
            (Err(_), Unknown::Ignore) => Ok(None),
            (Err(_), Unknown::Error) => Err(Error::UnknownCategory {
                column: self.column.clone(),
                value: format!("{:?}", key.to_string()),
                known: self.names(),
            }),
        }
    }
}
