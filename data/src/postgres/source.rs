//! The result of a query as blocks, all of one moment.

use super::address::Address;
use super::connection::Connection;
use super::types::{Column, Misfit, column};
use super::{Partitions, PostgresOptions};
use crate::database::{must_be, must_differ, quoted};
use crate::error::{Error, Result};
use crate::runtime::{block_on, joined};
use crate::source::memory::MemoryTable;
use crate::source::{Blocks, Source};
use crate::store::{BlockStore, BlockWriter};
use arrow::array::RecordBatchOptions;
use arrow::datatypes::{Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use std::error::Error as StdError;
use std::pin::pin;
use std::sync::Arc;
use tokio_postgres::types::{FromSql, Type};
use tokio_postgres::{Row, Statement};

/// Rows and bytes of a batch on its way into a block.
const BATCH_ROWS: usize = 1024;
const BATCH_BYTES: usize = 4 << 20;

/// One moment of the database, in which nothing can be changed.
const BEGIN: &str = "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// Large tables are read from their first page on, and by one process of the server: the same rows
/// come in the same order again, and sums of floats have the same bits. Servers that speak the
/// protocol alone may not know these settings.
const SAME_ORDER: &str = "SELECT set_config(name, CASE vartype WHEN 'bool' THEN 'off' ELSE '0' END, true) \
     FROM pg_settings WHERE name IN ('synchronize_seqscans', 'max_parallel_workers_per_gather')";

/// The description of a query's result.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Postgres {
    pub(super) address: Address,
    pub(super) query: String,
    pub(super) options: PostgresOptions,
    /// Without rows.
    pub(super) columns: MemoryTable,
}

#[typetag::serde(name = "postgres")]
impl Source for Postgres {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let read = Read {
            address: self.address.clone(),
            query: self.query.clone(),
            options: self.options.clone(),
            schema: self.columns.schema(),
        };
        Ok(Arc::new(block_on(read.all())?))
    }

    fn summary(&self) -> String {
        format!("{} of {}", self.query, self.address)
    }
}

/// The columns of a result, which reads no row of it.
pub(super) async fn schema_of(
    address: Address,
    query: String,
    options: PostgresOptions,
) -> Result<SchemaRef> {
    let connection = Connection::open(&address, options.timeout).await?;
    let schema = schema(&connection, &connection.prepare(&query).await?, &query)?;
    if let Some(partitions) = &options.partitions {
        partitions.check(&schema)?;
        connection.prepare(&format!("SELECT * FROM {}", as_table(&query))).await?;
    }
    Ok(schema)
}

fn schema(connection: &Connection, statement: &Statement, query: &str) -> Result<SchemaRef> {
    let refused = |reason: &str| Error::DatabaseQuery {
        database: connection.name.clone(),
        sql: query.to_owned(),
        position: None,
        reason: reason.to_owned(),
    };
    if !statement.params().is_empty() {
        return Err(refused(
            "it has parameters such as $1, for which there are no values; write values",
        ));
    }
    if statement.columns().is_empty() {
        return Err(refused("it gives no columns, expected a query such as SELECT"));
    }
    let fields = builders(statement)?.into_iter().zip(statement.columns());
    let fields = fields.map(|(mut values, of)| {
        Ok(Field::new(of.name(), values.finish()?.data_type().clone(), true))
    });
    let schema = Schema::new(fields.collect::<Result<Vec<_>>>()?);
    must_differ(&schema)?;
    Ok(Arc::new(schema))
}

fn builders(statement: &Statement) -> Result<Vec<Box<dyn Column>>> {
    let columns = statement.columns().iter();
    columns.map(|of| column(of.name(), of.type_(), of.type_modifier())).collect()
}

/// What is to be read.
struct Read {
    address: Address,
    query: String,
    options: PostgresOptions,
    schema: SchemaRef,
}

impl Read {
    async fn all(self) -> Result<BlockStore> {
        let first = self.connect().await?;
        first.run("read from", BEGIN).await?;
        first.run("read from", SAME_ORDER).await?;
        let Some(partitions) = &self.options.partitions else {
            return rows(&first, &self.query, &self.schema).await;
        };
        let queries = partitions.queries(&first, &self.query).await?;
        let connections = self.same_moment(first, queries.len()).await?;
        let read = |(connection, query): (Connection, String)| {
            let schema = self.schema.clone();
            tokio::spawn(async move { rows(&connection, &query, &schema).await })
        };
        let stores = join_all(connections.into_iter().zip(queries).map(read)).await;
        let stores = stores.into_iter().map(joined).collect::<Result<Vec<_>>>()?;
        Ok(BlockStore::join(self.schema.clone(), stores))
    }

    async fn connect(&self) -> Result<Connection> {
        Connection::open(&self.address, self.options.timeout).await
    }

    /// As many connections as `count`, all of which see the database as `first` does.
    async fn same_moment(&self, first: Connection, count: usize) -> Result<Vec<Connection>> {
        let ask = "SELECT pg_export_snapshot()";
        let moment = first.wait("read from", ask, first.client().query_one(ask, &[])).await?;
        let moment: String = moment.get(0);
        let begin = format!("{BEGIN}; SET TRANSACTION SNAPSHOT '{moment}'");
        let mut all = vec![first];
        while all.len() < count {
            let next = self.connect().await?;
            next.run("read from", &begin).await?;
            next.run("read from", SAME_ORDER).await?;
            all.push(next);
        }
        Ok(all)
    }
}

/// The rows of a query in the order in which they come, kept as blocks.
async fn rows(connection: &Connection, query: &str, expected: &SchemaRef) -> Result<BlockStore> {
    let statement = connection.prepare(query).await?;
    let got = schema(connection, &statement, query)?;
    must_be(expected, &got, &connection.name, query)?;
    let mut batch = Batch::new(&statement, got.clone())?;
    let mut blocks = BlockWriter::new(got);
    let mut rows = pin!(connection.rows(&statement, query).await?);
    while let Some(row) = connection.next(rows.as_mut(), query).await? {
        batch.push(&row)?;
        if batch.is_full() {
            blocks.push(batch.take()?)?;
        }
    }
    blocks.push(batch.take()?)?;
    blocks.finish()
}

/// Rows that are no record batch yet.
struct Batch {
    schema: SchemaRef,
    columns: Vec<Box<dyn Column>>,
    rows: usize,
    bytes: usize,
    /// Rows of the batches before.
    before: u64,
}

impl Batch {
    fn new(statement: &Statement, schema: SchemaRef) -> Result<Self> {
        Ok(Self { schema, columns: builders(statement)?, rows: 0, bytes: 0, before: 0 })
    }

    fn push(&mut self, row: &Row) -> Result<()> {
        self.rows += 1;
        self.bytes += row.raw_size_bytes();
        for (at, column) in self.columns.iter_mut().enumerate() {
            let raw = row.try_get::<_, Raw<'_>>(at).map_err(|e| Error::Internal(e.to_string()))?;
            if let Err(Misfit { got, expected, hint }) = column.push(raw.0) {
                return Err(Error::ColumnValue {
                    column: self.schema.field(at).name().clone(),
                    row: self.before + self.rows as u64,
                    got: got.to_owned(),
                    expected: expected.to_owned(),
                    hint,
                });
            }
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.rows >= BATCH_ROWS || self.bytes >= BATCH_BYTES
    }

    fn take(&mut self) -> Result<RecordBatch> {
        let columns = self.columns.iter_mut().map(|column| column.finish());
        let columns = columns.collect::<Result<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(self.rows));
        self.before += self.rows as u64;
        (self.rows, self.bytes) = (0, 0);
        Ok(RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)?)
    }
}

/// A value as the server sends it.
struct Raw<'a>(Option<&'a [u8]>);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(Self(Some(raw)))
    }

    fn from_sql_null(_: &Type) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(Self(None))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

impl Partitions {
    fn check(&self, schema: &SchemaRef) -> Result<()> {
        let field = schema.field_with_name(&self.column);
        let field = field.map_err(|_| Error::no_such_column(&self.column, schema))?;
        if self.count == 0 {
            let (option, expected) = ("the number of partitions", "at least 1".to_owned());
            return Err(Error::InvalidOption { option, expected, got: "0".to_owned() });
        }
        if field.data_type().is_integer() {
            return Ok(());
        }
        Err(Error::ColumnType {
            column: self.column.clone(),
            expected: "whole numbers, by which the rows are parted",
            got: field.data_type().to_string(),
            hint: "; give the query a column of them, such as CAST(EXTRACT(epoch FROM time) AS bigint)",
        })
    }

    /// Queries that have each row of `query` once, in all of them together.
    async fn queries(&self, connection: &Connection, query: &str) -> Result<Vec<String>> {
        let (query, column) = (as_table(query), quoted(&self.column));
        let ask = format!("SELECT min({column})::bigint, max({column})::bigint FROM {query}");
        let bounds = connection.client().query_one(&ask, &[]);
        let bounds = connection.wait("read from", &ask, bounds).await?;
        let ranges = match (bounds.get(0), bounds.get(1)) {
            (Some(least), Some(most)) => ranges(least, most, self.count),
            _ => Vec::new(),
        };
        let part = |(at, (first, last)): (usize, &(i64, i64))| {
            // Rows without a number come with the first.
            let missing = if at == 0 { format!(" OR {column} IS NULL") } else { String::new() };
            format!("SELECT * FROM {query} WHERE {column} BETWEEN {first} AND {last}{missing}")
        };
        Ok(match ranges.is_empty() {
            true => vec![format!("SELECT * FROM {query}")],
            false => ranges.iter().enumerate().map(part).collect(),
        })
    }
}

/// A query where another one has a table. Its last line may end in a comment.
fn as_table(query: &str) -> String {
    format!("({}\n) AS result", query.trim().trim_end_matches(';'))
}

/// `least..=most` in at most `count` pieces of about the same length.
fn ranges(least: i64, most: i64, count: usize) -> Vec<(i64, i64)> {
    let numbers = i128::from(most) - i128::from(least) + 1;
    let count = numbers.min(count as i128);
    let start = |at: i128| (i128::from(least) + numbers * at / count) as i64;
    let last = |at: i128| (i128::from(least) + numbers * (at + 1) / count - 1) as i64;
    (0..count).map(|at| (start(at), last(at))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_every_number_once() {
        assert_eq!(ranges(1, 10, 3), [(1, 3), (4, 6), (7, 10)]);
        assert_eq!(ranges(5, 5, 4), [(5, 5)]);
        let all = ranges(i64::MIN, i64::MAX, 1000);
        assert_eq!((all[0].0, all[999].1), (i64::MIN, i64::MAX));
        assert!(all.windows(2).all(|two| two[0].1 + 1 == two[1].0));
    }
}
