//! Runs Mobula's queries on [Apache Ballista](https://datafusion.apache.org/ballista/), where one machine
//! is too few.
//!
//! A cluster of Ballista's is a scheduler and executors. All of them are the user's own program: functions of
//! the program, its sources of data and its preprocessors go by their names, and each process finds them in
//! itself.
//!
//! ```no_run
//! use mobula_ballista::{Ballista, ExecutorProcessConfig, SchedulerConfig, run_executor, run_scheduler};
//! use mobula_data::{Dataset, backend::query_on};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! match std::env::args().nth(1).as_deref() {
//!     Some("scheduler") => run_scheduler(SchedulerConfig::default())?,
//!     Some("executor") => run_executor(ExecutorProcessConfig::default())?,
//!     _ => {
//!         let cluster = Ballista::new("http://localhost:50050")?;
//!         let trips = Dataset::read_parquet("/shared/trips/*.parquet")?;
//!         let sql = "SELECT zone, count(*) AS trips FROM trips GROUP BY zone";
//!         for rows in query_on(&cluster, sql, [("trips", trips)])? {
//!             println!("{:?}", rows?);
//!         }
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Nobody is asked who they are, and nothing is encrypted: keep the ports within a network that you trust. An
//! executor has two budgets of memory, Ballista's (`memory_pool_size`) and that of the datasets that it reads
//! (`MOBULA_DATA_BYTES`). A plan is a message of at most 16 MiB, in which rows that are in memory travel, too:
//! write many of them to files.

#![forbid(unsafe_code)]

pub use ballista_core::error::BallistaError;
pub use ballista_executor::executor_process::ExecutorProcessConfig;
pub use ballista_scheduler::config::SchedulerConfig;

use ballista_core::extension::{SessionConfigExt, SessionStateExt};
use ballista_core::serde::{BallistaLogicalExtensionCodec, BallistaPhysicalExtensionCodec};
use ballista_executor::executor_process::start_executor_process;
use ballista_scheduler::cluster::BallistaCluster;
use ballista_scheduler::scheduler_process::start_server;
use datafusion::error::Result as EngineResult;
use datafusion::execution::{SessionState, SessionStateBuilder};
use datafusion::prelude::{SessionConfig, SessionContext};
use mobula_data::backend::{Backend, LogicalCodec, PhysicalCodec, session_state};
use std::future::Future;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use url::Url;

/// What can go wrong before a query runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address of a scheduler is none.
    #[error(
        "{url:?} is no address of a scheduler: expected http://host:port and nothing else, such as http://host:50050"
    )]
    Address {
        /// What was given.
        url: String,
    },
    /// No thread can be started.
    #[error("no thread can be started for the {role} of Ballista")]
    Thread {
        /// Whose.
        role: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The scheduler or the executor could not start, or has failed.
    #[error("the {role} of Ballista failed")]
    Process {
        /// Which.
        role: &'static str,
        /// Why.
        source: BallistaError,
    },
}

/// A cluster, by its scheduler: a [`Backend`] for
/// [`query_on`](mobula_data::backend::query_on).
#[derive(Clone, Debug)]
pub struct Ballista {
    scheduler: String,
    config: SessionConfig,
}

impl Ballista {
    /// `url` is where the scheduler listens, such as `http://host:50050`. Nothing is sent before a query is.
    pub fn new(url: &str) -> Result<Self, Error> {
        let invalid = || Error::Address { url: url.to_owned() };
        let parsed = Url::parse(url).map_err(|_| invalid())?;
        let host = parsed.host_str().ok_or_else(invalid)?;
        let port = parsed.port_or_known_default().ok_or_else(invalid)?;
        // Nothing else of it would be heeded: no encryption, no password, no path.
        let heeded = format!("http://{host}:{port}");
        match Url::parse(&heeded) {
            Ok(same) if same == parsed => Ok(Self { scheduler: heeded, config: session_config() }),
            _ => Err(invalid()),
        }
    }

    /// So many parts of each dataset at least, and of what is exchanged between stages: about as many as the
    /// cluster has CPUs. Default: Ballista's, 16.
    pub fn with_partitions(mut self, partitions: usize) -> Self {
        self.config = self.config.with_target_partitions(partitions);
        self
    }
}

impl Backend for Ballista {
    fn session(&self) -> EngineResult<SessionContext> {
        let state = SessionStateBuilder::new().with_default_features();
        let state = state.with_config(self.config.clone()).build();
        let state = state.upgrade_for_ballista(self.scheduler.clone())?;
        Ok(SessionContext::new_with_state(session_state(state)?))
    }
}

fn session_config() -> SessionConfig {
    SessionConfig::new_with_ballista()
        .with_ballista_logical_extension_codec(Arc::new(logical_codec()))
        .with_ballista_physical_extension_codec(Arc::new(physical_codec()))
}

fn logical_codec() -> LogicalCodec {
    LogicalCodec::new(Arc::new(BallistaLogicalExtensionCodec::default()))
}

fn physical_codec() -> PhysicalCodec {
    PhysicalCodec::new(Arc::new(BallistaPhysicalExtensionCodec::default()))
}

/// How the scheduler plans what clients ask for, and the functions that executors know.
fn scheduler_session(config: SessionConfig) -> EngineResult<SessionState> {
    let state = ballista_core::utils::default_session_builder(config)?;
    Ok(session_state(state)?)
}

/// Runs a scheduler in this process, on threads of its own, until it fails.
///
/// What the configuration overrides is kept, but for the codecs and the sessions, which are those of
/// datasets.
pub fn run_scheduler(mut config: SchedulerConfig) -> Result<(), Error> {
    config.override_logical_codec = Some(Arc::new(logical_codec()));
    config.override_physical_codec = Some(Arc::new(physical_codec()));
    config.override_config_producer.get_or_insert_with(|| Arc::new(session_config));
    config.override_session_builder = Some(Arc::new(scheduler_session));
    run("scheduler", async {
        let address = address(&config.bind_host, config.bind_port)?;
        let cluster = BallistaCluster::new_from_config(&config).await?;
        start_server(cluster, address, Arc::new(config)).await
    })
}

/// Runs an executor in this process, on threads of its own, until it is told to end (SIGTERM, Ctrl+C) or fails.
pub fn run_executor(mut config: ExecutorProcessConfig) -> Result<(), Error> {
    config.override_logical_codec = Some(Arc::new(logical_codec()));
    config.override_physical_codec = Some(Arc::new(physical_codec()));
    config.override_config_producer.get_or_insert_with(|| Arc::new(session_config));
    let state = scheduler_session(session_config()).map_err(|error| Error::Process {
        role: "executor",
        source: BallistaError::DataFusionError(Box::new(error)),
    })?;
    config.override_function_registry.get_or_insert_with(|| Arc::new((&state).into()));
    run("executor", start_executor_process(Arc::new(config)))
}

fn address(host: &str, port: u16) -> Result<SocketAddr, BallistaError> {
    let mut found = (host, port).to_socket_addrs()?;
    found.next().ok_or_else(|| BallistaError::Configuration(format!("{host} has no address")))
}

/// On a thread that is not another runtime's, as that of the caller may be.
fn run(
    role: &'static str,
    process: impl Future<Output = Result<(), BallistaError>> + Send,
) -> Result<(), Error> {
    let process = || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        runtime.map_err(BallistaError::from)?.block_on(process)
    };
    let ended = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(format!("ballista {role}"));
        Ok(match thread.spawn_scoped(scope, process)?.join() {
            Ok(ended) => ended,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    });
    let ended = ended.map_err(|source| Error::Thread { role, source })?;
    ended.map_err(|source| Error::Process { role, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_nothing_that_is_not_heeded() {
        for url in ["http://host:50050", "http://host:50050/", "http://host", "http://127.0.0.1:1"]
        {
            assert!(Ballista::new(url).is_ok(), "{url}");
        }
        for url in ["host:50050", "https://host:50050", "http://me@host:50050", "http://host:1/x"] {
            let error = Ballista::new(url).expect_err(url).to_string();
            assert!(error.contains(url) && error.contains("http://host:port"), "{error}");
        }
    }

    #[test]
    fn a_process_starts_from_within_a_runtime() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let config = || SchedulerConfig { bind_host: "no such host".into(), ..Default::default() };
        let error = runtime.block_on(async { run_scheduler(config()) });
        assert!(matches!(error, Err(Error::Process { role: "scheduler", .. })), "{error:?}");
    }
}
