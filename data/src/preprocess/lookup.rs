//! Text as the numbers of a vocabulary.

use super::categories::is_text;
use super::columns::{PerColumn, transform_each};
use super::estimator::{names, of_columns};
use super::statistic::{Statistic, compute};
use super::words::text;
use super::{Estimator, Preprocessor, lists};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, ListArray, StringArray, UInt32Array};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

/// What is missing, and what lists in a tensor are padded with.
const MISSING: u32 = 0;
/// Text that is not in the vocabulary.
const UNKNOWN: u32 = 1;
/// Numbers that are no term of the vocabulary.
const RESERVED: usize = 2;
/// What reports call them.
const RESERVED_NAMES: [&str; RESERVED] = ["", "[UNK]"];

/// Replaces text by its number (`UInt32`) in the vocabulary of the column, as an embedding takes it.
/// Lists of text, such as those of a [`Tokenizer`](super::Tokenizer), become lists of numbers.
///
/// 0 is what is missing, which is also what a list in a tensor is padded with; 1 is text that is not in
/// the vocabulary; terms have the numbers from 2 on, the most frequent first, of terms that occur as
/// often the first in order. So has Keras' `TextVectorization`. A missing list is one of no text. An
/// embedding needs as many rows as [`classes`](Preprocessor::classes) has names, of which the first two,
/// an empty one and `[UNK]`, may also be texts.
///
/// ```
/// use arrow::array::{ArrayRef, StringArray};
/// use arrow::record_batch::RecordBatch;
/// use mobula_core::{BatchSource, Shard};
/// use mobula_data::{Chain, Dataset, StreamOptions, StringLookup, TensorSpec, Tokenizer};
/// use std::sync::Arc;
///
/// let text: ArrayRef = Arc::new(StringArray::from(vec!["to be or not to be", "to see"]));
/// let train = Dataset::from_batches([RecordBatch::try_from_iter([("text", text)])?])?;
/// let words = Chain::fit([Tokenizer::of(["text"]), StringLookup::of(["text"])], &train)?;
/// assert_eq!(words.classes("text").unwrap()[..5], ["", "[UNK]", "to", "be", "not"]);
///
/// let ids = TensorSpec::column("text").with_length(6).with_dtype(candle_core::DType::U32);
/// let options = StreamOptions::unlabelled([] as [&str; 0]).with_tensor(ids);
/// let batch = train.preprocess(&words)?.stream(options)?.open(Shard::ALL)?.next_batch()?.unwrap();
/// assert_eq!(batch.get("text")?.to_vec2::<u32>()?, [[2, 3, 5, 4, 2, 3], [2, 6, 0, 0, 0, 0]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StringLookup {
    columns: Vec<String>,
    max_tokens: Option<usize>,
    min_frequency: u64,
}

of_columns!(StringLookup);

impl StringLookup {
    /// For these columns; every text that they have is in the vocabulary.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: names(columns), max_tokens: None, min_frequency: 1 }
    }

    /// At most so many numbers, 0 and 1 among them: the most frequent terms stay.
    pub fn with_max_tokens(self, tokens: usize) -> Self {
        Self { max_tokens: Some(tokens), ..self }
    }

    /// Only terms that occur at least so often.
    pub fn with_min_frequency(self, times: u64) -> Self {
        Self { min_frequency: times, ..self }
    }

    fn lookup(&self, column: &str, Occurrences(counts): Occurrences) -> Result<Lookup> {
        let often = |(_, times): &(String, u64)| *times >= self.min_frequency;
        let mut terms: Vec<_> = counts.into_iter().filter(often).collect();
        terms.sort_unstable_by(|(a, x), (b, y)| (Reverse(x), a).cmp(&(Reverse(y), b)));
        let terms = terms.into_iter().map(|(term, _)| term);
        let most = self.max_tokens.map_or(usize::MAX, |tokens| tokens - RESERVED);
        let terms: Vec<_> = terms.take(most).collect();
        let column = column.to_owned();
        match terms.is_empty() {
            true => Err(Error::CannotFit { column, reason: self.nothing_left() }),
            false => Ok(Lookup::from(Terms { column, terms })),
        }
    }

    fn nothing_left(&self) -> String {
        match self.min_frequency {
            0 | 1 => "it has no text".to_owned(),
            times => format!("no text of it occurs {times} times"),
        }
    }
}

#[typetag::serde]
impl Estimator for StringLookup {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        if self.max_tokens.is_some_and(|most| most <= RESERVED) {
            return Err(Error::InvalidOption {
                option: "max_tokens",
                expected: "3 or more: 0 and 1 are no terms".to_owned(),
                got: self.max_tokens.unwrap_or_default().to_string(),
            });
        }
        let counts: Vec<Occurrences> = compute(dataset, &self.columns)?;
        let lookups = self.columns.iter().zip(counts).map(|(column, c)| self.lookup(column, c));
        Ok(Preprocessor::new(lookups.collect::<Result<Vec<_>>>()?))
    }
}

/// How often each text occurs.
#[derive(Clone, Default)]
struct Occurrences(HashMap<String, u64>);

impl Statistic for Occurrences {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        Texts::of(column, array)?.for_each(|text| {
            let Some(text) = text else { return };
            match self.0.get_mut(text) {
                Some(times) => *times += 1,
                None => drop(self.0.insert(text.to_owned(), 1)),
            }
        });
        Ok(())
    }

    fn merge(&mut self, later: Self) {
        for (term, times) in later.0 {
            *self.0.entry(term).or_default() += times;
        }
    }
}

/// The texts of a column, one after another, and the lists that they are in, if they are.
struct Texts {
    all: StringArray,
    lists: Option<ListArray>,
}

impl Texts {
    fn of(column: &str, array: &ArrayRef) -> Result<Self> {
        if !lists::item(array.data_type()).is_some_and(is_text) {
            let all = text(column, array)?.as_string::<i32>().clone();
            return Ok(Self { all, lists: None });
        }
        let lists = lists::of(column, array, Some(DataType::Utf8))?;
        Ok(Self { all: lists::items(&lists).as_string::<i32>().clone(), lists: Some(lists) })
    }

    /// All but those of a missing list, which may have some.
    fn for_each(&self, mut found: impl FnMut(Option<&str>)) {
        let mut at = |place: usize| found(self.all.is_valid(place).then(|| self.all.value(place)));
        match &self.lists {
            Some(lists) => lists::rows(lists).flatten().for_each(at),
            None => (0..self.all.len()).for_each(&mut at),
        }
    }
}

/// As it is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Terms {
    column: String,
    terms: Vec<String>,
}

/// The numbers of the terms of a column.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "Terms", into = "Terms")]
struct Lookup {
    terms: Arc<Terms>,
    numbers: Arc<HashMap<String, u32>>,
}

impl From<Terms> for Lookup {
    fn from(terms: Terms) -> Self {
        let numbered = terms.terms.iter().zip(RESERVED as u32..);
        let numbers = numbered.map(|(term, number)| (term.clone(), number)).collect();
        Self { terms: Arc::new(terms), numbers: Arc::new(numbers) }
    }
}

impl From<Lookup> for Terms {
    fn from(lookup: Lookup) -> Self {
        Self::clone(&lookup.terms)
    }
}

transform_each!("StringLookup", Lookup);

impl PerColumn for Lookup {
    fn column(&self) -> &str {
        &self.terms.column
    }

    fn classes(&self) -> Option<Vec<String>> {
        let reserved = RESERVED_NAMES.into_iter().map(str::to_owned);
        Some(reserved.chain(self.terms.terms.iter().cloned()).collect())
    }

    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let texts = Texts::of(self.column(), array)?;
        let mut numbers = Vec::with_capacity(texts.all.len());
        texts.for_each(|text| numbers.push(self.number(text)));
        let numbers = Arc::new(UInt32Array::from(numbers));
        let Some(lists) = texts.lists else { return Ok(numbers) };
        let item = Arc::new(Field::new("item", DataType::UInt32, false));
        let offsets = OffsetBuffer::from_lengths(lists::rows(&lists).map(|row| row.len()));
        Ok(Arc::new(ListArray::try_new(item, offsets, numbers, None)?))
    }
}

impl Lookup {
    fn number(&self, text: Option<&str>) -> u32 {
        let Some(text) = text else { return MISSING };
        self.numbers.get(text).copied().unwrap_or(UNKNOWN)
    }
}
