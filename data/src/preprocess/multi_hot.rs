//! Sets of categories as numbers.

use super::categories::{Codes, Counts, Unknown, Values};
use super::columns::{PerColumn, transform_each};
use super::estimator::{names, of_columns};
use super::lists;
use super::numbers::list;
use super::statistic::{Statistic, compute};
use super::{Estimator, Preprocessor};
use crate::Dataset;
use crate::error::Result;
use arrow::array::{Array, ArrayRef, Float32Array};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Replaces a column of lists of text, whole numbers or booleans by a `FixedSizeList<Float32>` with
/// a 1 for every category that is in the row's list, however often, and 0 elsewhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MultiHotEncoder {
    columns: Vec<String>,
    unknown: Unknown,
}

of_columns!(MultiHotEncoder);

impl MultiHotEncoder {
    /// For these columns; an unknown category is an error, and so is a missing list or item.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: names(columns), unknown: Unknown::Error }
    }

    /// What it does with a value it does not know.
    pub fn with_unknown(self, unknown: Unknown) -> Self {
        Self { unknown, ..self }
    }
}

#[typetag::serde]
impl Estimator for MultiHotEncoder {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let counts: Vec<ItemCounts> = compute(dataset, &self.columns)?;
        let codes = self.columns.iter().zip(counts).map(|(column, ItemCounts(counts))| {
            Codes::new(column, counts, self.unknown).map(MultiHot)
        });
        Ok(Preprocessor::new(codes.collect::<Result<Vec<_>>>()?))
    }
}

/// How often each category is in a list.
#[derive(Clone, Default)]
struct ItemCounts(Counts);

impl Statistic for ItemCounts {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        let lists = lists::of(column, array, None)?;
        let items = Values::of(column, &lists::items(&lists))?;
        self.0.add_at(&items, lists::rows(&lists).flatten());
        Ok(())
    }

    fn merge(&mut self, later: Self) {
        self.0.merge(later.0);
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
struct MultiHot(Codes);

transform_each!("MultiHotEncoder", MultiHot);

impl PerColumn for MultiHot {
    fn column(&self) -> &str {
        &self.0.column
    }

    fn classes(&self) -> Option<Vec<String>> {
        Some(self.0.names())
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let (lists, width) = (lists::of(self.column(), array, None)?, self.0.len());
        self.0.refuse_missing(lists.null_count())?;
        let mut values = vec![0.0; array.len() * width];
        let items = Values::of(self.column(), &lists::items(&lists))?;
        for (row, places) in lists::rows(&lists).enumerate() {
            for place in places {
                if let Some(code) = self.0.code(items.get(place))? {
                    values[row * width + code] = 1.0;
                }
            }
        }
        Ok(Arc::new(list(Float32Array::from(values), width, None)?))
    }
}
