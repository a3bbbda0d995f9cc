//! The leaves of a plan: blocks of a source, cut down to one side of its splits.

use crate::batch_fn::BatchMap;
use crate::counted::Counted;
use crate::dataset::Op;
use crate::error::{Error, Result};
use crate::operator::Exec;
use crate::plan::Compiled;
use crate::runtime::meanwhile;
use crate::source::{Block, OpenSource};
use crate::split::{Split, mask};
use crate::store::relabel;
use arrow::array::AsArray;
use arrow::compute::filter_record_batch;
use arrow::datatypes::{FieldRef, SchemaRef};
use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::{DFSchema, Result as EngineResult};
use datafusion::error::DataFusionError;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::expr_rewriter::unnormalize_col;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::{PartitionStream, StreamingTableExec};
use datafusion::physical_plan::{ExecutionPlan, ExecutionPlanProperties};
use futures::{StreamExt, stream};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A source as a table.
#[derive(Clone, Debug)]
pub(crate) enum SourceTable {
    /// One partition a block.
    Blocks { source: Arc<OpenSource>, splits: Arc<[Split]> },
    /// So many partitions, each of which has neighbouring blocks of a plan, one after another.
    Chains(Compiled, usize),
    /// The same of a source, with the columns that are needed.
    Sequences(Arc<OpenSource>, usize),
}

impl SourceTable {
    /// The blocks of `source` with the rows that the splits among `ops` leave.
    pub(crate) fn new(source: Arc<OpenSource>, ops: &[Op]) -> Self {
        let split = |op: &Op| {
            if let Op::Split(split) = op { Some(split.clone()) } else { None }
        };
        let splits = ops.iter().filter_map(split).collect();
        Self::Blocks { source, splits }
    }

    /// The blocks, if filters can leave out some of them.
    fn constants(&self) -> Option<&RecordBatch> {
        match self {
            Self::Blocks { source, .. } | Self::Sequences(source, _) => source.constants(),
            Self::Chains(..) => None,
        }
    }

    /// How many rows a query that reads it is to expect, where that is known.
    fn rows(&self, left_out: &[bool]) -> Option<usize> {
        let source = match self {
            Self::Blocks { .. } => return None,
            Self::Chains(plan, _) => plan.keeps_every_row().then(|| plan.source())?,
            Self::Sequences(source, _) => source,
        };
        let blocks = source.blocks().iter().enumerate();
        let blocks = blocks.filter(|(block, _)| !is_left_out(left_out, *block));
        let rows = blocks.map(|(_, block)| block.rows as usize).sum();
        // Of what is only to be planned nothing is known.
        (!source.blocks().is_empty()).then_some(rows)
    }

    fn partitions(
        &self,
        projection: &[usize],
        left_out: &[bool],
    ) -> EngineResult<Vec<Arc<dyn PartitionStream>>> {
        let schema = Arc::new(self.schema().project(projection)?);
        let projection: Arc<[usize]> = projection.into();
        Ok(match self {
            Self::Blocks { source, splits } => (0..source.blocks().len())
                .map(|block| {
                    let (source, splits) = (source.clone(), splits.clone());
                    let (schema, projection) = (schema.clone(), projection.clone());
                    let block = (!is_left_out(left_out, block)).then_some(block);
                    Arc::new(BlockStream { source, block, projection, splits, schema }) as _
                })
                .collect(),
            Self::Chains(plan, parts) => ranges(plan.blocks(), *parts)
                .map(|blocks| {
                    let (plan, projection) = (plan.clone(), projection.clone());
                    Arc::new(ChainStream { plan, blocks, projection, schema: schema.clone() }) as _
                })
                .collect(),
            Self::Sequences(source, parts) => ranges(source.blocks().len(), *parts)
                .map(|blocks| {
                    let blocks = blocks.filter(|block| !is_left_out(left_out, *block)).collect();
                    let (source, projection) = (source.clone(), projection.clone());
                    let schema = schema.clone();
                    Arc::new(SequenceStream { source, blocks, projection, schema }) as _
                })
                .collect(),
        })
    }
}

#[async_trait]
impl TableProvider for SourceTable {
    fn schema(&self) -> SchemaRef {
        match self {
            Self::Blocks { source, .. } | Self::Sequences(source, _) => source.schema().clone(),
            Self::Chains(plan, _) => plan.schema(),
        }
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    /// The engine filters what comes, too.
    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> EngineResult<Vec<TableProviderFilterPushDown>> {
        let is_known = |filter: &Expr| self.constants().is_some_and(|of| is_of(filter, of));
        let kind = |filter: &&Expr| match is_known(filter) {
            true => TableProviderFilterPushDown::Inexact,
            false => TableProviderFilterPushDown::Unsupported,
        };
        Ok(filters.iter().map(kind).collect())
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        let all = || (0..self.schema().fields().len()).collect();
        let projection: Vec<usize> = projection.cloned().unwrap_or_else(all);
        let schema = Arc::new(self.schema().project(&projection)?);
        let left_out = self.constants().map(|of| left_out(of, state, filters)).transpose()?;
        let left_out = left_out.unwrap_or_default();
        let partitions = self.partitions(&projection, &left_out)?;
        let plan = StreamingTableExec::try_new(schema, partitions, None, [], false, limit)?;
        let plan: Arc<dyn ExecutionPlan> = Arc::new(plan);
        Ok(match self.rows(&left_out) {
            Some(rows) => {
                Arc::new(Exec::new(Counted { rows: limit.unwrap_or(rows).min(rows) }, plan))
            }
            None => plan,
        })
    }
}

/// Of the blocks of [`left_out`], or of none.
fn is_left_out(left_out: &[bool], block: usize) -> bool {
    left_out.get(block).is_some_and(|out| *out)
}

/// Whether a filter asks for these columns alone.
fn is_of(filter: &Expr, constants: &RecordBatch) -> bool {
    filter.column_refs().iter().all(|column| constants.column_by_name(&column.name).is_some())
}

/// Which blocks have no row that passes the filters.
fn left_out(
    constants: &RecordBatch,
    state: &dyn Session,
    filters: &[Expr],
) -> EngineResult<Vec<bool>> {
    let schema = DFSchema::try_from(constants.schema())?;
    let mut out = vec![false; constants.num_rows()];
    for filter in filters.iter().filter(|filter| is_of(filter, constants)) {
        let passes = state
            .create_physical_expr(unnormalize_col(filter.clone()), &schema)
            .and_then(|filter| filter.evaluate(constants)?.into_array(out.len()));
        // What fails here fails again for the rows that it fails for.
        let Some(passes) = passes.as_ref().ok().and_then(|passes| passes.as_boolean_opt()) else {
            continue;
        };
        for (out, passes) in out.iter_mut().zip(passes) {
            *out |= passes != Some(true);
        }
    }
    Ok(out)
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

/// `blocks` in so many pieces of about the same length, at least one.
fn ranges(blocks: usize, pieces: usize) -> impl Iterator<Item = Range<usize>> {
    let pieces = pieces.clamp(1, blocks.max(1));
    (0..pieces).map(move |at| blocks * at / pieces..blocks * (at + 1) / pieces)
}

/// Blocks of a source, in order.
#[derive(Debug)]
struct SequenceStream {
    source: Arc<OpenSource>,
    blocks: Vec<usize>,
    projection: Arc<[usize]>,
    schema: SchemaRef,
}

impl PartitionStream for SequenceStream {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let (source, projection) = (self.source.clone(), self.projection.clone());
        let batches = self.blocks.clone().into_iter().flat_map(move |block| {
            match source.read(block, &projection) {
                Ok(batches) => batches,
                Err(error) => Box::new(std::iter::once(Err(error))) as _,
            }
        });
        let batches = stream::iter(batches.map(|batch| batch.map_err(Into::into)));
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), batches))
    }
}

/// Blocks of a plan, in order.
#[derive(Debug)]
struct ChainStream {
    plan: Compiled,
    blocks: Range<usize>,
    projection: Arc<[usize]>,
    schema: SchemaRef,
}

impl PartitionStream for ChainStream {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let (plan, projection) = (self.plan.clone(), self.projection.clone());
        let batches = stream::iter(self.blocks.clone()).then(move |block| {
            let (plan, projection) = (plan.clone(), projection.clone());
            async move {
                let batches = plan.execute(block).await.map_err(DataFusionError::from)?;
                let cut = move |batch: RecordBatch| Ok(batch.project(&projection)?);
                Ok::<_, DataFusionError>(stream::iter(batches).map(cut))
            }
        });
        let batches = futures::TryStreamExt::try_flatten(batches);
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
