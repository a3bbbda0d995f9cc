//! Preprocessors before they are fitted.

use super::Preprocessor;
use crate::Dataset;
use crate::error::Result;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt::Debug;
use std::sync::Arc;

/// What a preprocessor learns from the rows, for preprocessors of your own: `Step::from` makes a
/// step of it.
#[typetag::serde]
pub trait Estimator: Debug + Send + Sync {
    /// Fits it on the rows of a dataset.
    fn fit(&self, dataset: &Dataset) -> Result<Preprocessor>;
}

/// A preprocessor before it is fitted: a step of a [`Chain`](super::Chain). `StandardScaler::of`
/// and the like make one with the defaults; `OneHotEncoder::new(["sex"]).with_…().into()` one with
/// options.
#[derive(Clone, Debug)]
pub struct Step(Arc<dyn Estimator>);

impl Step {
    /// Fits it on the rows of a dataset: give it the training side of a split.
    pub fn fit(&self, dataset: &Dataset) -> Result<Preprocessor> {
        self.0.fit(dataset)
    }
}

impl<E: Estimator + 'static> From<E> for Step {
    fn from(estimator: E) -> Self {
        Self(Arc::new(estimator))
    }
}

impl Serialize for Step {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Step {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Box::<dyn Estimator>::deserialize(deserializer)?.into()))
    }
}

/// How a preprocessor that is made from the names of columns is made with its defaults.
macro_rules! of_columns {
    ($name:ident) => {
        impl $name {
            /// The step with its defaults, not fitted.
            pub fn of<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> $crate::Step {
                Self::new(columns).into()
            }

            /// Fits it with its defaults on the rows of a dataset: give it the training side of a
            /// split.
            pub fn fit<S: Into<String>>(
                dataset: &$crate::Dataset,
                columns: impl IntoIterator<Item = S>,
            ) -> $crate::Result<$crate::Preprocessor> {
                Self::of(columns).fit(dataset)
            }
        }
    };
}
pub(super) use of_columns;

pub(super) fn names<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Vec<String> {
    columns.into_iter().map(Into::into).collect()
}
