//! The lazy dataset: a description of rows, opened where they are needed.

use crate::batches::Batches;
use crate::error::{Error, Result};
use crate::plan::Compiled;
use crate::preprocess::Preprocessor;
use crate::resample::Resample;
use crate::runtime::{block_on, joined};
use crate::sink::RowKeys;
use crate::source::sorted::DrawKeys;
use crate::source::{OpenSource, Source};
use crate::split::{Side, Split};
use crate::stream::{StreamOptions, TensorSource};
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use arrow::util::pretty::pretty_format_batches;
use futures::{StreamExt, TryStreamExt, stream};
use mobula_core::{Batch, BatchSource, Shard};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, OnceLock};

/// Rows of named columns: where they come from, and what is done to them.
///
/// A dataset is a description. Making one finds out the columns, so that mistakes show where they are
/// made: out of the footer of a Parquet file, say, but of CSV or JSON by reading it once. Cloning one,
/// or sending it to a worker process, is cheap. Rows are read by `count`, `collect`, `head`, `show`, by fitting a preprocessor, and by a stream.
///
/// Operations work row by row and keep the order of the source, but for those that say otherwise.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Dataset {
    #[serde(with = "crate::shared")]
    source: Arc<dyn Source>,
    ops: Vec<Op>,
    /// Shared by everything derived from the same source.
    #[serde(skip)]
    known: Arc<Known>,
    #[serde(skip)]
    schema: OnceLock<SchemaRef>,
}

/// What was found out about a source.
#[derive(Debug, Default)]
struct Known {
    schema: OnceLock<SchemaRef>,
    /// It is opened once.
    open: OnceLock<Arc<OpenSource>>,
}

/// What is done to rows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Op {
    Select {
        columns: Vec<String>,
    },
    Filter {
        predicate: String,
    },
    WithColumn {
        name: String,
        expression: String,
    },
    Rename {
        from: String,
        to: String,
    },
    Split(Split),
    Preprocess(Preprocessor),
    MapBatches {
        function: String,
    },
    Resample(Resample),
    /// For a shuffle; no dataset has it.
    DrawKeys(DrawKeys),
    /// For samples without names; no dataset has it.
    RowKeys(RowKeys),
}

impl Op {
    pub(crate) fn keeps_every_row(&self) -> bool {
        matches!(
            self,
            Self::Select { .. }
                | Self::WithColumn { .. }
                | Self::Rename { .. }
                | Self::Preprocess(_)
        )
    }
}

/// Where datasets come from, beside what `read` has.
impl Dataset {
    /// Rows of a [`Source`] of the program's own.
    pub fn from_source(source: impl Source + 'static) -> Result<Self> {
        let dataset = Self::unopened(source);
        dataset.open()?;
        Ok(dataset)
    }

    pub(crate) fn unopened(source: impl Source + 'static) -> Self {
        Self {
            source: Arc::new(source),
            ops: Vec::new(),
            known: Arc::default(),
            schema: OnceLock::new(),
        }
    }
}

impl Dataset {
    /// The same with nothing open, so that it holds no rows.
    pub(crate) fn closed(&self) -> Self {
        let known = Known::default();
        if let Ok(schema) = self.source_schema() {
            known.schema.get_or_init(|| schema);
        }
        Self { known: Arc::new(known), ..self.clone() }
    }

    /// The same, of which the columns are known without opening it.
    pub(crate) fn with_schema(self, schema: SchemaRef) -> Self {
        self.known.schema.get_or_init(|| schema);
        self
    }
}

/// What can be done to the rows. Errors come at once, not when the rows are read.
impl Dataset {
    /// Keeps the given columns, in this order.
    pub fn select<S: Into<String>>(&self, columns: impl IntoIterator<Item = S>) -> Result<Self> {
        self.with_op(Op::Select { columns: columns.into_iter().map(Into::into).collect() })
    }

    /// Keeps the rows for which a SQL predicate is true, such as `"label < 5"`.
    pub fn filter(&self, predicate: impl Into<String>) -> Result<Self> {
        self.with_op(Op::Filter { predicate: predicate.into() })
    }

    /// Adds a column, or replaces it, with the value of a SQL expression.
    pub fn with_column(
        &self,
        name: impl Into<String>,
        expression: impl Into<String>,
    ) -> Result<Self> {
        self.with_op(Op::WithColumn { name: name.into(), expression: expression.into() })
    }

    /// Parts the rows into a training and a test dataset: no row is in both, each is in one.
    ///
    /// Every row goes to the test side with probability `test_fraction`, by a draw from `seed`
    /// and its position in the source alone. The sides are the same in every process, they do not
    /// change when rows are appended, and their sizes are near the fraction, not exactly on it.
    pub fn train_test_split(&self, test_fraction: f64, seed: u64) -> Result<(Self, Self)> {
        self.split_at("test_fraction", test_fraction, seed)
    }

    /// The sides of a split, of which the fraction goes by the name `option`.
    pub(crate) fn split_at(
        &self,
        option: &'static str,
        test_fraction: f64,
        seed: u64,
    ) -> Result<(Self, Self)> {
        if !(0.0..=1.0).contains(&test_fraction) {
            return Err(Error::InvalidOption {
                option,
                expected: "a number from 0 to 1".to_owned(),
                got: test_fraction.to_string(),
            });
        }
        if self.ops.iter().any(|op| matches!(op, Op::Resample(_))) {
            return Err(Error::InvalidOption {
                option: "the dataset of a split",
                expected: "one whose rows are not resampled: split first, then resample the side to train on".to_owned(),
                got: "one that is".to_owned(),
            });
        }
        let depth = self.ops.iter().filter(|op| matches!(op, Op::Split(_))).count() as u64;
        let side = |side| self.with_op(Op::Split(Split { test_fraction, seed, depth, side }));
        Ok((side(Side::Train)?, side(Side::Test)?))
    }

    /// Applies a fitted preprocessor.
    pub fn preprocess(&self, preprocessor: &Preprocessor) -> Result<Self> {
        self.with_op(Op::Preprocess(preprocessor.clone()))
    }

    /// Passes every batch through the [`BatchFn`](crate::BatchFn) of this name, which may add,
    /// drop or change columns and rows. How rows are grouped into batches is not defined.
    pub fn map_batches(&self, function: impl Into<String>) -> Result<Self> {
        self.with_op(Op::MapBatches { function: function.into() })
    }

    /// Leaves out the given columns.
    pub fn drop_columns<S: AsRef<str>>(
        &self,
        columns: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        let schema = self.schema()?;
        let mut left: Vec<_> = schema.fields().iter().map(|field| field.name().as_str()).collect();
        for column in columns {
            let column = column.as_ref();
            let at = left.iter().position(|name| *name == column);
            left.remove(at.ok_or_else(|| Error::no_such_column(column, &schema))?);
        }
        self.select(left)
    }

    /// Gives a column another name.
    pub fn rename(&self, from: impl Into<String>, to: impl Into<String>) -> Result<Self> {
        self.with_op(Op::Rename { from: from.into(), to: to.into() })
    }

    pub(crate) fn with_op(&self, op: Op) -> Result<Self> {
        let schema = Compiled::schema_of(self.schema()?, std::slice::from_ref(&op))?;
        let mut ops = self.ops.clone();
        ops.push(op);
        let (source, known) = (self.source.clone(), self.known.clone());
        Ok(Self { source, ops, known, schema: schema.into() })
    }
}

/// What reads rows.
impl Dataset {
    /// Names and types of the columns.
    pub fn schema(&self) -> Result<SchemaRef> {
        if let Some(schema) = self.schema.get() {
            return Ok(schema.clone());
        }
        let schema = Compiled::schema_of(self.source_schema()?, &self.ops)?;
        Ok(self.schema.get_or_init(|| schema).clone())
    }

    /// Number of rows. Reads nothing if no operation drops or adds rows.
    pub fn count(&self) -> Result<u64> {
        Ok(self.count_blocks()?.iter().sum())
    }

    /// All rows, in order, in memory, as one batch.
    pub fn collect(&self) -> Result<RecordBatch> {
        let compiled = self.compile()?;
        let schema = compiled.schema();
        let blocks = map_blocks(compiled, |_, batches| Ok(batches))?;
        Ok(concat_batches(&schema, blocks.iter().flatten())?)
    }

    /// All rows, in order, as record batches. The blocks that come next are read meanwhile, as many as
    /// there are processors.
    pub fn batches(&self) -> Result<impl Iterator<Item = Result<RecordBatch>> + use<>> {
        Ok(Batches::new(self.compile()?))
    }

    /// The first `rows` rows. Reads no block after the one that has the last of them.
    pub fn head(&self, rows: usize) -> Result<RecordBatch> {
        let compiled = self.compile()?;
        let (schema, mut batches, mut have) = (compiled.schema(), Vec::new(), 0);
        for block in 0..compiled.blocks() {
            if have >= rows {
                break;
            }
            let compiled = compiled.clone();
            for batch in block_on(async move { compiled.execute(block).await })? {
                have += batch.num_rows();
                batches.push(batch);
            }
        }
        let whole = concat_batches(&schema, &batches)?;
        Ok(whole.slice(0, rows.min(whole.num_rows())))
    }

    /// Prints the first `rows` rows as a table to stdout.
    pub fn show(&self, rows: usize) -> Result<()> {
        let table = pretty_format_batches(&[self.head(rows)?])?;
        mobula_core::console::line(table.to_string());
        Ok(())
    }

    /// All rows at once, as the tensors that [`Dataset::stream`] would give in steps: for data
    /// that fits into memory, such as a test part.
    pub fn to_batch<S: Into<String>>(
        &self,
        features: impl IntoIterator<Item = S>,
        label: impl Into<String>,
    ) -> Result<Batch> {
        let rows = usize::try_from(self.count()?).unwrap_or(usize::MAX).max(1);
        let options = StreamOptions::new(features, label).with_batch_size(rows).with_lanes(1);
        let mut stream = self.stream(options)?.open(Shard::ALL)?;
        Ok(stream.next_batch()?.unwrap_or_default())
    }

    /// A stream of tensor batches for training: counts the rows now, reads them where it is
    /// opened.
    pub fn stream(&self, options: StreamOptions) -> Result<TensorSource> {
        TensorSource::new(self, options)
    }
}

/// For the rest of the crate.
impl Dataset {
    pub(crate) fn open(&self) -> Result<Arc<OpenSource>> {
        if let Some(source) = self.known.open.get() {
            return Ok(source.clone());
        }
        let source = Arc::new(OpenSource::new(&*self.source)?);
        Ok(self.known.open.get_or_init(|| source).clone())
    }

    /// The source, if it was opened.
    pub(crate) fn opened(&self) -> Option<Arc<OpenSource>> {
        self.known.open.get().cloned()
    }

    /// The columns before any operation. Opens the source unless they are known.
    pub(crate) fn source_schema(&self) -> Result<SchemaRef> {
        match self.known.schema.get() {
            Some(schema) => Ok(schema.clone()),
            None => Ok(self.open()?.schema().clone()),
        }
    }

    pub(crate) fn compile(&self) -> Result<Compiled> {
        self.compile_with(&self.ops)
    }

    /// The same with other operations.
    pub(crate) fn compile_with(&self, ops: &[Op]) -> Result<Compiled> {
        Compiled::new(self.open()?, ops, self.stage(ops))
    }

    /// What it is called in one line.
    pub(crate) fn title(&self) -> String {
        self.stage(&self.ops)
    }

    /// What its source and operations on it are called as one.
    fn stage(&self, ops: &[Op]) -> String {
        let (kind, summary) = (self.source.typetag_name(), self.source.summary());
        let source =
            if summary.is_empty() { kind.to_owned() } else { format!("{kind}: {summary}") };
        let ops = ops.iter().map(|op| op.to_string());
        std::iter::once(source).chain(ops).collect::<Vec<_>>().join(" → ")
    }

    pub(crate) fn source(&self) -> &dyn Source {
        &*self.source
    }

    pub(crate) fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Rows of every block after all operations.
    pub(crate) fn count_blocks(&self) -> Result<Vec<u64>> {
        self.count_blocks_until(u64::MAX)
    }

    /// The same, but none for the blocks behind the first `most` rows.
    pub(crate) fn count_blocks_until(&self, most: u64) -> Result<Vec<u64>> {
        let source = self.open()?;
        let needed = self.ops.iter().rposition(|op| !op.keeps_every_row());
        let Some(last) = needed else {
            return Ok(source.blocks().iter().map(|block| block.rows).collect());
        };
        let ops = &self.ops[..=last];
        let name = format!("count: {}", self.stage(ops));
        let compiled = Compiled::for_counting(source, ops, name)?;
        block_on(async move {
            let count = |block| {
                let compiled = compiled.clone();
                let rows = |batch: &RecordBatch| batch.num_rows() as u64;
                tokio::spawn(
                    async move { Ok(compiled.execute(block).await?.iter().map(rows).sum()) },
                )
            };
            let counts = stream::iter(0..compiled.blocks()).map(count);
            let mut counts = counts.buffered(compiled.at_once());
            let (mut rows, mut sum) = (vec![0; compiled.blocks()], 0_u64);
            for of_block in &mut rows {
                if sum >= most {
                    break;
                }
                let Some(count) = counts.next().await else { break };
                *of_block = joined(count)?;
                sum += *of_block;
            }
            Ok(rows)
        })
    }

    /// Computes `function(block, rows)` for every block, several at a time, and adds the results to
    /// `start` in the order of the blocks. Few of them wait for their turn.
    pub(crate) fn fold_blocks<T: Send + 'static, A: Send + 'static>(
        &self,
        function: impl Fn(usize, Vec<RecordBatch>) -> Result<T> + Send + Sync + 'static,
        start: A,
        add: impl Fn(&mut A, T) + Send + 'static,
    ) -> Result<A> {
        fold_blocks(self.compile()?, function, start, add)
    }
}

fn map_blocks<T: Send + 'static>(
    compiled: Compiled,
    function: impl Fn(usize, Vec<RecordBatch>) -> Result<T> + Send + Sync + 'static,
) -> Result<Vec<T>> {
    fold_blocks(compiled, function, Vec::new(), Vec::push)
}

pub(crate) fn fold_blocks<T: Send + 'static, A: Send + 'static>(
    compiled: Compiled,
    function: impl Fn(usize, Vec<RecordBatch>) -> Result<T> + Send + Sync + 'static,
    start: A,
    add: impl Fn(&mut A, T) + Send + 'static,
) -> Result<A> {
    let function = Arc::new(function);
    block_on(async move {
        let run = |block| {
            let (compiled, function) = (compiled.clone(), function.clone());
            tokio::spawn(async move { function(block, compiled.execute(block).await?) })
        };
        let results = stream::iter(0..compiled.blocks()).map(run).buffered(compiled.at_once());
        let mut results = results.map(joined);
        let mut all = start;
        while let Some(result) = results.try_next().await? {
            add(&mut all, result);
        }
        Ok(all)
    })
}
