//! The errors of this crate: what, expected, got, way out.

use mobula_core::error::BoxError;
use std::path::PathBuf;

/// What a fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in building, running, saving and loading a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(BoxError),
    /// A file operation failed.
    #[error(transparent)]
    Core(#[from] mobula_core::Error),
    /// A tensor has another shape than its receiver takes.
    #[error("{what} must have shape {expected}, got {got:?}")]
    Shape {
        /// Whose tensor it is.
        what: String,
        /// The shape it must have, with names for the free axes.
        expected: String,
        /// The shape it has.
        got: Vec<usize>,
    },
    /// A label that no class has.
    #[error("label {label} in row {row} is out of range: the logits have {classes} classes, expected 0 to {}", *classes as i64 - 1)]
    LabelOutOfRange {
        /// The label.
        label: i64,
        /// Its row in the batch.
        row: usize,
        /// How many classes there are.
        classes: usize,
    },
    /// Labels that are not integers.
    #[error("labels must be integers (u8, u32 or i64), got {got}; cast them with to_dtype")]
    LabelType {
        /// Their type.
        got: &'static str,
    },
    /// An index that a table has no row for.
    #[error("index {index} at position {position} is out of range: the table has {count} rows, expected 0 to {}", *count as i64 - 1)]
    IndexOutOfRange {
        /// The index.
        index: i64,
        /// Its position among the indices, all dimensions in one.
        position: usize,
        /// How many rows there are.
        count: usize,
    },
    /// Indices that are not integers.
    #[error("indices must be integers (u32 or i64), got {got}; cast them with to_dtype")]
    IndexType {
        /// Their type.
        got: &'static str,
    },
    /// An id that a model does not know: of a token, of a category.
    #[error("{what} {column} of row {row} is {got}, expected a whole number from 0 to {} (option {option}); give what is unknown an id of its own", *count as i64 - 1)]
    UnknownId {
        /// What it is the id of.
        what: &'static str,
        /// Which of its row's, from 0.
        column: usize,
        /// Its row in the batch, from 0.
        row: usize,
        /// The id.
        got: f64,
        /// How many there are.
        count: usize,
        /// The option that says so.
        option: &'static str,
    },
    /// A mean over no rows.
    #[error("{what} of an empty batch is undefined: skip batches of 0 rows, or use the sum")]
    EmptyBatch {
        /// Which mean.
        what: &'static str,
    },
    /// The sum over the workers failed.
    #[error("cannot sum the statistics of a batch over the workers: {source}")]
    Sync {
        /// Why.
        source: BoxError,
    },
    /// Two parameters of a model with one name.
    #[error("parameter {name:?} exists already: give each layer its own scope")]
    DuplicateParameter {
        /// The full name.
        name: String,
    },
    /// An initialiser that needs more than the shape has.
    #[error("cannot initialise parameter {name:?} of shape {shape:?}: {reason}")]
    Initialiser {
        /// The parameter's full name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// What the initialiser needs.
        reason: &'static str,
    },
    /// A weights file that is damaged or no safetensors file.
    #[error("cannot read {} as safetensors: {source}", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What the format's reader said.
        source: BoxError,
    },
    /// Weights that lack parameters of the model.
    #[error("{from} lacks parameters of the model: {}; was it saved from another model?", names.join(", "))]
    MissingParameters {
        /// The file or other source of the weights.
        from: String,
        /// The model's parameters that it does not have.
        names: Vec<String>,
    },
    /// Weights with parameters that the model lacks.
    #[error("{from} has parameters that the model does not: {}; was it saved from another model?", names.join(", "))]
    UnexpectedParameters {
        /// The file or other source of the weights.
        from: String,
        /// Its names that are not the model's.
        names: Vec<String>,
    },
    /// Weights with a parameter of another shape.
    #[error("parameter {name:?} in {from} has shape {got:?}, the model expects {expected:?}")]
    ParameterShape {
        /// The file or other source of the weights.
        from: String,
        /// The parameter.
        name: String,
        /// The model's shape.
        expected: Vec<usize>,
        /// The shape found.
        got: Vec<usize>,
    },
    /// An architecture that no one registered.
    #[error("there is no architecture {name:?}; known: {}; a program adds its own with Registry::with", known.join(", "))]
    UnknownArchitecture {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// Options that do not parse: an unknown field, a missing one, a wrong type.
    #[error("options of architecture {architecture:?}: {source}")]
    Options {
        /// The architecture.
        architecture: String,
        /// What the parser said.
        source: BoxError,
    },
    /// An option whose value makes no model.
    #[error("option {option} is {got}, expected {expected}")]
    Option {
        /// The option's field.
        option: &'static str,
        /// Its value.
        got: String,
        /// What it may be.
        expected: String,
    },
    /// A model description that does not parse.
    #[error("{} is not a model description: {source}", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: BoxError,
    },
    /// A gradient check that cannot be run as asked.
    #[error("cannot check the gradient of {name}: {reason}")]
    GradientCheck {
        /// The variable.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// A gradient that differs from the slope of the function.
    #[error(
        "the gradient of {name} at element {index} is {got}, finite differences say {expected}"
    )]
    WrongGradient {
        /// The variable.
        name: String,
        /// The flat index of the element.
        index: usize,
        /// By central differences.
        expected: f64,
        /// By the backward pass.
        got: f64,
    },
}

impl Error {
    pub(crate) fn shape(
        what: impl Into<String>,
        expected: impl Into<String>,
        got: &[usize],
    ) -> Self {
        Self::Shape { what: what.into(), expected: expected.into(), got: got.to_vec() }
    }

    pub(crate) fn sync(source: BoxError) -> Self {
        Self::Sync { source }
    }

    pub(crate) fn option(
        option: &'static str,
        got: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Option { option, got: got.to_string(), expected: expected.into() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Tensor(error.into())
    }
}
