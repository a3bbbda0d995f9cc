//! Text as words.

use super::categories::is_text;
use super::columns::{PerColumn, transform_each};
use super::estimator::{names, of_columns};
use super::{Estimator, Preprocessor, lists};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, ListBuilder, StringBuilder};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Replaces text by the list of its words, which are what white space separates. Missing text
/// stays missing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tokenizer {
    columns: Vec<String>,
    lowercase: bool,
}

of_columns!(Tokenizer);

impl Tokenizer {
    /// For these columns; the case of letters stays.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: names(columns), lowercase: false }
    }

    /// Whether letters become lower case.
    pub fn with_lowercase(self, lowercase: bool) -> Self {
        Self { lowercase, ..self }
    }
}

#[typetag::serde]
impl Estimator for Tokenizer {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let splits = self
            .columns
            .iter()
            .map(|column| Split { column: column.clone(), lowercase: self.lowercase });
        let splits = Preprocessor::new(splits.collect::<Vec<_>>());
        // Of no rows: whether there are such columns, and whether they are text.
        dataset.preprocess(&splits)?;
        Ok(splits)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Split {
    column: String,
    lowercase: bool,
}

transform_each!("Tokenizer", Split);

impl PerColumn for Split {
    fn column(&self) -> &str {
        &self.column
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let array = text(&self.column, array)?;
        let mut words = ListBuilder::new(StringBuilder::new());
        for row in array.as_string::<i32>() {
            let row = row.map(|row| cased(row, self.lowercase));
            let split = row.as_ref().map(|row| row.split_whitespace());
            split.into_iter().flatten().for_each(|word| words.values().append_value(word));
            words.append(row.is_some());
        }
        Ok(Arc::new(words.finish()))
    }
}

/// Calls `found(row, token)` for the tokens of every row: the items of a list of text as they are;
/// of a text the runs of two or more letters, digits and underscores, as scikit-learn has them.
/// Missing text, or a missing item, is an error.
pub(super) fn tokens(
    column: &str,
    array: &ArrayRef,
    lowercase: bool,
    mut found: impl FnMut(usize, &str),
) -> Result<()> {
    if lists::item(array.data_type()).is_some_and(is_text) {
        let lists = lists::of(column, array, Some(DataType::Utf8))?;
        let items = lists::items(&lists);
        let words = items.as_string::<i32>();
        must_be_there(column, lists.null_count() + words.null_count())?;
        for (row, places) in lists::rows(&lists).enumerate() {
            places.for_each(|place| found(row, words.value(place)));
        }
        return Ok(());
    }
    let array = text(column, array)?;
    must_be_there(column, array.null_count())?;
    for (row, text) in array.as_string::<i32>().iter().flatten().enumerate() {
        let text = cased(text, lowercase);
        let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
        words.filter(|word| word.chars().nth(1).is_some()).for_each(|word| found(row, word));
    }
    Ok(())
}

fn must_be_there(column: &str, missing: usize) -> Result<()> {
    if missing == 0 {
        return Ok(());
    }
    let (column, place) = (column.to_owned(), "a batch of text".to_owned());
    Err(Error::Nulls { column, rows: missing, place })
}

fn cased(text: &str, lowercase: bool) -> std::borrow::Cow<'_, str> {
    if lowercase { text.to_lowercase().into() } else { text.into() }
}

pub(super) fn text(column: &str, array: &ArrayRef) -> Result<ArrayRef> {
    let values = match array.data_type() {
        DataType::Dictionary(_, values) => values,
        other => other,
    };
    if is_text(values) {
        return Ok(cast(array, &DataType::Utf8)?);
    }
    Err(Error::ColumnType {
        column: column.to_owned(),
        expected: "text",
        got: array.data_type().to_string(),
        hint: "",
    })
}
