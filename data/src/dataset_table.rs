//! Datasets as tables of queries, and what a query reads of them. Both can be described, so that another
//! process has the same.

use crate::Dataset;
use crate::error::Result;
use crate::left_out::LeftOut;
use crate::plan::Compiled;
use crate::scan::projected;
use crate::source::OpenSource;
use arrow::datatypes::{Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::stats::Precision;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Result as EngineResult, Statistics};
use datafusion::error::DataFusionError;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::metrics::MetricsSet;
use datafusion::physical_plan::statistics::StatisticsArgs;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::{PartitionStream, StreamingTableExec};
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A dataset as a table, of so many parts, each of which has neighbouring blocks, one after another.
#[derive(Clone, Debug)]
pub(crate) struct DatasetTable {
    dataset: Dataset,
    rows: Rows,
    parts: usize,
}

/// What blocks are read of.
#[derive(Clone, Debug)]
enum Rows {
    /// Of which the columns are read that are needed.
    Source(Arc<OpenSource>),
    Chain(Compiled),
}

/// What a query reads of a table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Reading {
    projection: Vec<usize>,
    left_out: LeftOut,
    limit: Option<usize>,
}

impl DatasetTable {
    /// Opens the dataset.
    pub(crate) fn new(dataset: Dataset, parts: usize) -> Result<Self> {
        let rows = match dataset.ops() {
            [] => Rows::Source(dataset.open()?),
            _ => Rows::Chain(dataset.compile()?),
        };
        Ok(Self { dataset, rows, parts })
    }

    /// For plans that are not run: with the dataset's columns, and no rows.
    pub(crate) fn unopened(dataset: Dataset) -> Result<Self> {
        let rows = Rows::Source(Arc::new(OpenSource::empty(dataset.schema()?)));
        Ok(Self { dataset, rows, parts: 1 })
    }

    pub(crate) fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    pub(crate) fn parts(&self) -> usize {
        self.parts
    }

    pub(crate) fn exec(&self, reading: Reading) -> EngineResult<DatasetExec> {
        let schema = Arc::new(self.schema().project(&reading.projection)?);
        let partitions = self.partitions(&schema, &reading);
        let limit = reading.limit;
        let streams = StreamingTableExec::try_new(schema, partitions, None, [], false, limit)?;
        Ok(DatasetExec { table: self.clone(), reading, streams })
    }

    fn partitions(&self, schema: &SchemaRef, reading: &Reading) -> Vec<Arc<dyn PartitionStream>> {
        let projection: Arc<[usize]> = reading.projection.as_slice().into();
        let ranges = ranges(self.source().blocks().len(), self.parts);
        let partition = |range: Range<usize>| {
            let blocks = range.filter(|block| !reading.left_out.has(*block)).collect();
            let (rows, projection) = (self.rows.clone(), projection.clone());
            Arc::new(PartStream { rows, blocks, projection, schema: schema.clone() }) as _
        };
        ranges.map(partition).collect()
    }

    fn source(&self) -> &OpenSource {
        match &self.rows {
            Rows::Source(source) => source,
            Rows::Chain(plan) => plan.source(),
        }
    }

    /// Those that filters can leave out blocks by.
    fn constants(&self) -> Option<&RecordBatch> {
        match &self.rows {
            Rows::Source(source) => source.constants(),
            Rows::Chain(_) => None,
        }
    }

    /// How many rows a query that reads it is to expect, where that is known: which side of a join is held
    /// in memory depends on it.
    fn expected(&self, reading: &Reading) -> Option<usize> {
        if matches!(&self.rows, Rows::Chain(plan) if !plan.keeps_every_row()) {
            return None;
        }
        let blocks = self.source().blocks();
        let read = blocks.iter().enumerate().filter(|(block, _)| !reading.left_out.has(*block));
        let rows = read.map(|(_, block)| block.rows as usize).sum::<usize>();
        // Of what is only to be planned nothing is known.
        (!blocks.is_empty()).then(|| reading.limit.unwrap_or(rows).min(rows))
    }
}

#[async_trait]
impl TableProvider for DatasetTable {
    fn schema(&self) -> SchemaRef {
        match &self.rows {
            Rows::Source(source) => source.schema().clone(),
            Rows::Chain(plan) => plan.schema(),
        }
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> EngineResult<Vec<TableProviderFilterPushDown>> {
        Ok(LeftOut::pushdown(self.constants(), filters))
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        let projection = projected(&self.schema(), projection);
        let left_out = LeftOut::by(self.constants(), state, filters)?;
        Ok(Arc::new(self.exec(Reading { projection, left_out, limit })?))
    }
}

/// Reads the parts of a dataset's table.
#[derive(Debug)]
pub(crate) struct DatasetExec {
    table: DatasetTable,
    reading: Reading,
    streams: StreamingTableExec,
}

impl DatasetExec {
    pub(crate) fn table(&self) -> &DatasetTable {
        &self.table
    }

    pub(crate) fn reading(&self) -> &Reading {
        &self.reading
    }
}

impl ExecutionPlan for DatasetExec {
    fn name(&self) -> &str {
        "DatasetExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.streams.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        Vec::new()
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> EngineResult<TreeNodeRecursion>,
    ) -> EngineResult<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(
        self: Arc<Self>,
        _children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn fetch(&self) -> Option<usize> {
        self.reading.limit
    }

    fn with_fetch(&self, limit: Option<usize>) -> Option<Arc<dyn ExecutionPlan>> {
        let reading = Reading { limit, ..self.reading.clone() };
        self.table.exec(reading).ok().map(|exec| Arc::new(exec) as _)
    }

    fn metrics(&self) -> Option<MetricsSet> {
        self.streams.metrics()
    }

    fn statistics_from_inputs(
        &self,
        _inputs: &[Arc<Statistics>],
        of: &StatisticsArgs,
    ) -> EngineResult<Arc<Statistics>> {
        let rows = self.table.expected(&self.reading).filter(|_| of.partition().is_none());
        let rows = rows.map_or(Precision::Absent, Precision::Inexact);
        Ok(Arc::new(Statistics::new_unknown(&self.schema()).with_num_rows(rows)))
    }

    fn execute(
        &self,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        self.streams.execute(partition, context)
    }
}

impl DisplayAs for DatasetExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let schema = self.schema();
        let parts = self.properties().output_partitioning().partition_count();
        write!(f, "DatasetExec: {}, columns=[{}], ", self.table.dataset.title(), names(&schema))?;
        write!(f, "parts={parts}")?;
        if let Some(rows) = self.table.expected(&self.reading) {
            write!(f, ", rows={rows}")?;
        }
        self.reading.limit.map_or(Ok(()), |limit| write!(f, ", limit={limit}"))
    }
}

fn names(schema: &Schema) -> String {
    let names = schema.fields().iter().map(|field| field.name().as_str());
    names.collect::<Vec<_>>().join(", ")
}

/// `blocks` in so many pieces of about the same length, at least one.
fn ranges(blocks: usize, pieces: usize) -> impl Iterator<Item = Range<usize>> {
    let pieces = pieces.clamp(1, blocks.max(1));
    (0..pieces).map(move |at| blocks * at / pieces..blocks * (at + 1) / pieces)
}

/// Some blocks, in order.
#[derive(Debug)]
struct PartStream {
    rows: Rows,
    blocks: Vec<usize>,
    projection: Arc<[usize]>,
    schema: SchemaRef,
}

impl PartitionStream for PartStream {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let (blocks, projection) = (self.blocks.clone(), self.projection.clone());
        let batches = match &self.rows {
            Rows::Source(source) => {
                let source = source.clone();
                let read = move |block| match source.read(block, &projection) {
                    Ok(batches) => batches,
                    Err(error) => Box::new(std::iter::once(Err(error))) as _,
                };
                let batches = blocks.into_iter().flat_map(read);
                stream::iter(batches.map(|batch| batch.map_err(DataFusionError::from))).boxed()
            }
            Rows::Chain(plan) => chained(plan.clone(), blocks, projection).boxed(),
        };
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), batches))
    }
}

fn chained(
    plan: Compiled,
    blocks: Vec<usize>,
    projection: Arc<[usize]>,
) -> impl futures::Stream<Item = EngineResult<RecordBatch>> + Send {
    let batches = stream::iter(blocks).then(move |block| {
        let (plan, projection) = (plan.clone(), projection.clone());
        async move {
            let batches = plan.execute(block).await.map_err(DataFusionError::from)?;
            let cut = move |batch: RecordBatch| Ok(batch.project(&projection)?);
            Ok::<_, DataFusionError>(stream::iter(batches).map(cut))
        }
    });
    batches.try_flatten()
}
