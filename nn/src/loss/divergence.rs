//! The distance of distributions.

use super::LossSum;
use super::pointwise::{Elements, Pointwise};
use super::weights::total;
use crate::kernels::Real;
use crate::{Error, Result};
use candle_core::Tensor;

/// The mean over rows of the Kullback–Leibler divergence of `probabilities` from the model's
/// `log_probabilities`, both `[rows, .., classes]`. Errors when there are no rows.
///
/// That is PyTorch's `kl_div` with `reduction="batchmean"` where there is one axis of rows. Its
/// `"mean"` divides by the number of elements, which is no divergence.
pub fn kl_div(log_probabilities: &Tensor, probabilities: &Tensor) -> Result<Tensor> {
    kl_div_sum(log_probabilities, probabilities, None)?.mean()
}

/// The sum for [`kl_div`]: Σ p · (ln p − log_probability), where p = 0 costs nothing.
///
/// `weights` have the shape of both without the last axis, or its first axes. Both get gradients.
pub fn kl_div_sum(
    log_probabilities: &Tensor,
    probabilities: &Tensor,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    let dims = log_probabilities.dims();
    let Some((&classes, rows)) = dims.split_last().filter(|(_, rows)| !rows.is_empty()) else {
        return Err(Error::shape("the log-probabilities of kl_div", "[rows, .., classes]", dims));
    };
    if let Some(weights) = weights.filter(|weights| weights.rank() == dims.len()) {
        let expected = format!("{rows:?}, or its first axes");
        return Err(Error::shape("the weights of kl_div", expected, weights.dims()));
    }
    let elements = Elements::new("kl_div", log_probabilities, probabilities, weights)?;
    let weight = match elements.weights() {
        Some(weights) => total(Some(weights), 0)? / classes.max(1) as f64,
        None => rows.iter().product::<usize>() as f64,
    };
    Ok(LossSum { sum: elements.sum(Divergence)?, weight })
}

#[derive(Clone, Copy)]
struct Divergence;

impl Pointwise for Divergence {
    #[inline(always)]
    fn value<T: Real>(self, x: T, target: T, _: T) -> T {
        let value = target * (target.ln() - x);
        if target == T::zero() { T::zero() } else { value }
    }

    #[inline(always)]
    fn slopes<T: Real>(self, x: T, target: T, _: T) -> (T, T) {
        (T::zero() - target, target.ln() + T::one() - x)
    }

    fn composed(
        self,
        x: &Tensor,
        target: &Tensor,
        _: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        // A number whose logarithm is finite, which 0 is then multiplied with.
        let log = target.maximum(f64::from(f32::MIN_POSITIVE))?.log()?;
        target * (log - x)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::pointwise::tests::assert_composed_agrees;

    #[test]
    fn the_kernel_agrees_with_candles_operations() {
        assert_composed_agrees(Divergence, true);
    }
}
