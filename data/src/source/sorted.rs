//! What needs all rows in an order first: shuffles, and functions of groups.

use super::{Blocks, Source};
use crate::Dataset;
use crate::batch_fn::{self, BatchMap};
use crate::error::{Error, Result};
use crate::frame::quoted;
use crate::plan::{self, TABLE};
use crate::runtime::block_on;
use crate::scan::MapStream;
use crate::session::{Mode, new_session};
use crate::store::{BlockStore, BlockWriter};
use arrow::array::{ArrayRef, UInt64Array};
use arrow::compute::{concat_batches, partition};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use arrow::row::{OwnedRow, RowConverter, SortField};
use datafusion::catalog::TableProvider;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::common::Column;
use datafusion::logical_expr::Expr;
use datafusion::prelude::DataFrame;
use futures::{StreamExt, TryStreamExt};
use mobula_core::random::Stream;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// All rows in an order drawn from a seed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Shuffled {
    pub(crate) input: Dataset,
    pub(crate) seed: u64,
}

/// A column that no dataset has.
const KEY: &str = "mobula: order";

#[typetag::serde(name = "shuffled")]
impl Source for Shuffled {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let table = plan::table(&self.input, 1)?;
        let (seed, columns) = (self.seed, self.input.schema()?);
        block_on(async move {
            let session = new_session(Mode::Serial)?;
            let failed = Error::engine("shuffle");
            let frame = session.read_table(Arc::new(table)).map_err(&failed)?;
            let keyed = map(frame, draw_keys(seed)).await?;
            let frame = session.read_table(keyed).map_err(&failed)?;
            let column = |name: &str| Expr::Column(Column::new_unqualified(name));
            let frame = frame.sort(vec![column(KEY).sort(true, false)]).map_err(&failed)?;
            let columns = columns.fields().iter().map(|field| column(field.name()));
            let frame = frame.select(columns.collect::<Vec<_>>()).map_err(&failed)?;
            Ok(Arc::new(plan::store(frame, failed).await?) as _)
        })
    }

    fn summary(&self) -> String {
        format!("by seed {}", self.seed)
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        vec![("input".to_owned(), &self.input)]
    }
}

/// Adds a number to each row that is a function of the seed and of how many rows came before.
fn draw_keys(seed: u64) -> Arc<dyn BatchMap> {
    let (stream, next) = (Stream::new(seed, "random_shuffle"), AtomicU64::new(0));
    Arc::new(move |batch: &RecordBatch| {
        let rows = batch.num_rows() as u64;
        let first = next.fetch_add(rows, Ordering::Relaxed);
        let draw = |row| {
            let mut words = stream.at(row, 0);
            u64::from(words.word()) << 32 | u64::from(words.word())
        };
        let keys: ArrayRef = Arc::new((first..first + rows).map(draw).collect::<UInt64Array>());
        let key = Arc::new(Field::new(KEY, DataType::UInt64, true));
        let schema = batch.schema();
        let fields = schema.fields().iter().cloned().chain([key]).collect::<Vec<_>>();
        let columns = batch.columns().iter().cloned().chain([keys]).collect();
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
    })
}

async fn map(frame: DataFrame, function: Arc<dyn BatchMap>) -> Result<Arc<dyn TableProvider>> {
    let plan = frame.create_physical_plan().await.map_err(Error::engine("plan"))?;
    let streams = MapStream::all(plan, function)?;
    let table = StreamingTable::try_new(streams.schema, streams.partitions);
    Ok(Arc::new(table.map_err(Error::engine("plan"))?))
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
        let (function, schema) = (batch_fn::lookup(&self.function)?, self.input.schema()?);
        let made = function.columns(&schema)?;
        GroupWriter::new(&schema, &self.keys, function).map(|_| made)
    }
}

#[typetag::serde(name = "groups")]
impl Source for Groups {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let (made, function) = (self.schema()?, batch_fn::lookup(&self.function)?);
        let mut groups = GroupWriter::new(&*self.input.schema()?, &self.keys, function)?;
        let keys: Vec<_> = self.keys.iter().map(|key| quoted(key)).collect();
        let query = format!("SELECT * FROM {TABLE} ORDER BY {}", keys.join(", "));
        let table = plan::table(&self.input, 1)?;
        block_on(async move {
            let frame =
                plan::query_frame(vec![(TABLE.to_owned(), table)], &query, Mode::Serial).await?;
            let failed = Error::sql(&query);
            let mut rows = frame.execute_stream().await.map_err(&failed)?.map_err(failed);
            while let Some(batch) = rows.next().await {
                groups.push(&batch?)?;
            }
            Ok(Arc::new(groups.finish(made)?) as _)
        })
    }

    fn summary(&self) -> String {
        format!("{:?} of each group of {}", self.function, self.keys.join(", "))
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        vec![("input".to_owned(), &self.input)]
    }
}

/// Takes rows in the order of their keys, and passes on each group as a whole.
struct GroupWriter {
    function: Arc<dyn BatchMap>,
    keys: Vec<usize>,
    converter: RowConverter,
    /// The group in hand, which may go on in the next batch.
    group: Vec<RecordBatch>,
    key: Option<OwnedRow>,
    blocks: BlockWriter,
}

impl GroupWriter {
    fn new(schema: &Schema, keys: &[String], function: Arc<dyn BatchMap>) -> Result<Self> {
        if keys.is_empty() {
            return Err(Error::InvalidOption {
                option: "the keys of groups",
                expected: "at least one column".to_owned(),
                got: "none".to_owned(),
            });
        }
        let index =
            |key: &String| schema.index_of(key).map_err(|_| Error::no_such_column(key, schema));
        let keys = keys.iter().map(index).collect::<Result<Vec<_>>>()?;
        let types = keys.iter().map(|at| SortField::new(schema.field(*at).data_type().clone()));
        let converter = RowConverter::new(types.collect())?;
        let (group, key, blocks) = (Vec::new(), None, BlockWriter::default());
        Ok(Self { function, keys, converter, group, key, blocks })
    }

    fn push(&mut self, batch: &RecordBatch) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let columns: Vec<_> = self.keys.iter().map(|at| batch.column(*at).clone()).collect();
        for range in partition(&columns)?.ranges() {
            let first: Vec<_> = columns.iter().map(|column| column.slice(range.start, 1)).collect();
            let key = self.converter.convert_columns(&first)?.row(0).owned();
            if self.key.as_ref() != Some(&key) {
                self.end_group()?;
                self.key = Some(key);
            }
            self.group.push(batch.slice(range.start, range.len()));
        }
        Ok(())
    }

    fn end_group(&mut self) -> Result<()> {
        let Some(first) = self.group.first() else { return Ok(()) };
        let group = concat_batches(&first.schema(), &self.group)?;
        self.group.clear();
        self.blocks.push(self.function.map(&group)?)
    }

    fn finish(mut self, schema: SchemaRef) -> Result<BlockStore> {
        self.end_group()?;
        self.blocks.finish(schema)
    }
}
