//! The leaves of a plan: blocks of a source, cut down to one side of its splits.

use crate::batch_fn::BatchMap;
use crate::dataset::Op;
use crate::error::{Error, Result};
use crate::left_out::LeftOut;
use crate::runtime::meanwhile;
use crate::source::{Block, OpenSource};
use crate::split::{Split, mask};
use crate::store::relabel;
use arrow::compute::filter_record_batch;
use arrow::datatypes::{FieldRef, SchemaRef};
use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::Result as EngineResult;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::{PartitionStream, StreamingTableExec};
use datafusion::physical_plan::{ExecutionPlan, ExecutionPlanProperties};
use futures::{StreamExt, stream};
use std::fmt;
use std::sync::Arc;

/// The blocks of a source as a table, a partition each.
#[derive(Clone, Debug)]
pub(crate) struct SourceTable {
    source: Arc<OpenSource>,
    splits: Arc<[Split]>,
}

impl SourceTable {
    /// The blocks of `source` with the rows that the splits among `ops` leave.
    pub(crate) fn new(source: Arc<OpenSource>, ops: &[Op]) -> Self {
        let split = |op: &Op| {
            if let Op::Split(split) = op { Some(split.clone()) } else { None }
        };
        let splits = ops.iter().filter_map(split).collect();
        Self { source, splits }
    }

    fn partitions(
        &self,
        schema: &SchemaRef,
        projection: &[usize],
        left_out: &LeftOut,
    ) -> Vec<Arc<dyn PartitionStream>> {
        let projection: Arc<[usize]> = projection.into();
        let partition = |block| {
            let (source, splits) = (self.source.clone(), self.splits.clone());
            let (schema, projection) = (schema.clone(), projection.clone());
            let block = (!left_out.has(block)).then_some(block);
            Arc::new(BlockStream { source, block, projection, splits, schema }) as _
        };
        (0..self.source.blocks().len()).map(partition).collect()
    }
}

#[async_trait]
impl TableProvider for SourceTable {
    fn schema(&self) -> SchemaRef {
        self.source.schema().clone()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> EngineResult<Vec<TableProviderFilterPushDown>> {
        Ok(LeftOut::pushdown(self.source.constants(), filters))
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        let projection = projected(&self.schema(), projection);
        let schema = Arc::new(self.schema().project(&projection)?);
        let left_out = LeftOut::by(self.source.constants(), state, filters)?;
        let partitions = self.partitions(&schema, &projection, &left_out);
        Ok(Arc::new(StreamingTableExec::try_new(schema, partitions, None, [], false, limit)?))
    }
}

/// The columns that are asked for: all, unless some are.
pub(crate) fn projected(schema: &SchemaRef, projection: Option<&Vec<usize>>) -> Vec<usize> {
    projection.cloned().unwrap_or_else(|| (0..schema.fields().len()).collect())
}

/// One block of a source.
#[derive(Debug)]
struct BlockStream {
    source: Arc<OpenSource>,
    /// None if no row of it is needed.
    block: Option<usize>,
    projection: Arc<[usize]>,
    splits: Arc<[Split]>,
    schema: SchemaRef,
}

impl BlockStream {
    fn read(
        &self,
        block: usize,
    ) -> Result<impl Iterator<Item = Result<RecordBatch>> + Send + use<>> {
        let Block { start: mut position, .. } = self.source.blocks()[block];
        let splits = self.splits.clone();
        let batches = self.source.read(block, &self.projection)?;
        Ok(batches.map(move |batch| {
            let batch = batch?;
            let first = position;
            position += batch.num_rows() as u64;
            if splits.is_empty() {
                return Ok(batch);
            }
            Ok(filter_record_batch(&batch, &mask(&splits, first..position))?)
        }))
    }
}

impl PartitionStream for BlockStream {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let batches = match self.block.map(|block| self.read(block)).transpose() {
            Ok(batches) => {
                stream::iter(batches.into_iter().flatten()).map(|b| b.map_err(Into::into)).boxed()
            }
            Err(error) => stream::once(async { Err(error.into()) }).boxed(),
        };
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), batches))
    }
}

/// One partition of a plan, passed through a function.
pub(crate) struct MapStream {
    input: Arc<dyn ExecutionPlan>,
    partition: usize,
    function: Arc<dyn BatchMap>,
    schema: SchemaRef,
}

/// All partitions of a plan, passed through a function, with the schema that it makes.
pub(crate) struct MapStreams {
    pub(crate) schema: SchemaRef,
    pub(crate) partitions: Vec<Arc<dyn PartitionStream>>,
}

impl MapStream {
    pub(crate) fn all(
        input: Arc<dyn ExecutionPlan>,
        function: Arc<dyn BatchMap>,
    ) -> Result<MapStreams> {
        let schema = function.columns(&input.schema())?;
        let stream = |partition| {
            let (input, function) = (input.clone(), function.clone());
            Arc::new(Self { input, partition, function, schema: schema.clone() }) as _
        };
        let count = input.output_partitioning().partition_count();
        let partitions = (0..count).map(stream).collect();
        Ok(MapStreams { schema, partitions })
    }
}

impl PartitionStream for MapStream {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let (function, schema, block) =
            (self.function.clone(), self.schema.clone(), self.partition);
        let mut row = 0;
        let apply = move |batch: EngineResult<RecordBatch>| -> EngineResult<RecordBatch> {
            let batch = batch?;
            let first = row;
            row += batch.num_rows() as u64;
            let run = || function.map_at(&batch, block, first);
            let batch = if function.may_wait() { meanwhile(run) } else { run() }?;
            Ok(conform(batch, &schema)?)
        };
        let batches = match self.input.execute(self.partition, context) {
            Ok(batches) => batches.map(apply).boxed(),
            Err(error) => stream::once(async { Err(error) }).boxed(),
        };
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), batches))
    }
}

/// What a function made, which must have the columns that it announced.
pub(crate) fn conform(batch: RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    if batch.schema() == *schema {
        return Ok(batch);
    }
    let of = batch.schema();
    let same = |(one, other): (&FieldRef, &FieldRef)| {
        one.name() == other.name() && one.data_type() == other.data_type()
    };
    let fields = of.fields().iter().zip(schema.fields());
    if of.fields().len() == schema.fields().len() && fields.into_iter().all(same) {
        return relabel(&batch, schema);
    }
    let columns = crate::source::columns;
    Err(Error::SchemaDiffers {
        path: "a batch from a batch function".into(),
        expected: columns(schema),
        got: columns(&of),
    })
}

impl fmt::Debug for MapStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MapStream(partition {})", self.partition)
    }
}
