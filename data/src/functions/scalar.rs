//! Functions of the values of a row.

use super::{Called, FnTypes, Function, Head, SIGNATURE, failed};
use arrow::array::{Array, ArrayRef};
use arrow::datatypes::DataType;
use datafusion::common::{Result as EngineResult, exec_err};
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDFImpl, Signature};
use mobula_core::BoxError;

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
    head: Head,
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
        Self { head: Head::new(name, types), call }
    }
}

impl Function for ScalarFn {
    fn head(&self) -> &Head {
        &self.head
    }
}

impl ScalarUDFImpl for Called<ScalarFn> {
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

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> EngineResult<ColumnarValue> {
        let columns = ColumnarValue::values_to_arrays(&args.args)?;
        let Called(ScalarFn { head: Head { name, .. }, call }) = self;
        // Where all arguments are constants there is a row of them, whatever the number of rows.
        let rows = columns[0].len();
        let made = call(&columns).map_err(|source| failed(name, source))?;
        let (expected, got) = (args.return_field.data_type(), made.data_type());
        if made.len() != rows || expected != got {
            let len = made.len();
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
