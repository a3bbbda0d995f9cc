//! A rule for one element, written once: for numbers in memory, and for tensors where these are.

use super::pass;
use super::state::ParamState;
use crate::{Error, Result};
use candle_core::Tensor;
use std::fmt::{self, Debug, Formatter};
use std::ops::{Add, Div, Mul, Sub};
use std::rc::Rc;

/// What a rule computes with: a number, or the numbers of a tensor one by one. Each operation is rounded
/// by itself, so that both come to the same.
pub trait Number:
    Clone
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Add<f32, Output = Self>
    + Mul<f32, Output = Self>
    + Div<f32, Output = Self>
{
    /// The square root.
    #[must_use]
    fn sqrt(self) -> Self;

    /// 1, −1, or 0 for 0.
    #[must_use]
    fn sign(self) -> Self;

    /// Itself times itself.
    #[must_use]
    #[inline(always)]
    fn square(self) -> Self {
        self.clone() * self
    }

    /// `self + weight · (to − self)`, rounded as PyTorch's `lerp` rounds it.
    #[must_use]
    #[inline(always)]
    fn lerp(self, to: Self, weight: f32) -> Self {
        match weight < 0.5 {
            true => self.clone() + (to - self) * weight,
            false => to.clone() - (to - self) * (1.0 - weight),
        }
    }
}

impl Number for f32 {
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    // `signum` of 0 is 1.
    #[inline(always)]
    fn sign(self) -> Self {
        f32::from(u8::from(self > 0.0)) - f32::from(u8::from(self < 0.0))
    }
}

/// A rule that changes each element by itself, with `N` numbers that it remembers of each.
///
/// ```
/// use mobula_train::optim::{Elementwise, Number, Rule};
///
/// /// Gradient descent with momentum.
/// struct Momentum { lr: f32, kept: f32 }
///
/// impl Elementwise<1> for Momentum {
///     #[inline(always)]
///     fn update<X: Number>(&self, value: X, gradient: X, [buffer]: [X; 1]) -> (X, [X; 1]) {
///         let buffer = buffer * self.kept + gradient;
///         (value - buffer.clone() * self.lr, [buffer])
///     }
/// }
///
/// let rule = Rule::new(Momentum { lr: 0.1, kept: 0.9 });
/// # let _ = rule;
/// ```
pub trait Elementwise<const N: usize>: Sync {
    /// Value, gradient and what is remembered before; value and what is remembered afterwards. Free of
    /// branches on values it becomes vector code, if it is `#[inline(always)]`.
    fn update<X: Number>(&self, value: X, gradient: X, state: [X; N]) -> (X, [X; N]);
}

/// How an optimizer changes one parameter at one step, on any device.
pub struct Rule(Box<dyn Anywhere>);

impl Rule {
    /// Of the rule for one element.
    pub fn new<const N: usize>(rule: impl Elementwise<N> + 'static) -> Self {
        Self(Box::new(Of(rule)))
    }

    /// Changes values and state in place. Errors when the state is not that of this rule.
    pub fn update(
        &self,
        values: &mut [f32],
        gradient: &[f32],
        state: &mut ParamState,
    ) -> Result<()> {
        self.0.in_place(values, gradient, state)
    }

    /// Value and state afterwards, on the device that they are on. `name` is what an error is about.
    pub(super) fn of_tensors(
        &self,
        name: &str,
        value: Tensor,
        gradient: Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        self.0.of_tensors(name, value, gradient, state)
    }
}

impl Debug for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Rule")
    }
}

trait Anywhere {
    fn in_place(&self, values: &mut [f32], gradient: &[f32], state: &mut ParamState) -> Result<()>;

    fn of_tensors(
        &self,
        name: &str,
        value: Tensor,
        gradient: Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)>;
}

struct Of<R, const N: usize>(R);

impl<R: Elementwise<N>, const N: usize> Anywhere for Of<R, N> {
    fn in_place(&self, values: &mut [f32], gradient: &[f32], state: &mut ParamState) -> Result<()> {
        pass::elements(&self.0, values, gradient, state)
    }

    fn of_tensors(
        &self,
        name: &str,
        value: Tensor,
        gradient: Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let state = <&[Tensor; N]>::try_from(state).map_err(|_| Error::OptimizerSlots {
            parameter: name.to_owned(),
            expected: format!("{N} tensors"),
            got: state.len().to_string(),
        })?;
        let state = state.each_ref().map(|slot| Numbers(Ok(slot.clone())));
        let (value, state) = self.0.update(Numbers(Ok(value)), Numbers(Ok(gradient)), state);
        let state = state.into_iter().map(Numbers::tensor).collect::<Result<_>>()?;
        Ok((value.tensor()?, state))
    }
}

/// The numbers of a tensor, or why there are none.
#[derive(Clone)]
struct Numbers(Result<Tensor, Rc<candle_core::Error>>);

impl Numbers {
    fn map(self, op: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) -> Self {
        Self(self.0.and_then(|numbers| op(&numbers).map_err(Rc::new)))
    }

    fn with(
        self,
        other: Self,
        op: impl FnOnce(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Self {
        match other.0 {
            Ok(other) => self.map(|numbers| op(numbers, &other)),
            Err(error) => Self(self.0.and(Err(error))),
        }
    }

    fn tensor(self) -> Result<Tensor> {
        Ok(self.0.map_err(candle_core::Error::msg)?)
    }
}

impl Add for Numbers {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.with(other, Tensor::add)
    }
}

impl Sub for Numbers {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.with(other, Tensor::sub)
    }
}

impl Mul for Numbers {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        self.with(other, Tensor::mul)
    }
}

impl Div for Numbers {
    type Output = Self;

    fn div(self, other: Self) -> Self {
        self.with(other, Tensor::div)
    }
}

impl Add<f32> for Numbers {
    type Output = Self;

    fn add(self, other: f32) -> Self {
        self.map(|numbers| numbers.affine(1.0, other.into()))
    }
}

impl Mul<f32> for Numbers {
    type Output = Self;

    fn mul(self, other: f32) -> Self {
        // Any number and −0 are that number, also if it is −0.
        self.map(|numbers| numbers.affine(other.into(), -0.0))
    }
}

// Candle divides by a number by multiplying by its reciprocal, which is rounded once more.
impl Div<f32> for Numbers {
    type Output = Self;

    fn div(self, other: f32) -> Self {
        self.map(|numbers| numbers / numbers.zeros_like()?.affine(1.0, other.into())?)
    }
}

impl Number for Numbers {
    fn sqrt(self) -> Self {
        self.map(Tensor::sqrt)
    }

    fn sign(self) -> Self {
        self.map(Tensor::sign)
    }
}
