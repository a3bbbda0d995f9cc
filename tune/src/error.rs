//! The errors of this crate: what, where, expected, got, way out.

use mobula_core::BoxError;
use std::path::PathBuf;

/// What can go wrong in describing, running and resuming a study.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A range with nothing in it.
    #[error("parameter {name:?} has the range {low}..{high}: low must be below high, both finite")]
    EmptyRange {
        /// The parameter.
        name: String,
        /// Its low end.
        low: f64,
        /// Its high end.
        high: f64,
    },
    /// A logarithmic range that reaches zero.
    #[error(
        "parameter {name:?} is logarithmic from {low}: a logarithmic range must start above 0 \
         (integers: at 1); use a linear one, or raise the low end"
    )]
    LogRange {
        /// The parameter.
        name: String,
        /// Its low end.
        low: f64,
    },
    /// An integer range that a 64-bit float cannot hold exactly.
    #[error("parameter {name:?} reaches beyond 2^53, up to which integers are searched exactly")]
    IntRange {
        /// The parameter.
        name: String,
    },
    /// The same name twice.
    #[error("parameter {name:?} is in the search space twice")]
    DuplicateParameter {
        /// The name.
        name: String,
    },
    /// A choice between nothing, between equal values, or with a value that is not finite.
    #[error("parameter {name:?} {problem}")]
    Choices {
        /// The parameter.
        name: String,
        /// What is wrong with its choices.
        problem: &'static str,
    },
    /// A space without parameters.
    #[error(
        "the search space has no parameters; add one, such as .log_uniform(\"lr\", 1e-4, 1e-1)"
    )]
    EmptySpace,
    /// A parameter that the space does not have.
    #[error("there is no parameter {name:?}; available: {}", available.join(", "))]
    NoSuchParameter {
        /// The name asked for.
        name: String,
        /// The names there are.
        available: Vec<String>,
    },
    /// A parameter read as another type than it has.
    #[error("parameter {name:?} is {got}, not {expected}")]
    ParameterType {
        /// The parameter.
        name: String,
        /// The type asked for.
        expected: &'static str,
        /// Its value.
        got: String,
    },
    /// A trial's parameters do not fit the type they were read into.
    #[error("the parameters {params} do not fit {into}: {source}")]
    ParamsDecode {
        /// The parameters.
        params: String,
        /// The Rust type.
        into: &'static str,
        /// What serde said.
        source: BoxError,
    },
    /// A grid over a parameter that has no end of values.
    #[error(
        "a grid needs a list of values, and parameter {name:?} is continuous; give it `values`, or use random or tpe"
    )]
    NoGrid {
        /// The parameter.
        name: String,
    },
    /// An option of a sampler, a scheduler or the tuner that makes no sense.
    #[error("{option} is {got}, expected {expected}")]
    Option {
        /// The option.
        option: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
    /// Another process, or another study of this one, writes this journal.
    #[error("{} is in use by another study; wait for it to end, or use another journal", path.display())]
    JournalLocked {
        /// The journal.
        path: PathBuf,
    },
    /// A file that is not a study journal.
    #[error("{} is not a study journal; choose another path", path.display())]
    NotAJournal {
        /// The file.
        path: PathBuf,
    },
    /// A journal of a format that this version does not know.
    #[error("{} has journal version {got}, this build reads version {expected}", path.display())]
    JournalVersion {
        /// The journal.
        path: PathBuf,
        /// The version this build knows.
        expected: u32,
        /// The file's.
        got: u32,
    },
    /// A record with whole records behind it is damaged: not a torn tail, but a damaged disk or
    /// an edited file.
    #[error(
        "{} is damaged at byte {offset}: {reason}; restore a copy, or cut the file to {offset} \
         bytes to go on from there", path.display()
    )]
    JournalCorrupt {
        /// The journal.
        path: PathBuf,
        /// Where the bad record starts: everything before it is good.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The journal holds another study.
    #[error(
        "{} holds a study with another {what}: recorded {recorded}, asked for {asked}; \
         use another journal, or ask for the same", path.display()
    )]
    StudyMismatch {
        /// The journal.
        path: PathBuf,
        /// Which part differs: "search space", "metric", …
        what: &'static str,
        /// What the journal says.
        recorded: String,
        /// What was asked for.
        asked: String,
    },
    /// No trial brought a value.
    #[error("all {trials} trials failed; the first, trial {number}: {message}")]
    AllFailed {
        /// How many trials there were.
        trials: usize,
        /// The first failed trial.
        number: usize,
        /// Its error.
        message: String,
    },
    /// More trials failed than the tuner was told to bear.
    #[error(
        "{failed} trials failed, more than the {allowed} allowed; the first, trial {number}: {message}"
    )]
    TooManyFailures {
        /// How many trials failed.
        failed: usize,
        /// How many were allowed to.
        allowed: usize,
        /// The first failed trial.
        number: usize,
        /// Its error.
        message: String,
    },
    /// A study without a finished trial has no best one.
    #[error("none of {trials} trials has completed, so there is no best one")]
    NoBest {
        /// How many trials there are.
        trials: usize,
    },
    /// A report that lacks the study's metric.
    #[error("trial {trial} reported {}, but the study's metric is {metric:?}", reported.join(", "))]
    MetricMissing {
        /// The trial.
        trial: usize,
        /// The study's metric.
        metric: String,
        /// The names reported.
        reported: Vec<String>,
    },
    /// The study was stopped before all trials had ended.
    #[error("the study was stopped after {finished} of {trials} trials; {resume}")]
    Interrupted {
        /// How many trials have ended.
        finished: usize,
        /// How many were asked for.
        trials: usize,
        /// How to go on.
        resume: String,
    },
    /// The study ended, or its coordinator died, under a running trial.
    #[error("trial {trial} has no study to report to any more")]
    StudyGone {
        /// The trial.
        trial: usize,
    },
    /// A sweep file that cannot be understood; the source names the line.
    #[error("{}: {source}", path.display())]
    SweepFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, and on which line.
        source: BoxError,
    },
    /// A field of a sweep file with a value that makes no sense.
    #[error("{field}: {problem}")]
    SweepField {
        /// The field, such as `parameters.lr`.
        field: String,
        /// What is wrong, and what is expected.
        problem: String,
    },
    /// A trial's program could not be started.
    #[error("cannot start {program:?}: {source}")]
    Spawn {
        /// The program.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A trial's program ended with an error.
    #[error("the command ended with {status}; the end of {}: {tail}", log.display())]
    CommandFailed {
        /// Its exit status.
        status: String,
        /// Where its output is.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// An error of the core: files, tasks, resources.
    #[error(transparent)]
    Core(#[from] mobula_core::Error),
    /// A bug in Mobula.
    #[error("internal error, please report it: {0}")]
    Internal(String),
}
