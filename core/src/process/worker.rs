//! A worker process, wherever it runs.

use super::link::LocalLink;
use super::wire::ToWorker;
use crate::nodes::FarLink;
use crate::scheduler::NodeId;
use std::time::Duration;

/// A process among those of all machines, two of which may have one of the same number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct ProcessId {
    pub(crate) node: NodeId,
    pub(crate) pid: u32,
}

/// One of this machine.
impl From<u32> for ProcessId {
    fn from(pid: u32) -> Self {
        Self { node: NodeId::HERE, pid }
    }
}

/// A running worker process, of this machine or of another one. Dropping it kills the process.
#[derive(Debug)]
pub(crate) enum WorkerLink {
    Here(LocalLink),
    There(FarLink),
}

impl WorkerLink {
    /// Sends a frame; `false` when the worker is gone.
    pub(crate) fn send(&self, frame: ToWorker) -> bool {
        match self {
            Self::Here(link) => link.send(frame),
            Self::There(link) => link.send(frame),
        }
    }

    /// Which process it is, once that is known.
    pub(crate) fn process(&self) -> Option<ProcessId> {
        match self {
            Self::Here(link) => Some(link.process().pid().into()),
            Self::There(link) => link.process(),
        }
    }

    pub(crate) fn kill(&self) {
        match self {
            Self::Here(link) => link.process().kill(),
            Self::There(link) => link.kill(None),
        }
    }

    /// Kills it; its end is then explained so.
    pub(crate) fn kill_because(&self, reason: String) {
        match self {
            Self::Here(link) => link.process().kill_because(reason),
            Self::There(link) => link.kill(Some(reason)),
        }
    }

    /// Waits for its end, at most so long.
    pub(crate) fn wait(&self, timeout: Duration) {
        match self {
            Self::Here(link) => drop(link.process().wait(timeout)),
            Self::There(link) => link.wait(timeout),
        }
    }
}
