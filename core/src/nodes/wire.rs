//! What a driver and its agents say to each other: one bidirectional gRPC stream a machine, and one
//! stream for each large value that is fetched.

use super::look::View;
use crate::Resources;
use crate::process::wire::ToWorker;
use crate::process::{Environment, WorkerEvent};
use crate::scheduler::NodeId;
use crate::store::ObjectId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

pub(super) const JOIN: &str = "/mobula.v1.Nodes/Join";
pub(super) const FETCH: &str = "/mobula.v1.Nodes/Fetch";

/// Events of one worker that an agent may have sent and the driver not yet taken.
pub(super) const CREDITS: usize = 1024;

/// From an agent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromNode {
    /// The first frame.
    Hello(Hello),
    /// Alive.
    Beat,
    /// The process of this worker has been started.
    Started { worker: u64, pid: u32 },
    /// What a worker says, or that it is gone.
    Event { worker: u64, event: WorkerEvent },
    /// A line that a worker has printed.
    Line { worker: u64, line: String },
    /// What somebody has asked for under this number.
    Seen { look: u64, view: View },
}

/// Who wants to join.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) build: String,
    pub(super) host: String,
    /// What the machine has. `None`: somebody else accounts for it.
    pub(super) machine: Option<Machine>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) total: Resources,
    /// Where its values are to be had.
    pub(super) objects: SocketAddr,
}

/// From the driver.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToNode {
    /// The first frame: what the driver calls this machine.
    Welcome { node: NodeId },
    /// The only frame for who is not let in.
    Refused { reason: String },
    /// Alive.
    Beat,
    /// Start a worker process.
    Start { worker: u64, environment: Environment },
    /// For this worker.
    Frame { worker: u64, frame: ToWorker },
    /// Kill this worker; its end is then explained so.
    Kill { worker: u64, reason: Option<String> },
    /// So many more events of this worker have been taken.
    Taken { worker: u64, events: usize },
    /// Say what the machine has, under this number.
    Look { look: u64 },
    /// Nobody refers to this value any more.
    Forget { holder: NodeId, id: ObjectId },
    /// Another machine is gone, and what it gave out there.
    Lost { node: NodeId, objects: SocketAddr },
    /// The program has ended.
    Shutdown,
}

/// Asks for a value, by its holder's number.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Wanted {
    pub(super) holder: NodeId,
    pub(super) id: ObjectId,
}

/// A piece of a value in its flat form.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Piece(pub(super) Bytes);
