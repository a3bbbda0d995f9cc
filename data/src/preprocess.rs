//! Preprocessors: fitted once, on the training rows, and applied the same in training and serving.

mod affine;
mod concat;
mod encode;
mod impute;
pub(crate) mod numbers;
mod statistic;
mod tensors;

pub use encode::{LabelEncoder, OneHotEncoder, OrdinalEncoder, Unknown};
pub use impute::{Fill, SimpleImputer, Value};

use crate::Dataset;
use crate::error::{Error, Result};
use affine::Affine;
use arrow::array::ArrayRef;
use arrow::datatypes::{Field, FieldRef, Schema};
use arrow::record_batch::RecordBatch;
use concat::Concatenation;
use encode::{OneHot, Ordinal};
use impute::Imputation;
use mobula_core::checkpoint::write_atomically;
use mobula_core::error::AtPath;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// A fitted preprocessor: numbers and categories, as plain data.
///
/// ```
/// # use mobula_data::{Dataset, Preprocessor, StandardScaler};
/// # use arrow::array::{ArrayRef, Float64Array, RecordBatch};
/// # use std::sync::Arc;
/// # let x: ArrayRef = Arc::new(Float64Array::from(vec![1.0, 3.0]));
/// # let train = Dataset::from_batches([RecordBatch::try_from_iter([("x", x)])?])?;
/// let scaler: Preprocessor = StandardScaler::fit(&train, ["x"])?;
/// let scaled = train.preprocess(&scaler)?.collect()?; // x: -1, 1
/// # assert_eq!(scaled.column(0).to_data().buffers()[0].typed_data::<f32>(), [-1.0, 1.0]);
/// # Ok::<(), mobula_data::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Preprocessor(Fitted);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Fitted {
    Affine(Vec<Affine>),
    SimpleImputer(Vec<Imputation>),
    OneHotEncoder(Vec<OneHot>),
    OrdinalEncoder(Vec<Ordinal>),
    Concatenator(Concatenation),
    Chain(Vec<Preprocessor>),
}

impl Preprocessor {
    /// Applies it to a batch. Columns that it does not name pass unchanged.
    pub fn transform(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        match &self.0 {
            Fitted::Affine(columns) => each(batch, columns),
            Fitted::SimpleImputer(columns) => each(batch, columns),
            Fitted::OneHotEncoder(columns) => each(batch, columns),
            Fitted::OrdinalEncoder(columns) => each(batch, columns),
            Fitted::Concatenator(concatenation) => concatenation.apply(batch),
            Fitted::Chain(steps) => {
                steps.iter().try_fold(batch.clone(), |batch, step| step.transform(&batch))
            }
        }
    }

    /// The same without the steps that work on `column`: for serving, where requests have no
    /// label to encode.
    pub fn without(&self, column: &str) -> Self {
        Self(match &self.0 {
            Fitted::Affine(columns) => Fitted::Affine(other_columns(columns, column)),
            Fitted::SimpleImputer(columns) => Fitted::SimpleImputer(other_columns(columns, column)),
            Fitted::OneHotEncoder(columns) => Fitted::OneHotEncoder(other_columns(columns, column)),
            Fitted::OrdinalEncoder(columns) => {
                Fitted::OrdinalEncoder(other_columns(columns, column))
            }
            Fitted::Concatenator(concatenation) => {
                Fitted::Concatenator(concatenation.without(column))
            }
            Fitted::Chain(steps) => {
                Fitted::Chain(steps.iter().map(|s| s.without(column)).collect())
            }
        })
    }

    /// The categories of an encoded column, in the order of their codes: `classes("label")?[3]`
    /// is what class 3 was called.
    pub fn classes(&self, column: &str) -> Option<Vec<String>> {
        match &self.0 {
            Fitted::OneHotEncoder(columns) => {
                columns.iter().find(|c| c.column() == column).map(|c| c.0.names())
            }
            Fitted::OrdinalEncoder(columns) => {
                columns.iter().find(|c| c.column() == column).map(|c| c.0.names())
            }
            Fitted::Chain(steps) => steps.iter().find_map(|step| step.classes(column)),
            _ => None,
        }
    }

    /// Writes it as JSON, by convention to `preprocessor.json`; a reader never sees half of it.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(mobula_core::Error::layer)?;
        Ok(write_atomically(path.as_ref(), &text)?)
    }

    /// Reads what [`save`](Self::save) wrote.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read(path).at("read", path)?;
        serde_json::from_slice(&text).map_err(|error| Error::Corrupt {
            path: path.to_owned(),
            format: "preprocessor",
            reason: error.to_string(),
        })
    }
}

/// A preprocessor before it is fitted: a step of a [`Chain`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Step {
    /// See [`StandardScaler`].
    StandardScaler(Vec<String>),
    /// See [`MinMaxScaler`].
    MinMaxScaler(Vec<String>),
    /// See [`SimpleImputer`].
    SimpleImputer(Vec<String>, Fill),
    /// See [`OneHotEncoder`].
    OneHotEncoder(Vec<String>, Unknown),
    /// See [`OrdinalEncoder`].
    OrdinalEncoder(Vec<String>, Unknown),
    /// See [`Concatenator`].
    Concatenator(Vec<String>, String),
}

impl Step {
    /// Fits it on the rows of a dataset: give it the training side of a split.
    pub fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        let fitted = match self {
            Self::StandardScaler(columns) => Fitted::Affine(affine::standard(dataset, columns)?),
            Self::MinMaxScaler(columns) => Fitted::Affine(affine::min_max(dataset, columns)?),
            Self::SimpleImputer(columns, fill) => {
                Fitted::SimpleImputer(impute::fit(dataset, columns, fill)?)
            }
            Self::OneHotEncoder(columns, unknown) => {
                Fitted::OneHotEncoder(encode::one_hot(dataset, columns, *unknown)?)
            }
            Self::OrdinalEncoder(columns, unknown) => {
                Fitted::OrdinalEncoder(encode::ordinal(dataset, columns, *unknown)?)
            }
            Self::Concatenator(columns, output) => {
                Fitted::Concatenator(Concatenation::fit(dataset, columns, output)?)
            }
        };
        Ok(Preprocessor(fitted))
    }
}

/// Scales to mean 0 and standard deviation 1 (of the population): numeric columns as a whole,
/// `FixedSizeList` columns element by element. A constant is only centred. Gives `Float32`;
/// missing values stay missing.
#[derive(Debug)]
pub struct StandardScaler;

impl StandardScaler {
    /// The step, not fitted.
    pub fn of<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Step {
        Step::StandardScaler(names(columns))
    }

    /// Fits it on the rows of a dataset: give it the training side of a split.
    pub fn fit<S: Into<String>>(
        dataset: &Dataset,
        columns: impl IntoIterator<Item = S>,
    ) -> Result<Preprocessor> {
        Self::of(columns).fit(dataset)
    }
}

/// Scales to the range 0 to 1, by the minimum and the maximum; otherwise as [`StandardScaler`].
#[derive(Debug)]
pub struct MinMaxScaler;

impl MinMaxScaler {
    /// The step, not fitted.
    pub fn of<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Step {
        Step::MinMaxScaler(names(columns))
    }

    /// Fits it on the rows of a dataset: give it the training side of a split.
    pub fn fit<S: Into<String>>(
        dataset: &Dataset,
        columns: impl IntoIterator<Item = S>,
    ) -> Result<Preprocessor> {
        Self::of(columns).fit(dataset)
    }
}

/// Joins numeric columns and lists into one `FixedSizeList<Float32>`, the feature vector. The
/// columns go, the new one comes last.
#[derive(Debug)]
pub struct Concatenator;

impl Concatenator {
    /// The step, which makes `output`.
    pub fn of<S: Into<String>>(
        columns: impl IntoIterator<Item = S>,
        output: impl Into<String>,
    ) -> Step {
        Step::Concatenator(names(columns), output.into())
    }
}

/// Several steps, one after another.
///
/// ```
/// # use mobula_data::*;
/// # use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray};
/// # use std::sync::Arc;
/// # let mass: ArrayRef = Arc::new(Float64Array::from(vec![Some(1.0), None, Some(3.0)]));
/// # let sex: ArrayRef = Arc::new(StringArray::from(vec!["f", "m", "f"]));
/// # let train = Dataset::from_batches([RecordBatch::try_from_iter([("mass", mass), ("sex", sex)])?])?;
/// let chain = Chain::fit(
///     [
///         SimpleImputer::mean(["mass"]),
///         StandardScaler::of(["mass"]),
///         OneHotEncoder::of(["sex"]),
///         Concatenator::of(["mass", "sex"], "features"),
///     ],
///     &train,
/// )?;
/// # assert_eq!(train.preprocess(&chain)?.schema()?.field(0).name(), "features");
/// # Ok::<(), mobula_data::Error>(())
/// ```
#[derive(Debug)]
pub struct Chain;

impl Chain {
    /// Fits each step on what the steps before it make of the rows.
    pub fn fit(steps: impl IntoIterator<Item = Step>, dataset: &Dataset) -> Result<Preprocessor> {
        let (mut dataset, mut fitted) = (dataset.clone(), Vec::new());
        for step in steps {
            let preprocessor = step.fit(&dataset)?;
            dataset = dataset.preprocess(&preprocessor)?;
            fitted.push(preprocessor);
        }
        Ok(Preprocessor(Fitted::Chain(fitted)))
    }
}

/// A fitted preprocessor that changes one column in place.
trait PerColumn: Clone {
    fn column(&self) -> &str;
    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef>;
}

fn each<P: PerColumn>(batch: &RecordBatch, columns: &[P]) -> Result<RecordBatch> {
    columns.iter().try_fold(batch.clone(), |batch, fitted| {
        let index = index_of(&batch.schema(), fitted.column())?;
        let array = fitted.apply(batch.column(index))?;
        replace(&batch, index, array)
    })
}

fn replace(batch: &RecordBatch, index: usize, array: ArrayRef) -> Result<RecordBatch> {
    let schema = batch.schema();
    let (mut fields, mut columns): (Vec<FieldRef>, _) =
        (schema.fields().to_vec(), batch.columns().to_vec());
    let old = &fields[index];
    fields[index] = Arc::new(Field::new(old.name(), array.data_type().clone(), old.is_nullable()));
    columns[index] = array;
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}

fn other_columns<P: PerColumn>(columns: &[P], column: &str) -> Vec<P> {
    columns.iter().filter(|c| c.column() != column).cloned().collect()
}

fn index_of(schema: &Schema, column: &str) -> Result<usize> {
    schema.index_of(column).map_err(|_| Error::no_such_column(column, schema))
}

fn names<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Vec<String> {
    columns.into_iter().map(Into::into).collect()
}
