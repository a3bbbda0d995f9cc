//! What a running program is doing: for `mobula status`, Prometheus, and the program itself.
//!
//! ```
//! use mobula_core::{Resources, Runtime, Task};
//!
//! let runtime = Runtime::local(Resources::cpus(2.0))?;
//! runtime.submit(Task::new("answer", || Ok::<_, String>(42))).get()?;
//! assert_eq!(runtime.status().tasks.submitted, 1);
//! # Ok::<(), mobula_core::Error>(())
//! ```
//!
//! A program that called [`init`](crate::init()) answers through a Unix socket that only its user
//! can reach ([`running`], [`of_pid`], [`of_run`]), and, where the environment has
//! [`METRICS_VARIABLE`], over HTTP. No request takes a lock for longer than it takes to copy a few
//! numbers.

mod client;
mod counts;
mod machines;
mod metrics;
mod prometheus;
mod roster;
mod server;
mod socket;

pub use client::{of_pid, of_run, running};
pub use metrics::METRICS_VARIABLE;
pub use prometheus::prometheus;

pub(crate) use counts::{Counts, Ending};
pub(crate) use roster::{Look, Roster, Sighting};
pub(crate) use server::open;
pub(crate) use socket::{Guard, follow_run, leave};

use crate::{Node, NodeInfo, Resources, Runtime};
use machines::Machines;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::OnceLock;

/// What a program is doing, at about one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Status {
    /// Who answers.
    pub program: Program,
    /// The machines it places work on, the one it runs on first.
    pub nodes: Vec<NodeStatus>,
    /// Its tasks, by where they stand.
    pub tasks: TaskCounts,
    /// Its actors, the oldest first.
    pub actors: Vec<ActorStatus>,
    /// Its worker processes, machine by machine, the oldest first.
    pub workers: Vec<WorkerStatus>,
    /// What it holds in shared memory and on disk of the machine that it runs on.
    pub objects: ObjectCounts,
}

/// A running program.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Program {
    /// Its process id.
    pub pid: u32,
    /// Its command line.
    pub command: Vec<String>,
    /// Mobula's version.
    pub version: String,
    /// Seconds since 1970 when its runtime began.
    pub started: f64,
    /// The run directories that it works on.
    pub runs: Vec<PathBuf>,
    /// Bytes of resident memory of its own process.
    pub resident_bytes: u64,
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct NodeStatus {
    /// Its host name, and its number unless the program runs on it.
    pub name: String,
    /// All resources of it.
    pub total: Resources,
    /// What nobody holds.
    pub free: Resources,
    /// It did not answer within a second. What only it knows is 0 then: the memory of its worker
    /// processes, and its objects.
    pub silent: bool,
    /// What the program holds in shared memory and on disk of this machine.
    pub objects: ObjectCounts,
}

impl From<NodeInfo> for NodeStatus {
    fn from(info: NodeInfo) -> Self {
        let name = match info.node {
            Node::HERE => info.host,
            node => format!("{} ({node})", info.host),
        };
        Self { name, total: info.total, free: info.free, ..Self::default() }
    }
}

/// Tasks since the program began. Those that wait, run, and have ended add up to `submitted`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct TaskCounts {
    /// For inputs, for resources, or for their next attempt.
    pub waiting: u64,
    /// On a thread, or sent to a worker process. One that was cancelled counts until its work ends.
    pub running: u64,
    /// Ended with a result.
    pub finished: u64,
    /// Ended with an error, their own or that of an input.
    pub failed: u64,
    /// Ended because somebody, or the end of the runtime, wanted it so.
    pub cancelled: u64,
    /// All of them.
    pub submitted: u64,
    /// Attempts after which a task waited again: it failed, or a worker gave it back unbegun.
    pub retried: u64,
}

/// An actor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ActorStatus {
    /// Its name; pools have several of one name.
    pub name: String,
    /// Whether calls reach it.
    pub state: ActorState,
    /// How often its process was started again.
    pub restarts: u64,
    /// How often its state could not be saved.
    pub failed_checkpoints: u64,
    /// Calls that were sent and have not ended.
    pub pending: u64,
    /// Its process; `None` on a thread, and while there is none.
    pub pid: Option<u32>,
    /// The name of the machine that its process is on.
    #[serde(default)]
    pub node: Option<String>,
}

/// Where an actor is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActorState {
    /// Its constructor has yet to run, for the first time or after a loss.
    Starting,
    /// It takes calls.
    Running,
    /// It is gone for good, and somebody still has a handle to it.
    Dead,
}

impl ActorState {
    /// As JSON has it: `running`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Dead => "dead",
        }
    }
}

/// A worker process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct WorkerStatus {
    /// The name of its machine.
    pub node: String,
    /// Its process id there.
    pub pid: u32,
    /// What it is for: `tasks`, the name of an actor, or a group and its rank.
    pub name: String,
    /// Whether it has work. Members of groups always have.
    pub busy: bool,
    /// Bytes of resident memory; 0 if it has just ended, or its machine does not answer.
    pub resident_bytes: u64,
}

/// The large values that processes share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ObjectCounts {
    /// All of them.
    pub count: u64,
    /// Bytes of those in shared memory.
    pub memory_bytes: u64,
    /// Bytes of those that are on disk alone.
    pub spilled_bytes: u64,
    /// Bytes of memory beyond which they are spilled.
    pub budget_bytes: u64,
}

/// What a runtime keeps to be seen.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) counts: Counts,
    pub(crate) actors: Roster,
    /// Takes the socket away with the runtime.
    pub(crate) socket: OnceLock<Guard>,
    pub(crate) started: OnceLock<f64>,
}

impl Runtime {
    /// What this program is doing. Other programs ask with [`running`] and its kin. Waits up to a
    /// second for other machines that do not answer.
    pub fn status(&self) -> Status {
        let machines = Machines::look(self);
        let actors = self.seen().actors.look();
        Status {
            program: self.program(),
            tasks: self.seen().counts.look(),
            workers: machines.workers(self, &actors),
            actors: actors.into_iter().map(|actor| machines.actor(actor)).collect(),
            objects: machines.objects_here(),
            nodes: machines.nodes,
        }
    }

    fn program(&self) -> Program {
        let pid = std::process::id();
        Program {
            pid,
            command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: self.seen().started.get().copied().unwrap_or_default(),
            runs: socket::runs(),
            resident_bytes: crate::process::resident_bytes(pid).unwrap_or(0),
        }
    }
}
