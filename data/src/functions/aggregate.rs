//! Functions of the rows of a group.

use super::{Called, FnTypes, Function, Head, SIGNATURE, failed};
use crate::error::Result;
use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{DataType, Field, FieldRef};
use datafusion::common::{Result as EngineResult, exec_err, not_impl_err};
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::{Accumulator, AggregateUDFImpl, Signature};
use datafusion::scalar::ScalarValue;
use mobula_core::BoxError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::sync::Arc;

/// What an aggregate knows of the rows of a group so far, for aggregates of your own.
///
/// `Default` is that of no rows. It travels between threads and to disk as MessagePack; what it makes
/// of a group must depend on neither the order of its rows nor on how they are cut. (MessagePack has no
/// `Some(None)`.) In SQL it may have a `FILTER`, or be over a window that begins with the first row;
/// `ORDER BY` among its arguments is refused, and `DISTINCT` where the engine cannot do without it.
///
/// ```
/// use arrow::array::{Array, ArrayRef, AsArray, Float64Array};
/// use arrow::datatypes::{DataType, Float64Type};
/// use mobula_core::BoxError;
/// use mobula_data::{AggregateFn, Aggregator, CsvOptions, Dataset, FnTypes};
/// use serde::{Deserialize, Serialize};
/// use std::sync::Arc;
///
/// #[derive(Debug, Default, Serialize, Deserialize)]
/// struct GeometricMean {
///     logarithms: f64,
///     rows: u64,
/// }
///
/// impl Aggregator for GeometricMean {
///     fn types(_given: &[DataType]) -> Result<FnTypes, BoxError> {
///         Ok(FnTypes::new([DataType::Float64], DataType::Float64))
///     }
///
///     fn update(&mut self, columns: &[ArrayRef]) -> Result<(), BoxError> {
///         for x in columns[0].as_primitive::<Float64Type>().iter().flatten() {
///             self.logarithms += x.ln();
///             self.rows += 1;
///         }
///         Ok(())
///     }
///
///     fn merge(&mut self, other: Self) -> Result<(), BoxError> {
///         self.logarithms += other.logarithms;
///         self.rows += other.rows;
///         Ok(())
///     }
///
///     fn finish(&self) -> Result<ArrayRef, BoxError> {
///         let mean = (self.rows > 0).then(|| (self.logarithms / self.rows as f64).exp());
///         Ok(Arc::new(Float64Array::from(vec![mean])))
///     }
/// }
///
/// mobula_data::inventory::submit! { AggregateFn::new::<GeometricMean>("geometric_mean") }
///
/// # fn main() -> mobula_data::Result<()> {
/// # std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).unwrap();
/// let penguins = Dataset::read_csv("examples/data/penguins.csv", CsvOptions::default())?;
/// let mass = penguins.aggregate(["species"], ["geometric_mean(body_mass_g) AS mass"])?.collect()?;
/// assert_eq!(mass.column(1).as_primitive::<Float64Type>().value(2).round(), 5051.0);
/// # Ok(())
/// # }
/// ```
pub trait Aggregator:
    Debug + Default + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// What it makes of the types of the arguments; an error where it has no use for them. It is
    /// also asked with those that it said the arguments are converted to.
    fn types(given: &[DataType]) -> Result<FnTypes, BoxError>;

    /// Adds rows of the group, perhaps none: the arguments, as columns of the same length.
    fn update(&mut self, columns: &[ArrayRef]) -> Result<(), BoxError>;

    /// Adds what another knows of other rows of the group.
    fn merge(&mut self, other: Self) -> Result<(), BoxError>;

    /// The aggregate of the rows so far, as a column of one value. More may come after it.
    fn finish(&self) -> Result<ArrayRef, BoxError>;

    /// Bytes of memory that it holds, which come out of the budget. Default: its own, without what it
    /// has on the heap.
    fn size(&self) -> usize {
        size_of::<Self>()
    }
}

/// An [`Aggregator`] that SQL can call, in queries and in [`Dataset::aggregate`](crate::Dataset::aggregate).
#[derive(Debug)]
pub struct AggregateFn {
    head: Head,
    make: fn(&'static str, DataType) -> Box<dyn Accumulator>,
}

inventory::collect!(AggregateFn);

impl AggregateFn {
    /// Gives it a name, of the letters a-z, digits and underscores.
    pub const fn new<A: Aggregator>(name: &'static str) -> Self {
        Self { head: Head::new(name, A::types), make: make::<A> }
    }
}

impl Function for AggregateFn {
    fn head(&self) -> &Head {
        &self.head
    }
}

fn make<A: Aggregator>(name: &'static str, output: DataType) -> Box<dyn Accumulator> {
    Box::new(State { name, output, of: A::default() })
}

impl AggregateUDFImpl for Called<AggregateFn> {
    fn name(&self) -> &str {
        self.0.head.name
    }

    fn signature(&self) -> &Signature {
        &SIGNATURE
    }

    fn coerce_types(&self, given: &[DataType]) -> EngineResult<Vec<DataType>> {
        Ok(self.0.head.types(given)?.inputs)
    }

    fn return_type(&self, given: &[DataType]) -> EngineResult<DataType> {
        Ok(self.0.head.types(given)?.output)
    }

    /// What the engine has for groups that it finds no rows for.
    fn default_value(&self, output: &DataType) -> EngineResult<ScalarValue> {
        (self.0.make)(self.0.head.name, output.clone()).evaluate()
    }

    fn create_sliding_accumulator(
        &self,
        _args: AccumulatorArgs<'_>,
    ) -> EngineResult<Box<dyn Accumulator>> {
        not_impl_err!("{} over a window that does not begin with the first row", self.0.head.name)
    }

    fn state_fields(&self, args: StateFieldsArgs<'_>) -> EngineResult<Vec<FieldRef>> {
        Ok(vec![Arc::new(Field::new(
            format!("{}[state]", args.name),
            DataType::LargeBinary,
            false,
        ))])
    }

    fn accumulator(&self, args: AccumulatorArgs<'_>) -> EngineResult<Box<dyn Accumulator>> {
        let name = self.0.head.name;
        if args.is_distinct || args.ignore_nulls || !args.order_bys.is_empty() {
            return not_impl_err!(
                "{name} with DISTINCT, IGNORE NULLS or ORDER BY among its arguments"
            );
        }
        Ok((self.0.make)(name, args.return_field.data_type().clone()))
    }
}

/// An aggregate under way.
#[derive(Debug)]
struct State<A> {
    name: &'static str,
    output: DataType,
    of: A,
}

impl<A: Aggregator> State<A> {
    fn done<T>(&self, result: Result<T, impl Into<BoxError>>) -> Result<T> {
        result.map_err(|source| failed(self.name, source.into()))
    }
}

impl<A: Aggregator> Accumulator for State<A> {
    fn update_batch(&mut self, columns: &[ArrayRef]) -> EngineResult<()> {
        let updated = self.of.update(columns);
        Ok(self.done(updated)?)
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> EngineResult<()> {
        for state in states[0].as_binary::<i64>().iter().flatten() {
            let other = self.done(rmp_serde::from_slice(state))?;
            let merged = self.of.merge(other);
            self.done(merged)?;
        }
        Ok(())
    }

    fn state(&mut self) -> EngineResult<Vec<ScalarValue>> {
        let bytes = self.done(rmp_serde::to_vec_named(&self.of))?;
        Ok(vec![ScalarValue::LargeBinary(Some(bytes))])
    }

    fn evaluate(&mut self) -> EngineResult<ScalarValue> {
        let value = self.done(self.of.finish())?;
        let (name, got, expected) = (self.name, value.data_type(), &self.output);
        if value.len() != 1 || got != expected {
            let len = value.len();
            return exec_err!("{name} returned {len} values of {got}, expected one of {expected}");
        }
        ScalarValue::try_from_array(&value, 0)
    }

    fn size(&self) -> usize {
        self.of.size()
    }
}
