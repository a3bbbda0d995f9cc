//! Engines elsewhere that run queries over datasets.
//!
//! A plan and the datasets in it travel as bytes of `datafusion-proto`, with the codecs of this module;
//! functions of the program go by their names. An engine whose processes are all this program, as those of
//! Ballista can be, runs them: see [`Backend`].

mod codec;
mod computed;
mod message;
mod opened;

pub use codec::{LogicalCodec, PhysicalCodec};
pub(crate) use opened::{Packed, opened};

use crate::Dataset;
use crate::error::{Error, Result};
use crate::{QueryRows, functions, query};
use datafusion::execution::SessionState;
use datafusion::prelude::SessionContext;
use std::fmt::Debug;

/// An engine that runs queries: what [`query_on`] is given.
///
/// It is a session of DataFusion whose query planner makes a physical plan that, once executed here, has
/// the engine run the query, and gives its rows. A planner that sends the plan somewhere encodes it with
/// [`LogicalCodec`] or [`PhysicalCodec`], and whoever gets it decodes it with the same.
///
/// What is here is that of one process:
///
/// ```
/// use datafusion::error::Result;
/// use datafusion::prelude::{SessionConfig, SessionContext};
/// use mobula_data::Dataset;
/// use mobula_data::backend::{Backend, query_on, session_state};
///
/// #[derive(Debug)]
/// struct TwoThreads;
///
/// impl Backend for TwoThreads {
///     fn session(&self) -> Result<SessionContext> {
///         let state = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(2)).state();
///         Ok(SessionContext::new_with_state(session_state(state)?))
///     }
/// }
///
/// let rows = query_on(&TwoThreads, "SELECT sum(id) AS sum FROM ids", [("ids", Dataset::range(101)?)])?;
/// let rows = rows.collect::<mobula_data::Result<Vec<_>>>()?;
/// assert_eq!(format!("{:?}", rows[0].column(0)), "PrimitiveArray<UInt64>\n[\n  5050,\n]");
/// # Ok::<(), mobula_data::Error>(())
/// ```
pub trait Backend: Debug + Send + Sync {
    /// A session for one query: with [`session_state`], and the store of `file://` that sessions have unless
    /// they are told otherwise.
    fn session(&self) -> datafusion::error::Result<SessionContext>;
}

/// As [`query_batches`](crate::query_batches), but run by another engine: its rows come in the order that
/// the query asks for, and in any if it asks for none. They are kept here, in memory while the budget has
/// room, and on disk beyond.
///
/// Every process of the engine that reads a dataset opens it, so each must find the same files by the same
/// names: one that finds others is told so, and the query fails. Files of Parquet to which nothing is done are
/// not looked at so: the engine reads them by itself, and trusts that they are the same everywhere. Rows that
/// are in memory travel with the plan: write many of them to files.
pub fn query_on<S: Into<String>>(
    backend: &dyn Backend,
    sql: &str,
    tables: impl IntoIterator<Item = (S, Dataset)>,
) -> Result<QueryRows> {
    query::query_batches_on(backend, sql, tables)
}

/// `state` with what a process needs that plans queries over datasets for an engine: the functions of this
/// program, and aggregates that are computed where DataFusion guesses them from statistics.
pub fn session_state(mut state: SessionState) -> Result<SessionState> {
    functions::check()?;
    let registered = functions::register(&mut state).and_then(|()| computed::register(&mut state));
    registered.map_err(Error::engine("register functions"))?;
    Ok(state)
}
