//! Optimizers by name.

use super::{
    Adafactor, AdafactorOptions, Adagrad, AdagradOptions, Adam, AdamOptions, AdamW, AdamWOptions,
    Lion, LionOptions, Optimizer, RmsProp, RmsPropOptions, Sgd, SgdOptions,
};
use crate::Result;
use serde::{Deserialize, Serialize};

/// An optimizer as configurations write it: its `name`, and its options beside it.
///
/// ```
/// use mobula_train::optim::OptimizerSpec;
///
/// let spec: OptimizerSpec = serde_json::from_str(r#"{"name": "lion", "lr": 2e-4}"#)?;
/// assert_eq!(spec.build()?.lr(), 2e-4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
#[non_exhaustive]
pub enum OptimizerSpec {
    /// [`Adafactor`].
    Adafactor(AdafactorOptions),
    /// [`Adagrad`].
    Adagrad(AdagradOptions),
    /// [`Adam`].
    Adam(AdamOptions),
    /// [`AdamW`].
    AdamW(AdamWOptions),
    /// [`Lion`].
    Lion(LionOptions),
    /// [`RmsProp`].
    RmsProp(RmsPropOptions),
    /// [`Sgd`].
    Sgd(SgdOptions),
}

impl OptimizerSpec {
    /// The optimizer. Errors when an option is out of its range.
    pub fn build(&self) -> Result<Box<dyn Optimizer>> {
        Ok(match *self {
            Self::Adafactor(options) => Box::new(Adafactor::new(options)?),
            Self::Adagrad(options) => Box::new(Adagrad::new(options)?),
            Self::Adam(options) => Box::new(Adam::new(options)?),
            Self::AdamW(options) => Box::new(AdamW::new(options)?),
            Self::Lion(options) => Box::new(Lion::new(options)?),
            Self::RmsProp(options) => Box::new(RmsProp::new(options)?),
            Self::Sgd(options) => Box::new(Sgd::new(options)?),
        })
    }

    /// The learning rate among its options, for a search that draws it.
    pub fn lr_mut(&mut self) -> &mut f64 {
        match self {
            Self::Adafactor(options) => &mut options.lr,
            Self::Adagrad(options) => &mut options.lr,
            Self::Adam(options) => &mut options.lr,
            Self::AdamW(options) => &mut options.lr,
            Self::Lion(options) => &mut options.lr,
            Self::RmsProp(options) => &mut options.lr,
            Self::Sgd(options) => &mut options.lr,
        }
    }
}

impl Default for OptimizerSpec {
    fn default() -> Self {
        Self::AdamW(AdamWOptions::default())
    }
}
