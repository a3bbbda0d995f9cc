//! Losses of numbers.

use super::LossSum;
use super::pointwise::{Elements, Pointwise};
use super::weights::total;
use crate::kernels::Real;
use crate::{Error, Result};
use candle_core::Tensor;

/// The mean of `(prediction − target)²`, two tensors of one shape. Errors when they are empty.
pub fn mse(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    mse_sum(prediction, target, None)?.mean()
}

/// The sum for [`mse`].
///
/// `weights` have the first axes of the prediction, such as a weight for each row, or all axes;
/// they are constants. Both the prediction and the target get gradients.
pub fn mse_sum(prediction: &Tensor, target: &Tensor, weights: Option<&Tensor>) -> Result<LossSum> {
    sum("mse", Square, prediction, target, weights)
}

/// The mean of `|prediction − target|`, whose gradient is 0 where they are equal, as in PyTorch.
pub fn l1(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    l1_sum(prediction, target, None)?.mean()
}

/// The sum for [`l1`]; `weights` as for [`mse_sum`].
pub fn l1_sum(prediction: &Tensor, target: &Tensor, weights: Option<&Tensor>) -> Result<LossSum> {
    sum("l1", Absolute, prediction, target, weights)
}

/// The mean of `d²/2` where `|d| = |prediction − target|` is at most `delta`, and of
/// `delta · (|d| − delta/2)` beyond. Errors unless `delta` is positive and finite.
///
/// Huber: *Robust Estimation of a Location Parameter* (Annals of Mathematical Statistics, 1964).
pub fn huber(prediction: &Tensor, target: &Tensor, delta: f64) -> Result<Tensor> {
    huber_sum(prediction, target, delta, None)?.mean()
}

/// The sum for [`huber`]; `weights` as for [`mse_sum`].
pub fn huber_sum(
    prediction: &Tensor,
    target: &Tensor,
    delta: f64,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    let loss = Huber { delta: positive("delta", delta)?, factor: 1.0 };
    sum("huber", loss, prediction, target, weights)
}

/// [`huber`] with `delta = beta`, divided by `beta`: its slope is ±1 far from the target. Errors
/// unless `beta` is positive and finite; for 0, see [`l1`].
pub fn smooth_l1(prediction: &Tensor, target: &Tensor, beta: f64) -> Result<Tensor> {
    smooth_l1_sum(prediction, target, beta, None)?.mean()
}

/// The sum for [`smooth_l1`]; `weights` as for [`mse_sum`].
pub fn smooth_l1_sum(
    prediction: &Tensor,
    target: &Tensor,
    beta: f64,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    let loss = Huber { delta: positive("beta", beta)?, factor: 1.0 / beta };
    sum("smooth_l1", loss, prediction, target, weights)
}

fn positive(option: &'static str, value: f64) -> Result<f64> {
    match value > 0.0 && value.is_finite() {
        true => Ok(value),
        false => Err(Error::option(option, value, "a positive number")),
    }
}

fn sum<L: Pointwise>(
    name: &str,
    loss: L,
    prediction: &Tensor,
    target: &Tensor,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    let elements = Elements::new(name, prediction, target, weights)?;
    let weight = total(elements.weights(), prediction.elem_count())?;
    Ok(LossSum { sum: elements.sum(loss)?, weight })
}

#[derive(Clone, Copy)]
struct Square;

impl Pointwise for Square {
    #[inline(always)]
    fn value<T: Real>(self, x: T, target: T, _: T) -> T {
        (x - target) * (x - target)
    }

    #[inline(always)]
    fn slopes<T: Real>(self, x: T, target: T, _: T) -> (T, T) {
        let slope = (x - target) + (x - target);
        (slope, T::zero() - slope)
    }

    fn composed(
        self,
        x: &Tensor,
        target: &Tensor,
        _: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        (x - target)?.sqr()
    }
}

#[derive(Clone, Copy)]
struct Absolute;

/// 1, 0 or −1; a NaN stays one.
#[inline(always)]
fn sign<T: Real>(x: T) -> T {
    let positive = if x > T::zero() { T::one() } else { x * T::zero() };
    if x < T::zero() { T::zero() - T::one() } else { positive }
}

impl Pointwise for Absolute {
    #[inline(always)]
    fn value<T: Real>(self, x: T, target: T, _: T) -> T {
        (x - target).abs()
    }

    #[inline(always)]
    fn slopes<T: Real>(self, x: T, target: T, _: T) -> (T, T) {
        (sign(x - target), sign(target - x))
    }

    fn composed(
        self,
        x: &Tensor,
        target: &Tensor,
        _: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let difference = (x - target)?;
        // Candle's absolute value has slope 1 at 0.
        &difference * difference.detach().sign()?
    }
}

/// A NaN stays one.
#[inline(always)]
fn at_most<T: Real>(x: T, bound: T) -> T {
    if x > bound { bound } else { x }
}

#[derive(Clone, Copy)]
struct Huber {
    delta: f64,
    factor: f64,
}

impl Pointwise for Huber {
    #[inline(always)]
    fn value<T: Real>(self, x: T, target: T, _: T) -> T {
        let distance = (x - target).abs();
        let within = at_most(distance, T::from_f64(self.delta));
        within * (distance - within * T::from_f64(0.5)) * T::from_f64(self.factor)
    }

    #[inline(always)]
    fn slopes<T: Real>(self, x: T, target: T, _: T) -> (T, T) {
        let difference = x - target;
        let within = at_most(difference.abs(), T::from_f64(self.delta));
        let slope = sign(difference) * within * T::from_f64(self.factor);
        (slope, T::zero() - slope)
    }

    fn composed(
        self,
        x: &Tensor,
        target: &Tensor,
        _: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let difference = (x - target)?;
        let distance = (&difference * difference.detach().sign()?)?;
        // As a constant it gives the slope of both pieces.
        let within = distance.detach().clamp(0.0, self.delta)?;
        let loss = (&within * (distance - (&within * 0.5)?)?)?;
        loss * self.factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::pointwise::tests::assert_composed_agrees;

    #[test]
    fn the_kernels_agree_with_candles_operations() {
        assert_composed_agrees(Square, false);
        assert_composed_agrees(Absolute, false);
        assert_composed_agrees(Huber { delta: 0.7, factor: 1.5 }, false);
    }
}
