//! From a source and a chain of operations to one DataFusion plan with a partition per block.
//!
//! Operations work row by row, so partition `i` of the plan is what becomes of block `i`, however
//! many threads or processes there are. It can be computed alone, and again. Two things that
//! DataFusion does by default would break that, and are off: file scans that steal work from
//! each other's partitions (a partition on its own then returns the whole table), and filters
//! that one partition pushes into another at run time.

use crate::Dataset;
use crate::batch_fn::BatchMap;
use crate::dataset::Op;
use crate::error::{Error, Result};
use crate::functions;
use crate::resample::Resample;
use crate::runtime::{block_on, threads};
use crate::scan::{MapStream, SourceTable};
use crate::session::session;
use crate::source::OpenSource;
use crate::stage::{Stage, Watched};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, SchemaRef};
use arrow::record_batch::RecordBatch;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::common::Column;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::logical_expr::{Expr, LogicalPlan, Volatility, cast};
use datafusion::physical_plan::display::DisplayableExecutionPlan;
use datafusion::physical_plan::{ExecutionPlan, ExecutionPlanProperties};
use datafusion::prelude::{DataFrame, lit};
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use std::sync::Arc;

/// Blocks that wait for a network at the same time, and rows of all of them.
const MOST_WAITING: u64 = 16;
const WAITING_ROWS: u64 = 1 << 20;

/// An executable plan: partition `i` is block `i` of the source after all operations.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    plan: Arc<dyn ExecutionPlan>,
    source: Arc<OpenSource>,
    /// Where no operation does more than choose columns: which.
    chosen: Option<Arc<[usize]>>,
    /// Whether a block has all rows of the source's, and no others.
    keeps_every_row: bool,
    stage: Arc<Stage>,
}

impl Compiled {
    /// `name` is what reports call it.
    pub(crate) fn new(source: Arc<OpenSource>, ops: &[Op], name: String) -> Result<Self> {
        Self::build(source, ops, name, Ok)
    }

    /// The plan without its columns: as many rows, and nothing read that is not needed to know it.
    pub(crate) fn for_counting(source: Arc<OpenSource>, ops: &[Op], name: String) -> Result<Self> {
        Self::build(source, ops, name, |frame| {
            frame.select([lit(1u8).alias("row")]).map_err(Error::engine("count"))
        })
    }

    fn build(
        source: Arc<OpenSource>,
        ops: &[Op],
        name: String,
        last: fn(DataFrame) -> Result<DataFrame>,
    ) -> Result<Self> {
        let ops = ops.to_vec();
        let stage =
            Stage::new(name, Some(source.blocks().len()), Box::new(Arc::downgrade(&source)));
        block_on(async move {
            let frame = last(frame(&source, &ops).await?)?;
            let plan = frame.create_physical_plan().await.map_err(Error::engine("plan"))?;
            let (got, expected) =
                (plan.output_partitioning().partition_count(), source.blocks().len());
            if got != expected {
                return Err(Error::Internal(format!(
                    "a plan has {got} partitions for {expected} blocks"
                )));
            }
            let chosen = chosen(&plan.schema(), source.schema(), &ops);
            let keeps_every_row = ops.iter().all(Op::keeps_every_row);
            Ok(Self { plan, source, chosen, keeps_every_row, stage })
        })
    }

    /// What the operations make of a schema; a clear error if they do not fit it.
    pub(crate) fn schema_of(schema: SchemaRef, ops: &[Op]) -> Result<SchemaRef> {
        let (source, ops) = (Arc::new(OpenSource::empty(schema)), ops.to_vec());
        block_on(async move { schema_of(frame(&source, &ops).await?) })
    }

    /// The engine's plans of a dataset's operations.
    pub(crate) fn explain(dataset: &Dataset) -> Result<String> {
        let source = match dataset.opened() {
            Some(source) => source,
            None => {
                let input = dataset.source_schema()?;
                Arc::new(OpenSource::empty(input))
            }
        };
        let ops = dataset.ops().to_vec();
        block_on(async move { crate::explain::plans(frame(&source, &ops).await?).await })
    }

    pub(crate) fn schema(&self) -> SchemaRef {
        self.plan.schema()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.source.blocks().len()
    }

    /// How many blocks are worth reading at the same time.
    pub(crate) fn at_once(&self) -> usize {
        let most = self.source.blocks().iter().map(|block| block.rows).max().unwrap_or(0).max(1);
        // Large ones wait less for each of their rows, and more of them would not fit into memory.
        let waiting = MOST_WAITING.min(WAITING_ROWS / most) as usize;
        if self.source.waits() { threads().max(waiting) } else { threads() }
    }

    /// For who takes rows for as long as it likes.
    pub(crate) fn endless(self) -> Self {
        self.stage.has_no_end();
        self
    }

    /// The engine's plan, with what each part of it has done so far.
    pub(crate) fn metrics(&self) -> String {
        DisplayableExecutionPlan::with_metrics(&*self.plan).indent(false).to_string()
    }

    pub(crate) fn keeps_every_row(&self) -> bool {
        self.keeps_every_row
    }

    pub(crate) fn source(&self) -> &OpenSource {
        &self.source
    }

    /// The rows of one block, in order. Runs on the crate's threads.
    pub(crate) async fn execute(&self, block: usize) -> Result<Vec<RecordBatch>> {
        self.batches(block)?.try_collect().await
    }

    /// The same as one batch.
    pub(crate) async fn whole(&self, block: usize) -> Result<RecordBatch> {
        Ok(concat_batches(&self.schema(), &self.execute(block).await?)?)
    }

    /// The same, a batch at a time.
    pub(crate) fn batches(&self, block: usize) -> Result<BoxStream<'static, Result<RecordBatch>>> {
        let plan = self.clone();
        // Once it is watched: it begins to read before the first rows are asked for.
        let rows = stream::once(async move { plan.stream(block) });
        let rows = rows.map_ok(|rows| rows.map_err(Error::engine("read rows"))).try_flatten();
        Ok(Watched::new(rows.boxed(), &self.stage, block).boxed())
    }

    /// The same, a batch at a time, for who takes numbers of any width: what needs no engine goes by it.
    pub(crate) fn stream_narrow(
        &self,
        block: usize,
    ) -> Result<BoxStream<'static, Result<RecordBatch>>> {
        Ok(match &self.chosen {
            Some(columns) => {
                let (source, columns) = (self.source.clone(), columns.clone());
                let rows = stream::once(async move { source.read_narrow(block, &columns) });
                let rows = rows.map_ok(stream::iter).try_flatten();
                Watched::new(rows.boxed(), &self.stage, block).boxed()
            }
            None => self.batches(block)?,
        })
    }

    fn stream(&self, block: usize) -> Result<SendableRecordBatchStream> {
        self.plan.execute(block, session().task_ctx()).map_err(Error::engine("run"))
    }
}

/// The columns of the source that are left, if the operations only choose some.
fn chosen(schema: &SchemaRef, source: &SchemaRef, ops: &[Op]) -> Option<Arc<[usize]>> {
    if !ops.iter().all(|op| matches!(op, Op::Select { .. })) {
        return None;
    }
    let names = schema.fields().iter().map(|field| field.name());
    names.map(|name| source.index_of(name).ok()).collect()
}

async fn frame(source: &Arc<OpenSource>, ops: &[Op]) -> Result<DataFrame> {
    let table = SourceTable::new(source.clone(), ops);
    let mut frame = session().read_table(Arc::new(table)).map_err(Error::engine("plan"))?;
    for op in ops {
        frame = apply(frame, op).await?;
    }
    Ok(frame)
}

async fn apply(frame: DataFrame, op: &Op) -> Result<DataFrame> {
    match op {
        Op::Select { columns } => select(frame, columns),
        Op::Filter { predicate } => {
            let expression = parse(&frame, predicate)?;
            frame.filter(expression).map_err(Error::sql(predicate))
        }
        Op::WithColumn { name, expression } => {
            let parsed = parse(&frame, expression)?;
            frame.with_column(name, parsed).map_err(Error::sql(expression))
        }
        Op::Rename { from, to } => rename(frame, from, to),
        // Part of the scan: a function of the position in the source, not of the values.
        Op::Split(_) => Ok(frame),
        Op::Preprocess(preprocessor) => {
            let preprocessor = preprocessor.clone();
            map(frame, Arc::new(move |batch: &RecordBatch| preprocessor.transform(batch))).await
        }
        Op::DrawKeys(keys) => map(frame, Arc::new(keys.clone())).await,
        Op::RowKeys(keys) => map(frame, Arc::new(keys.clone())).await,
        Op::MapBatches { function } => map(frame, crate::batch_fn::lookup(function)?).await,
        Op::Resample(resample) => {
            let copies = parse(&frame, &resample.copies)?;
            let copies = cast(copies, DataType::Float64);
            let frame = frame.with_column(Resample::COPIES, copies);
            let frame = frame.map_err(Error::sql(&resample.copies))?;
            map(frame, Arc::new(resample.clone())).await
        }
    }
}

fn select(frame: DataFrame, columns: &[String]) -> Result<DataFrame> {
    let schema = frame.schema().as_arrow();
    for column in columns {
        schema.field_with_name(column).map_err(|_| Error::no_such_column(column, schema))?;
    }
    // Not `col(name)`, which would take "a.b" apart and lower the case of "A".
    let expressions = columns.iter().map(|c| Expr::Column(Column::new_unqualified(c)));
    frame.select(expressions.collect::<Vec<_>>()).map_err(Error::engine("select columns"))
}

fn rename(frame: DataFrame, from: &str, to: &str) -> Result<DataFrame> {
    let schema = frame.schema().as_arrow();
    schema.field_with_name(from).map_err(|_| Error::no_such_column(from, schema))?;
    if from != to && schema.field_with_name(to).is_ok() {
        return Err(Error::ColumnTwice { column: to.to_owned() });
    }
    let expressions = schema.fields().iter().map(|field| {
        let column = Expr::Column(Column::new_unqualified(field.name()));
        if field.name() == from { column.alias(to) } else { column }
    });
    let expressions: Vec<_> = expressions.collect();
    frame.select(expressions).map_err(Error::engine("rename a column"))
}

fn parse(frame: &DataFrame, sql: &str) -> Result<Expr> {
    functions::check()?;
    let expression = frame.parse_sql_expr(sql).map_err(Error::sql(sql))?;
    must_be_deterministic(&expression, sql)?;
    Ok(expression)
}

/// Passes every batch of a plan through a function.
async fn map(frame: DataFrame, function: Arc<dyn BatchMap>) -> Result<DataFrame> {
    let plan = frame.create_physical_plan().await.map_err(Error::engine("plan"))?;
    let streams = MapStream::all(plan, function)?;
    let schema = streams.schema;
    let table =
        StreamingTable::try_new(schema, streams.partitions).map_err(Error::engine("plan"))?;
    session().read_table(Arc::new(table)).map_err(Error::engine("plan"))
}

/// The columns of a frame, as they are once the engine has found common types where it needs them.
pub(crate) fn schema_of(frame: DataFrame) -> Result<SchemaRef> {
    let plan = frame.into_optimized_plan().map_err(Error::engine("plan"))?;
    Ok(Arc::new(plan.schema().as_arrow().clone()))
}

pub(crate) fn plan_must_be_deterministic(plan: &LogicalPlan, sql: &str) -> Result<()> {
    let mut result = Ok(());
    let visited = plan.apply_with_subqueries(|node| {
        node.apply_expressions(|expression| {
            result = must_be_deterministic(expression, sql);
            Ok(if result.is_ok() { TreeNodeRecursion::Continue } else { TreeNodeRecursion::Stop })
        })
    });
    visited.map_err(Error::sql(sql))?;
    result
}

/// Functions that are constant in one query, but not from one worker to the next.
const CLOCKS: [&str; 4] = ["now", "current_date", "current_time", "today"];

pub(crate) fn must_be_deterministic(expression: &Expr, sql: &str) -> Result<()> {
    let mut culprit = None;
    let visited = expression.apply(|node| {
        if let Expr::ScalarFunction(call) = node {
            let volatile = call.func.signature().volatility == Volatility::Volatile;
            if volatile || CLOCKS.contains(&call.func.name()) {
                culprit = Some(call.func.name().to_owned());
                return Ok(TreeNodeRecursion::Stop);
            }
        }
        Ok(TreeNodeRecursion::Continue)
    });
    visited.map_err(Error::sql(sql))?;
    match culprit {
        Some(function) => Err(Error::NotDeterministic { sql: sql.to_owned(), function }),
        None => Ok(()),
    }
}
