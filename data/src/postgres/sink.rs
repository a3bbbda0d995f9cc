//! A dataset as a table, all of it or nothing.

use super::PostgresWriteOptions;
use super::address::Address;
use super::connection::Connection;
use super::encode::{Target, Values, created};
use crate::Dataset;
use crate::database::{IfExists, quoted};
use crate::error::{Error, Result};
use crate::plan::Compiled;
use crate::runtime::{block_on, joined, threads};
use arrow::datatypes::{FieldRef, SchemaRef};
use arrow::record_batch::RecordBatch;
use bytes::Bytes;
use futures::{FutureExt, SinkExt, StreamExt, stream};
use std::pin::{Pin, pin};
use tokio_postgres::CopyInSink;
use tokio_postgres::types::ToSql;

const WRITE: &str = "write to";

/// Bytes that are sent at a time, or as many as a row has.
const CHUNK: usize = 256 << 10;

/// What a binary `COPY` begins with: a signature, flags, and the length of what else there is.
const HEAD: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// What it ends with: a row of -1 columns.
const TAIL: [u8; 2] = (-1_i16).to_be_bytes();

impl Dataset {
    /// Writes the rows to a table of a PostgreSQL server, in order, in one transaction: others see all of
    /// them or none, and a write that fails or is killed leaves nothing. `table` is a name as it is,
    /// capitals included, or a schema and a name such as `birds.penguins`. The URL is as [`read_postgres`](Self::read_postgres) takes it.
    /// Gives the number of rows.
    ///
    /// A table that is not there is made, of columns that may be missing and have the types of which
    /// `read_postgres` makes those of the dataset; unsigned and small integers have the next larger type,
    /// `UInt64` is `numeric(20, 0)`, and times lose what is less than a microsecond. One that is there is an
    /// error, unless [`with_if_exists`](PostgresWriteOptions::with_if_exists) says otherwise. When rows are
    /// appended, columns are matched by name, and those of the table that the dataset has not get their
    /// defaults. Values become those of the table's types where these mean the same: numbers as they
    /// fit, text also `uuid`, `json`, `jsonb` and enums. What a constraint of the table refuses
    /// is known when all rows were sent.
    pub fn write_postgres(
        &self,
        url: impl AsRef<str>,
        table: impl AsRef<str>,
        options: PostgresWriteOptions,
    ) -> Result<u64> {
        let address = Address::new(url.as_ref())?;
        let table = Table::new(table.as_ref(), self.schema()?, options.if_exists)?;
        let (table, connection) = block_on(async move {
            let connection = Connection::open(&address, options.timeout).await?;
            // What would fail in the end fails before anything is computed.
            table.check(&connection).await?;
            Ok((table, connection))
        })?;
        let compiled = self.compile()?;
        block_on(async move {
            let written = table.write(&connection, compiled).await;
            if written.is_err() {
                // The server does so by itself when it sees that nobody is there; now it is done.
                let _ = connection.run(WRITE, "ROLLBACK").await;
            }
            written
        })
    }
}

/// The table that is written.
struct Table {
    /// As given.
    name: String,
    /// As SQL has it.
    quoted: String,
    schema: SchemaRef,
    /// Its columns and their types, if it is made.
    definition: String,
    if_exists: IfExists,
}

impl Table {
    fn new(name: &str, schema: SchemaRef, if_exists: IfExists) -> Result<Self> {
        let parts: Vec<_> = match name.split_once('.') {
            Some((schema, name)) => vec![quoted(schema), quoted(name)],
            None => vec![quoted(name)],
        };
        if schema.fields().is_empty() {
            return Err(Error::InvalidOption {
                option: "the columns of a table",
                expected: "at least one".to_owned(),
                got: "none".to_owned(),
            });
        }
        let columns = schema.fields().iter();
        let columns =
            columns.map(|field| Ok(format!("{} {}", quoted(field.name()), created(field)?)));
        let definition = match if_exists {
            // The table may take what a new one could not.
            IfExists::Append => columns.collect::<Result<Vec<_>>>().unwrap_or_default(),
            IfExists::Fail | IfExists::Replace => columns.collect::<Result<Vec<_>>>()?,
        };
        let (name, quoted) = (name.to_owned(), parts.join("."));
        Ok(Self { name, quoted, schema, definition: definition.join(", "), if_exists })
    }

    /// Whether it is there, and may be; and if it is to stay, whether it takes such rows.
    async fn check(&self, connection: &Connection) -> Result<()> {
        let is_there = self.is_there(connection).await?;
        match self.if_exists {
            IfExists::Fail if is_there => Err(Error::TableExists {
                database: connection.name.clone(),
                table: self.name.clone(),
            }),
            IfExists::Append if is_there => self.targets(connection).await.map(drop),
            _ => self.schema.fields().iter().try_for_each(|field| created(field).map(drop)),
        }
    }

    async fn is_there(&self, connection: &Connection) -> Result<bool> {
        let ask = "SELECT to_regclass($1)::text";
        let name: &(dyn ToSql + Sync) = &self.quoted;
        let (client, of) = (connection.client(), [name]);
        let found = connection.wait(WRITE, ask, client.query_one(ask, &of)).await?;
        Ok(found.get::<_, Option<String>>(0).is_some())
    }

    async fn write(&self, connection: &Connection, compiled: Compiled) -> Result<u64> {
        connection.run(WRITE, "BEGIN").await?;
        self.check(connection).await?;
        if self.if_exists == IfExists::Replace {
            connection.run(WRITE, &format!("DROP TABLE IF EXISTS {}", self.quoted)).await?;
        }
        if !self.is_there(connection).await? {
            let create = format!("CREATE TABLE {} ({})", self.quoted, self.definition);
            connection.run(WRITE, &create).await?;
        }
        let targets = self.targets(connection).await?;
        let rows = self.copy(connection, compiled, &targets).await?;
        connection.run(WRITE, "COMMIT").await.map_err(|error| self.unknown(error))?;
        Ok(rows)
    }

    /// The columns of the table that the rows go to, in the order of the dataset's.
    async fn targets(&self, connection: &Connection) -> Result<Vec<Target>> {
        let ask = format!("SELECT * FROM {}", self.quoted);
        let statement = connection.prepare(&ask).await?;
        let columns = statement.columns();
        let target = |field: &FieldRef| {
            let Some(column) = columns.iter().find(|column| column.name() == field.name()) else {
                let available = columns.iter().map(|column| column.name().to_owned()).collect();
                return Err(Error::NoSuchColumn { column: field.name().clone(), available });
            };
            Target::new(field, column.type_().clone())
        };
        self.schema.fields().iter().map(target).collect()
    }

    async fn copy(
        &self,
        connection: &Connection,
        compiled: Compiled,
        targets: &[Target],
    ) -> Result<u64> {
        let columns: Vec<_> = self.schema.fields().iter().map(|of| quoted(of.name())).collect();
        let columns = columns.join(", ");
        let sql = format!("COPY {} ({columns}) FROM STDIN (FORMAT binary)", self.quoted);
        let begun = connection.client().copy_in(&sql);
        let sink = pin!(connection.wait(WRITE, &sql, begun).await?);
        let mut copy = Copy { connection, sql: &sql, sink, pending: HEAD.to_vec(), rows: 0 };
        let read = |block| {
            let compiled = compiled.clone();
            tokio::spawn(async move { compiled.execute(block).await }).map(joined)
        };
        let mut blocks = stream::iter(0..compiled.blocks()).map(read).buffered(threads());
        while let Some(batches) = blocks.next().await {
            for batch in batches? {
                copy.push(&batch, targets).await?;
            }
        }
        copy.finish().await
    }

    /// A commit of which nobody has heard the end.
    fn unknown(&self, error: Error) -> Error {
        let (Error::DatabaseGone { database, .. } | Error::DatabaseSilent { database, .. }) =
            &error
        else {
            return error;
        };
        let (database, table) = (database.clone(), self.name.clone());
        Error::CommitUnknown { database, table, source: error.into() }
    }
}

/// Rows on their way to the server.
struct Copy<'a> {
    connection: &'a Connection,
    sql: &'a str,
    sink: Pin<&'a mut CopyInSink<Bytes>>,
    /// What is not sent yet.
    pending: Vec<u8>,
    rows: u64,
}

impl Copy<'_> {
    async fn push(&mut self, batch: &RecordBatch, targets: &[Target]) -> Result<()> {
        let first = self.rows + 1;
        let columns = targets.iter().zip(batch.columns());
        let columns = columns.map(|(target, column)| target.values(column, first));
        let columns = columns.collect::<Result<Vec<Values<'_>>>>()?;
        for row in 0..batch.num_rows() {
            self.pending.extend((columns.len() as i16).to_be_bytes());
            columns.iter().try_for_each(|column| column.write(row, &mut self.pending))?;
            if self.pending.len() >= CHUNK {
                self.send().await?;
            }
        }
        self.rows += batch.num_rows() as u64;
        Ok(())
    }

    async fn send(&mut self) -> Result<()> {
        let bytes = Bytes::from(std::mem::take(&mut self.pending));
        self.connection.wait(WRITE, self.sql, self.sink.send(bytes)).await
    }

    async fn finish(mut self) -> Result<u64> {
        self.pending.extend(TAIL);
        self.send().await?;
        self.connection.wait(WRITE, self.sql, self.sink.as_mut().finish()).await
    }
}
