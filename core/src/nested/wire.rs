//! What goes over the control stream for the sake of what a worker has its driver do.

use crate::actor::Blueprint;
use crate::actor::lanes::Class;
use crate::parcel::Packed;
use crate::task::TaskOptions;
use crate::{Error, Resources};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What a worker asks its driver for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Submission {
    /// The call that asks, if it is one of the worker's queue.
    pub(crate) by: Option<u64>,
    pub(crate) name: String,
    pub(crate) args: Vec<Packed>,
    pub(crate) wanted: Wanted,
}

/// Functions and methods are known by their registered names, actors and groups by their tickets.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Wanted {
    Task {
        function: String,
        options: TaskOptions,
    },
    /// A task that gives many values, of which those below `granted` may be sent.
    Stream {
        function: String,
        options: TaskOptions,
        granted: u64,
    },
    /// An actor, once it is built.
    Actor(Box<Blueprint>),
    /// The newest actor of this type with the submission's name.
    Named {
        kind: String,
    },
    /// The result of a call.
    Call {
        actor: u64,
        method: String,
        class: Class,
    },
    /// How an actor is.
    Condition {
        actor: u64,
    },
    /// A group, once its members have been started.
    Group {
        function: String,
        /// Its encoded options.
        options: Bytes,
    },
    /// Something of a group.
    Ask {
        group: u64,
        ask: Ask,
    },
}

/// What is asked of a group by its maker, who waits for the answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// What has happened, waiting at most so long.
    Events {
        timeout: Duration,
    },
    /// What the member has given that has finished last.
    Value,
    /// The processes of its members.
    Pids,
    SetContext {
        context: Bytes,
    },
    Tell {
        message: Bytes,
    },
    Stop,
}

/// What has happened in a group.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Said {
    Report {
        rank: usize,
        payload: Bytes,
    },
    /// Its value is asked for.
    Finished {
        rank: usize,
    },
    Failed {
        rank: usize,
        error: Failure,
    },
    Restarting {
        generation: u64,
        replaced: Vec<usize>,
        error: Failure,
    },
    Resized {
        generation: u64,
        gone: Vec<usize>,
        size: usize,
    },
}

/// How an actor is.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Condition {
    pub(crate) is_alive: bool,
    pub(crate) pid: Option<u32>,
}

/// An error on its way to another process. Those that programs tell apart keep their kind.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Failure {
    Failed { task: String, message: String },
    Panicked { task: String, message: String, location: String },
    Lost { task: String, reason: String },
    Cancelled { task: String },
    Timeout { what: String, after: Duration },
    InputFailed { task: String, via: Vec<String>, root: Box<Self> },
    ObjectLost { object: String, reason: String },
    NotRegistered { name: String, registered: Vec<String> },
    NoSuchActor { name: String },
    Unplaceable { asked: Box<Resources>, total: Box<Resources> },
    NotPlaced { name: String, asked: Box<Resources>, free: Box<Resources>, after: Duration },
    Other { text: String },
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        match error.clone() {
            Error::TaskFailed { task, message } => Self::Failed { task, message },
            Error::TaskPanicked { task, message, location } => {
                Self::Panicked { task, message, location }
            }
            Error::WorkerLost { task, reason } => Self::Lost { task, reason },
            Error::Cancelled { task } => Self::Cancelled { task },
            Error::Timeout { what, after } => Self::Timeout { what, after },
            Error::InputFailed { task, via, root } => {
                Self::InputFailed { task, via, root: Box::new(Self::from(&*root)) }
            }
            Error::ObjectLost { object, reason } => Self::ObjectLost { object, reason },
            Error::NotRegistered { name, registered } => Self::NotRegistered { name, registered },
            Error::NoSuchActor { name } => Self::NoSuchActor { name },
            Error::Unplaceable { asked, total } => Self::Unplaceable { asked, total },
            Error::NotPlaced { name, asked, free, after } => {
                Self::NotPlaced { name, asked, free, after }
            }
            other => Self::Other { text: crate::error::chain(&other) },
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Failed { task, message } => Self::TaskFailed { task, message },
            Failure::Panicked { task, message, location } => {
                Self::TaskPanicked { task, message, location }
            }
            Failure::Lost { task, reason } => Self::WorkerLost { task, reason },
            Failure::Cancelled { task } => Self::Cancelled { task },
            Failure::Timeout { what, after } => Self::Timeout { what, after },
            Failure::InputFailed { task, via, root } => {
                Self::InputFailed { task, via, root: std::sync::Arc::new((*root).into()) }
            }
            Failure::ObjectLost { object, reason } => Self::ObjectLost { object, reason },
            Failure::NotRegistered { name, registered } => Self::NotRegistered { name, registered },
            Failure::NoSuchActor { name } => Self::NoSuchActor { name },
            Failure::Unplaceable { asked, total } => Self::Unplaceable { asked, total },
            Failure::NotPlaced { name, asked, free, after } => {
                Self::NotPlaced { name, asked, free, after }
            }
            Failure::Other { text } => Self::layer(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn errors_keep_their_kind_and_their_words() {
        let root = || Error::TaskFailed { task: "a".into(), message: "no".into() };
        let errors = [
            root(),
            Error::WorkerLost { task: "b".into(), reason: "killed".into() },
            Error::InputFailed { task: "c".into(), via: vec!["b".into()], root: Arc::new(root()) },
            Error::NoSuchActor { name: "d".into() },
            Error::InitTwice,
        ];
        for error in errors {
            let there: Error = Failure::from(&error).into();
            assert_eq!(there.to_string(), error.to_string());
            assert_eq!(there.is_retryable(), error.is_retryable());
        }
    }
}
