//! Rows in another order: sorted, shuffled, and what is made of groups of them.

use super::{BatchIter, Blocks, Source, hash};
use crate::Dataset;
use crate::batch_fn::{self, BatchMap};
use crate::dataset::Op;
use crate::error::{Error, Result};
use crate::exchange::{Keys, Parts, Sample};
use crate::order::OrderBy;
use crate::runtime::{block_on, joined, meanwhile, threads};
use crate::scan::conform;
use crate::store::{BlockStore, BlockWriter};
use arrow::array::{ArrayRef, UInt64Array};
use arrow::compute::partition;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use arrow::row::SortField;
use futures::{StreamExt, stream};
use mobula_core::random::Stream;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// All rows in the order of SQL expressions; those that are the same by them stay as they were.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sorted {
    pub(crate) input: Dataset,
    pub(crate) by: String,
}

#[typetag::serde(name = "sorted")]
impl Source for Sorted {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let order = OrderBy::new(&self.input.compile()?.schema(), &self.by)?;
        let parts = ordered(&self.input, order)?;
        let columns = parts.schema().clone();
        let plan = hash([self.input.plan_hash()?.as_bytes(), b"sort", self.by.as_bytes()]);
        Ok(Arc::new(PartBlocks { parts, columns, plan }))
    }

    fn summary(&self) -> String {
        format!("by {}", self.by)
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        vec![("input".to_owned(), &self.input)]
    }
}

/// The rows of a dataset in parts by an order.
fn ordered(input: &Dataset, order: OrderBy) -> Result<Parts> {
    let sample = input.select(order.columns())?.compile()?;
    let input = input.compile()?;
    block_on(Parts::new(input, Sample::Keys(sample), Arc::new(order)))
}

/// Parts as blocks.
#[derive(Debug)]
struct PartBlocks {
    parts: Parts,
    /// Those of the parts, perhaps without the last.
    columns: SchemaRef,
    /// What the rows are a function of.
    plan: String,
}

impl Blocks for PartBlocks {
    fn schema(&self) -> SchemaRef {
        self.columns.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.parts.rows().to_vec()
    }

    fn fingerprint(&self) -> Result<String> {
        // And how they are parted.
        let rows: Vec<u8> = self.parts.rows().iter().flat_map(|rows| rows.to_le_bytes()).collect();
        Ok(hash([self.plan.as_bytes(), &rows]))
    }

    fn name(&self, block: usize) -> String {
        format!("part {block}")
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        Ok(Box::new(std::iter::once(self.parts.read(block, projection))))
    }
}

/// All rows in an order drawn from a seed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Shuffled {
    pub(crate) input: Dataset,
    pub(crate) seed: u64,
}

#[typetag::serde(name = "shuffled")]
impl Source for Shuffled {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let (rows, mut starts) = (self.input.count_blocks()?, vec![0]);
        for rows in &rows {
            starts.push(starts.last().unwrap_or(&0) + rows);
        }
        let keyed = Op::DrawKeys(DrawKeys { seed: self.seed, starts });
        let ops = [self.input.ops(), &[keyed]].concat();
        let input = self.input.compile_with(&ops)?;
        let columns = self.input.compile()?.schema();
        let parts = block_on(Parts::new(input, Sample::Even(rows), Arc::new(Drawn)))?;
        let seed = self.seed.to_le_bytes();
        let plan = hash([self.input.plan_hash()?.as_bytes(), b"shuffle", &seed]);
        Ok(Arc::new(PartBlocks { parts, columns, plan }))
    }

    fn summary(&self) -> String {
        format!("by seed {}", self.seed)
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        vec![("input".to_owned(), &self.input)]
    }
}

/// The last column, a number that was drawn for each row.
#[derive(Debug)]
struct Drawn;

impl Keys for Drawn {
    fn fields(&self) -> Vec<SortField> {
        vec![SortField::new(DataType::UInt64)]
    }

    fn of(&self, batch: &RecordBatch) -> Result<Vec<ArrayRef>> {
        Ok(vec![batch.column(batch.num_columns() - 1).clone()])
    }
}

/// Adds a number to each row that is a function of the seed and of how many rows come before.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DrawKeys {
    seed: u64,
    /// Rows before each block.
    starts: Vec<u64>,
}

impl BatchMap for DrawKeys {
    fn columns(&self, input: &SchemaRef) -> Result<SchemaRef> {
        // A name that no column has.
        let key = Arc::new(Field::new("mobula: order", DataType::UInt64, true));
        let fields = input.fields().iter().cloned().chain([key]).collect::<Vec<_>>();
        Ok(Arc::new(Schema::new(fields)))
    }

    fn map(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        self.map_at(batch, 0, 0)
    }

    fn map_at(&self, batch: &RecordBatch, block: usize, row: u64) -> Result<RecordBatch> {
        let stream = Stream::new(self.seed, "random_shuffle");
        let first = self.starts[block] + row;
        let draw = |row| {
            let mut words = stream.at(row, 0);
            u64::from(words.word()) << 32 | u64::from(words.word())
        };
        let rows = first..first + batch.num_rows() as u64;
        let keys: ArrayRef = Arc::new(rows.map(draw).collect::<UInt64Array>());
        let columns = batch.columns().iter().cloned().chain([keys]).collect();
        Ok(RecordBatch::try_new(self.columns(&batch.schema())?, columns)?)
    }
}

/// What a batch function makes of each group of rows.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Groups {
    pub(crate) input: Dataset,
    pub(crate) keys: Vec<String>,
    pub(crate) function: String,
}

impl Groups {
    /// The columns that the function makes; an error if a key is none of the input's.
    pub(crate) fn schema(&self) -> Result<SchemaRef> {
        let schema = self.input.schema()?;
        if self.keys.is_empty() {
            return Err(Error::InvalidOption {
                option: "the keys of groups",
                expected: "at least one column".to_owned(),
                got: "none".to_owned(),
            });
        }
        for key in &self.keys {
            schema.index_of(key).map_err(|_| Error::no_such_column(key, &schema))?;
        }
        batch_fn::lookup(&self.function)?.columns(&schema)
    }
}

#[typetag::serde(name = "groups")]
impl Source for Groups {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let (schema, function) =
            (self.input.compile()?.schema(), batch_fn::lookup(&self.function)?);
        let made = function.columns(&schema)?;
        let keys = self.keys.iter().map(|key| schema.index_of(key));
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        let parts = ordered(&self.input, OrderBy::of_groups(&schema, &self.keys)?)?;
        Ok(Arc::new(map_groups(Arc::new(parts), keys, function, made)?))
    }

    fn summary(&self) -> String {
        format!("{:?} of each group of {}", self.function, self.keys.join(", "))
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        vec![("input".to_owned(), &self.input)]
    }
}

/// What a function makes of each group of rows whose columns at `keys` are the same.
fn map_groups(
    parts: Arc<Parts>,
    keys: Vec<usize>,
    function: Arc<dyn BatchMap>,
    made: SchemaRef,
) -> Result<BlockStore> {
    let all: Vec<_> = (0..parts.schema().fields().len()).collect();
    let (count, schema) = (parts.rows().len(), made.clone());
    let of_part = move |part| {
        let rows = parts.read(part, &all)?;
        if rows.num_rows() == 0 {
            return Ok::<_, Error>(Vec::new());
        }
        let columns: Vec<_> = keys.iter().map(|at| rows.column(*at).clone()).collect();
        let groups = partition(&columns)?.ranges().into_iter();
        let run = |group: Range<usize>| {
            conform(function.map(&rows.slice(group.start, group.len()))?, &schema)
        };
        meanwhile(|| groups.map(run).collect())
    };
    let of_part = Arc::new(of_part);
    block_on(async move {
        let run = |part| {
            let of_part = of_part.clone();
            tokio::spawn(async move { of_part(part) })
        };
        let mut made_of = stream::iter(0..count).map(run).buffered(threads());
        let mut blocks = BlockWriter::new(made);
        while let Some(batches) = made_of.next().await {
            joined(batches)?.into_iter().try_for_each(|batch| blocks.push(batch))?;
        }
        blocks.finish()
    })
}
