//! Functions of the values of a row.

use super::{FnTypes, TypesOf, failed, must_be_a_name, types};
use arrow::array::{Array, ArrayRef};
use arrow::datatypes::DataType;
use datafusion::common::{Result as EngineResult, exec_err};
use datafusion::logical_expr::{
    ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use mobula_core::BoxError;
use std::sync::LazyLock;

/// A function of columns that SQL can call, in queries, filters and expressions.
///
/// ```
/// use arrow::array::{ArrayRef, AsArray, Float64Array};
/// use arrow::datatypes::{DataType, Float64Type};
/// use mobula_core::BoxError;
/// use mobula_data::{Dataset, FnTypes, ScalarFn};
/// use std::sync::Arc;
///
/// fn types(_given: &[DataType]) -> Result<FnTypes, BoxError> {
///     Ok(FnTypes::new([DataType::Float64, DataType::Float64], DataType::Float64))
/// }
///
/// fn body_mass_index(columns: &[ArrayRef]) -> Result<ArrayRef, BoxError> {
///     let [kilograms, meters] = [0, 1].map(|at| columns[at].as_primitive::<Float64Type>());
///     let rows = kilograms.iter().zip(meters);
///     let index = rows.map(|(mass, height)| Some(mass? / (height? * height?)));
///     Ok(Arc::new(index.collect::<Float64Array>()))
/// }
///
/// mobula_data::inventory::submit! { ScalarFn::new("body_mass_index", types, body_mass_index) }
///
/// # fn main() -> mobula_data::Result<()> {
/// let rows = Dataset::range(100)?.with_column("index", "body_mass_index(id, 1.75)")?;
/// assert_eq!(rows.filter("index < 18.5")?.count()?, 57); // up to 56 kg
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ScalarFn {
    pub(super) name: &'static str,
    types: TypesOf,
    call: fn(&[ArrayRef]) -> Result<ArrayRef, BoxError>,
}

inventory::collect!(ScalarFn);

impl ScalarFn {
    /// Gives `call` a name, of the letters a-z, digits and underscores. It is given the arguments as
    /// columns of the same length, which is that of what it must return, and must return the same for
    /// the same rows. It may also be given rows that a filter leaves out: an error for those is an
    /// error of the query, so a missing value is better for what it cannot do. `types` is what it makes
    /// of the types of the arguments.
    pub const fn new(
        name: &'static str,
        types: fn(&[DataType]) -> Result<FnTypes, BoxError>,
        call: fn(&[ArrayRef]) -> Result<ArrayRef, BoxError>,
    ) -> Self {
        must_be_a_name(name);
        Self { name, types, call }
    }
}

pub(super) fn of(function: &'static ScalarFn) -> ScalarUDF {
    ScalarUDF::from(Called { name: function.name })
}

/// The engine's side of it; a name means one function.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Called {
    name: &'static str,
}

impl Called {
    fn function(&self) -> &'static ScalarFn {
        let mut all = inventory::iter::<ScalarFn>.into_iter();
        all.find(|function| function.name == self.name).expect("it was made of one")
    }

    fn types(&self, given: &[DataType]) -> EngineResult<FnTypes> {
        types(self.name, self.function().types, given)
    }
}

/// What all have in common.
static SIGNATURE: LazyLock<Signature> =
    LazyLock::new(|| Signature::user_defined(Volatility::Immutable));

impl ScalarUDFImpl for Called {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &SIGNATURE
    }

    fn coerce_types(&self, given: &[DataType]) -> EngineResult<Vec<DataType>> {
        Ok(self.types(given)?.inputs)
    }

    fn return_type(&self, given: &[DataType]) -> EngineResult<DataType> {
        Ok(self.types(given)?.output)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> EngineResult<ColumnarValue> {
        let columns = ColumnarValue::values_to_arrays(&args.args)?;
        // Where all arguments are constants there is a row of them, whatever the number of rows.
        let rows = columns.first().map_or(args.number_rows, |column| column.len());
        let made = (self.function().call)(&columns).map_err(|source| failed(self.name, source))?;
        let (expected, got) = (args.return_field.data_type(), made.data_type());
        if made.len() != rows || expected != got {
            let (name, len) = (self.name, made.len());
            return exec_err!(
                "{name} returned {len} values of {got} for {rows} rows, expected as many of {expected}"
            );
        }
        let all_constant = args.args.iter().all(|arg| matches!(arg, ColumnarValue::Scalar(_)));
        match all_constant && rows == 1 {
            true => Ok(ColumnarValue::Scalar(datafusion::scalar::ScalarValue::try_from_array(
                &made, 0,
            )?)),
            false => Ok(ColumnarValue::Array(made)),
        }
    }
}
