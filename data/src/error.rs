//! The errors of this crate: what, where, expected, got, way out.

use crate::kept_parts::OneError;
use mobula_core::BoxError;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in reading, transforming and streaming data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the layer below: a file that cannot be read, a stream that cannot be resumed.
    #[error(transparent)]
    Core(#[from] mobula_core::Error),
    /// A process of another engine finds other data than where the query was planned.
    #[error(
        "{dataset}: its rows are not those where the query was planned; every process must find the same files by the same names, and what is made of others on the way, such as the groups of a query, may come in another order where there is less memory: write it to files first"
    )]
    OtherData {
        /// What the dataset is called.
        dataset: String,
    },
    /// The description of a dataset cannot be sent to another engine, or is not understood there.
    #[error(
        "{dataset} cannot be described to another process: {reason}; all processes must be of the same program, with the same sources, functions and preprocessors"
    )]
    Untold {
        /// What the dataset is called.
        dataset: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No file is at a path, or matches a pattern.
    #[error("no file matches {}; check the path (relative ones start at the current folder)", pattern.display())]
    NoFiles {
        /// The pattern, made absolute.
        pattern: PathBuf,
    },
    /// What an object store did not do.
    #[error("cannot {action} {url}: {source}{hint}")]
    ObjectStore {
        /// What was attempted.
        action: &'static str,
        /// The object.
        url: String,
        /// What the store said, or the way to it.
        source: BoxError,
        /// Where its address and credentials come from.
        hint: &'static str,
    },
    /// A folder in an object store with nothing but what a write that did not end has left.
    #[error(
        "{folder} is being written, or was when its writer ended; write it again, with overwrite"
    )]
    Unfinished {
        /// Its URL.
        folder: String,
    },
    /// A file whose content is not what its format says.
    #[error("{} is not a valid {format} file: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The format that was expected.
        format: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The files of one data set have different columns.
    #[error("{} has the columns [{got}], expected [{expected}] as the first file has", path.display())]
    SchemaDiffers {
        /// The file that differs.
        path: PathBuf,
        /// Columns of the first file.
        expected: String,
        /// Columns of this file.
        got: String,
    },
    /// The folders named `column=value` that files lie in do not have the same columns.
    #[error(
        "{} lies in folders for the columns [{}], expected [{}] as the first file does",
        path.display(), got.join(", "), expected.join(", ")
    )]
    FoldersDiffer {
        /// The file that differs.
        path: PathBuf,
        /// Columns of the first file's folders.
        expected: Vec<String>,
        /// Columns of this file's.
        got: Vec<String>,
    },
    /// A column that the data does not have.
    #[error("there is no column {column:?}; available: {}", available.join(", "))]
    NoSuchColumn {
        /// The name asked for.
        column: String,
        /// The names there are.
        available: Vec<String>,
    },
    /// A column whose name another has.
    #[error("there would be two columns {column:?}; rename or drop one of them")]
    ColumnTwice {
        /// The column.
        column: String,
    },
    /// A column of a type that an operation cannot take.
    #[error("column {column:?} is {got}, expected {expected}{hint}")]
    ColumnType {
        /// The column.
        column: String,
        /// What the operation takes.
        expected: &'static str,
        /// The column's Arrow type.
        got: String,
        /// The way out, as a clause that starts with `; `, or nothing.
        hint: &'static str,
    },
    /// A column or tensor whose rows are wider or narrower than what was fitted.
    #[error(
        "column {column:?} has {got} values a row, expected {expected} as in the data it was fitted on"
    )]
    Width {
        /// The column.
        column: String,
        /// Values a row when fitted.
        expected: usize,
        /// Values a row now.
        got: usize,
    },
    /// Missing values where none can be represented.
    #[error(
        "column {column:?} has {rows} missing values in {place}; fill them with SimpleImputer or drop the rows with filter(\"{column} IS NOT NULL\")"
    )]
    Nulls {
        /// The column.
        column: String,
        /// How many rows have none.
        rows: usize,
        /// Which part of the data.
        place: String,
    },
    /// A statistic that the data does not define.
    #[error("cannot fit column {column:?}: {reason}")]
    CannotFit {
        /// The column.
        column: String,
        /// Why: no rows, only missing values, values that are not finite.
        reason: String,
    },
    /// SQL that cannot be planned.
    #[error("in {sql:?}: {source}")]
    Sql {
        /// The query or expression as given.
        sql: String,
        /// What the planner said.
        source: BoxError,
    },
    /// A database that cannot be reached, or that went away.
    #[error(
        "cannot {action} {database}: {source}; check that the server runs and can be reached from here"
    )]
    DatabaseGone {
        /// What was attempted.
        action: &'static str,
        /// The database, without a password.
        database: String,
        /// What the system or the server said.
        source: BoxError,
    },
    /// A database that can be reached, and does not let us in: no such user, password or database, no
    /// room, no TLS.
    #[error("{database} cannot be used: {reason}{hint}")]
    DatabaseRefused {
        /// The database, without a password.
        database: String,
        /// What the server said.
        reason: String,
        /// The way out, as a clause that starts with `; `, or nothing.
        hint: &'static str,
    },
    /// A database that says nothing for longer than it may.
    #[error("cannot {action} {database}: it said nothing for {timeout:?}; {hint}")]
    DatabaseSilent {
        /// What was attempted.
        action: &'static str,
        /// The database, without a password.
        database: String,
        /// How long it may say nothing.
        timeout: Duration,
        /// The way out.
        hint: &'static str,
    },
    /// What a database says to a query or a table that it was given.
    #[error("{database}, on {sql:?}{}: {reason}", at(*position))]
    DatabaseQuery {
        /// The database, without a password.
        database: String,
        /// The query or the table as given.
        sql: String,
        /// Line and column of what it stumbled over, from 1 on.
        position: Option<(usize, usize)>,
        /// What is wrong, and the way out if the database knows one.
        reason: String,
    },
    /// A value that its column's type has not.
    #[error("column {column:?} has {got} in row {row}, expected {expected}{hint}")]
    ColumnValue {
        /// The column.
        column: String,
        /// Which row of the result, from 1 on.
        row: u64,
        /// The value, or what it is.
        got: String,
        /// What the column takes.
        expected: String,
        /// The way out, as a clause that starts with `; `, or nothing.
        hint: &'static str,
    },
    /// A table that is there and is not to be changed.
    #[error(
        "{database} has a table {table:?}; write another one, or choose IfExists::Append or IfExists::Replace"
    )]
    TableExists {
        /// The database, without a password.
        database: String,
        /// The table as given.
        table: String,
    },
    /// A database that went away while it was told to keep what was written.
    #[error(
        "{database} went away while {table:?} was committed: {source}; it has all rows or none, so look before you write them again"
    )]
    CommitUnknown {
        /// The database, without a password.
        database: String,
        /// The table as given.
        table: String,
        /// What the system or the server said.
        source: BoxError,
    },
    /// A table of a query that is neither a name it was given nor a file.
    #[error(
        "there is no table {table:?}; known: {}; write a file as 'path.parquet', or give it a name: {table}=path.parquet",
        if known.is_empty() { "none".to_owned() } else { known.join(", ") }
    )]
    NoSuchTable {
        /// The name in the query.
        table: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// A file whose name does not say what it is.
    #[error("cannot tell what {} is by its name; known endings: .{}", path.display(), known.join(", ."))]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// The endings that are known.
        known: Vec<&'static str>,
    },
    /// A function whose value differs from one evaluation to the next.
    #[error(
        "{sql:?} calls {function}(), which gives every worker another answer; use a seeded operation instead"
    )]
    NotDeterministic {
        /// The query or expression as given.
        sql: String,
        /// The function.
        function: String,
    },
    /// A number that a preprocessor cannot take.
    #[error("column {column:?} has the value {value}, expected {expected}")]
    OutOfRange {
        /// The column.
        column: String,
        /// The first such value.
        value: f64,
        /// What it takes, and the way out.
        expected: &'static str,
    },
    /// A value that was not there when the encoder was fitted.
    #[error("column {column:?} has the value {value}, which was not there when the encoder was fitted; known: {}", known.join(", "))]
    UnknownCategory {
        /// The column.
        column: String,
        /// The value.
        value: String,
        /// The categories that were fitted.
        known: Vec<String>,
    },
    /// A value that the elements of a tensor cannot have.
    #[error(
        "column {column:?} has the value {value} in {place}, which {dtype} has not; choose another type with TensorSpec::with_dtype{}",
        if *dtype == "u32" { "; a class number is at least 0" } else { "" }
    )]
    ElementRange {
        /// The column.
        column: String,
        /// The first such value.
        value: String,
        /// The type of the tensor's elements.
        dtype: &'static str,
        /// Which part of the data.
        place: String,
    },
    /// A list that is longer than the tensor has room for.
    #[error(
        "column {column:?} has a list of {got} values in {place}, the tensor has room for {expected}; give TensorSpec::with_length the length of the longest, or ask for with_truncation"
    )]
    ListLength {
        /// The column.
        column: String,
        /// Values of the list.
        got: usize,
        /// Values that fit.
        expected: usize,
        /// Which part of the data.
        place: String,
    },
    /// An option that makes no sense.
    #[error("{option} is {got}, expected {expected}")]
    InvalidOption {
        /// The option.
        option: &'static str,
        /// What would be right.
        expected: String,
        /// What was given.
        got: String,
    },
    /// A batch function that this binary does not register.
    #[error("no batch function is named {name:?}; registered: {}; register it with mobula_data::inventory::submit! {{ BatchFn::new({name:?}, function) }}", registered.join(", "))]
    NotRegistered {
        /// The name asked for.
        name: String,
        /// What this binary registers.
        registered: Vec<String>,
    },
    /// A batch function returned an error.
    #[error("batch function {name:?} failed: {source}")]
    BatchFn {
        /// The function.
        name: String,
        /// Its error.
        source: BoxError,
    },
    /// A function that SQL called returned an error.
    #[error("function {name}: {source}")]
    Function {
        /// The function.
        name: String,
        /// Its error.
        source: BoxError,
    },
    /// A name that two functions have.
    #[error(
        "there are two functions {name}; give yours, which ScalarFn or AggregateFn registers, another name"
    )]
    FunctionTwice {
        /// The name.
        name: String,
    },
    /// There is no room for what has no room in memory.
    #[error(
        "cannot spill to a file in {}: {source}; make room, or set TMPDIR to a folder that has it",
        folder.display()
    )]
    Spill {
        /// The folder for temporary files.
        folder: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A query that needs more memory than it may have, and cannot spill.
    #[error(
        "the query needs more memory than the {budget} bytes that data may use: {reason}; set MOBULA_DATA_BYTES to more"
    )]
    OutOfMemory {
        /// The budget.
        budget: usize,
        /// What the engine said.
        reason: String,
    },
    /// A block that was computed by a closure, which no one has any more.
    #[error(
        "a block that a closure computed is lost, and cannot be computed again: {reason}; register the function as a BatchFn, which can"
    )]
    BlockLost {
        /// How it was found out.
        reason: String,
    },
    /// Rows that are not of the type asked for, or the other way round.
    #[error("rows of {kind}: {source}")]
    Rows {
        /// The type.
        kind: &'static str,
        /// What does not fit.
        source: BoxError,
    },
    /// Blocks that cannot be computed again, or come out otherwise.
    #[error(
        "{place} of a persisted dataset gives other rows when it is computed again, so it cannot be replaced if it is lost: {reason}"
    )]
    NotRepeatable {
        /// Which block.
        place: String,
        /// What may be the cause, and the way out.
        reason: String,
    },
    /// Nothing is left to read.
    #[error("the dataset has no rows{after}")]
    Empty {
        /// " after its filters and splits", or nothing.
        after: &'static str,
    },
    /// A row that cannot be a sample of a WebDataset.
    #[error("the sample {key:?} cannot be written: {reason}")]
    Sample {
        /// Its key.
        key: String,
        /// Why: its key is no name, it has no value.
        reason: &'static str,
    },
    /// Something is where rows are to be written.
    #[error("{} exists; {hint}", path.display())]
    TargetExists {
        /// The folder.
        path: PathBuf,
        /// The way out.
        hint: &'static str,
    },
    /// A file changed under an open dataset.
    #[error("{} changed since the dataset was opened; make the dataset again", path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
    },
    /// A part of the data that has other rows than its source announced.
    #[error("{place} has {got} rows, it had {expected} when it was opened; make the dataset again")]
    Changed {
        /// Which part of the data.
        place: String,
        /// Rows when it was opened.
        expected: u64,
        /// Rows now.
        got: u64,
    },
    /// An error of the query engine or the tensor library.
    #[error("cannot {action}: {source}")]
    Engine {
        /// What was attempted.
        action: &'static str,
        /// What the engine said.
        source: BoxError,
    },
    /// A function panicked, one of the program's or one of Mobula's.
    #[error(
        "a function of the data layer, or of the program that it was given, panicked: {message}"
    )]
    Panicked {
        /// What it said.
        message: String,
    },
    /// A bug in Mobula.
    #[error("internal error, please report it: {0}")]
    Internal(String),
}

impl Error {
    pub(crate) fn no_such_column(column: &str, schema: &arrow::datatypes::Schema) -> Self {
        Self::NoSuchColumn {
            column: column.to_owned(),
            available: schema.fields().iter().map(|f| f.name().clone()).collect(),
        }
    }

    pub(crate) fn engine(
        action: &'static str,
    ) -> impl Fn(datafusion::error::DataFusionError) -> Self {
        move |error| {
            recover(error).unwrap_or_else(|error| Self::Engine { action, source: error.into() })
        }
    }

    pub(crate) fn sql(sql: &str) -> impl Fn(datafusion::error::DataFusionError) -> Self + '_ {
        move |error| {
            recover(error)
                .unwrap_or_else(|error| Self::Sql { sql: sql.to_owned(), source: parsers(error) })
        }
    }
}

/// The parser's own error, which the engine's has once more.
fn parsers(error: datafusion::error::DataFusionError) -> BoxError {
    use datafusion::error::DataFusionError as Engine;
    match error {
        Engine::SQL(parser, _) => parser,
        Engine::Diagnostic(_, inner) => parsers(*inner),
        error => error.into(),
    }
}

/// " (line 1, column 8)", or nothing.
fn at(position: Option<(usize, usize)>) -> String {
    position.map(|(line, column)| format!(" (line {line}, column {column})")).unwrap_or_default()
}

/// Takes our own error out of the engine's wrapping, and names the columns there are.
fn recover(
    error: datafusion::error::DataFusionError,
) -> Result<Error, datafusion::error::DataFusionError> {
    use arrow::error::ArrowError;
    use datafusion::common::SchemaError;
    use datafusion::error::DataFusionError as Engine;
    match error {
        Engine::External(inner) => match inner.downcast::<Error>() {
            Ok(ours) => Ok(*ours),
            Err(inner) => match inner.downcast_ref::<OneError>().and_then(OneError::take) {
                Some(first) => recover(first),
                None => Err(Engine::External(inner)),
            },
        },
        Engine::ResourcesExhausted(reason) => {
            Ok(Error::OutOfMemory { budget: crate::memory::budget().unwrap_or(0), reason })
        }
        Engine::Shared(inner) => match Arc::try_unwrap(inner) {
            Ok(inner) => recover(inner),
            Err(inner) => match inner.find_root() {
                Engine::ResourcesExhausted(reason) => {
                    recover(Engine::ResourcesExhausted(reason.clone()))
                }
                Engine::External(root) => {
                    match root.downcast_ref::<OneError>().and_then(OneError::take) {
                        Some(first) => recover(first),
                        None => Err(Engine::Shared(inner)),
                    }
                }
                _ => Err(Engine::Shared(inner)),
            },
        },
        Engine::Context(text, inner) => recover(*inner).map_err(|inner| inner.context(text)),
        Engine::Diagnostic(diagnostic, inner) => {
            recover(*inner).map_err(|inner| Engine::Diagnostic(diagnostic, Box::new(inner)))
        }
        Engine::IoError(inner) => within(inner).map_err(Engine::IoError),
        Engine::ArrowError(inner, backtrace) => match *inner {
            ArrowError::ExternalError(inner) => match inner.downcast::<Error>() {
                Ok(ours) => Ok(*ours),
                Err(inner) => match inner.downcast::<Engine>() {
                    Ok(inner) => recover(*inner),
                    Err(inner) => Err(Engine::External(inner)),
                },
            },
            ArrowError::IoError(text, inner) => within(inner).map_err(|inner| {
                Engine::ArrowError(Box::new(ArrowError::IoError(text, inner)), backtrace)
            }),
            inner => Err(Engine::ArrowError(Box::new(inner), backtrace)),
        },
        Engine::SchemaError(inner, backtrace) => match *inner {
            SchemaError::FieldNotFound { field, valid_fields } => Ok(Error::NoSuchColumn {
                column: field.name().to_owned(),
                // A sort knows those of its input and those that it gives.
                available: {
                    let mut names: Vec<_> =
                        valid_fields.iter().map(|field| field.name().to_owned()).collect();
                    let mut seen = std::collections::HashSet::new();
                    names.retain(|name| seen.insert(name.clone()));
                    names
                },
            }),
            inner => Err(Engine::SchemaError(Box::new(inner), backtrace)),
        },
        error => Err(error),
    }
}

/// Our own error, if that is what a write failed with.
fn within(error: std::io::Error) -> Result<Error, std::io::Error> {
    error.downcast::<Error>()
}

impl From<arrow::error::ArrowError> for Error {
    fn from(error: arrow::error::ArrowError) -> Self {
        Self::Engine { action: "compute on Arrow data", source: error.into() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Engine { action: "make a tensor", source: error.into() }
    }
}

impl From<Error> for mobula_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Core(error) => error,
            error => Self::layer(error),
        }
    }
}

impl From<Error> for datafusion::error::DataFusionError {
    fn from(error: Error) -> Self {
        Self::External(error.into())
    }
}
