//! The terms of a column of text, and how often they are in each row.

use super::numbers::list;
use super::statistic::{Statistic, compute_from};
use super::words::tokens;
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, Float32Array};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

/// What a vocabulary is made by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Terms {
    pub(super) columns: Vec<String>,
    pub(super) lowercase: bool,
    pub(super) max_features: Option<usize>,
}

impl Terms {
    /// The vocabulary of each column, and what was counted: with how many rows, and the number of
    /// rows that have each term.
    pub(super) fn fit(&self, dataset: &Dataset) -> Result<Vec<(Vocabulary, Found)>> {
        if self.max_features == Some(0) {
            let (option, got) = ("max_features", "0".to_owned());
            return Err(Error::InvalidOption { option, expected: "1 or more".to_owned(), got });
        }
        let none = Counted { lowercase: self.lowercase, ..Counted::default() };
        let counted = compute_from(dataset, &self.columns, none)?;
        self.columns.iter().zip(counted).map(|(column, c)| self.vocabulary(column, c)).collect()
    }

    fn vocabulary(&self, column: &str, counted: Counted) -> Result<(Vocabulary, Found)> {
        let mut terms: Vec<_> = counted.terms.into_iter().collect();
        terms.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        if let Some(most) = self.max_features {
            // Stable: of terms that occur as often, the first in order stay.
            terms.sort_by_key(|(_, counts)| Reverse(counts.times));
            terms.truncate(most);
            terms.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        }
        let column = column.to_owned();
        if terms.is_empty() {
            let reason = "it has no word of two or more letters".to_owned();
            return Err(Error::CannotFit { column, reason });
        }
        let rows_with = terms.iter().map(|(_, counts)| counts.rows).collect();
        let terms = terms.into_iter().map(|(term, _)| term).collect();
        let vocabulary = Vocabulary { column, lowercase: self.lowercase, terms };
        Ok((vocabulary, Found { rows: counted.rows, rows_with }))
    }
}

/// How many rows there were, and how many had each term.
pub(super) struct Found {
    pub(super) rows: u64,
    pub(super) rows_with: Vec<u64>,
}

#[derive(Clone, Default)]
struct Counted {
    lowercase: bool,
    rows: u64,
    terms: HashMap<String, TermCounts>,
}

#[derive(Clone, Default)]
struct TermCounts {
    times: u64,
    rows: u64,
    /// The last row of the batch, counted from 1, that has the term.
    last: usize,
}

impl Statistic for Counted {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        self.rows += array.len() as u64;
        let terms = &mut self.terms;
        tokens(column, array, self.lowercase, |row, token| match terms.get_mut(token) {
            Some(counts) => counts.add(row + 1),
            None => terms.entry(token.to_owned()).or_default().add(row + 1),
        })?;
        terms.values_mut().for_each(|counts| counts.last = 0);
        Ok(())
    }

    fn merge(&mut self, later: Self) {
        self.rows += later.rows;
        for (term, counts) in later.terms {
            let sum = self.terms.entry(term).or_default();
            sum.times += counts.times;
            sum.rows += counts.rows;
        }
    }
}

impl TermCounts {
    fn add(&mut self, row: usize) {
        self.times += 1;
        self.rows += u64::from(self.last != row);
        self.last = row;
    }
}

/// The terms of a column, sorted: a term's place is its number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Vocabulary {
    pub(super) column: String,
    lowercase: bool,
    pub(super) terms: Vec<String>,
}

impl Vocabulary {
    /// How often each term is in each row, row by row.
    pub(super) fn count(&self, array: &ArrayRef) -> Result<Vec<f32>> {
        let width = self.terms.len();
        let mut counts = vec![0.0; array.len() * width];
        tokens(&self.column, array, self.lowercase, |row, token| {
            if let Ok(term) = self.terms.binary_search_by(|term| term.as_str().cmp(token)) {
                counts[row * width + term] += 1.0;
            }
        })?;
        Ok(counts)
    }

    pub(super) fn lists(&self, values: Vec<f32>) -> Result<ArrayRef> {
        Ok(Arc::new(list(Float32Array::from(values), self.terms.len(), None)?))
    }
}
