//! Rows more often or less often than they are: weights, balance, mixtures.

use crate::Dataset;
use crate::batch_fn::BatchMap;
use crate::dataset::Op;
use crate::error::{Error, Result};
use crate::frame::quoted;
use crate::query::TABLE;
use crate::source::union::{self, Union};
use arrow::array::{Array, AsArray, UInt32Array};
use arrow::compute::take_record_batch;
use arrow::datatypes::{DataType, Float64Type, Int64Type, SchemaRef};
use arrow::record_batch::RecordBatch;
use mobula_core::random::Stream;
use serde::{Deserialize, Serialize};

/// A row is not to be more often than this.
const MOST_COPIES: f64 = 1000.0;

/// How often each row is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Resample {
    /// A SQL expression: the mean number of copies.
    pub(crate) copies: String,
    pub(crate) seed: u64,
    /// How many came before it: the same seed twice draws different numbers.
    pub(crate) depth: u64,
}

impl Resample {
    /// The name of the column with the number of copies, which the map takes away again.
    pub(crate) const COPIES: &str = "mobula: copies";

    fn copies(&self, mean: Option<f64>, draws: &Stream, row: u64) -> Result<usize> {
        let mean = mean.unwrap_or(f64::NAN);
        if !(0.0..=MOST_COPIES).contains(&mean) {
            return Err(Error::OutOfRange {
                column: self.copies.clone(),
                value: mean,
                expected: "a number of copies from 0 to 1000",
            });
        }
        let more = draws.at(row, 0).uniform() < mean.fract();
        Ok(mean as usize + usize::from(more))
    }
}

impl BatchMap for Resample {
    fn columns(&self, input: &SchemaRef) -> Result<SchemaRef> {
        let kept: Vec<_> = (0..input.fields().len() - 1).collect();
        Ok(input.project(&kept)?.into())
    }

    fn map(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        self.map_at(batch, 0, 0)
    }

    fn map_at(&self, batch: &RecordBatch, block: usize, row: u64) -> Result<RecordBatch> {
        let draws = Stream::new(self.seed, "resample").child(self.depth).child(block as u64);
        let mut batch = batch.clone();
        // Its last column.
        let means = batch.remove_column(batch.num_columns() - 1);
        let mut rows = Vec::with_capacity(batch.num_rows());
        for (at, mean) in means.as_primitive::<Float64Type>().iter().enumerate() {
            let copies = self.copies(mean, &draws, row + at as u64)?;
            rows.extend(std::iter::repeat_n(at as u32, copies));
        }
        Ok(take_record_batch(&batch, &UInt32Array::from(rows))?)
    }
}

/// Whether values of a column are text in SQL. Only types whose values SQL says exactly.
fn is_text(column: &str, data_type: &DataType) -> Result<bool> {
    match data_type {
        of if of.is_integer() || of == &DataType::Boolean => Ok(false),
        DataType::Dictionary(_, of) => is_text(column, of),
        of if of.is_string() || matches!(of, DataType::Date32 | DataType::Date64) => Ok(true),
        of => Err(Error::ColumnType {
            column: column.to_owned(),
            expected: "whole numbers, booleans, text or dates",
            got: of.to_string(),
            hint: "; make classes of it with with_column",
        }),
    }
}

/// Rows more often or less often than they are. Which, is a function of the seed and the place of a row
/// in its block; copies of a row are neighbours, so shuffle the stream.
impl Dataset {
    /// Each row as often as a SQL expression says, on average: `"2.5"` is two or three times,
    /// `"CASE WHEN label = 3 THEN 4 ELSE 0.5 END"` prefers a class, and a column of weights takes rows by
    /// their weight. From 0 to 1000.
    pub fn resample(&self, copies: impl Into<String>, seed: u64) -> Result<Self> {
        let depth = self.ops().iter().filter(|op| matches!(op, Op::Resample(_))).count() as u64;
        self.with_op(Op::Resample(Resample { copies: copies.into(), seed, depth }))
    }

    /// As many rows of each value of `column`, about, and as many rows in all as there are. Reads the
    /// column once.
    pub fn balance(&self, column: impl AsRef<str>, seed: u64) -> Result<Self> {
        let column = column.as_ref();
        let name = quoted(column);
        let counts = self.sql(format!(
            "SELECT {name}, count(*) AS \"mobula: rows\" FROM {TABLE} GROUP BY {name} ORDER BY {name}"
        ))?;
        let values = counts.collect()?;
        let counts = values.column(1).as_primitive::<Int64Type>().values();
        let rows = counts.iter().sum::<i64>() as f64;
        if rows == 0.0 {
            return Err(Error::Empty { after: "" });
        }
        let of = values.column(0);
        let is_text = is_text(column, of.data_type())?;
        let texts = crate::rows::text(&values)?;
        let case = |(at, count): (usize, &i64)| {
            let (text, copies) = (&texts[at][0], rows / counts.len() as f64 / *count as f64);
            if copies > MOST_COPIES {
                return Err(Error::OutOfRange {
                    column: column.to_owned(),
                    value: copies,
                    expected: "values that are not that rare: a row would be there more than 1000 times",
                });
            }
            let is = match (of.is_null(at), is_text) {
                (true, _) => format!("{name} IS NULL"),
                (false, false) => format!("{name} = {text}"),
                (false, true) => format!("{name} = '{}'", text.replace('\'', "''")),
            };
            Ok(format!(" WHEN {is} THEN {copies:e}"))
        };
        let cases = counts.iter().enumerate().map(case).collect::<Result<String>>()?;
        self.resample(format!("CASE{cases} ELSE 1 END"), seed)
    }

    /// Two parts as [`train_test_split`](Self::train_test_split) makes, but with the same share of each
    /// value of `column`, to the row. The rows are shuffled for it, see
    /// [`random_shuffle`](Self::random_shuffle).
    pub fn stratified_split(
        &self,
        column: impl AsRef<str>,
        test_fraction: f64,
        seed: u64,
    ) -> Result<(Self, Self)> {
        // For its check of the fraction.
        self.train_test_split(test_fraction, seed)?;
        let of = quoted(column.as_ref());
        let numbered = self.random_shuffle(seed)?.sql(format!(
            "SELECT *, row_number() OVER (PARTITION BY {of} ORDER BY \"mobula: place\") AS \"mobula: row\", \
             count(*) OVER (PARTITION BY {of}) AS \"mobula: rows\" \
             FROM (SELECT *, row_number() OVER () AS \"mobula: place\" FROM {TABLE}) \
             ORDER BY {of}, \"mobula: place\""
        ))?;
        let is_test = format!("\"mobula: row\" <= round(\"mobula: rows\" * {test_fraction:?})");
        let side = |predicate: String| {
            numbered.filter(predicate)?.drop_columns([
                "mobula: place",
                "mobula: row",
                "mobula: rows",
            ])
        };
        Ok((side(format!("NOT ({is_test})"))?, side(is_test)?))
    }

    /// Rows of several datasets with the same columns, by weights: of `rows` rows in all, each dataset
    /// gives about its share, whole or several times over. They are not mixed yet: shuffle the stream.
    pub fn mix<'a>(
        parts: impl IntoIterator<Item = (&'a Self, f64)>,
        rows: u64,
        seed: u64,
    ) -> Result<Self> {
        let parts: Vec<_> = parts.into_iter().collect();
        let all: f64 = parts.iter().map(|(_, weight)| weight).sum();
        let mut inputs = Vec::new();
        for (at, (dataset, weight)) in parts.into_iter().enumerate() {
            let copies = rows as f64 * weight / all / dataset.count()? as f64;
            if !(0.0..=MOST_COPIES).contains(&copies) {
                return Err(Error::InvalidOption {
                    option: "the weights of a mixture",
                    expected: "positive numbers, and from each dataset at most 1000 times its rows"
                        .to_owned(),
                    got: format!("{weight} for dataset {}, {copies} times its rows", at + 1),
                });
            }
            let seed = Stream::new(seed, "mix").child(at as u64).key();
            let seed = u64::from(seed[0]) << 32 | u64::from(seed[1]);
            inputs.push(dataset.resample(format!("{copies:e}"), seed)?);
        }
        let schema = union::schema_of(&inputs)?;
        Ok(Self::unopened(Union { inputs }).with_schema(schema))
    }
}
