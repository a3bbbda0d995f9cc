//! Features without a vocabulary: by their hash.

use super::categories::Values;
use super::columns::{column_of, index_of, join};
use super::estimator::names;
use super::numbers::{Numbers, list};
use super::words::tokens;
use super::{Estimator, Preprocessor, Step, Transform, lists};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, Float32Array};
use arrow::datatypes::DataType;
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::sync::Arc;

/// Adds up the features of a row by their hash, in a vector of a given width (the hashing trick):
/// there is nothing to fit, and no value is unknown. The columns go, the vector,
/// `FixedSizeList<Float32>`, comes last.
///
/// * A number is the feature `column` with that value; a boolean is one of 0 or 1.
/// * Text is the feature `column=text` with value 1.
/// * A list of text has the feature `text` for each of its items, with value 1.
///
/// A missing number or text is a feature that the row does not have; a missing list is an error.
/// The hash is the signed 32-bit MurmurHash3 of the feature's UTF-8 with seed 0: its absolute value
/// modulo the width is the place, and its sign that of the value, so that what collides cancels on
/// average. This is what scikit-learn's `FeatureHasher` does; the numbers are the same, for ever.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FeatureHasher {
    columns: Vec<String>,
    num_features: usize,
    output: String,
}

impl FeatureHasher {
    /// The step, which makes `output` of `num_features` numbers: a power of two spreads features
    /// evenly.
    pub fn of<S: Into<String>>(
        columns: impl IntoIterator<Item = S>,
        num_features: usize,
        output: impl Into<String>,
    ) -> Step {
        Self { columns: names(columns), num_features, output: output.into() }.into()
    }
}

#[typetag::serde]
impl Estimator for FeatureHasher {
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        if !(1..=i32::MAX as usize).contains(&self.num_features) {
            return Err(Error::InvalidOption {
                option: "num_features",
                expected: format!("1 to {}", i32::MAX),
                got: self.num_features.to_string(),
            });
        }
        let schema = dataset.schema()?;
        self.columns.iter().try_for_each(|column| index_of(&schema, column).map(|_| ()))?;
        let hashing = Preprocessor::new(Hashing(self.clone()));
        // Of no rows: whether the columns have types that it takes.
        dataset.preprocess(&hashing)?;
        Ok(hashing)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct Hashing(FeatureHasher);

#[typetag::serde(name = "FeatureHasher")]
impl Transform for Hashing {
    fn transform(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let FeatureHasher { columns, num_features: width, output } = &self.0;
        let mut sums = Sums { width: *width, values: vec![0.0; batch.num_rows() * width] };
        for column in columns {
            sums.add_column(column, column_of(batch, column)?)?;
        }
        let sums = sums.values.into_iter().map(|x| x as f32).collect();
        let vectors = list(Float32Array::new(sums, None), *width, None)?;
        join(batch, columns.iter().map(String::as_str), output, Arc::new(vectors))
    }

    fn without(&self, column: &str) -> Preprocessor {
        let columns = self.0.columns.iter().filter(|name| *name != column).cloned().collect();
        Preprocessor::new(Self(FeatureHasher { columns, ..self.0.clone() }))
    }
}

struct Sums {
    width: usize,
    values: Vec<f64>,
}

impl Sums {
    fn add_column(&mut self, column: &str, array: &ArrayRef) -> Result<()> {
        let kind = array.data_type();
        if lists::item(kind).is_some() {
            return tokens(column, array, false, |row, token| self.add(row, hash(token), 1.0));
        }
        if kind.is_numeric() || *kind == DataType::Boolean {
            let hash = hash(column);
            let numbers = Numbers::of_scalars(column, array)?.values;
            let present = numbers.iter().enumerate().filter_map(|(row, x)| Some((row, x?)));
            present.for_each(|(row, x)| self.add(row, hash, x));
            return Ok(());
        }
        let mut feature = format!("{column}=");
        let values = Values::of(column, array)?;
        for (row, text) in (0..array.len()).filter_map(|row| Some((row, values.get(row)?))) {
            feature.truncate(column.len() + 1);
            // Writing into a string does not fail.
            let _ = write!(feature, "{text}");
            self.add(row, hash(&feature), 1.0);
        }
        Ok(())
    }

    fn add(&mut self, row: usize, hash: i32, value: f64) {
        // The one hash without a positive twin, -2^31, has a positive absolute value here.
        let place = hash.unsigned_abs() as usize % self.width;
        self.values[row * self.width + place] += if hash < 0 { -value } else { value };
    }
}

/// MurmurHash3_x86_32 with seed 0 (Appleby, public domain).
fn hash(text: &str) -> i32 {
    let mix = |k: u32| k.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    let words = text.as_bytes().chunks_exact(4);
    let tail = words.remainder();
    let mut h = words.fold(0u32, |h, word| {
        let k = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        (h ^ mix(k)).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
    });
    let k = tail.iter().rev().fold(0u32, |k, byte| k << 8 | u32::from(*byte));
    h ^= mix(k) ^ text.len() as u32;
    h = (h ^ h >> 16).wrapping_mul(0x85eb_ca6b);
    h = (h ^ h >> 13).wrapping_mul(0xc2b2_ae35);
    (h ^ h >> 16) as i32
}

#[cfg(test)]
mod tests {
    use super::hash;

    /// Of the reference implementation.
    #[test]
    fn murmur_hashes() {
        let hashes = ["", "a", "hello", "hello, world"].map(|text| hash(text) as u32);
        assert_eq!(hashes, [0, 0x3c25_69b2, 0x248b_fa47, 0x149b_bb7f]);
    }
}
