//! The loss of yes and no.

use super::LossSum;
use super::pointwise::{Elements, Pointwise};
use super::weights::total;
use crate::kernels::Real;
use crate::layers::Activation;
use crate::{Error, Result};
use candle_core::Tensor;

/// The mean cross-entropy of probabilities `sigmoid(logits)` and `targets` in `[0, 1]`, element by
/// element, two tensors of one shape. Errors when they are empty.
pub fn bce_with_logits(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    bce_with_logits_sum(logits, targets, None, None)?.mean()
}

/// The sum for [`bce_with_logits`]:
/// `pos_weight · target · softplus(−logit) + (1 − target) · softplus(logit)`.
///
/// `weights` are as for [`mse_sum`](super::mse_sum). `pos_weight`, what a positive example counts,
/// has the last axes of the logits, such as a number for each class; it does not count in
/// [`LossSum::weight`], as in PyTorch, and is a constant.
pub fn bce_with_logits_sum(
    logits: &Tensor,
    targets: &Tensor,
    pos_weight: Option<&Tensor>,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    let pos_weight = pos_weight.map(|weight| repeated(weight, logits)).transpose()?;
    let elements = Elements::new("bce_with_logits", logits, targets, weights)?;
    let weight = total(elements.weights(), logits.elem_count())?;
    Ok(LossSum { sum: elements.with_parameters(pos_weight).sum(Binary)?, weight })
}

fn repeated(pos_weight: &Tensor, logits: &Tensor) -> Result<Tensor> {
    if !logits.dims().ends_with(pos_weight.dims()) {
        let expected = format!("the last axes of {:?}", logits.dims());
        return Err(Error::shape("pos_weight", expected, pos_weight.dims()));
    }
    if pos_weight.track_op() {
        let expected = "constants: detach them, for a loss has no gradient of its weights";
        return Err(Error::option("pos_weight", "a tensor that wants a gradient", expected));
    }
    let repeated = pos_weight.to_dtype(logits.dtype())?.broadcast_as(logits.dims())?;
    Ok(repeated.contiguous()?)
}

#[derive(Clone, Copy)]
struct Binary;

/// `ln(1 + eˣ)` of `x` and of `−x`.
#[inline(always)]
fn softplus<T: Real>(x: T) -> (T, T) {
    let small = (T::zero() - x.abs()).exp().ln_1p();
    let positive = if x < T::zero() { T::zero() } else { x };
    (positive + small, positive - x + small)
}

impl Pointwise for Binary {
    #[inline(always)]
    fn value<T: Real>(self, x: T, target: T, p: T) -> T {
        let (no, yes) = softplus(x);
        p * target * yes + (T::one() - target) * no
    }

    #[inline(always)]
    fn slopes<T: Real>(self, x: T, target: T, p: T) -> (T, T) {
        let (no, yes) = softplus(x);
        let slope = (T::one() - target) * x.sigmoid() - p * target * (T::zero() - x).sigmoid();
        (slope, p * yes - no)
    }

    fn composed(
        self,
        x: &Tensor,
        target: &Tensor,
        p: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let softplus = |x: &Tensor| Activation::Softplus.composed(x);
        let positive = match p {
            Some(p) => (target * p)?,
            None => target.clone(),
        };
        (positive * softplus(&x.neg()?)?)? + (target.neg()? + 1.0)? * softplus(x)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::pointwise::tests::assert_composed_agrees;

    #[test]
    fn the_kernel_agrees_with_candles_operations() {
        assert_composed_agrees(Binary, true);
    }
}
