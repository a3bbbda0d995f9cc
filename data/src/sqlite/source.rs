//! The result of a query as blocks.

use super::values::{Values, declared, widened};
use super::{BUSY, failed, refused};
use crate::database::{must_be, must_differ};
use crate::error::{Error, Result};
use crate::runtime::meanwhile;
use crate::source::memory::MemoryTable;
use crate::source::{Blocks, Source};
use crate::store::{BlockStore, BlockWriter};
use arrow::array::RecordBatchOptions;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Row, Statement};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Rows and bytes of a batch on its way into a block.
const BATCH_ROWS: usize = 1024;
const BATCH_BYTES: usize = 4 << 20;

/// The description of a query's result.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Sqlite {
    pub(super) path: PathBuf,
    pub(super) query: String,
    /// Without rows.
    pub(super) columns: MemoryTable,
}

#[typetag::serde(name = "sqlite")]
impl Source for Sqlite {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let rows = || rows(&self.path, &self.query, self.columns.schema());
        Ok(Arc::new(meanwhile(rows)?))
    }

    fn summary(&self) -> String {
        format!("{} of {}", self.query, self.path.display())
    }
}

fn connect(path: &Path) -> Result<Connection> {
    // To write, if it may: what a killed writer has left is undone by who opens the file next.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let opened = Connection::open_with_flags(path, flags);
    let connection = opened.map_err(failed(path, "open"))?;
    connection.pragma_update(None, "query_only", true).map_err(failed(path, "query_only"))?;
    connection.busy_timeout(BUSY).map_err(failed(path, "busy_timeout"))?;
    Ok(connection)
}

fn prepare<'a>(connection: &'a Connection, path: &Path, query: &str) -> Result<Statement<'a>> {
    let statement = connection.prepare(query).map_err(failed(path, query))?;
    let reason = match (statement.column_count(), statement.parameter_count()) {
        (0, _) => "it gives no columns, expected a query such as SELECT",
        (_, 0) => return Ok(statement),
        _ => "it has parameters such as ?, for which there are no values; write values",
    };
    Err(refused(path, query, None, reason.to_owned()))
}

/// The columns of a result. The types that are not declared are found by reading it.
pub(super) fn schema_of(path: &Path, query: &str) -> Result<SchemaRef> {
    let connection = connect(path)?;
    let mut statement = prepare(&connection, path, query)?;
    let columns = statement.columns();
    let (names, declared): (Vec<_>, Vec<_>) =
        columns.map(|of| (of.name().to_owned(), declared(of.decl_type()))).unzip();
    let types = match declared.iter().cloned().collect() {
        Some(types) => types,
        None => found(&mut statement, declared).map_err(failed(path, query))?,
    };
    let fields = names.into_iter().zip(types).map(|(name, of)| Field::new(name, of, true));
    let schema = Schema::new(fields.collect::<Vec<_>>());
    must_differ(&schema)?;
    Ok(Arc::new(schema))
}

/// The types of all columns, where not all are declared.
fn found(
    statement: &mut Statement<'_>,
    declared: Vec<Option<DataType>>,
) -> rusqlite::Result<Vec<DataType>> {
    let open: Vec<_> = (0..declared.len()).filter(|at| declared[*at].is_none()).collect();
    let mut types: Vec<_> = declared.into_iter().map(|of| of.unwrap_or(DataType::Null)).collect();
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        for at in &open {
            let known = std::mem::replace(&mut types[*at], DataType::Null);
            types[*at] = widened(known, row.get_ref(*at)?);
        }
    }
    Ok(types)
}

/// The rows of a query in the order in which they come, kept as blocks. A statement sees the database
/// as it is when it begins.
fn rows(path: &Path, query: &str, schema: SchemaRef) -> Result<BlockStore> {
    let connection = connect(path)?;
    let mut statement = prepare(&connection, path, query)?;
    must_be(&schema, &renamed(&schema, &statement), &path.display().to_string(), query)?;
    let mut batch = Batch::new(schema.clone());
    let mut blocks = BlockWriter::new(schema);
    let mut rows = statement.query([]).map_err(failed(path, query))?;
    while let Some(row) = rows.next().map_err(failed(path, query))? {
        batch.push(row, failed(path, query))?;
        if batch.is_full() {
            blocks.push(batch.take()?)?;
        }
    }
    blocks.push(batch.take()?)?;
    blocks.finish()
}

/// The columns by the names that a statement has for them; values tell whether the types are right.
fn renamed(schema: &SchemaRef, statement: &Statement<'_>) -> SchemaRef {
    let of = |at: usize| schema.fields().get(at).map_or(&DataType::Null, |field| field.data_type());
    let names = statement.column_names().enumerate();
    let fields = names.map(|(at, name)| Field::new(name, of(at).clone(), true));
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// Rows that are no record batch yet.
struct Batch {
    schema: SchemaRef,
    columns: Vec<Values>,
    rows: usize,
    bytes: usize,
    /// Rows of the batches before.
    before: u64,
}

impl Batch {
    fn new(schema: SchemaRef) -> Self {
        let columns = schema.fields().iter().map(|field| Values::new(field.data_type())).collect();
        Self { schema, columns, rows: 0, bytes: 0, before: 0 }
    }

    fn push(&mut self, row: &Row<'_>, failed: impl Fn(rusqlite::Error) -> Error) -> Result<()> {
        self.rows += 1;
        for (at, column) in self.columns.iter_mut().enumerate() {
            let value = row.get_ref(at).map_err(&failed)?;
            self.bytes += bytes_of(value);
            column.push(value).map_err(|got| Error::ColumnValue {
                column: self.schema.field(at).name().clone(),
                row: self.before + self.rows as u64,
                got,
                expected: column.expected().to_owned(),
                hint: "; cast the column in the query, such as CAST(column AS TEXT)",
            })?;
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.rows >= BATCH_ROWS || self.bytes >= BATCH_BYTES
    }

    fn take(&mut self) -> Result<RecordBatch> {
        let columns = self.columns.iter_mut().map(Values::finish).collect();
        let options = RecordBatchOptions::new().with_row_count(Some(self.rows));
        self.before += self.rows as u64;
        (self.rows, self.bytes) = (0, 0);
        Ok(RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)?)
    }
}

fn bytes_of(value: ValueRef<'_>) -> usize {
    match value {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes.len(),
        _ => size_of::<i64>(),
    }
}
