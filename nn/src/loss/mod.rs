//! Losses: each as a mean, and as a [`LossSum`] for shares of a batch and weighted rows.
//!
//! The mean is over rows for losses of classes and of distributions, and over elements for those
//! of numbers. On the CPU, `f32` is computed in `f32` and summed in blocks of a few hundred numbers
//! whose sums are added in `f64`, in an order that the shapes fix: bits do not depend on the number
//! of threads. A NaN comes through to the loss.

mod binary;
mod classes;
mod cross_entropy;
mod divergence;
mod pointwise;
mod regression;
mod weights;

pub use binary::{bce_with_logits, bce_with_logits_sum};
pub(crate) use cross_entropy::checked_labels;
pub use cross_entropy::{
    CrossEntropyOptions, cross_entropy, cross_entropy_sum, cross_entropy_with, nll, nll_with,
};
pub use divergence::{kl_div, kl_div_sum};
pub use regression::{huber, huber_sum, l1, l1_sum, mse, mse_sum, smooth_l1, smooth_l1_sum};

use crate::{Error, Result};
use candle_core::Tensor;

/// The sum of a loss over a batch, and what it is divided by for the mean.
///
/// Workers with unequal shares of a batch divide their `sum` by the `weight`s of all of them: the
/// gradients then add up to that of the mean over the whole batch.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::loss;
///
/// let (y, target) = (Tensor::new(&[1f32, 2.0, 5.0], &Device::Cpu)?, Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu)?);
/// let weights = Tensor::new(&[3f32, 1.0, 0.0], &Device::Cpu)?;
/// let loss = loss::mse_sum(&y, &target, Some(&weights))?;
/// assert_eq!((loss.sum.to_scalar::<f32>()?, loss.weight), (7.0, 4.0));
/// assert_eq!(loss.mean()?.to_scalar::<f32>()?, 1.75);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct LossSum {
    /// Σ weight · loss, a scalar of the input's type.
    pub sum: Tensor,
    /// Σ weight: without weights, how many rows or elements there are.
    pub weight: f64,
}

impl LossSum {
    /// `sum / weight`. Errors when the weight is 0, where the mean is undefined.
    pub fn mean(&self) -> Result<Tensor> {
        if self.weight == 0.0 {
            return Err(Error::EmptyBatch { what: "the mean loss" });
        }
        Ok((&self.sum / self.weight)?)
    }
}
