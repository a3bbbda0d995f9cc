//! SQLite: the result of a query as a dataset, and a dataset as a table.

mod sink;
mod source;
mod values;

use crate::Dataset;
use crate::database::{described, line_and_column};
use crate::error::{Error, Result};
use crate::runtime::meanwhile;
use crate::source::paths;
use rusqlite::ErrorCode;
use source::Sqlite;
use std::path::Path;
use std::time::Duration;

/// How long another process may hold a database that this one needs.
const BUSY: Duration = Duration::from_secs(10);

/// SQLite databases: files, which are read as they are and need no server.
impl Dataset {
    /// The result of a query over a SQLite database. Making it finds out the columns: those of a table by
    /// the types that they were declared with, and others (expressions, and `NUMERIC`, `DATE` and such)
    /// by their values, for which the query is run once.
    ///
    /// Rows are read once in every process that needs them, all as they are at one moment, and kept as
    /// [`sql`](Self::sql) keeps its result. They come in the order of the query's `ORDER BY`; without
    /// one, in an order that SQLite gives again as long as the file does not change, but that it does not
    /// promise. A process that reads other rows than another is refused their stream:
    /// [`persist`](Self::persist) what several processes are to read while the file changes.
    ///
    /// | declared as | Arrow |
    /// |---|---|
    /// | `BOOL…` | `Boolean`, of 0 and 1 |
    /// | `…INT…` | `Int64` |
    /// | `…CHAR…`, `…CLOB…`, `…TEXT…` | `Utf8` |
    /// | `…BLOB…` | `Binary` |
    /// | `…REAL…`, `…FLOA…`, `…DOUB…` | `Float64` |
    /// | anything else, or nothing | by the values: `Int64`, `Float64`, `Utf8` or `Binary`, and `Null` where there are none |
    ///
    /// A column of SQLite may have values of any type, and one of Arrow may not: a value that does not
    /// fit is an error that names the column and the row. Missing values are missing.
    pub fn read_sqlite(path: impl AsRef<Path>, query: impl Into<String>) -> Result<Self> {
        let (path, query) = (paths::existing(path.as_ref())?, query.into());
        let schema = meanwhile(|| source::schema_of(&path, &query))?;
        let columns = described(schema.clone())?;
        Ok(Self::unopened(Sqlite { path, query, columns }).with_schema(schema))
    }
}

/// What SQLite says to `sql`.
fn failed<'a>(path: &'a Path, sql: &'a str) -> impl Fn(rusqlite::Error) -> Error + 'a {
    move |error| {
        let (code, offset) = match &error {
            rusqlite::Error::SqliteFailure(error, _) => (Some(error.code), None),
            rusqlite::Error::SqlInputError { offset, .. } => (None, usize::try_from(*offset).ok()),
            _ => (None, None),
        };
        let reason = match error {
            rusqlite::Error::SqlInputError { msg, .. } => msg,
            error => error.to_string(),
        };
        match code {
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                Error::Corrupt { path: path.to_owned(), format: "SQLite", reason }
            }
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Error::DatabaseRefused {
                database: path.display().to_string(),
                reason,
                hint: "; another process writes to it, so wait until that is done",
            },
            _ => {
                let before = offset.and_then(|offset| sql.get(..offset));
                let position = before.map(|text| line_and_column(sql, text.chars().count()));
                refused(path, sql, position, reason)
            }
        }
    }
}

fn refused(path: &Path, sql: &str, position: Option<(usize, usize)>, reason: String) -> Error {
    Error::DatabaseQuery {
        database: path.display().to_string(),
        sql: sql.to_owned(),
        position,
        reason,
    }
}
