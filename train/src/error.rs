//! The errors of this crate: what, where, expected, got, way out.

use mobula_core::BoxError;
use std::path::PathBuf;
use std::time::Duration;

/// What a fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Placing, starting or talking to workers failed, or a file operation did.
    #[error(transparent)]
    Core(#[from] mobula_core::Error),
    /// The model failed.
    #[error(transparent)]
    Nn(#[from] mobula_nn::Error),
    /// What the program gave to a step or an evaluation failed.
    #[error(transparent)]
    Program(BoxError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(BoxError),
    /// The loss of a step is not a number any more.
    #[error(
        "the loss at step {step} is {loss}: lower the learning rate, or check the inputs for NaN"
    )]
    NonFiniteLoss {
        /// The global step.
        step: u64,
        /// The loss, averaged over all rows of all ranks.
        loss: f64,
    },
    /// A gradient is not finite although the loss is.
    #[error(
        "the gradient of {parameter:?} at step {step} is not finite: lower the learning rate, or check the inputs for NaN"
    )]
    NonFiniteGradient {
        /// The parameter.
        parameter: String,
        /// The global step.
        step: u64,
    },
    /// A step without finite numbers, and no checkpoint to go back to.
    #[error("{error}; cannot go back to a checkpoint: {reason}")]
    NoRollBack {
        /// Of the step.
        error: Box<Error>,
        /// Why not.
        reason: String,
    },
    /// A gradient overflows although the loss is scaled as little as it may be.
    #[error(
        "the gradient of {parameter:?} at step {step} is not finite although the loss scale is at its minimum, {scale}: lower the learning rate, check the inputs for NaN, or lower `min_scale`"
    )]
    LossScale {
        /// The scale.
        scale: f32,
        /// The parameter.
        parameter: String,
        /// The global step.
        step: u64,
    },
    /// Workers cannot have GPUs here.
    #[error("workers that hold {gpus} GPU need {missing}")]
    Gpus {
        /// Of each worker.
        gpus: f64,
        /// What they need.
        missing: &'static str,
    },
    /// There is no NCCL here that could be used.
    #[error(
        "cannot load NCCL: {reason}; install NVIDIA's NCCL, name the folder of libnccl.so.2 in LD_LIBRARY_PATH, or leave `transport` as it is by default"
    )]
    NoNccl {
        /// Why not.
        reason: String,
    },
    /// NCCL failed, or did not come to an end.
    #[error("rank {rank}: NCCL could not {action}: {reason}")]
    Nccl {
        /// Who says so.
        rank: usize,
        /// What it was to do.
        action: &'static str,
        /// Why not.
        reason: String,
    },
    /// A mean over a stream that has no rows on any rank.
    #[error("cannot take a mean over a stream without rows")]
    NoRows,
    /// A loss that is not one number.
    #[error("the loss must be one f32, got shape {shape:?}; take the mean over the rows")]
    LossShape {
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Parameters that the loss does not depend on, or whose gradient got lost in an operation
    /// without a backward pass.
    #[error("no gradient reached {}: does the loss depend on it, and has every operation on the way a backward pass?", names.join(", "))]
    NoGradient {
        /// The parameters.
        names: Vec<String>,
    },
    /// A gradient was added to after it had been sent to the other ranks.
    #[error(
        "the backward pass of this step came to {parameter:?} more often than that of the first step, when its gradient had been sent to the other ranks: a model that changes from step to step needs `Overlap::Never`"
    )]
    LateGradient {
        /// Whose.
        parameter: String,
    },
    /// A checkpoint within an epoch, of which it is not known where it stands.
    #[error(
        "a checkpoint within an epoch needs batches that know where their stream stands: open it with `context.batches`"
    )]
    NoPosition,
    /// The rank that writes checkpoints could not.
    #[error("rank {rank} could not write the checkpoint: {reason}")]
    Unwritten {
        /// Who.
        rank: usize,
        /// Why not.
        reason: String,
    },
    /// After a loss, ranks have states that do not fit each other.
    #[error(
        "rank {root} has kept a model of {expected} values, this one's has {got}: do all ranks restore the same states in the same order?"
    )]
    OtherState {
        /// Who has kept one.
        root: usize,
        /// Its values, with its buffers.
        expected: usize,
        /// Those of the state to be restored.
        got: usize,
    },
    /// A validation that gives more or fewer numbers than it said.
    #[error("a validation gave {got} numbers for a batch, expected {expected}")]
    Totals {
        /// As many as it said.
        expected: usize,
        /// As many as it gave.
        got: usize,
    },
    /// A step over a batch that is not cut into virtual shards.
    #[error(
        "a step with {virtual_shards} virtual shards needs a batch of a stream that `context.batches` has opened"
    )]
    NotInShards {
        /// How many there are.
        virtual_shards: usize,
    },
    /// Members of a collective did not come in time.
    #[error("rank {rank} waited {after:?} in {operation} for rank {}", late.iter().map(ToString::to_string).collect::<Vec<_>>().join(", rank "))]
    Straggler {
        /// Which collective operation.
        operation: &'static str,
        /// Who waited.
        rank: usize,
        /// Who did not come.
        late: Vec<usize>,
        /// How long.
        after: Duration,
    },
    /// Ranks called a collective with buffers of different lengths.
    #[error(
        "rank {rank} brings {len} values to a collective operation, rank {other} {other_len}: do all ranks build the same model?"
    )]
    CollectiveLength {
        /// Who noticed.
        rank: usize,
        /// How much it brings.
        len: usize,
        /// Another rank.
        other: usize,
        /// How much that one brings.
        other_len: usize,
    },
    /// Members of a group call different collective operations.
    #[error(
        "rank {rank} calls {operation}, rank {other} another operation or with another type or root: do all ranks take the same steps?"
    )]
    CollectiveMismatch {
        /// Who noticed.
        rank: usize,
        /// What it calls.
        operation: &'static str,
        /// Who calls something else.
        other: usize,
    },
    /// An operation after one that failed.
    #[error("{operation} after a collective operation that failed: {first}")]
    CollectiveBroken {
        /// What was called.
        operation: &'static str,
        /// How the first one failed.
        first: String,
    },
    /// No rank has this number.
    #[error("broadcast from rank {root}, expected one of {world} ranks: the first is 0")]
    CollectiveRoot {
        /// What was given.
        root: usize,
        /// How many ranks there are.
        world: usize,
    },
    /// A connection between ranks of two hosts cannot be made.
    #[error("cannot {action} {address} to exchange gradients: {source}")]
    Connection {
        /// What was tried.
        action: &'static str,
        /// Where.
        address: std::net::SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The connection to a rank broke, and the driver knows of no loss.
    #[error("the connection to rank {rank} broke: {source}")]
    PeerLost {
        /// Of whom.
        rank: usize,
        /// How.
        source: std::io::Error,
    },
    /// Shared memory could not be made or opened.
    #[error("cannot {action} {bytes} bytes of shared memory: {source}")]
    SharedMemory {
        /// "reserve", "open" or "map".
        action: &'static str,
        /// How much.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// An optimizer that has stepped another model.
    #[error(
        "the optimizer holds moments of {expected} values, the model has {got}: each model needs its own optimizer"
    )]
    OptimizerModel {
        /// Values that the optimizer has moments for.
        expected: usize,
        /// Values of the model.
        got: usize,
    },
    /// Gradients that have stayed on another device, for an optimizer that works on the CPU.
    #[error("the gradients are on another device: `Gradients::bring_here` gets them to the CPU")]
    GradientsElsewhere,
    /// An optimizer of one's own without its essence.
    #[error("the optimizer {optimizer:?} has neither `rule` nor `update_param`: write one of them")]
    NoRule {
        /// Its name.
        optimizer: String,
    },
    /// State of a parameter that the optimizer did not make.
    #[error(
        "the state of {parameter:?} is not that of this optimizer: expected {expected}, got {got}; take it from `init`"
    )]
    OptimizerSlots {
        /// The parameter.
        parameter: String,
        /// The tensors that the optimizer remembers.
        expected: String,
        /// The tensors there are.
        got: String,
    },
    /// Saved optimizer state that does not fit the model.
    #[error("the optimizer state in {} does not fit the model: {reason}", path.display())]
    OptimizerState {
        /// The file.
        path: PathBuf,
        /// Which tensor, expected and got.
        reason: String,
    },
    /// A group of parameters that the model does not have.
    #[error("no parameter is like {pattern:?}; the model has {}", names.join(", "))]
    ParamPattern {
        /// The pattern of the group.
        pattern: String,
        /// The names of the model's parameters.
        names: Vec<String>,
    },
    /// A metric that decides on something, but was not reported.
    #[error("{what} depends on the metric {metric:?}, but the epoch reports {}", names.join(", "))]
    NoMetric {
        /// On what, such as "the learning rate".
        what: &'static str,
        /// The option `metric` of that.
        metric: String,
        /// The metrics that were reported.
        names: Vec<String>,
    },
    /// Averages of the weights were asked for, but none are kept.
    #[error("no averages of the weights are kept: give the updater an `ema`")]
    NoAverages,
    /// An option out of its range.
    #[error("option {option} is {got}, expected {expected}")]
    Option {
        /// Its field.
        option: &'static str,
        /// Its value.
        got: String,
        /// What it may be.
        expected: &'static str,
    },
    /// The training group failed more often than allowed.
    #[error("training failed {failures} time(s), {allowed} allowed: {source}")]
    TooManyFailures {
        /// How often it failed.
        failures: u32,
        /// `FailureConfig::max_failures`.
        allowed: u32,
        /// The last failure.
        source: mobula_core::Error,
    },
}

impl Error {
    /// Whether it says of a step's numbers what all ranks say alike.
    pub(crate) fn is_of_numbers(&self) -> bool {
        matches!(
            self,
            Self::NonFiniteLoss { .. } | Self::NonFiniteGradient { .. } | Self::LossScale { .. }
        )
    }

    /// Wraps an error of the user's program.
    pub fn program(error: impl Into<BoxError>) -> Self {
        Self::Program(error.into())
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Tensor(error.into())
    }
}
