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
#[cfg(feature = "backend")]
use datafusion::logical_expr::{AggregateUDF, ScalarUDF};
use datafusion::logical_expr::{Signature, Volatility};
use datafusion::prelude::SessionContext;
use mobula_core::BoxError;
use std::fmt::Debug;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock};

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

/// What both kinds of functions have.
#[derive(Debug)]
struct Head {
    name: &'static str,
    types: TypesOf,
}

impl Head {
    const fn new(name: &'static str, types: TypesOf) -> Self {
        must_be_a_name(name);
        Self { name, types }
    }

    /// The types of a call, with as many arguments as the function takes.
    fn types(&self, given: &[DataType]) -> EngineResult<FnTypes> {
        let name = self.name;
        if given.is_empty() {
            return Err(exec_datafusion_err!("{name} takes at least one argument"));
        }
        let given: Vec<_> = given.iter().map(without_view).collect();
        let types = (self.types)(&given).map_err(|source| failed(name, source))?;
        match types.inputs.len() == given.len() {
            true => Ok(types),
            false => Err(exec_datafusion_err!(
                "{name} takes {} arguments, but {} are given",
                types.inputs.len(),
                given.len()
            )),
        }
    }
}

/// Text is views where the engine read it from Parquet, and functions need not know.
fn without_view(of: &DataType) -> DataType {
    match of {
        DataType::Utf8View => DataType::Utf8,
        DataType::BinaryView => DataType::Binary,
        other => other.clone(),
    }
}

trait Function: Debug {
    fn head(&self) -> &Head;
}

/// The engine's side of a function. A name means one.
#[derive(Debug)]
struct Called<F: 'static>(&'static F);

impl<F: Function> PartialEq for Called<F> {
    fn eq(&self, other: &Self) -> bool {
        self.0.head().name == other.0.head().name
    }
}

impl<F: Function> Eq for Called<F> {}

impl<F: Function> Hash for Called<F> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.head().name.hash(state);
    }
}

/// Of all: types are their own affair, and the same rows give the same.
static SIGNATURE: LazyLock<Signature> =
    LazyLock::new(|| Signature::user_defined(Volatility::Immutable));

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
    let scalars = inventory::iter::<ScalarFn>.into_iter().map(|function| function.head().name);
    scalars.chain(inventory::iter::<AggregateFn>.into_iter().map(|function| function.head().name))
}

/// Gives every name one meaning.
pub(crate) fn check() -> Result<()> {
    match *TWICE {
        Some(name) => Err(Error::FunctionTwice { name: name.to_owned() }),
        None => Ok(()),
    }
}

/// Makes them known to a session.
pub(crate) fn register(session: &mut dyn FunctionRegistry) -> EngineResult<()> {
    for function in inventory::iter::<ScalarFn> {
        session.register_udf(Arc::new(Called(function).into()))?;
    }
    for function in inventory::iter::<AggregateFn> {
        session.register_udaf(Arc::new(Called(function).into()))?;
    }
    Ok(())
}

/// The function of this name that is the program's own.
#[cfg(feature = "backend")]
pub(crate) fn scalar(name: &str) -> Option<Arc<ScalarUDF>> {
    let mut all = inventory::iter::<ScalarFn>.into_iter();
    let function = all.find(|function| function.head().name == name)?;
    Some(Arc::new(Called(function).into()))
}

/// The same of aggregates.
#[cfg(feature = "backend")]
pub(crate) fn aggregate(name: &str) -> Option<Arc<AggregateUDF>> {
    let mut all = inventory::iter::<AggregateFn>.into_iter();
    let function = all.find(|function| function.head().name == name)?;
    Some(Arc::new(Called(function).into()))
}
