//! PostgreSQL: the result of a query as a dataset, and a dataset as a table.

mod address;
mod connection;
mod encode;
mod numeric;
mod sink;
mod source;
mod types;

use crate::Dataset;
use crate::database::{IfExists, described};
use crate::error::Result;
use crate::runtime::block_on;
use address::Address;
use serde::{Deserialize, Serialize};
use source::Postgres;
use std::time::Duration;

/// How long a server may say nothing, unless told otherwise: a query may take that long to its first row.
const PATIENCE: Duration = Duration::from_secs(600);

/// How to read from PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PostgresOptions {
    partitions: Option<Partitions>,
    timeout: Duration,
}

/// Rows parted by a column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Partitions {
    column: String,
    count: usize,
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self { partitions: None, timeout: PATIENCE }
    }
}

impl PostgresOptions {
    /// Reads through `count` connections at once, each of which has a range of the whole numbers in
    /// `column`. All see the same moment. Rows come range by range, and those without a number with
    /// the first. The query is run once for the bounds and once for each range, so it should be one that
    /// an index on the column makes cheap. Default: one connection.
    pub fn with_partitions(self, column: impl Into<String>, count: usize) -> Self {
        Self { partitions: Some(Partitions { column: column.into(), count }), ..self }
    }

    /// Sets how long the server may say nothing, to its first row or from one to the next. Default: 10
    /// minutes. Connecting has 10 seconds for each host, or the `connect_timeout` of the URL.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }
}

/// How to write to PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PostgresWriteOptions {
    if_exists: IfExists,
    timeout: Duration,
}

impl Default for PostgresWriteOptions {
    fn default() -> Self {
        Self { if_exists: IfExists::default(), timeout: PATIENCE }
    }
}

impl PostgresWriteOptions {
    /// Sets what becomes of a table of that name. Default: [`IfExists::Fail`].
    pub fn with_if_exists(self, if_exists: IfExists) -> Self {
        Self { if_exists, ..self }
    }

    /// Sets how long the server may say nothing, such as while another transaction holds the table.
    /// Default: 10 minutes.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }
}

/// PostgreSQL. A URL is `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, with parameters such as
/// `?connect_timeout=5` behind it; what it does not say comes from `PGHOST`, `PGPORT`, `PGUSER`,
/// `PGPASSWORD`, `PGDATABASE` and `PGSSLMODE`, in each process that reads. A password is in no message
/// and in no description that is JSON; worker processes are told the one of the URL.
///
/// Connections are not encrypted: `sslmode=require` is an error, and `prefer`, the default, means
/// `disable`.
impl Dataset {
    /// The result of a query that a PostgreSQL server runs. Making it asks for the columns alone.
    ///
    /// Rows are read once in every process that needs them, all as they are at one moment (a
    /// transaction that is read-only and sees no later change), in bounded memory, and kept as
    /// [`sql`](Self::sql) keeps its result. They come in the order of the query's `ORDER BY`; without one,
    /// or where rows are the same by it, in an order that the server gives again as long as nothing
    /// changes, but that it does not promise. A process that reads other rows than another, because
    /// the table changed in between, is refused their stream: [`persist`](Self::persist) what several
    /// processes are to read, or what changes.
    ///
    /// | PostgreSQL | Arrow |
    /// |---|---|
    /// | `boolean`, `smallint`, `integer`, `bigint`, `oid` | `Boolean`, `Int16`, `Int32`, `Int64`, `UInt32` |
    /// | `real`, `double precision` | `Float32`, `Float64` |
    /// | `numeric(p, s)` | `Decimal128`, beyond 38 digits `Decimal256`, at most 76 |
    /// | `numeric` | `Float64`, the nearest; cast it to `numeric(p, s)` in the query to keep all digits |
    /// | `text`, `varchar`, `char`, `name`, `citext`, `xml`, `json`, `jsonb`, `uuid`, enums | `Utf8` |
    /// | `bytea` | `Binary` |
    /// | `date`, `time`, `timestamp`, `timestamptz` | `Date32`, `Time64`, `Timestamp`, the last in UTC; microseconds |
    /// | arrays of these, of one dimension | `List` |
    ///
    /// Another type is an error that names the column. So is a server that cannot be reached, ends, or
    /// says nothing for too long, and a query that it refuses.
    pub fn read_postgres(url: impl AsRef<str>, query: impl Into<String>) -> Result<Self> {
        Self::read_postgres_with(url, query, PostgresOptions::default())
    }

    /// The same with options.
    pub fn read_postgres_with(
        url: impl AsRef<str>,
        query: impl Into<String>,
        options: PostgresOptions,
    ) -> Result<Self> {
        let (address, query) = (Address::new(url.as_ref())?, query.into());
        let schema = block_on(source::schema_of(address.clone(), query.clone(), options.clone()))?;
        let columns = described(schema.clone())?;
        Ok(Self::unopened(Postgres { address, query, options, columns }).with_schema(schema))
    }
}
