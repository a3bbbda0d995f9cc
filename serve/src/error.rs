//! The errors of this crate, each with the HTTP status it is answered with.

use mobula_core::BoxError;
use std::path::PathBuf;
use std::time::Duration;

/// What can go wrong in serving, loading and asking models.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A body that is not an inference request.
    #[error("the body is not an inference request: {reason}")]
    Malformed {
        /// What the parser said, with line and column.
        reason: String,
    },
    /// An input that does not match the model's metadata.
    #[error("input {input:?} has {what} {got}, expected {expected}")]
    InvalidInput {
        /// Name of the input.
        input: String,
        /// Which property: "datatype", "shape", "data".
        what: &'static str,
        /// What the model takes.
        expected: String,
        /// What the request has.
        got: String,
    },
    /// The names of the inputs are not the model's.
    #[error("model {model:?} takes the inputs [{}], got [{}]", expected.join(", "), got.join(", "))]
    InputNames {
        /// Name of the model.
        model: String,
        /// The model's inputs.
        expected: Vec<String>,
        /// The request's inputs.
        got: Vec<String>,
    },
    /// More rows than a batch may have.
    #[error(
        "the request has {got} rows, but model {model:?} takes at most {limit} at once \
         (max_batch_size); split the request"
    )]
    TooManyRows {
        /// Name of the model.
        model: String,
        /// The limit.
        limit: usize,
        /// Rows of the request.
        got: usize,
    },
    /// An output that the model does not have.
    #[error("model {model:?} has no output {name:?}; available: {}", available.join(", "))]
    UnknownOutput {
        /// Name of the model.
        model: String,
        /// The output asked for.
        name: String,
        /// The outputs there are.
        available: Vec<String>,
    },
    /// A part of the protocol that this server does not speak.
    #[error("{what} is not supported here; {way_out}")]
    Unsupported {
        /// Which part.
        what: &'static str,
        /// What to do instead.
        way_out: &'static str,
    },
    /// A model that is not served.
    #[error("there is no model {name:?}; available: {}", available.join(", "))]
    UnknownModel {
        /// The name asked for.
        name: String,
        /// The models there are.
        available: Vec<String>,
    },
    /// A version that is not served.
    #[error("model {model:?} has no version {version:?}; available: {available}")]
    UnknownVersion {
        /// Name of the model.
        model: String,
        /// The version asked for.
        version: String,
        /// The version that is served.
        available: String,
    },
    /// A path that leads nowhere.
    #[error("there is nothing at {method} {path}; models are at /v2/models/NAME/infer")]
    NotFound {
        /// The method used.
        method: String,
        /// The path asked for.
        path: String,
    },
    /// A path that exists, with a method that it does not take.
    #[error("{path} does not take {method}; infer is POST, everything about a model is GET")]
    MethodNotAllowed {
        /// The method used.
        method: String,
        /// The path asked for.
        path: String,
    },
    /// A body larger than the server takes.
    #[error("the body is larger than {limit} bytes; send fewer rows per request")]
    BodyTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// A body that did not arrive in time.
    #[error("the body did not arrive within {after:?}")]
    BodyTimeout {
        /// The limit.
        after: Duration,
    },
    /// A full queue.
    #[error("the queue of model {model:?} is full ({limit} rows); try again in {retry_after:?}")]
    QueueFull {
        /// Name of the model.
        model: String,
        /// Its bound in rows.
        limit: usize,
        /// How long the queue needs to drain; whole seconds, at least 1.
        retry_after: Duration,
    },
    /// A model that takes no requests now.
    #[error("model {model:?} is not available: {reason}")]
    Unavailable {
        /// Name of the model.
        model: String,
        /// Why.
        reason: &'static str,
    },
    /// A request that was not answered in time.
    #[error("model {model:?} did not answer within {after:?}")]
    DeadlineExceeded {
        /// Name of the model.
        model: String,
        /// The request's time limit.
        after: Duration,
    },
    /// A model that returned an error or panicked.
    #[error("model {model:?} failed: {message}")]
    ModelFailed {
        /// Name of the model.
        model: String,
        /// Its error, with its causes.
        message: String,
    },
    /// A model whose outputs are not what its metadata says.
    #[error("output {output:?} of model {model:?} has {what} {got}, expected {expected}")]
    InvalidOutput {
        /// Name of the model.
        model: String,
        /// Name of the output.
        output: String,
        /// Which property: "datatype", "shape", "rows".
        what: &'static str,
        /// What the metadata says.
        expected: String,
        /// What the model returned.
        got: String,
    },
    /// A model that could not be loaded.
    #[error("cannot load model {model:?}: {message}")]
    LoadFailed {
        /// Name of the model.
        model: String,
        /// The loader's error, with its causes.
        message: String,
    },
    /// Two deployments of one name.
    #[error("model {model:?} is deployed twice; give one of them another name")]
    DuplicateModel {
        /// Name of the model.
        model: String,
    },
    /// An option of a deployment that makes no sense.
    #[error("model {model:?}: {option} is {got}, expected {expected}")]
    InvalidOption {
        /// Name of the model.
        model: String,
        /// Name of the option.
        option: &'static str,
        /// What would be fine.
        expected: String,
        /// What was set.
        got: String,
    },
    /// An address that another program listens on.
    #[error(
        "{addr} is in use by another program; choose another port (--http HOST:PORT), or port 0 \
         for a free one"
    )]
    AddressInUse {
        /// The address.
        addr: String,
    },
    /// An address that cannot be listened on.
    #[error("cannot listen on {addr}: {source}")]
    Bind {
        /// The address.
        addr: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The server's threads could not be started.
    #[error("cannot start the server's threads: {source}")]
    Threads {
        /// What the system said.
        source: std::io::Error,
    },
    /// Requests that were still under way at the end of a shutdown's deadline.
    #[error(
        "{unanswered} requests were still under way after {after:?} and were answered with 503"
    )]
    ShutdownDeadline {
        /// How many.
        unanswered: usize,
        /// The deadline.
        after: Duration,
    },
    /// A server that cannot be reached, or that hung up.
    #[error("no answer from {addr}: {source}")]
    Connection {
        /// The server's address.
        addr: String,
        /// What went wrong.
        source: BoxError,
    },
    /// A server that answered with an error.
    #[error("the server answered {status}: {message}")]
    Rejected {
        /// The HTTP status.
        status: u16,
        /// The `error` of the answer.
        message: String,
    },
    /// A blocking call from a tokio task, which it would stall.
    #[error("{call} blocks and cannot be called from async code; use tokio::task::spawn_blocking")]
    BlockingInAsync {
        /// Which call.
        call: &'static str,
    },
    /// A folder that is not a model repository.
    #[error("{} is not a model repository: {reason}", path.display())]
    Repository {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong with it, and what belongs there.
        reason: String,
    },
    /// An error of core, passed through unchanged.
    #[error(transparent)]
    Core(#[from] mobula_core::Error),
}

impl Error {
    /// The HTTP status that a server answers this error with.
    pub fn status(&self) -> u16 {
        match self {
            Self::Malformed { .. }
            | Self::InvalidInput { .. }
            | Self::InputNames { .. }
            | Self::TooManyRows { .. }
            | Self::UnknownOutput { .. }
            | Self::Unsupported { .. } => 400,
            Self::UnknownModel { .. } | Self::UnknownVersion { .. } | Self::NotFound { .. } => 404,
            Self::MethodNotAllowed { .. } => 405,
            Self::BodyTimeout { .. } => 408,
            Self::BodyTooLarge { .. } => 413,
            Self::QueueFull { .. } => 429,
            Self::Unavailable { .. } => 503,
            Self::DeadlineExceeded { .. } => 504,
            Self::Rejected { status, .. } => *status,
            _ => 500,
        }
    }

    /// Whether the same request may succeed later.
    pub fn is_overloaded(&self) -> bool {
        matches!(self.status(), 429 | 503)
    }
}
