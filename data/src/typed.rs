//! Rows of the program's own types, and functions of them that are closures.

use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::{ArrayRef, BooleanArray, RecordBatchOptions};
use arrow::compute::{CastOptions, cast_with_options, filter_record_batch};
use arrow::datatypes::{DataType, FieldRef, Schema};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_arrow::schema::{SchemaLike, TracingOptions};
use std::sync::Arc;

/// Rows as values of a serde type: a struct with a field a column. Columns that it has no field for
/// are passed over; numbers are converted, if the field's type has them, and never cut off.
///
/// ```
/// use mobula_data::{CsvOptions, Dataset};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Debug, Serialize, Deserialize)]
/// struct Penguin {
///     species: String,
///     body_mass_g: Option<f64>,
/// }
///
/// #[derive(Debug, PartialEq, Serialize, Deserialize)]
/// struct Heavy {
///     species: String,
///     kilograms: f64,
/// }
///
/// # std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).unwrap();
/// let penguins = Dataset::read_csv("examples/data/penguins.csv", CsvOptions::default())?;
/// let heavy = penguins.flat_map(|penguin: Penguin| {
///     let kilograms = penguin.body_mass_g.unwrap_or(0.0) / 1000.0;
///     (kilograms > 6.0).then_some(Heavy { species: penguin.species, kilograms })
/// })?;
/// let rows = heavy.rows::<Heavy>()?.collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(rows[0], Heavy { species: "Gentoo".to_owned(), kilograms: 6.3 });
/// # Ok::<(), mobula_data::Error>(())
/// ```
///
/// A closure stays in its process. What it makes is computed at once, several blocks at a time, and
/// kept on disk as [`persist`](Self::persist) keeps it; but a block that is lost is an error. A
/// [`BatchFn`](crate::BatchFn), which has a name, is computed when its rows are needed, by any worker.
impl Dataset {
    /// A dataset of these rows. Those of a type that describes itself only with values (maps, enums
    /// with data) are refused.
    pub fn from_rows<T: Serialize + DeserializeOwned>(
        rows: impl IntoIterator<Item = T>,
    ) -> Result<Self> {
        let rows: Vec<T> = rows.into_iter().collect();
        Self::from_batches([to_batch(&fields::<T>()?, &rows)?])
    }

    /// The rows, in order. Blocks are read ahead as [`batches`](Self::batches) does.
    pub fn rows<T: DeserializeOwned>(&self) -> Result<impl Iterator<Item = Result<T>>> {
        let of_batch = |batch: Result<RecordBatch>| match batch.and_then(|b| from_batch::<T>(&b)) {
            Ok(rows) => rows.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        };
        Ok(self.batches()?.flat_map(of_batch))
    }

    /// What `function` makes of each row.
    pub fn map<T: DeserializeOwned, U: Serialize + DeserializeOwned>(
        &self,
        function: impl Fn(T) -> U + Send + Sync + 'static,
    ) -> Result<Self> {
        self.flat_map(move |row| Some(function(row)))
    }

    /// What `function` makes of each row: any number of rows.
    pub fn flat_map<T, U, I>(
        &self,
        function: impl Fn(T) -> I + Send + Sync + 'static,
    ) -> Result<Self>
    where
        T: DeserializeOwned,
        U: Serialize + DeserializeOwned,
        I: IntoIterator<Item = U>,
    {
        let fields = fields::<U>()?;
        let schema = Arc::new(Schema::new(fields.clone()));
        self.computed(schema, move |batch| {
            let rows: Vec<U> = from_batch::<T>(batch)?.into_iter().flat_map(&function).collect();
            to_batch(&fields, &rows)
        })
    }

    /// The rows for which `function` is true, with all their columns.
    pub fn filter_rows<T: DeserializeOwned>(
        &self,
        function: impl Fn(&T) -> bool + Send + Sync + 'static,
    ) -> Result<Self> {
        self.computed(self.schema()?, move |batch| {
            let mask: Vec<bool> = from_batch::<T>(batch)?.iter().map(&function).collect();
            Ok(filter_record_batch(batch, &BooleanArray::from(mask))?)
        })
    }

    /// What `function` makes of each block, a batch that may have other rows and columns. It is also
    /// called with an empty batch, to learn its columns.
    pub fn map_batches_with(
        &self,
        function: impl Fn(&RecordBatch) -> Result<RecordBatch, mobula_core::BoxError>
        + Send
        + Sync
        + 'static,
    ) -> Result<Self> {
        let failed = |source| Error::BatchFn { name: "(a closure)".to_owned(), source };
        let empty = function(&RecordBatch::new_empty(self.schema()?)).map_err(failed)?;
        self.computed(empty.schema(), move |batch| function(batch).map_err(failed))
    }

    /// `function(…function(function(start, row 0), row 1)…)`, over all rows in order.
    pub fn fold<T: DeserializeOwned, A>(
        &self,
        start: A,
        function: impl FnMut(A, T) -> A,
    ) -> Result<A> {
        let mut function = function;
        self.rows::<T>()?.try_fold(start, |all, row| Ok(function(all, row?)))
    }
}

fn fields<T: DeserializeOwned>() -> Result<Vec<FieldRef>> {
    let options = TracingOptions::default()
        .map_as_struct(false)
        .enums_without_data_as_strings(true)
        .strings_as_large_utf8(false)
        .bytes_as_large_binary(false)
        .sequence_as_large_list(false);
    Vec::<FieldRef>::from_type::<T>(options).map_err(misfit::<T>)
}

fn to_batch<U: Serialize>(fields: &[FieldRef], rows: &Vec<U>) -> Result<RecordBatch> {
    if rows.is_empty() {
        return Ok(RecordBatch::new_empty(Arc::new(Schema::new(fields.to_vec()))));
    }
    serde_arrow::to_record_batch(fields, rows).map_err(misfit::<U>)
}

fn from_batch<T: DeserializeOwned>(batch: &RecordBatch) -> Result<Vec<T>> {
    // Types that cannot be traced get the columns as they are.
    let batch = match fields::<T>() {
        Ok(fields) => converted::<T>(batch, &fields)?,
        Err(_) => batch.clone(),
    };
    serde_arrow::from_record_batch(&batch).map_err(misfit::<T>)
}

/// The columns in the types that the fields of a row have, where that changes no value: a whole number
/// that does not fit is an error.
fn converted<T>(batch: &RecordBatch, wanted: &[FieldRef]) -> Result<RecordBatch> {
    let (schema, options) = (batch.schema(), CastOptions { safe: false, ..CastOptions::default() });
    let column = |(column, field): (&ArrayRef, &FieldRef)| {
        let wanted = wanted.iter().find(|wanted| wanted.name() == field.name());
        match wanted.map(|wanted| wanted.data_type()) {
            Some(to) if to != column.data_type() && converts(column.data_type(), to) => {
                cast_with_options(column, to, &options)
            }
            _ => Ok(column.clone()),
        }
    };
    let columns = batch.columns().iter().zip(schema.fields()).map(column);
    let misfit = |error: ArrowError| Error::Rows {
        kind: std::any::type_name::<T>(),
        source: error.to_string().into(),
    };
    let columns = columns.collect::<Result<Vec<_>, _>>().map_err(misfit)?;
    let fields = columns.iter().zip(schema.fields());
    let fields = fields
        .map(|(column, field)| field.as_ref().clone().with_data_type(column.data_type().clone()));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(schema, columns, &options)?)
}

fn converts(from: &DataType, to: &DataType) -> bool {
    match from {
        DataType::Dictionary(_, values) => values.as_ref() == to || converts(values, to),
        DataType::Decimal32(..) | DataType::Decimal64(..) | DataType::Decimal128(..) => {
            to.is_floating()
        }
        from if from.is_integer() => to.is_integer() || to.is_floating(),
        from if from.is_floating() => to.is_floating(),
        from => from.is_string() && to.is_string(),
    }
}

fn misfit<T>(error: serde_arrow::Error) -> Error {
    Error::Rows { kind: std::any::type_name::<T>(), source: error.message().into() }
}
