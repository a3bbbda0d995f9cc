//! Functions of the program that SQL can call, by name, so that a description can mean them: worker
//! processes are the same binary, so they find them too.

mod aggregate;
mod scalar;

pub use aggregate::{AggregateFn, Aggregator};
pub use scalar::ScalarFn;

use crate::error::{Error, Result};
use arrow::datatypes::DataType;
use datafusion::common::{Result as EngineResult, exec_datafusion_err};
use datafusion::execution::FunctionRegistry;
use datafusion::prelude::SessionContext;
use mobula_core::BoxError;
use std::sync::LazyLock;

/// The types of a function's arguments and of its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FnTypes {
    inputs: Vec<DataType>,
    output: DataType,
}

impl FnTypes {
    /// Arguments are converted to `inputs`, as `CAST` does, before the function gets them.
    pub fn new(inputs: impl IntoIterator<Item = DataType>, output: DataType) -> Self {
        Self { inputs: inputs.into_iter().collect(), output }
    }
}

/// What a function makes of the types that it is called with, or why it cannot be: it is also asked
/// with those that it said the arguments are converted to.
type TypesOf = fn(&[DataType]) -> Result<FnTypes, BoxError>;

/// The types of a call, with as many arguments as the function takes.
fn types(name: &str, of: TypesOf, given: &[DataType]) -> EngineResult<FnTypes> {
    if given.is_empty() {
        return Err(exec_datafusion_err!("{name} takes at least one argument"));
    }
    let types = of(given).map_err(|source| failed(name, source))?;
    if types.inputs.len() != given.len() {
        return Err(exec_datafusion_err!(
            "{name} takes {} arguments, but {} are given",
            types.inputs.len(),
            given.len()
        ));
    }
    Ok(types)
}

fn failed(name: &str, source: BoxError) -> Error {
    Error::Function { name: name.to_owned(), source }
}

/// A function's name as SQL has it without quotes.
const fn must_be_a_name(name: &str) {
    let bytes = name.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let letter = bytes[at].is_ascii_lowercase() || bytes[at] == b'_';
        assert!(letter || at > 0 && bytes[at].is_ascii_digit(), "a name has a-z, 0-9 and _");
        at += 1;
    }
    assert!(at > 0, "a function needs a name");
}

/// A name that two functions have, or that one shares with a function of the engine's.
static TWICE: LazyLock<Option<&'static str>> = LazyLock::new(|| {
    let engine = SessionContext::new();
    let mut taken = engine.udfs();
    taken.extend(engine.udafs());
    // Those of rows in order too, which it would look up after ours.
    taken.extend(engine.udwfs());
    taken.extend(engine.higher_order_function_names());
    names().find(|name| !taken.insert((*name).to_owned()))
});

fn names() -> impl Iterator<Item = &'static str> {
    let scalars = inventory::iter::<ScalarFn>.into_iter().map(|function| function.name);
    scalars.chain(inventory::iter::<AggregateFn>.into_iter().map(|function| function.name))
}

/// Gives every name one meaning.
pub(crate) fn check() -> Result<()> {
    match *TWICE {
        Some(name) => Err(Error::FunctionTwice { name: name.to_owned() }),
        None => Ok(()),
    }
}

/// Makes them known to a session.
pub(crate) fn register(session: &SessionContext) {
    for function in inventory::iter::<ScalarFn> {
        session.register_udf(scalar::of(function));
    }
    for function in inventory::iter::<AggregateFn> {
        session.register_udaf(aggregate::of(function));
    }
}
