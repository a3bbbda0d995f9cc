//! Element-wise non-linearities.

use crate::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// A non-linearity by name, for options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// `max(x, 0)`. Its gradient at exactly 0 is 1 (candle's choice; PyTorch's is 0).
    #[default]
    Relu,
    /// `x · Φ(x)`, exact (Hendrycks and Gimpel, 2016), as PyTorch's default.
    Gelu,
}

impl Activation {
    /// Applies it to every element.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Relu => x.relu()?,
            Self::Gelu => x.gelu_erf()?,
        })
    }
}
