//! Text as vectors: a number for each term.

use super::columns::{PerColumn, transform_each};
use super::estimator::{names, of_columns};
use super::vocabulary::{Found, Terms, Vocabulary};
use super::{Estimator, Preprocessor};
use crate::Dataset;
use crate::error::Result;
use arrow::array::ArrayRef;
use serde::{Deserialize, Serialize};

/// Replaces text by a `FixedSizeList<Float32>`: how often it has each term of the vocabulary, in
/// the terms' order. Terms that were not there when it was fitted do not count; missing text is an
/// error.
///
/// Terms are runs of two or more letters, digits and underscores, in lower case; the items of a
/// list of text, such as [`Tokenizer`](crate::Tokenizer) makes, are terms as they are. The vector
/// has all its zeros: a row takes 4 bytes for each term.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CountVectorizer(Terms);

of_columns!(CountVectorizer);

impl CountVectorizer {
    /// For these columns, each with a vocabulary of its own: all its terms, in lower case.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self(Terms { columns: names(columns), lowercase: true, max_features: None })
    }

    /// Keeps the terms that occur most often, the first in order of those that occur as often.
    pub fn with_max_features(mut self, terms: usize) -> Self {
        self.0.max_features = Some(terms);
        self
    }

    /// Whether text becomes lower case first.
    pub fn with_lowercase(mut self, lowercase: bool) -> Self {
        self.0.lowercase = lowercase;
        self
    }
}

#[typetag::serde]
impl Estimator for CountVectorizer {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let fitted = self.0.fit(dataset)?.into_iter().map(|(vocabulary, _)| Count(vocabulary));
        Ok(Preprocessor::new(fitted.collect::<Vec<_>>()))
    }
}

/// As [`CountVectorizer`], but a term counts the more, the fewer rows have it, and the vector of a
/// row is scaled to length 1. A term that is in `d` of `n` rows is weighted by
/// `ln((1 + n) / (1 + d)) + 1`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TfidfVectorizer(Terms);

of_columns!(TfidfVectorizer);

impl TfidfVectorizer {
    /// For these columns, each with a vocabulary of its own: all its terms, in lower case.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self(Terms { columns: names(columns), lowercase: true, max_features: None })
    }

    /// Keeps the terms that occur most often, the first in order of those that occur as often.
    pub fn with_max_features(mut self, terms: usize) -> Self {
        self.0.max_features = Some(terms);
        self
    }

    /// Whether text becomes lower case first.
    pub fn with_lowercase(mut self, lowercase: bool) -> Self {
        self.0.lowercase = lowercase;
        self
    }
}

#[typetag::serde]
impl Estimator for TfidfVectorizer {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let fitted = self
            .0
            .fit(dataset)?
            .into_iter()
            .map(|(vocabulary, found)| Tfidf { vocabulary, idf: inverse_frequencies(&found) });
        Ok(Preprocessor::new(fitted.collect::<Vec<_>>()))
    }
}

fn inverse_frequencies(found: &Found) -> Vec<f64> {
    let rows = 1.0 + found.rows as f64;
    found.rows_with.iter().map(|with| (rows / (1.0 + *with as f64)).ln() + 1.0).collect()
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct Count(Vocabulary);

transform_each!("CountVectorizer", Count);

impl PerColumn for Count {
    fn column(&self) -> &str {
        &self.0.column
    }

    fn classes(&self) -> Option<Vec<String>> {
        Some(self.0.terms.clone())
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        self.0.lists(self.0.count(array)?)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Tfidf {
    vocabulary: Vocabulary,
    idf: Vec<f64>,
}

transform_each!("TfidfVectorizer", Tfidf);

impl PerColumn for Tfidf {
    fn column(&self) -> &str {
        &self.vocabulary.column
    }

    fn classes(&self) -> Option<Vec<String>> {
        Some(self.vocabulary.terms.clone())
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let mut counts = self.vocabulary.count(array)?;
        counts.chunks_mut(self.idf.len()).for_each(|row| self.weigh(row));
        self.vocabulary.lists(counts)
    }
}

impl Tfidf {
    fn weigh(&self, row: &mut [f32]) {
        let weighted = |(count, idf): (&f32, &f64)| f64::from(*count) * idf;
        let squares = row.iter().zip(&self.idf).map(weighted).map(|x| x * x);
        let length = squares.sum::<f64>().sqrt();
        if length > 0.0 {
            let pairs = row.iter_mut().zip(&self.idf);
            pairs.for_each(|(x, idf)| *x = (weighted((x, idf)) / length) as f32);
        }
    }
}
