//! A connection whose every wait ends.

use super::address::{Address, name_of};
use crate::database::line_and_column;
use crate::error::{Error, Result};
use futures::future::{Either, select};
use futures::{FutureExt, TryStreamExt};
use mobula_core::BoxError;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::{DbError, ErrorPosition};
use tokio_postgres::{Client, NoTls, Row, RowStream, Statement};

/// How long connecting may take for each host, unless the URL has a `connect_timeout`.
const CONNECT: Duration = Duration::from_secs(10);

/// How long a server is asked to give up what nobody waits for any more.
const CANCEL: Duration = Duration::from_secs(2);

/// How long a connection that nobody has any more may take to end.
const GOODBYE: Duration = Duration::from_secs(2);

const NO_TLS: &str = "; leave sslmode out, or set it to disable or prefer, where the way to the server is safe, such as a tunnel of ssh";

/// A connection to a database.
pub(super) struct Connection {
    client: Client,
    /// How messages call it.
    pub(super) name: String,
    /// How long the server may say nothing.
    patience: Duration,
    /// Why it ended, if it did by itself.
    ended: Arc<OnceLock<String>>,
    /// Says by its end that nobody has the connection any more.
    _in_use: oneshot::Sender<()>,
}

impl Connection {
    pub(super) async fn open(address: &Address, patience: Duration) -> Result<Self> {
        let config = address.config()?;
        let name = name_of(&config);
        if config.get_ssl_mode() == SslMode::Require {
            let reason = "sslmode=require asks for TLS, which is not supported".to_owned();
            return Err(Error::DatabaseRefused { database: name, reason, hint: NO_TLS });
        }
        let hosts = config.get_hosts().len().max(config.get_hostaddrs().len()).max(1);
        let each = config.get_connect_timeout().copied().unwrap_or(CONNECT);
        let connected = timeout(each * hosts as u32, config.connect(NoTls)).await;
        let silent = |_| Error::DatabaseSilent {
            action: "connect to",
            database: name.clone(),
            timeout: each,
            hint: "check host and port, or give it longer with ?connect_timeout=SECONDS in the URL",
        };
        let connected = connected.map_err(silent)?;
        let (client, connection) =
            connected.map_err(|error| failed(error, "connect to", &name, None, None))?;
        let (ended, (in_use, unused)) = (Arc::new(OnceLock::new()), oneshot::channel());
        tokio::spawn(drive(connection, unused, ended.clone()));
        Ok(Self { client, name, patience, ended, _in_use: in_use })
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Waits for what the server says to `sql`.
    pub(super) async fn wait<T>(
        &self,
        action: &'static str,
        sql: &str,
        answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T> {
        match timeout(self.patience, answer).await {
            Ok(answer) => answer.map_err(|error| self.failed(error, action, sql)),
            Err(_) => {
                // It may well be as silent about this.
                let _ = timeout(CANCEL, self.client.cancel_token().cancel_query(NoTls)).await;
                let (database, timeout) = (self.name.clone(), self.patience);
                let hint = "look in pg_stat_activity what it waits for, or give it longer with with_timeout";
                Err(Error::DatabaseSilent { action, database, timeout, hint })
            }
        }
    }

    /// Runs statements of ours.
    pub(super) async fn run(&self, action: &'static str, sql: &str) -> Result<()> {
        self.wait(action, sql, self.client.batch_execute(sql)).await
    }

    pub(super) async fn prepare(&self, sql: &str) -> Result<Statement> {
        self.wait("ask", sql, self.client.prepare(sql)).await
    }

    /// The rows of a statement, as they come.
    pub(super) async fn rows(&self, statement: &Statement, sql: &str) -> Result<RowStream> {
        let none: [&str; 0] = [];
        self.wait("read from", sql, self.client.query_raw(statement, none)).await
    }

    pub(super) async fn next(
        &self,
        mut rows: Pin<&mut RowStream>,
        sql: &str,
    ) -> Result<Option<Row>> {
        // Rows that are here need no timer, and most are.
        if let Some(row) = rows.as_mut().try_next().now_or_never() {
            return row.map_err(|error| self.failed(error, "read from", sql));
        }
        self.wait("read from", sql, rows.as_mut().try_next()).await
    }

    pub(super) fn failed(
        &self,
        error: tokio_postgres::Error,
        action: &'static str,
        sql: &str,
    ) -> Error {
        failed(error, action, &self.name, Some(sql), self.ended.get())
    }
}

/// Carries what is said until the connection ends, and a moment longer than somebody has it: to say
/// goodbye, not to hear a long answer out.
async fn drive<S, T>(
    mut connection: tokio_postgres::Connection<S, T>,
    unused: oneshot::Receiver<()>,
    why: Arc<OnceLock<String>>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let ended = match select(&mut connection, unused).await {
        Either::Left((ended, _)) => ended,
        Either::Right(_) => timeout(GOODBYE, connection).await.unwrap_or(Ok(())),
    };
    if let Err(error) = ended {
        let _ = why.set(mobula_core::error::chain(&error));
    }
}

/// What is wrong, and whose fault it is.
fn failed(
    error: tokio_postgres::Error,
    action: &'static str,
    database: &str,
    sql: Option<&str>,
    ended: Option<&String>,
) -> Error {
    if let Some(said) = error.as_db_error() {
        return complaint(said, action, database, sql);
    }
    let database = database.to_owned();
    let source = std::error::Error::source(&error);
    let is_io = source.is_some_and(|source| source.is::<std::io::Error>());
    let text = mobula_core::error::chain(&error);
    if error.is_closed() || is_io {
        let source: BoxError = match ended {
            Some(why) if !is_io => format!("{text}: {why}").into(),
            _ => text.into(),
        };
        return Error::DatabaseGone { action, database, source };
    }
    let hint = if text.contains("password missing") { hint("28P01") } else { "" };
    Error::DatabaseRefused { database, reason: text, hint }
}

/// What the server itself says is wrong.
fn complaint(said: &DbError, action: &'static str, database: &str, sql: Option<&str>) -> Error {
    let (database, code) = (database.to_owned(), said.code().code());
    match sql {
        _ if is_farewell(code) => {
            Error::DatabaseGone { action, database, source: said.message().into() }
        }
        Some(sql) if !is_refusal(code) => {
            let position = position(said, sql);
            let (sql, reason) = (sql.to_owned(), reason(said));
            Error::DatabaseQuery { database, sql, position, reason }
        }
        _ => Error::DatabaseRefused { database, reason: reason(said), hint: hint(code) },
    }
}

/// Whether a SQLSTATE says that the server ends, or the connection.
fn is_farewell(code: &str) -> bool {
    code.starts_with("57P") || code.starts_with("08") || code == "25P03"
}

/// Whether a SQLSTATE is about who may connect: class 28, no such database, too many connections.
fn is_refusal(code: &str) -> bool {
    code.starts_with("28") || code == "3D000" || code == "53300"
}

fn hint(code: &str) -> &'static str {
    match code {
        "28P01" => "; give user and password in the URL, or in PGUSER and PGPASSWORD",
        "28000" => {
            "; it may want another user, or TLS, which is not supported: see pg_hba.conf there"
        }
        "3D000" => "; the database comes behind the last / of the URL",
        "53300" => "; wait until others have gone, or ask for fewer partitions",
        _ => "",
    }
}

/// What the server said, all of it.
fn reason(said: &DbError) -> String {
    let mut text = format!("{} (SQLSTATE {})", said.message(), said.code().code());
    for (title, more) in [("detail", said.detail()), ("hint", said.hint())] {
        if let Some(more) = more {
            text += &format!("; {title}: {more}");
        }
    }
    text
}

fn position(said: &DbError, sql: &str) -> Option<(usize, usize)> {
    match said.position()? {
        ErrorPosition::Original(at) => Some(line_and_column(sql, (*at as usize).saturating_sub(1))),
        ErrorPosition::Internal { .. } => None,
    }
}
