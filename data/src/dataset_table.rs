//! Datasets as tables of queries, and what a query reads of them. Both can be described, so that another
//! process has the same.

use crate::Dataset;
use crate::error::Result;
use crate::left_out::LeftOut;
use crate::plan::Compiled;
use crate::scan::projected;
use crate::source::OpenSource;
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::stats::Precision;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Result as EngineResult, Statistics};
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::{
    FileGroup, FileOpenFuture, FileOpener, FileScanConfig, FileScanConfigBuilder, FileSource,
};
use datafusion::datasource::source::DataSourceExec;
use datafusion::datasource::table_schema::TableSchema;
use datafusion::error::DataFusionError;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
use datafusion::physical_plan::{DisplayFormatType, ExecutionPlan};
use futures::future::ready;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use object_store::ObjectStore;
use serde::{Deserialize, Serialize};
#[cfg(feature = "backend")]
use std::any::Any;
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

    /// The blocks of each part.
    fn ranges(&self) -> Vec<Range<usize>> {
        ranges(self.source().blocks().len(), self.parts).collect()
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
    fn expected(&self, left_out: &LeftOut) -> Option<usize> {
        if matches!(&self.rows, Rows::Chain(plan) if !plan.keeps_every_row()) {
            return None;
        }
        let blocks = self.source().blocks();
        let read = blocks.iter().enumerate().filter(|(block, _)| !left_out.has(*block));
        let rows = read.map(|(_, block)| block.rows as usize).sum();
        // Of what is only to be planned nothing is known.
        (!blocks.is_empty()).then_some(rows)
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
        let reading = Reading { projection, left_out, limit, parts: self.ranges() };
        Ok(reading.of(self.clone())?)
    }
}

/// What a query reads of a table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Reading {
    projection: Vec<usize>,
    left_out: LeftOut,
    limit: Option<usize>,
    /// The blocks of each part.
    parts: Vec<Range<usize>>,
}

impl Reading {
    /// The plan that reads it.
    pub(crate) fn of(self, table: DatasetTable) -> Result<Arc<DataSourceExec>> {
        let schema = Arc::new(table.schema().project(&self.projection)?);
        let rows = table.expected(&self.left_out).map(|rows| self.limit.unwrap_or(rows).min(rows));
        let rows = rows.map_or(Precision::Absent, Precision::Inexact);
        let statistics = Statistics::new_unknown(&schema).with_num_rows(rows);
        let parts = self.parts.iter().map(part).collect();
        let limit = self.limit;
        let source = DatasetSource::new(table, self, schema);
        // Any store will do: none is asked.
        let scan = FileScanConfigBuilder::new(ObjectStoreUrl::local_filesystem(), Arc::new(source));
        let scan = scan.with_file_groups(parts).with_limit(limit).with_statistics(statistics);
        Ok(DataSourceExec::from_data_source(scan.build()))
    }

    /// What a plan reads, if it is of a dataset, and of which table: as it is by now, with other parts or
    /// another limit, perhaps.
    #[cfg(feature = "backend")]
    pub(crate) fn by(plan: &dyn ExecutionPlan) -> Option<(&DatasetTable, Self)> {
        let source: &dyn Any = plan.downcast_ref::<DataSourceExec>()?.data_source().as_ref();
        let scan = source.downcast_ref::<FileScanConfig>()?;
        let source: &dyn Any = scan.file_source().as_ref();
        let source = source.downcast_ref::<DatasetSource>()?;
        let files = scan.file_groups.iter().flat_map(|part| part.iter());
        let parts = files.filter_map(blocks).collect();
        Some((&source.table, Self { limit: scan.limit, parts, ..source.reading.clone() }))
    }
}

/// A part as the engine has it: a file of its own, of which a range is read.
fn part(blocks: &Range<usize>) -> FileGroup {
    let file = PartitionedFile::new("blocks", 0).with_range(blocks.start as i64, blocks.end as i64);
    FileGroup::new(vec![file])
}

fn blocks(file: &PartitionedFile) -> Option<Range<usize>> {
    let range = file.range.as_ref()?;
    Some(range.start as usize..range.end as usize)
}

/// `blocks` in so many pieces of about the same length, at least one.
fn ranges(blocks: usize, pieces: usize) -> impl Iterator<Item = Range<usize>> {
    let pieces = pieces.clamp(1, blocks.max(1));
    (0..pieces).map(move |at| blocks * at / pieces..blocks * (at + 1) / pieces)
}

/// The parts of a dataset's table as files of the engine: of these it knows, and engines that divide its
/// plans know, which are whose.
#[derive(Clone)]
struct DatasetSource {
    table: DatasetTable,
    reading: Reading,
    schema: TableSchema,
    metrics: ExecutionPlanMetricsSet,
}

impl DatasetSource {
    fn new(table: DatasetTable, reading: Reading, schema: SchemaRef) -> Self {
        let schema = TableSchema::from(schema);
        Self { table, reading, schema, metrics: ExecutionPlanMetricsSet::new() }
    }
}

impl FileSource for DatasetSource {
    fn create_file_opener(
        &self,
        _store: Arc<dyn ObjectStore>,
        _scan: &FileScanConfig,
        _partition: usize,
    ) -> EngineResult<Arc<dyn FileOpener>> {
        let projection = self.reading.projection.as_slice().into();
        let (rows, left_out) = (self.table.rows.clone(), self.reading.left_out.clone());
        Ok(Arc::new(Opener { rows, left_out, projection }))
    }

    fn table_schema(&self) -> &TableSchema {
        &self.schema
    }

    /// Batches are as blocks have them.
    fn with_batch_size(&self, _batch_size: usize) -> Arc<dyn FileSource> {
        Arc::new(self.clone())
    }

    fn metrics(&self) -> &ExecutionPlanMetricsSet {
        &self.metrics
    }

    fn file_type(&self) -> &str {
        "dataset"
    }

    fn supports_repartitioning(&self) -> bool {
        false
    }

    fn fmt_extra(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(rows) = self.table.expected(&self.reading.left_out) {
            write!(f, ", rows={rows}")?;
        }
        write!(f, ", of={}", self.table.dataset.title())
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> EngineResult<TreeNodeRecursion>,
    ) -> EngineResult<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }
}

/// Reads some blocks, in order.
struct Opener {
    rows: Rows,
    left_out: LeftOut,
    projection: Arc<[usize]>,
}

impl FileOpener for Opener {
    fn open(&self, part: PartitionedFile) -> EngineResult<FileOpenFuture> {
        let blocks = blocks(&part).into_iter().flatten();
        let blocks: Vec<_> = blocks.filter(|block| !self.left_out.has(*block)).collect();
        let projection = self.projection.clone();
        let batches = match &self.rows {
            Rows::Source(source) => read(source.clone(), blocks, projection).boxed(),
            Rows::Chain(plan) => chained(plan.clone(), blocks, projection).boxed(),
        };
        Ok(ready(Ok(batches)).boxed())
    }
}

type Batch = EngineResult<RecordBatch>;

fn read(
    source: Arc<OpenSource>,
    blocks: Vec<usize>,
    projection: Arc<[usize]>,
) -> impl Stream<Item = Batch> + Send {
    let batches = blocks.into_iter().flat_map(move |block| match source.read(block, &projection) {
        Ok(batches) => batches,
        Err(error) => Box::new(std::iter::once(Err(error))) as _,
    });
    stream::iter(batches.map(|batch| batch.map_err(Into::into)))
}

fn chained(
    plan: Compiled,
    blocks: Vec<usize>,
    projection: Arc<[usize]>,
) -> impl Stream<Item = Batch> + Send {
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
