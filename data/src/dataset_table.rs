//! Datasets as tables of queries, and what a query reads of them. Both can be described, so that another
//! process has the same.

use crate::Dataset;
#[cfg(feature = "backend")]
use crate::backend::Packed;
use crate::error::{Error, Result};
use crate::left_out::LeftOut;
use crate::plan::Compiled;
use crate::scan::projected;
use crate::source::OpenSource;
use crate::source::memory::MemoryTable;
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
use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use object_store::ObjectStore;
use serde::{Deserialize, Serialize};
#[cfg(feature = "backend")]
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A dataset as a table, of some parts, each of which has neighbouring blocks, one after another.
#[derive(Clone, Debug)]
pub(crate) struct DatasetTable {
    shape: Arc<Shape>,
    rows: Rows,
}

/// Where the rows of a table are.
#[derive(Clone, Debug)]
enum Rows {
    Here(Opened),
    /// Wherever they are read.
    #[cfg(feature = "backend")]
    There(Arc<Packed>),
}

/// A dataset whose blocks can be read.
#[derive(Clone, Debug)]
pub(crate) enum Opened {
    /// Of which the columns are read that are needed.
    Source(Dataset, Arc<OpenSource>),
    Chain(Dataset, Compiled),
}

/// What is known of a table without its rows.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub(crate) title: String,
    /// Without rows.
    columns: MemoryTable,
    /// Rows of each block, before operations.
    pub(crate) blocks: Vec<u64>,
    /// Whether operations keep them.
    keeps_every_row: bool,
    /// Those that filters can leave out blocks by.
    constants: Option<MemoryTable>,
    parts: Vec<Range<usize>>,
}

impl Opened {
    pub(crate) fn new(dataset: &Dataset) -> Result<Self> {
        Ok(match dataset.ops() {
            [] => Self::Source(dataset.clone(), dataset.open()?),
            _ => Self::Chain(dataset.clone(), dataset.compile()?),
        })
    }

    fn shape(&self, parts: usize) -> Result<Shape> {
        let (dataset, source, columns, keeps_every_row) = match self {
            Self::Source(dataset, source) => (dataset, &**source, source.schema().clone(), true),
            Self::Chain(dataset, plan) => {
                (dataset, plan.source(), plan.schema(), plan.keeps_every_row())
            }
        };
        let constants = matches!(self, Self::Source(..)).then(|| source.constants()).flatten();
        let blocks: Vec<_> = source.blocks().iter().map(|block| block.rows).collect();
        Ok(Shape {
            title: dataset.title().replace('\n', " "),
            columns: MemoryTable::new(vec![RecordBatch::new_empty(columns)])?,
            parts: ranges(blocks.len(), parts).collect(),
            blocks,
            keeps_every_row,
            constants: constants.map(|of| MemoryTable::new(vec![of.clone()])).transpose()?,
        })
    }

    fn read(&self, blocks: Vec<usize>, projection: Arc<[usize]>) -> BoxStream<'static, Batch> {
        match self {
            Self::Source(_, source) => read(source.clone(), blocks, projection).boxed(),
            Self::Chain(_, plan) => chained(plan.clone(), blocks, projection).boxed(),
        }
    }
}

impl Shape {
    fn schema(&self) -> SchemaRef {
        self.columns.schema()
    }

    fn constants(&self) -> Option<&RecordBatch> {
        self.constants.as_ref().and_then(|of| of.batches().first())
    }

    /// How many rows a query that reads it is to expect, where that is known: which side of a join is held
    /// in memory depends on it.
    fn expected(&self, left_out: &LeftOut) -> Option<usize> {
        let blocks = self.blocks.iter().enumerate().filter(|(block, _)| !left_out.has(*block));
        let rows = blocks.map(|(_, rows)| *rows as usize).sum();
        // Of what is only to be planned nothing is known.
        (self.keeps_every_row && !self.blocks.is_empty()).then_some(rows)
    }
}

impl DatasetTable {
    /// Opens the dataset.
    pub(crate) fn new(dataset: &Dataset, parts: usize) -> Result<Self> {
        Self::of(Opened::new(dataset)?, parts)
    }

    /// For plans that are not run: with the dataset's columns, and no rows.
    pub(crate) fn unopened(dataset: &Dataset) -> Result<Self> {
        let empty = Arc::new(OpenSource::empty(dataset.schema()?));
        Self::of(Opened::Source(dataset.clone(), empty), 1)
    }

    fn of(opened: Opened, parts: usize) -> Result<Self> {
        Ok(Self { shape: Arc::new(opened.shape(parts)?), rows: Rows::Here(opened) })
    }
}

#[cfg(feature = "backend")]
impl DatasetTable {
    pub(crate) fn shape(&self) -> &Arc<Shape> {
        &self.shape
    }

    /// Of a plan that comes from elsewhere. Opens nothing.
    pub(crate) fn elsewhere(shape: Arc<Shape>, packed: Arc<Packed>) -> Self {
        Self { shape, rows: Rows::There(packed) }
    }

    pub(crate) fn packed(&self) -> Result<Arc<Packed>> {
        match &self.rows {
            Rows::Here(Opened::Source(dataset, _) | Opened::Chain(dataset, _)) => {
                Packed::new(dataset).map(Arc::new)
            }
            Rows::There(packed) => Ok(packed.clone()),
        }
    }
}

#[async_trait]
impl TableProvider for DatasetTable {
    fn schema(&self) -> SchemaRef {
        self.shape.schema()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> EngineResult<Vec<TableProviderFilterPushDown>> {
        Ok(LeftOut::pushdown(self.shape.constants(), filters))
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        let projection = projected(&self.schema(), projection);
        let left_out = LeftOut::by(self.shape.constants(), state, filters)?;
        let parts = self.shape.parts.iter().map(|part| vec![part.clone()]).collect();
        let reading = Reading { projection, left_out, limit, parts };
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
    parts: Vec<Vec<Range<usize>>>,
}

impl Reading {
    /// The plan that reads it.
    pub(crate) fn of(self, table: DatasetTable) -> Result<Arc<DataSourceExec>> {
        let schema = Arc::new(table.schema().project(&self.projection)?);
        let rows =
            table.shape.expected(&self.left_out).map(|rows| self.limit.unwrap_or(rows).min(rows));
        let rows = rows.map_or(Precision::Absent, Precision::Inexact);
        let statistics = Statistics::new_unknown(&schema).with_num_rows(rows);
        let parts = self.parts.iter().map(|part| file_group(part)).collect();
        let limit = self.limit;
        let source = DatasetSource::new(table, self, schema);
        // None is asked for anything, but the engine wants one that it knows.
        let scan = FileScanConfigBuilder::new(ObjectStoreUrl::local_filesystem(), Arc::new(source));
        let scan = scan.with_file_groups(parts).with_limit(limit).with_statistics(statistics);
        Ok(DataSourceExec::from_data_source(scan.build()))
    }

    /// What a plan reads, if it is of a dataset, and of which table: as it is by now, with some of the parts
    /// and another limit, perhaps.
    #[cfg(feature = "backend")]
    pub(crate) fn by(plan: &dyn ExecutionPlan) -> Result<Option<(&DatasetTable, Self)>> {
        let Some(exec) = plan.downcast_ref::<DataSourceExec>() else { return Ok(None) };
        let source: &dyn Any = exec.data_source().as_ref();
        let Some(scan) = source.downcast_ref::<FileScanConfig>() else { return Ok(None) };
        let source: &dyn Any = scan.file_source().as_ref();
        let Some(source) = source.downcast_ref::<DatasetSource>() else { return Ok(None) };
        let parts = scan.file_groups.iter().map(|part| part.iter().map(blocks).collect());
        let parts = parts.collect::<Result<_>>()?;
        Ok(Some((&source.table, Self { limit: scan.limit, parts, ..source.reading.clone() })))
    }
}

/// A part as the engine has it: files of its own, which are ranges of blocks.
fn file_group(blocks: &[Range<usize>]) -> FileGroup {
    let file = |blocks: &Range<usize>| {
        PartitionedFile::new("blocks", 0).with_range(blocks.start as i64, blocks.end as i64)
    };
    FileGroup::new(blocks.iter().map(file).collect())
}

fn blocks(file: &PartitionedFile) -> Result<Range<usize>> {
    let range = file.range.as_ref().map(|range| range.start as usize..range.end as usize);
    range.ok_or_else(|| Error::Internal("a part of a dataset without its blocks".to_owned()))
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
        let (table, left_out) = (self.table.clone(), self.reading.left_out.clone());
        Ok(Arc::new(Opener { table, left_out, projection }))
    }

    fn table_schema(&self) -> &TableSchema {
        &self.schema
    }

    /// The engine cuts them as it likes.
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
        if let Some(rows) = self.table.shape.expected(&self.reading.left_out) {
            write!(f, ", rows={rows}")?;
        }
        write!(f, ", of={}", self.table.shape.title)
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
    table: DatasetTable,
    left_out: LeftOut,
    projection: Arc<[usize]>,
}

impl FileOpener for Opener {
    fn open(&self, part: PartitionedFile) -> EngineResult<FileOpenFuture> {
        let blocks = blocks(&part)?.filter(|block| !self.left_out.has(*block)).collect();
        let projection = self.projection.clone();
        match &self.table.rows {
            Rows::Here(opened) => Ok(ready(Ok(opened.read(blocks, projection))).boxed()),
            #[cfg(feature = "backend")]
            Rows::There(packed) => {
                let opened = crate::backend::opened(packed.clone(), self.table.shape.clone());
                Ok(async move { Ok(opened.await?.read(blocks, projection)) }.boxed())
            }
        }
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
