//! Preprocessors: fitted once, on the training rows, and applied the same in training and serving.
//!
//! Each is one file: an [`Estimator`], which is fitted, and a [`Transform`], which that makes.

mod affine;
mod bins;
mod categories;
mod chain;
mod columns;
mod concat;
mod encode;
mod estimator;
mod hasher;
mod impute;
mod lists;
mod lookup;
mod max_abs;
mod minimize;
mod multi_hot;
mod normalize;
pub(crate) mod numbers;
mod power;
mod robust;
mod sample;
mod statistic;
mod tensors;
mod vectorize;
mod vocabulary;
mod words;

pub use affine::{MinMaxScaler, StandardScaler};
pub use bins::{KBinsDiscretizer, Strategy};
pub use categories::Unknown;
pub use chain::Chain;
pub use concat::Concatenator;
pub use encode::{LabelEncoder, OneHotEncoder, OrdinalEncoder};
pub use estimator::{Estimator, Step};
pub use hasher::FeatureHasher;
pub use impute::{Fill, SimpleImputer, Value};
pub use lookup::StringLookup;
pub use max_abs::MaxAbsScaler;
pub use multi_hot::MultiHotEncoder;
pub use normalize::{Norm, Normalizer};
pub use power::{Power, PowerTransformer};
pub use robust::RobustScaler;
pub use vectorize::{CountVectorizer, TfidfVectorizer};
pub use words::Tokenizer;

use crate::error::{Error, Result};
use arrow::record_batch::RecordBatch;
use mobula_core::checkpoint::write_atomically;
use mobula_core::error::AtPath;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt::Debug;
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
#[derive(Clone, Debug)]
pub struct Preprocessor(Arc<dyn Transform>);

/// What a fitted preprocessor does to a batch, for preprocessors of your own.
///
/// It must do the same to a row whatever batch the row is in, and is also given empty batches, to
/// learn what columns it makes. [`typetag`](crate::typetag) writes it as JSON under its name, which
/// must be its own, and every program that reads that JSON must contain it.
///
/// ```
/// use arrow::array::{ArrayRef, AsArray, Float64Array};
/// use arrow::datatypes::Float64Type;
/// use arrow::record_batch::RecordBatch;
/// use mobula_data::{Preprocessor, Result, Transform, typetag};
/// use serde::{Deserialize, Serialize};
/// use std::sync::Arc;
///
/// /// Replaces a column of 64-bit floats by its logarithm.
/// #[derive(Debug, Serialize, Deserialize)]
/// struct Logarithm(String);
///
/// #[typetag::serde]
/// impl Transform for Logarithm {
///     fn transform(&self, batch: &RecordBatch) -> Result<RecordBatch> {
///         let index = batch.schema().index_of(&self.0)?;
///         let mut columns = batch.columns().to_vec();
///         let numbers = columns[index].as_primitive::<Float64Type>();
///         columns[index] = Arc::new(numbers.unary::<_, Float64Type>(f64::ln));
///         Ok(RecordBatch::try_new(batch.schema(), columns)?)
///     }
///
///     fn without(&self, column: &str) -> Preprocessor {
///         if *column == self.0 { Preprocessor::identity() } else { Preprocessor::new(Self(self.0.clone())) }
///     }
/// }
///
/// let fitted = Preprocessor::new(Logarithm("price".into()));
/// let price: ArrayRef = Arc::new(Float64Array::from(vec![1.0]));
/// let batch = RecordBatch::try_from_iter([("price", price)])?;
/// let again: Preprocessor = serde_json::from_str(&serde_json::to_string(&fitted).unwrap()).unwrap();
/// assert_eq!(again.transform(&batch)?.column(0).as_primitive::<Float64Type>().value(0), 0.0);
/// # Ok::<(), mobula_data::Error>(())
/// ```
#[typetag::serde]
pub trait Transform: Debug + Send + Sync {
    /// Applies it to a batch. Columns that it does not name should pass unchanged.
    fn transform(&self, batch: &RecordBatch) -> Result<RecordBatch>;

    /// The same without what works on `column`.
    fn without(&self, column: &str) -> Preprocessor;

    /// The categories or terms that `column` was encoded by, in the order of their codes, if it was.
    fn classes(&self, column: &str) -> Option<Vec<String>> {
        let _ = column;
        None
    }
}

impl Preprocessor {
    /// What kind it is of.
    pub(crate) fn kind(&self) -> &'static str {
        self.0.typetag_name()
    }

    /// One of your own.
    pub fn new(transform: impl Transform + 'static) -> Self {
        Self(Arc::new(transform))
    }

    /// One that changes nothing.
    pub fn identity() -> Self {
        Self::new(Vec::<Self>::new())
    }

    /// Applies it to a batch. Columns that it does not name pass unchanged.
    pub fn transform(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        self.0.transform(batch)
    }

    /// The same without the steps that work on `column`: for serving, where requests have no
    /// label to encode.
    pub fn without(&self, column: &str) -> Self {
        self.0.without(column)
    }

    /// The categories of an encoded column, in the order of their codes: `classes("label")?[3]`
    /// is what class 3 was called.
    pub fn classes(&self, column: &str) -> Option<Vec<String>> {
        self.0.classes(column)
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

/// Two are the same if they are written the same.
impl PartialEq for Preprocessor {
    fn eq(&self, other: &Self) -> bool {
        let written = |one: &Self| serde_json::to_vec(one).ok();
        written(self).is_some_and(|text| Some(text) == written(other))
    }
}

impl Serialize for Preprocessor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Preprocessor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Box::<dyn Transform>::deserialize(deserializer)?.into()))
    }
}
