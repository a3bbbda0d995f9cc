//! Queries over several datasets and over files.

use crate::Dataset;
use crate::error::{Error, Result};
use crate::plan::{in_order, read_only};
use crate::runtime::block_on;
use crate::session::{Joins, new_session};
use arrow::compute::concat_batches;
use arrow::record_batch::RecordBatch;
use datafusion::common::TableReference;
use datafusion::prelude::SessionContext;
use std::collections::BTreeMap;
use std::sync::Arc;

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
pub fn query<S: Into<String>>(
    sql: &str,
    tables: impl IntoIterator<Item = (S, Dataset)>,
) -> Result<RecordBatch> {
    let tables: BTreeMap<String, Dataset> =
        tables.into_iter().map(|(name, table)| (name.into(), table)).collect();
    let session = new_session(Joins::Hash)?;
    for table in tables_of(&session, sql)? {
        let dataset = match tables.get(table.table()) {
            Some(dataset) => dataset.clone(),
            None => file(&table, &tables)?,
        };
        let provider = in_order(&dataset)?;
        session.register_table(table, Arc::new(provider)).map_err(Error::sql(sql))?;
    }
    let sql = sql.to_owned();
    block_on(async move {
        let frame = read_only(&session, &sql).await?;
        let schema = Arc::new(frame.schema().as_arrow().clone());
        let batches = frame.collect().await.map_err(Error::sql(&sql))?;
        let schema = batches.first().map_or(schema, RecordBatch::schema);
        Ok(concat_batches(&schema, &batches)?)
    })
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
