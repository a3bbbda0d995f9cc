//! What every layer and model is.

use crate::{Pass, Result};
use candle_core::Tensor;

/// A map from a batch to a batch: a layer, or a whole model.
///
/// Shared between threads as it is: whatever changes from pass to pass comes in `pass`.
pub trait Module: Send + Sync {
    /// The output for `x`, whose first dimension is the rows.
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor>;
}
