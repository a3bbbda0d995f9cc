//! Queries over several datasets and over files.

use crate::Dataset;
use crate::error::{Error, Result};
use crate::plan::{self, read_only};
use crate::remote;
use crate::runtime::block_on;
use crate::session::{Mode, new_session};
use crate::store::relabel;
use arrow::array::RecordBatchOptions;
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use datafusion::catalog::TableProvider;
use datafusion::common::TableReference;
use datafusion::common::tree_node::TreeNode;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{
    ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl,
};
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::collect;
use datafusion::prelude::SessionContext;
use mobula_core::error::AtPath;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use url::Url;

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
/// for; if it asks for none, but filters, computes, limits and unites alone, in that of the tables.
pub fn query<S: Into<String>>(
    sql: &str,
    tables: impl IntoIterator<Item = (S, Dataset)>,
) -> Result<RecordBatch> {
    let tables = tables.into_iter().map(|(name, table)| (name.into(), table)).collect();
    let session = new_session(Mode::Serial)?;
    let tables = named(tables_of(&session, sql)?, &tables)?;
    let mut mode = mode(sql, &tables)?;
    loop {
        match (run(sql, &tables, mode), mode.with_less_memory()) {
            (Err(Error::OutOfMemory { .. }), Some(less)) => mode = less,
            (result, _) => return result,
        }
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

/// What keeps the order of its table is done in it.
fn mode(sql: &str, tables: &[(TableReference, Dataset)]) -> Result<Mode> {
    let session = new_session(Mode::Serial)?;
    for (name, dataset) in tables {
        let table = plan::empty_table(dataset)?;
        session.register_table(name.clone(), Arc::new(table)).map_err(Error::sql(sql))?;
    }
    let query = sql.to_owned();
    let keeps_order = block_on(async move {
        let frame = read_only(&session, &query).await?;
        let reorders = frame.logical_plan().exists(|node| {
            use LogicalPlan as Plan;
            Ok(!matches!(
                node,
                Plan::Projection(_)
                    | Plan::Filter(_)
                    | Plan::Limit(_)
                    | Plan::TableScan(_)
                    | Plan::SubqueryAlias(_)
                    | Plan::Union(_)
                    | Plan::Values(_)
                    | Plan::EmptyRelation(_)
            ))
        });
        Ok(!reorders.map_err(Error::sql(&query))?)
    })?;
    Ok(if keeps_order { Mode::Serial } else { Mode::Parallel })
}

fn run(sql: &str, tables: &[(TableReference, Dataset)], mode: Mode) -> Result<RecordBatch> {
    let session = new_session(mode)?;
    for (name, dataset) in tables {
        let table = provider(dataset, mode)?;
        session.register_table(name.clone(), table).map_err(Error::sql(sql))?;
    }
    let sql = sql.to_owned();
    block_on(async move {
        let frame = read_only(&session, &sql).await?;
        let context = Arc::new(frame.task_ctx());
        let plan = frame.create_physical_plan().await.map_err(Error::sql(&sql))?;
        let schema = plan.schema();
        let batches = collect(plan, context).await.map_err(Error::sql(&sql))?;
        // The branches of a union say of themselves alone what may be missing.
        let batches = batches.iter().map(|batch| relabel(batch, &schema));
        without_views(&concat_batches(&schema, &batches.collect::<Result<Vec<_>>>()?)?)
    })
}

/// A dataset as a table. The engine reads Parquet files itself, as it knows which of their pages a
/// query needs.
fn provider(dataset: &Dataset, mode: Mode) -> Result<Arc<dyn TableProvider>> {
    let ours = || Ok(Arc::new(plan::table(dataset, mode.partitions())?) as _);
    let files = dataset.source().parquet_files().filter(|_| dataset.ops().is_empty());
    let Some(files) = files else { return ours() };
    let failed = Error::engine("read Parquet files");
    let url = |path: &PathBuf| {
        // The engine knows no `..`.
        let url = Url::from_file_path(path.canonicalize().at("resolve", path)?);
        let url = url.map_err(|()| Error::NoFiles { pattern: path.clone() })?;
        ListingTableUrl::try_new(url, None).map_err(&failed)
    };
    // Of an object store it would not notice that a file changed, or is gone.
    if files.iter().any(|path| remote::is_url(path)) {
        return ours();
    }
    let urls = files.iter().map(url).collect::<Result<Vec<_>>>()?;
    // The engine would read them by name.
    if mode != Mode::Parallel && !urls.is_sorted_by_key(|url| url.prefix()) {
        return ours();
    }
    let options = ListingOptions::new(Arc::new(ParquetFormat::default())).with_file_extension("");
    let config = ListingTableConfig::new_with_multi_paths(urls)
        .with_listing_options(options)
        .with_schema(with_views(&*dataset.schema()?));
    Ok(Arc::new(ListingTable::try_new(config).map_err(failed)?))
}

/// Text as the engine is fastest with it.
fn with_views(schema: &Schema) -> SchemaRef {
    retyped(schema, |of| match of {
        DataType::Utf8 => DataType::Utf8View,
        DataType::Binary => DataType::BinaryView,
        other => other.clone(),
    })
}

/// Text as everybody reads it.
fn without_views(batch: &RecordBatch) -> Result<RecordBatch> {
    let schema = retyped(&batch.schema(), |of| match of {
        DataType::Utf8View => DataType::Utf8,
        DataType::BinaryView => DataType::Binary,
        other => other.clone(),
    });
    let columns = batch.columns().iter().zip(schema.fields());
    let columns = columns.map(|(column, field)| cast(column, field.data_type()));
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    let columns = columns.collect::<Result<_, _>>()?;
    Ok(RecordBatch::try_new_with_options(schema, columns, &options)?)
}

fn retyped(schema: &Schema, data_type: fn(&DataType) -> DataType) -> SchemaRef {
    let field =
        |field: &Arc<Field>| field.as_ref().clone().with_data_type(data_type(field.data_type()));
    Arc::new(Schema::new(schema.fields().iter().map(field).collect::<Vec<_>>()))
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
