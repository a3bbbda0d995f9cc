//! A dataset as a table, all of it or nothing.

use super::{BUSY, failed};
use crate::Dataset;
use crate::batches::Batches;
use crate::database::{IfExists, fitted, quoted};
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, SchemaRef};
use arrow::record_batch::RecordBatch;
use mobula_core::error::AtPath;
use rusqlite::types::ToSqlOutput;
use rusqlite::{Connection, OptionalExtension, Statement, TransactionBehavior};
use std::path::Path;

impl Dataset {
    /// Writes the rows to a table of a SQLite database, in order, in one transaction: others see all of
    /// them or none, and a write that fails or is killed leaves nothing. A file that is not there is made.
    /// Gives the number of rows.
    ///
    /// A new table has `BOOLEAN`, `INTEGER`, `REAL`, `TEXT` and `BLOB`; decimals, dates and times
    /// are text, in the form `2000-12-31T23:59:59`. Lists, and floats that are no number, which SQLite would
    /// take for missing, are errors. `if_exists` says what becomes of a table of that name; when
    /// rows are appended, columns are matched by name.
    pub fn write_sqlite(
        &self,
        path: impl AsRef<Path>,
        table: impl AsRef<str>,
        if_exists: IfExists,
    ) -> Result<u64> {
        let path = path.as_ref();
        let path = std::path::absolute(path).at("resolve", path)?;
        let write = Write { path: &path, table: table.as_ref(), schema: self.schema()? };
        let definition = write.definition()?;
        let rows = Batches::new(self.compile()?);
        write.all(&definition, if_exists, rows)
    }
}

/// What is to be written.
struct Write<'a> {
    path: &'a Path,
    table: &'a str,
    schema: SchemaRef,
}

impl Write<'_> {
    /// The columns of a table that is made, as SQL has them.
    fn definition(&self) -> Result<String> {
        let columns = self.schema.fields().iter();
        let column = |field: &Field| Ok(format!("{} {}", quoted(field.name()), created(field)?));
        let columns = columns.map(|field| column(field)).collect::<Result<Vec<_>>>()?;
        Ok(columns.join(", "))
    }

    fn all(&self, definition: &str, if_exists: IfExists, rows: Batches) -> Result<u64> {
        let failed = failed(self.path, self.table);
        let mut connection = Connection::open(self.path).map_err(&failed)?;
        connection.busy_timeout(BUSY).map_err(&failed)?;
        // It goes back unless it is committed, and so it does when this process ends.
        let begun = connection.transaction_with_behavior(TransactionBehavior::Immediate);
        let transaction = begun.map_err(&failed)?;
        let table = quoted(self.table);
        let mut is_there = self.is_there(&transaction).map_err(&failed)?;
        match if_exists {
            IfExists::Fail if is_there => {
                let database = self.path.display().to_string();
                return Err(Error::TableExists { database, table: self.table.to_owned() });
            }
            IfExists::Replace if is_there => {
                transaction.execute_batch(&format!("DROP TABLE {table}")).map_err(&failed)?;
                is_there = false;
            }
            _ => {}
        }
        if !is_there {
            let create = format!("CREATE TABLE {table} ({definition})");
            transaction.execute_batch(&create).map_err(&failed)?;
        }
        let written = self.insert(&transaction, rows)?;
        transaction.commit().map_err(&failed)?;
        Ok(written)
    }

    fn is_there(&self, connection: &Connection) -> rusqlite::Result<bool> {
        let ask = "SELECT 1 FROM sqlite_schema WHERE type IN ('table', 'view') AND name = ? COLLATE NOCASE";
        let found = connection.query_row(ask, [self.table], |_| Ok(()));
        Ok(found.optional()?.is_some())
    }

    fn insert(&self, connection: &Connection, rows: Batches) -> Result<u64> {
        let columns: Vec<_> = self.schema.fields().iter().map(|of| quoted(of.name())).collect();
        let marks = vec!["?"; columns.len()].join(", ");
        let (table, columns) = (quoted(self.table), columns.join(", "));
        let sql = format!("INSERT INTO {table} ({columns}) VALUES ({marks})");
        let mut statement = connection.prepare(&sql).map_err(failed(self.path, &sql))?;
        let mut written = 0;
        for batch in rows {
            self.insert_batch(&mut statement, &sql, &batch?, &mut written)?;
        }
        Ok(written)
    }

    fn insert_batch(
        &self,
        statement: &mut Statement<'_>,
        sql: &str,
        batch: &RecordBatch,
        written: &mut u64,
    ) -> Result<()> {
        let fields = self.schema.fields().iter().zip(batch.columns());
        let columns = fields.map(|(field, column)| Values::new(field, column, *written + 1));
        let columns = columns.collect::<Result<Vec<_>>>()?;
        for row in 0..batch.num_rows() {
            for (at, column) in columns.iter().enumerate() {
                let value = column.get(row, *written + 1)?;
                statement.raw_bind_parameter(at + 1, value).map_err(failed(self.path, sql))?;
            }
            statement.raw_execute().map_err(failed(self.path, sql))?;
            *written += 1;
        }
        Ok(())
    }
}

/// The type of a new table's column.
fn created(field: &Field) -> Result<&'static str> {
    Ok(match stored(field)? {
        DataType::Boolean => "BOOLEAN",
        DataType::Int64 => "INTEGER",
        DataType::Float64 => "REAL",
        DataType::Binary => "BLOB",
        _ => "TEXT",
    })
}

/// The type from which the values of a column are made.
fn stored(field: &Field) -> Result<DataType> {
    let of = match field.data_type() {
        DataType::Dictionary(_, values) => values,
        other => other,
    };
    Ok(match of {
        DataType::Boolean => DataType::Boolean,
        of if of.is_integer() => DataType::Int64,
        of if of.is_floating() => DataType::Float64,
        of if of.is_binary() || matches!(of, DataType::FixedSizeBinary(_)) => DataType::Binary,
        of if of.is_decimal() || of.is_temporal() || of.is_string() || of.is_null() => {
            DataType::Utf8
        }
        _ => {
            return Err(Error::ColumnType {
                column: field.name().clone(),
                expected: "a type of Arrow that SQLite has as well",
                got: field.data_type().to_string(),
                hint: "; take it apart, or make it text, with with_column",
            });
        }
    })
}

/// The values of a column as SQLite takes them.
struct Values<'a> {
    field: &'a Field,
    made: ArrayRef,
}

impl<'a> Values<'a> {
    fn new(field: &'a Field, column: &ArrayRef, first: u64) -> Result<Self> {
        let to = stored(field)?;
        let made = fitted(column, &to)?
            .map_err(|(row, got)| misfit(field, first + row, got, "an integer of 64 bits"))?;
        Ok(Self { field, made })
    }

    /// The value at a place, for row `row` of all.
    fn get(&self, at: usize, row: u64) -> Result<ToSqlOutput<'_>> {
        use rusqlite::types::ValueRef;
        if self.made.is_null(at) {
            return Ok(ToSqlOutput::Borrowed(ValueRef::Null));
        }
        Ok(ToSqlOutput::Borrowed(match self.made.data_type() {
            DataType::Boolean => ValueRef::Integer(self.made.as_boolean().value(at).into()),
            DataType::Int64 => ValueRef::Integer(self.made.as_primitive::<Int64Type>().value(at)),
            DataType::Float64 => match self.made.as_primitive::<Float64Type>().value(at) {
                value if value.is_nan() => {
                    let expected = "a number, as SQLite takes others for missing";
                    return Err(misfit(self.field, row, "NaN".to_owned(), expected));
                }
                value => ValueRef::Real(value),
            },
            DataType::Binary => ValueRef::Blob(self.made.as_binary::<i32>().value(at)),
            _ => ValueRef::Text(self.made.as_string::<i32>().value(at).as_bytes()),
        }))
    }
}

fn misfit(field: &Field, row: u64, got: String, expected: &str) -> Error {
    let hint = "; cast it, or give it another value, with with_column";
    Error::ColumnValue {
        column: field.name().clone(),
        row,
        got,
        expected: expected.to_owned(),
        hint,
    }
}
