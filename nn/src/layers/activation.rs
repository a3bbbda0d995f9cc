//! Element-wise non-linearities.

use crate::Result;
use crate::cpu::{TASK_ELEMENTS, unsupported, with_values};
use crate::kernels::{Real, output, vectorized};
use crate::link::{Source, owned, result_kept};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// A non-linearity by name, for options. Values and gradients are PyTorch's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// `x`.
    Identity,
    /// `max(x, 0)`; its gradient at 0 is 0.
    #[default]
    Relu,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `x` above 0, `0.01 x` below.
    LeakyRelu,
    /// `x` above 0, `eˣ − 1` below (Clevert, Unterthiner, Hochreiter, 2016).
    Elu,
    /// `x · Φ(x)`, exact (Hendrycks and Gimpel, 2016), as PyTorch's default.
    Gelu,
    /// The same with a hyperbolic tangent in place of the error function.
    GeluTanh,
    /// `x / (1 + e⁻ˣ)`, also called swish.
    Silu,
    /// `1 / (1 + e⁻ˣ)`.
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// `ln(1 + eˣ)`.
    Softplus,
}

impl Activation {
    /// Applies it to every element.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        if self == Self::Identity {
            return Ok(x.clone());
        }
        if !crate::cpu::has_kernels(x) {
            return Ok(self.composed(x)?);
        }
        let x = &x.contiguous()?;
        Ok(match x.dtype() {
            DType::F32 => self.forward_as::<f32>(x)?,
            DType::F64 => self.forward_as::<f64>(x)?,
            other => return Err(unsupported(other, "activation").into()),
        })
    }

    /// What [`Init`](crate::Init) multiplies the weights before it with, so that the variance lasts
    /// from layer to layer: PyTorch's `calculate_gain`. For the relatives of ReLU that it has no
    /// number for, ReLU's √2.
    pub fn gain(self) -> f64 {
        match self {
            Self::Identity | Self::Sigmoid => 1.0,
            Self::Tanh => 5.0 / 3.0,
            Self::LeakyRelu => crate::Init::rectifier_gain(0.01),
            Self::Relu | Self::Relu6 | Self::Elu | Self::Gelu => std::f64::consts::SQRT_2,
            Self::GeluTanh | Self::Silu | Self::Softplus => std::f64::consts::SQRT_2,
        }
    }

    /// In candle's own operations, for devices that this crate has no kernel for.
    pub(crate) fn composed(self, x: &Tensor) -> candle_core::Result<Tensor> {
        // The exponential of a large number would make a NaN of the slope.
        let sigmoid = |x: &Tensor| ((x * 0.5)?.tanh()? + 1.0)? * 0.5;
        let is_positive = |x: &Tensor| x.gt(0.0)?.to_dtype(x.dtype());
        // Candle's own relu passes the gradient at 0.
        let relu = |x: &Tensor| is_positive(x)?.mul(x);
        match self {
            Self::Identity => Ok(x.clone()),
            Self::Relu => relu(x),
            Self::Relu6 => {
                x.lt(6.0)?.to_dtype(x.dtype())?.mul(&relu(x)?)?
                    + (x.ge(6.0)?.to_dtype(x.dtype())? * 6.0)?
            }
            Self::LeakyRelu => x.mul(&((is_positive(x)? * 0.99)? + 0.01)?),
            Self::Elu => {
                // The exponential of the positive side is not used, and must not overflow.
                let below = x.le(0.0)?.to_dtype(x.dtype())?.mul(x)?;
                relu(x)? + (below.exp()? - 1.0)?
            }
            // Candle's own have slopes of six digits.
            Self::Gelu => {
                let inner = (x * std::f64::consts::FRAC_1_SQRT_2)?.erf()?;
                x.mul(&((inner + 1.0)? * 0.5)?)
            }
            Self::GeluTanh => {
                let cubic = ((x.sqr()? * (GeluTanh::CUBIC * GeluTanh::SCALE))? + GeluTanh::SCALE)?;
                let inner = x.mul(&cubic)?.tanh()?;
                x.mul(&((inner + 1.0)? * 0.5)?)
            }
            Self::Silu => x.mul(&sigmoid(x)?),
            Self::Sigmoid => sigmoid(x),
            Self::Tanh => x.tanh(),
            Self::Softplus => {
                let small = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
                // At 0 candle's slopes of both are 1, which makes 1 − ½.
                x.relu()? + small
            }
        }
    }

    /// Whether [`slope`](Scalar::slope) looks at the input, not at the output alone.
    pub(crate) fn needs_input(self) -> bool {
        matches!(self, Self::Gelu | Self::GeluTanh | Self::Silu | Self::Softplus)
    }

    /// Calls `visit` with the function itself, so that loops over it are compiled for each.
    #[inline(always)]
    pub(crate) fn visit<V: Visitor>(self, visitor: V) -> V::Output {
        match self {
            Self::Identity => visitor.visit::<Identity>(),
            Self::Relu => visitor.visit::<Relu>(),
            Self::Relu6 => visitor.visit::<Relu6>(),
            Self::LeakyRelu => visitor.visit::<LeakyRelu>(),
            Self::Elu => visitor.visit::<Elu>(),
            Self::Gelu => visitor.visit::<Gelu>(),
            Self::GeluTanh => visitor.visit::<GeluTanh>(),
            Self::Silu => visitor.visit::<Silu>(),
            Self::Sigmoid => visitor.visit::<Sigmoid>(),
            Self::Tanh => visitor.visit::<Tanh>(),
            Self::Softplus => visitor.visit::<Softplus>(),
        }
    }
}

/// A loop over some activation.
pub(crate) trait Visitor {
    type Output;

    fn visit<S: Scalar>(self) -> Self::Output;
}

/// One activation of one number.
pub(crate) trait Scalar: Send + Sync + 'static {
    fn value<T: Real>(x: T) -> T;

    /// The derivative where the input is `x` and the output `y`.
    fn slope<T: Real>(x: T, y: T) -> T;
}

/// `value` where the condition holds, else 0: a select, not a branch.
#[inline(always)]
fn keep<T: Real>(condition: bool, value: T) -> T {
    if condition { value } else { T::zero() }
}

#[inline(always)]
fn number<T: Real>(value: f64) -> T {
    T::from_f64(value)
}

pub(crate) struct Identity;
pub(crate) struct Relu;
pub(crate) struct Relu6;
pub(crate) struct LeakyRelu;
pub(crate) struct Elu;
pub(crate) struct Gelu;
pub(crate) struct GeluTanh;
pub(crate) struct Silu;
pub(crate) struct Sigmoid;
pub(crate) struct Tanh;
pub(crate) struct Softplus;

impl Scalar for Identity {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        x
    }

    #[inline(always)]
    fn slope<T: Real>(_x: T, _y: T) -> T {
        T::one()
    }
}

impl Scalar for Relu {
    /// A NaN stays one.
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        if x <= T::zero() { T::zero() } else { x }
    }

    #[inline(always)]
    fn slope<T: Real>(_x: T, y: T) -> T {
        keep(y > T::zero(), T::one())
    }
}

impl Scalar for Relu6 {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        let x = Relu::value(x);
        if x >= number(6.0) { number(6.0) } else { x }
    }

    #[inline(always)]
    fn slope<T: Real>(_x: T, y: T) -> T {
        keep((y > T::zero()) & (y < number(6.0)), T::one())
    }
}

impl Scalar for LeakyRelu {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        if x > T::zero() { x } else { x * number(0.01) }
    }

    #[inline(always)]
    fn slope<T: Real>(_x: T, y: T) -> T {
        if y > T::zero() { T::one() } else { number(0.01) }
    }
}

impl Scalar for Elu {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        // eˣ − 1, which would cancel near 0.
        let below = (x * number(0.5)).tanh() * (x.exp() + T::one());
        if x > T::zero() { x } else { below }
    }

    #[inline(always)]
    fn slope<T: Real>(_x: T, y: T) -> T {
        if y > T::zero() { T::one() } else { y + T::one() }
    }
}

impl Scalar for Gelu {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        x * gauss(x)
    }

    #[inline(always)]
    fn slope<T: Real>(x: T, _y: T) -> T {
        // 1 / √(2π)
        let density = (x * x * number(-0.5)).exp() * number(0.398_942_280_401_432_7);
        density.mul_add(x, gauss(x))
    }
}

/// The normal distribution function.
#[inline(always)]
fn gauss<T: Real>(x: T) -> T {
    (x * number(std::f64::consts::FRAC_1_SQRT_2)).erf().mul_add(number(0.5), number(0.5))
}

impl Scalar for GeluTanh {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        let t = Self::inner(x).tanh();
        x * t.mul_add(number(0.5), number(0.5))
    }

    #[inline(always)]
    fn slope<T: Real>(x: T, _y: T) -> T {
        let t = Self::inner(x).tanh();
        let inner_slope =
            (x * x).mul_add(number(3.0 * Self::CUBIC * Self::SCALE), number(Self::SCALE));
        let rest = (T::one() - t * t) * inner_slope * x;
        (rest + t).mul_add(number(0.5), number(0.5))
    }
}

impl GeluTanh {
    const CUBIC: f64 = 0.044_715;
    /// √(2/π)
    const SCALE: f64 = 0.797_884_560_802_865_4;

    #[inline(always)]
    fn inner<T: Real>(x: T) -> T {
        (x * x).mul_add(number(Self::CUBIC * Self::SCALE), number(Self::SCALE)) * x
    }
}

impl Scalar for Silu {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        x * x.sigmoid()
    }

    #[inline(always)]
    fn slope<T: Real>(x: T, _y: T) -> T {
        let s = x.sigmoid();
        s * (x * (T::one() - s) + T::one())
    }
}

impl Scalar for Sigmoid {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        x.sigmoid()
    }

    #[inline(always)]
    fn slope<T: Real>(_x: T, y: T) -> T {
        y * (T::one() - y)
    }
}

impl Scalar for Tanh {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        x.tanh()
    }

    #[inline(always)]
    fn slope<T: Real>(_x: T, y: T) -> T {
        T::one() - y * y
    }
}

impl Scalar for Softplus {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        Relu::value(x) + (T::zero() - x.abs()).exp().ln_1p()
    }

    #[inline(always)]
    fn slope<T: Real>(x: T, _y: T) -> T {
        x.sigmoid()
    }
}

struct Values<'a, T>(&'a [T], &'a mut [T]);

impl<T: Real> Visitor for Values<'_, T> {
    type Output = ();

    fn visit<S: Scalar>(self) {
        let tasks = self.1.par_chunks_mut(TASK_ELEMENTS).zip(self.0.par_chunks(TASK_ELEMENTS));
        tasks.for_each(|(y, x)| {
            vectorized(
                #[inline(always)]
                || y.iter_mut().zip(x).for_each(|(y, x)| *y = S::value(*x)),
            )
        });
    }
}

/// Multiplies the gradient of `y` by the slope, which makes it that of `x`.
pub(crate) struct Slopes<'a, T> {
    pub(crate) x: &'a [T],
    pub(crate) y: &'a [T],
    pub(crate) gradient: &'a mut [T],
}

impl<T: Real> Visitor for Slopes<'_, T> {
    type Output = ();

    fn visit<S: Scalar>(self) {
        let values = self.x.par_chunks(TASK_ELEMENTS).zip(self.y.par_chunks(TASK_ELEMENTS));
        self.gradient.par_chunks_mut(TASK_ELEMENTS).zip(values).for_each(|(gradient, (x, y))| {
            vectorized(
                #[inline(always)]
                || slopes::<S, T>(x, y, gradient),
            )
        });
    }
}

#[inline(always)]
fn slopes<S: Scalar, T: Real>(x: &[T], y: &[T], gradient: &mut [T]) {
    for ((gradient, x), y) in gradient.iter_mut().zip(x).zip(y) {
        *gradient *= S::slope(*x, *y);
    }
}

impl Activation {
    fn forward_as<T: Real>(self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = with_values([x], |[x]| Ok(output(x.len(), |y| self.visit(Values(x, y)))))?;
        let (source, shape) = (Source::of(x), x.shape().clone());
        let (to, x) = (source.clone(), self.needs_input().then(|| x.detach()));
        result_kept::<T>(y, shape, &[&source], move |gradient, y| {
            let mut gradient = owned::<T>(gradient)?;
            with_values([x.as_ref().unwrap_or(y), y], |[x, y]| {
                self.visit(Slopes { x, y, gradient: &mut gradient });
                Ok(())
            })?;
            Ok(vec![to.give(gradient)?])
        })
    }
}
