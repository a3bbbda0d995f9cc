//! Queries over several datasets and over files.

use crate::Dataset;
#[cfg(feature = "backend")]
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::in_turn::InOrder;
use crate::operator::Exec;
use crate::parts::retyped;
use crate::plan::{plan_must_be_deterministic, schema_of};
use crate::runtime::{Tasks, block_on, in_turn};
use crate::session::{Mode, new_session};
use crate::source::Blocks;
use crate::stage::{Names, Stage, Watched};
use crate::store::{BlockStore, Kept};
use crate::tables::{self, Table};
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use datafusion::common::TableReference;
use datafusion::execution::context::SQLOptions;
use datafusion::physical_plan::ExecutionPlanProperties;
use datafusion::prelude::{DataFrame, SessionContext};
use futures::TryStreamExt;
use futures::future::ready;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The name that queries use for the dataset they are asked of.
pub(crate) const TABLE: &str = "dataset";

/// Datasets, by the names that a query calls them.
type Inputs = [(TableReference, Dataset)];

/// The result of a query over the tables given by name, and over files that it names in quotes, as
/// [`Dataset::read`] reads them. It is kept in memory; the tables are read as the query needs them.
///
/// ```
/// use mobula_data::{Dataset, query};
///
/// # std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).unwrap();
/// let digits = Dataset::read_parquet("examples/data/digits-*.parquet")?;
/// let rows = query("SELECT count(*) FROM digits WHERE label = 3", [("digits", digits)])?;
/// let same = "SELECT count(*) FROM 'examples/data/digits-*.parquet' WHERE label = 3";
/// assert_eq!(query::<String>(same, [])?, rows);
/// # Ok::<(), mobula_data::Error>(())
/// ```
///
/// It runs on all processors, within the budget of memory. Rows come in the order that the query asks
/// for; if it asks for none, but filters, computes, limits and unites alone, in that of the tables. Any
/// other order is the same each time, if the memory is enough.
pub fn query<S: Into<String>>(
    sql: &str,
    tables: impl IntoIterator<Item = (S, Dataset)>,
) -> Result<RecordBatch> {
    let rows = query_batches(sql, tables)?;
    let schema = rows.schema();
    Ok(concat_batches(&schema, &rows.collect::<Result<Vec<_>>>()?)?)
}

/// The same a batch at a time, for results that are large: they are kept in memory while the budget
/// has room, and on disk beyond. The whole query has run when this returns.
pub fn query_batches<S: Into<String>>(
    sql: &str,
    tables: impl IntoIterator<Item = (S, Dataset)>,
) -> Result<QueryRows> {
    rows_of(sql, tables, run)
}

/// The same by another engine.
#[cfg(feature = "backend")]
pub(crate) fn query_batches_on<S: Into<String>>(
    backend: &dyn Backend,
    sql: &str,
    tables: impl IntoIterator<Item = (S, Dataset)>,
) -> Result<QueryRows> {
    rows_of(sql, tables, |inputs, query, schema| {
        let session = backend.session().map_err(Error::engine("begin a session"))?;
        let tables = tables::elsewhere(inputs, session.state().config().target_partitions())?;
        run_in(session, tables, inputs, query, schema)
    })
}

fn rows_of<S: Into<String>>(
    sql: &str,
    tables: impl IntoIterator<Item = (S, Dataset)>,
    run: impl FnOnce(&Inputs, &str, &SchemaRef) -> Result<BlockStore>,
) -> Result<QueryRows> {
    let tables = tables.into_iter().map(|(name, table)| (name.into(), table)).collect();
    let inputs = named(tables_of(&new_session(Mode::HashJoin(1))?, sql)?, &tables)?;
    let (empty, of) = (tables::empty(&inputs)?, sql.to_owned());
    let schema = block_on(async move { schema_of(frame(empty, &of, Mode::HashJoin(1)).await?) })?;
    let blocks = run(&inputs, sql, &schema)?;
    Ok(QueryRows { schema: blocks.schema(), blocks: blocks.into_iter() })
}

/// The rows of a query's result. What was read is forgotten.
#[derive(Debug)]
pub struct QueryRows {
    schema: SchemaRef,
    blocks: std::vec::IntoIter<Kept>,
}

impl QueryRows {
    /// Their columns.
    pub fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }
}

impl Iterator for QueryRows {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.blocks.next().map(|block| block.read())
    }
}

/// The datasets that a query's names mean.
fn named(
    names: Vec<TableReference>,
    tables: &BTreeMap<String, Dataset>,
) -> Result<Vec<(TableReference, Dataset)>> {
    let dataset = |name: TableReference| {
        let dataset = match tables.get(name.table()) {
            Some(dataset) => dataset.clone(),
            None => file(&name, tables)?,
        };
        Ok((name, dataset))
    };
    names.into_iter().map(dataset).collect()
}

/// The names of datasets, as they are.
pub(crate) fn bare(inputs: &[(String, Dataset)]) -> Vec<(TableReference, Dataset)> {
    let bare =
        |(name, input): &(String, Dataset)| (TableReference::bare(name.as_str()), input.clone());
    inputs.iter().map(bare).collect()
}

/// The columns of the result of a query that gives the same each time, without running it.
pub(crate) fn query_schema(inputs: &Inputs, query: &str) -> Result<SchemaRef> {
    let (tables, query) = (tables::empty(inputs)?, query.to_owned());
    let schema = block_on(async move {
        let frame = frame(tables, &query, Mode::HashJoin(1)).await?;
        plan_must_be_deterministic(frame.logical_plan(), &query)?;
        schema_of(frame)
    })?;
    let mut names = BTreeSet::new();
    match schema.fields().iter().find(|field| !names.insert(field.name())) {
        Some(twice) => Err(Error::ColumnTwice { column: twice.name().clone() }),
        None => Ok(schema),
    }
}

/// The result of a query whose columns are known, so that every worker that runs it gets the same
/// rows, in the same order where the memory is enough.
pub(crate) fn run(inputs: &Inputs, query: &str, schema: &SchemaRef) -> Result<BlockStore> {
    let mut mode = tables::mode(inputs)?;
    loop {
        let tables = tables::all(inputs, mode)?;
        let rows = run_in(new_session(mode)?, tables, inputs, query, schema);
        match (rows, mode.with_less_memory()) {
            (Err(Error::OutOfMemory { reason, .. }), Some(less)) => {
                tracing::debug!(?mode, ?less, reason, "too little memory for a query");
                mode = less;
            }
            (result, _) => return result,
        }
    }
}

/// The same once, in a session.
fn run_in(
    session: SessionContext,
    tables: Vec<Table>,
    inputs: &Inputs,
    query: &str,
    schema: &SchemaRef,
) -> Result<BlockStore> {
    let (query, schema) = (query.to_owned(), schema.clone());
    let rows =
        block_on(
            async move { store(frame_in(session, tables, &query).await?, &query, &schema).await },
        );
    // Rather what became of a file than what was read of it.
    inputs.iter().try_for_each(|(_, input)| input.open()?.check_files())?;
    rows
}

/// What the rows of a query are called.
#[derive(Debug)]
struct Query;

impl Names for Query {
    fn name(&self, _block: usize) -> String {
        "its result".to_owned()
    }
}

/// The rows of a query, as blocks with the types of a schema.
async fn store(frame: DataFrame, query: &str, schema: &SchemaRef) -> Result<BlockStore> {
    let failed = Error::sql(query);
    let context = Arc::new(frame.task_ctx());
    let plan = frame.create_physical_plan().await.map_err(&failed)?;
    // What other engines plan for no rows may have no columns.
    let schema = match plan.schema().fields().is_empty() {
        true => schema.clone(),
        false => tables::with_types(&plan.schema(), schema),
    };
    // What would be kept until it is its turn is kept as the result.
    let plan = match plan.downcast_ref::<Exec<InOrder>>() {
        Some(all) => all.input().clone(),
        None => plan,
    };
    let partitions = plan.output_partitioning().partition_count();
    let blocks = (partitions > 1).then_some(partitions);
    let stage = Stage::new(format!("query: {query}"), blocks, Box::new(Query));
    let (typed, of) = (schema.clone(), context.clone());
    let stores = in_turn(partitions, context.clone(), move |partition| {
        let (plan, context, stage) = (plan.clone(), of.clone(), stage.clone());
        let schema = typed.clone();
        async move {
            let typed = schema.clone();
            let rows = plan.execute(partition, context)?;
            let rows = rows.and_then(move |rows| ready(retyped(&rows, &typed).map_err(Into::into)));
            BlockStore::collect(schema, Watched::new(rows, &stage, partition)).await
        }
    });
    let stores = stores.try_collect::<Vec<_>>().await.map_err(failed);
    if let (Err(_), Some(tasks)) = (&stores, context.session_config().get_extension::<Tasks>()) {
        tasks.ended().await;
    }
    Ok(BlockStore::join(schema, stores?))
}

/// A query over tables, which changes nothing.
pub(crate) async fn frame(tables: Vec<Table>, query: &str, mode: Mode) -> Result<DataFrame> {
    frame_in(new_session(mode)?, tables, query).await
}

async fn frame_in(session: SessionContext, tables: Vec<Table>, query: &str) -> Result<DataFrame> {
    for (name, table) in tables {
        session.register_table(name, table).map_err(Error::engine("plan"))?;
    }
    let options =
        SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    session.sql_with_options(query, options).await.map_err(Error::sql(query))
}

/// The tables that a query names and does not make itself.
fn tables_of(session: &SessionContext, sql: &str) -> Result<Vec<TableReference>> {
    let state = session.state();
    let dialect = state.config_options().sql_parser.dialect;
    let statement = state.sql_to_statement(sql, &dialect).map_err(Error::sql(sql))?;
    state.resolve_table_references(&statement).map_err(Error::sql(sql))
}

fn file(table: &TableReference, known: &BTreeMap<String, Dataset>) -> Result<Dataset> {
    let path = table.to_string();
    let named_as_file = path.contains(['.', '/', '*']);
    if named_as_file {
        return Dataset::read(path);
    }
    Err(Error::NoSuchTable { table: path, known: known.keys().cloned().collect() })
}
