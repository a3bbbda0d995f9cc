//! The errors of this crate: what, where, expected, got, way out.

use crate::Resources;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Any error, boxed: how one layer's error passes through another layer's interface.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong in placing, running and recording work.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation on a file or folder failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb: "read", "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: Arc<std::io::Error>,
    },
    /// A name that a batch or table does not have.
    #[error("there is no column {name:?}; available: {}", available.join(", "))]
    NoSuchColumn {
        /// The name asked for.
        name: String,
        /// The names there are.
        available: Vec<String>,
    },
    /// A tensor of a batch has another number of rows than the first one.
    #[error(
        "tensor {name:?} of a batch has {got} rows, expected {expected} as the first tensor has"
    )]
    BatchRows {
        /// The tensor.
        name: String,
        /// Rows of the first tensor.
        expected: usize,
        /// Rows of this one.
        got: usize,
    },
    /// A tensor of a batch has no dimension at all.
    #[error("tensor {name:?} of a batch is a scalar, expected a first dimension of rows")]
    BatchScalar {
        /// The tensor.
        name: String,
    },
    /// A request larger than everything there is.
    #[error(
        "cannot place {asked}: this machine has {total}; ask for less, or run where there is more"
    )]
    Unplaceable {
        /// What was asked for.
        asked: Box<Resources>,
        /// What there is, all in all.
        total: Box<Resources>,
    },
    /// Resources that others held all the time.
    #[error(
        "{name} waited {after:?} for {asked}; free: {free}; end what holds the rest, or ask for less"
    )]
    NotPlaced {
        /// Who waited.
        name: String,
        /// What it asked for.
        asked: Box<Resources>,
        /// What was free at the end.
        free: Box<Resources>,
        /// How long it waited.
        after: Duration,
    },
    /// An amount that is none.
    #[error(
        "cannot ask for {asked}: amounts are finite and not negative, and of GPUs a fraction of one or whole ones"
    )]
    InvalidResources {
        /// What was asked for.
        asked: Box<Resources>,
    },
    /// Options of a group that do not fit each other.
    #[error("{option} of group {group} is {got}, expected {expected}")]
    InvalidGroup {
        /// Its name.
        group: String,
        /// Which option.
        option: &'static str,
        /// What it is.
        got: String,
        /// What it may be.
        expected: String,
    },
    /// An elastic group has lost more members than it can do without.
    #[error(
        "{group} has room for {left} of its members, needs {min} at least, and found no room for more within {after:?}; add machines, or let it go on with fewer"
    )]
    TooFewMembers {
        /// The group.
        group: String,
        /// For how many there is room.
        left: usize,
        /// How many it needs.
        min: usize,
        /// How long room was looked for.
        after: Duration,
    },
    /// A metric named like a field that every line has.
    #[error("a metric cannot be named {name:?}: every line of metrics has a field of that name")]
    ReservedMetric {
        /// The name.
        name: String,
    },
    /// `init()` was called before.
    #[error("mobula::init() was called twice in one process; pass its Runtime on instead")]
    InitTwice,
    /// Another program works on the run.
    #[error("the run {} is in use by process {pid}; wait for its end, or choose another name", path.display())]
    RunBusy {
        /// The run.
        path: PathBuf,
        /// The other program.
        pid: u32,
    },
    /// Process workers were asked for in a program that never called `init()`.
    #[error(
        "this program asked for worker processes, but its main() did not call mobula::init(); \
         make `let runtime = mobula::init()?;` the first line of main()"
    )]
    InitMissing,
    /// `Runtime::current()` outside of a task.
    #[error(
        "no task, actor or group member runs on this thread; pass the Runtime of mobula::init() on instead"
    )]
    NoCurrentRuntime,
    /// A function that no `#[mobula::remote]` registered.
    #[error("no remote function is named {name:?}; registered: {}", registered.join(", "))]
    NotRegistered {
        /// The name asked for.
        name: String,
        /// What this binary registers.
        registered: Vec<String>,
    },
    /// Two functions that `#[mobula::remote]` registered under one name.
    #[error("two remote functions are named {name:?}; rename one, or move it out of its function")]
    RegisteredTwice {
        /// The name.
        name: String,
    },
    /// A worker process runs another build than its driver.
    #[error("worker runs build {got}, expected {expected}: driver and workers must be one binary")]
    BuildMismatch {
        /// The driver's build.
        expected: String,
        /// The worker's build.
        got: String,
    },
    /// A member of a group works for a generation that is over.
    #[error(
        "{member} is of generation {generation}, and generation {newest} follows: return this error to be called again, or go on from Member::rendezvous"
    )]
    Reformed {
        /// Who.
        member: String,
        /// The generation that it takes part in.
        generation: u64,
        /// The newest one.
        newest: u64,
    },
    /// A task or group member returned an error.
    #[error("{task} failed: {message}")]
    TaskFailed {
        /// Which task, with its rank if it has one.
        task: String,
        /// Its error, with its causes.
        message: String,
    },
    /// A task or group member panicked.
    #[error("{task} panicked at {location}: {message}")]
    TaskPanicked {
        /// Which task, with its rank if it has one.
        task: String,
        /// The panic message.
        message: String,
        /// File and line.
        location: String,
    },
    /// A bundle that a placement group does not have.
    #[error("placement group {group} has no bundle {index}: it has {bundles}, counted from 0")]
    NoSuchBundle {
        /// The group.
        group: String,
        /// The bundle asked for.
        index: usize,
        /// How many there are.
        bundles: usize,
    },
    /// What waited for a bundle whose placement group is gone.
    #[error("{name} was not placed: the placement group that its bundle belongs to is gone")]
    BundleGone {
        /// Who waited.
        name: String,
    },
    /// What waited for a node that is gone.
    #[error("{name} was not placed: the node that it was to run on is gone")]
    NodeGone {
        /// Who waited.
        name: String,
    },
    /// What is to run on a thread was given a place on another machine.
    #[error(
        "{name} runs on a thread of the driver, but its bundle or node is another machine's; place it in a process"
    )]
    ThreadElsewhere {
        /// What was to run.
        name: String,
    },
    /// A value that was on a node which is gone.
    #[error("the value of {object} was lost: {reason}")]
    ObjectLost {
        /// Whose value.
        object: String,
        /// Where it was, and why it was not made again.
        reason: String,
    },
    /// This program could not join its driver, or open its door to the other nodes.
    #[error("cannot {action}: {reason}")]
    Join {
        /// What was attempted.
        action: String,
        /// Why it failed, and what to do.
        reason: String,
    },
    /// A task was not run, because what it needed came to nothing.
    #[error("{task} was not run, because {}{root}", through(via))]
    InputFailed {
        /// Which task.
        task: String,
        /// The inputs between it and the root, the nearest first; at most 8 are named.
        via: Vec<String>,
        /// What went wrong in the first place.
        root: Arc<Error>,
    },
    /// A worker process ended before it answered.
    #[error("{task} was lost: {reason}")]
    WorkerLost {
        /// Which task, with its rank if it has one.
        task: String,
        /// How the process ended, and where its log is.
        reason: String,
    },
    /// Something took longer than its deadline.
    #[error("{what} took longer than {after:?}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// The deadline.
        after: Duration,
    },
    /// The work was cancelled, or the runtime is shutting down.
    #[error("{task} was cancelled")]
    Cancelled {
        /// Which task.
        task: String,
    },
    /// A full mailbox refused a message.
    #[error("the mailbox of {actor} is full ({capacity} messages)")]
    MailboxFull {
        /// Which actor.
        actor: String,
        /// Its bound.
        capacity: usize,
    },
    /// No actor of this name and type is alive.
    #[error(
        "there is no actor named {name:?} of this type; it was never started here, or its last handle is gone"
    )]
    NoSuchActor {
        /// The name asked for.
        name: String,
    },
    /// An actor has no group of this name.
    #[error(
        "{actor} has no group {group:?}; its methods have: {}; write #[group({group:?})] on one",
        groups.join(", ")
    )]
    NoSuchGroup {
        /// Which actor.
        actor: String,
        /// The group asked for.
        group: String,
        /// The groups of its methods.
        groups: Vec<String>,
    },
    /// A value could not be encoded for, or decoded from, another process.
    #[error("cannot {action} {what}: {source}")]
    Codec {
        /// "encode" or "decode".
        action: &'static str,
        /// Which value.
        what: String,
        /// What the codec said.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A checkpoint that cannot be trusted.
    #[error("checkpoint {} is not valid: {reason}", path.display())]
    CheckpointInvalid {
        /// The checkpoint's folder.
        path: PathBuf,
        /// Which file, and what is wrong with it.
        reason: String,
    },
    /// Checkpoints, but none that can be trusted.
    #[error("none of the {found} checkpoints in {} is valid; remove them to start afresh", path.display())]
    NoCheckpoint {
        /// The folder that was searched.
        path: PathBuf,
        /// How many invalid ones there are.
        found: usize,
    },
    /// A new run has the name of an existing one.
    #[error("a run exists at {}; resume it, or choose another name", path.display())]
    RunExists {
        /// The existing run.
        path: PathBuf,
    },
    /// No program answers for this.
    #[error("there is no running program that answers: {what}; {hint}")]
    NotRunning {
        /// Which one was asked for.
        what: String,
        /// Where to look instead.
        hint: String,
    },
    /// Not a run directory.
    #[error("{} is not a run: it has no run.json", path.display())]
    NoSuchRun {
        /// The path given.
        path: PathBuf,
    },
    /// A stream state that belongs to other data, another seed or another algorithm.
    #[error("cannot resume the stream: its {what} is {expected}, the checkpoint has {got}")]
    StreamMismatch {
        /// Which part of the state differs.
        what: &'static str,
        /// The stream's value.
        expected: String,
        /// The state's value.
        got: String,
    },
    /// A variable of the environment that tells of a launch is missing or wrong.
    #[error("{variable} is {}, expected {expected}", got.as_ref().map_or("not set".to_owned(), |v| format!("{v:?}")))]
    LaunchVariable {
        /// Its name.
        variable: String,
        /// Its value, `None` where it is not set.
        got: Option<String>,
        /// What would have been right, and why.
        expected: String,
    },
    /// A system call failed.
    #[error("{what} failed: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: Arc<std::io::Error>,
    },
    /// An error of another layer, passed through unchanged.
    #[error(transparent)]
    Layer(Arc<dyn std::error::Error + Send + Sync>),
    /// A bug in Mobula.
    #[error("internal error, please report it: {0}")]
    Internal(String),
}

impl Error {
    /// Wraps another layer's error.
    pub fn layer(error: impl Into<BoxError>) -> Self {
        Self::Layer(Arc::from(error.into()))
    }

    /// A value that could not be encoded or decoded ("encode" or "decode", which value, why).
    pub fn codec(
        action: &'static str,
        what: impl Into<String>,
        error: impl Into<BoxError>,
    ) -> Self {
        Self::Codec { action, what: what.into(), source: Arc::from(error.into()) }
    }

    /// A system call that failed.
    pub fn system(what: &'static str, source: impl Into<std::io::Error>) -> Self {
        Self::System { what, source: Arc::new(source.into()) }
    }

    /// `task` was not run, because of the `error` of its `input`.
    pub(crate) fn input_failed(task: &str, input: &str, error: Self) -> Self {
        let (mut via, root) = match error {
            Self::InputFailed { task, mut via, root } => {
                via.insert(0, task);
                (via, root)
            }
            // It names its task itself.
            Self::TaskFailed { .. } | Self::TaskPanicked { .. } | Self::WorkerLost { .. } => {
                (Vec::new(), Arc::new(error))
            }
            other => (vec![input.to_owned()], Arc::new(other)),
        };
        via.truncate(8);
        Self::InputFailed { task: task.to_owned(), via, root }
    }

    /// Whether the same work may succeed when tried again on another worker.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::WorkerLost { .. } | Self::Timeout { .. } | Self::ObjectLost { .. })
    }

    /// Whether the receiver refused because it has too much to do.
    pub fn is_overloaded(&self) -> bool {
        matches!(self, Self::MailboxFull { .. })
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::layer(error)
    }
}

fn through(via: &[String]) -> String {
    via.iter().map(|task| format!("{task} was not, because ")).collect()
}

/// An error and its causes on one line, `a: b: c`, without repeating what a cause already says.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// Names the path in an I/O error.
pub trait AtPath<T> {
    /// Turns an I/O error into [`Error::Io`] for `action` on `path`.
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T, Error>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T, Error> {
        self.map_err(|source| Error::Io {
            action,
            path: path.as_ref().to_owned(),
            source: Arc::new(source),
        })
    }
}
