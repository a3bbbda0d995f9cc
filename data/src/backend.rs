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
use datafusion::execution::{SessionState, SessionStateBuilder};
use datafusion::prelude::SessionContext;
use std::fmt::Debug;
use std::sync::Arc;

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
/// assert_eq!(format!("{:?}", rows[0].column(0)), "PrimitiveArray<Int64>\n[\n  5050,\n]");
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
/// names. One that finds others fails, and the query with it, as far as a dataset can tell others
/// ([`Blocks::fingerprint`](crate::Blocks::fingerprint)); files of Parquet to which nothing is done the engine
/// reads by itself, and trusts. Rows that are in memory travel with the plan: write many of them to files.
pub fn query_on<S: Into<String>>(
    backend: &dyn Backend,
    sql: &str,
    tables: impl IntoIterator<Item = (S, Dataset)>,
) -> Result<QueryRows> {
    query::query_batches_on(backend, sql, tables)
}

/// `state` as a process needs it that plans queries over datasets, for an engine or as one: with the functions
/// of this program, with aggregates that are computed where DataFusion guesses them from statistics, and without
/// what makes plans that cannot be sent, or run a few parts at a time.
pub fn session_state(state: SessionState) -> Result<SessionState> {
    functions::check()?;
    // A join would wait for all of its partitions to say what they hold.
    let config = state.config().clone().set_bool(DYNAMIC_FILTERS, false);
    let logical = without(state.optimizers(), UNSENDABLE, |rule| rule.name());
    let physical = without(state.physical_optimizers(), &["aggregate_statistics"], |r| r.name());
    let state = SessionStateBuilder::new_from_existing(state).with_config(config);
    let state = state.with_optimizer_rules(logical).with_physical_optimizer_rules(physical);
    let mut state = state.build();
    let registered = functions::register(&mut state).and_then(|()| computed::register(&mut state));
    registered.map_err(Error::engine("register functions"))?;
    Ok(state)
}

/// By its name, which sets those of each kind, too.
const DYNAMIC_FILTERS: &str = "datafusion.optimizer.enable_dynamic_filter_pushdown";

/// Rules that put in the place of what has no rows something whose columns get lost on the way.
const UNSENDABLE: &[&str] =
    &["eliminate_filter", "eliminate_limit", "eliminate_join", "propagate_empty_relation"];

fn without<T: ?Sized>(rules: &[Arc<T>], names: &[&str], name: fn(&T) -> &str) -> Vec<Arc<T>> {
    rules.iter().filter(|rule| !names.contains(&name(rule))).cloned().collect()
}
