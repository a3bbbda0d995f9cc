//! Normalisations.

mod batch;
mod group;
mod rows;

pub use batch::{BatchNorm, BatchNormOptions};
pub use group::GroupNorm;

use crate::cpu::unsupported;
use crate::{Error, Init, Module, Params, Pass, Result};
use candle_core::{D, DType, Tensor};
use rows::{Kind, Rows};

/// Added to a variance before the root is taken, in PyTorch and here.
const EPS: f64 = 1e-5;

/// Each row of the last dimension less its mean, by its standard deviation, times `weight` plus
/// `bias`: `[.., features]` to the same (Ba, Kiros, Hinton: *Layer Normalization*, 2016).
///
/// Parameters `weight` and `bias` `[features]`, ones and zeros.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    name: String,
}

impl LayerNorm {
    /// Creates the parameters in `params`; ε is 10⁻⁵. Errors for 0 features.
    pub fn new(params: &Params, features: usize) -> Result<Self> {
        positive("features", features)?;
        Ok(Self {
            weight: params.get(features, "weight", Init::Ones)?,
            bias: params.get(features, "bias", Init::Zeros)?,
            eps: EPS,
            name: params.path().to_owned(),
        })
    }

    /// With another ε.
    #[must_use]
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
        let y = centered.broadcast_div(&(variance + self.eps)?.sqrt()?)?;
        Ok(y.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)?)
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor, _pass: &Pass) -> Result<Tensor> {
        check_features(x, self.weight.elem_count(), "layer norm", &self.name)?;
        match crate::cpu::has_kernels(x) {
            true => apply(Kind::Layer, self.eps, x, &self.weight, &self.bias),
            false => self.composed(x),
        }
    }
}

/// Each row of the last dimension by the root of its mean square, times `weight`:
/// `[.., features]` to the same (Zhang and Sennrich, 2019).
///
/// Parameter `weight [features]`, ones.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor,
    /// Zeros, for the kernel.
    bias: Tensor,
    eps: f64,
    name: String,
}

impl RmsNorm {
    /// Creates the parameter in `params`; ε is 10⁻⁵. Errors for 0 features.
    pub fn new(params: &Params, features: usize) -> Result<Self> {
        positive("features", features)?;
        let weight = params.get(features, "weight", Init::Ones)?;
        let bias = weight.detach().zeros_like()?;
        Ok(Self { weight, bias, eps: EPS, name: params.path().to_owned() })
    }

    /// With another ε.
    #[must_use]
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let y = x.broadcast_div(&(square + self.eps)?.sqrt()?)?;
        Ok(y.broadcast_mul(&self.weight)?)
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor, _pass: &Pass) -> Result<Tensor> {
        check_features(x, self.weight.elem_count(), "RMS norm", &self.name)?;
        match crate::cpu::has_kernels(x) {
            true => apply(Kind::Rms, self.eps, x, &self.weight, &self.bias),
            false => self.composed(x),
        }
    }
}

fn apply(kind: Kind, eps: f64, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (x, rows) = (&x.contiguous()?, Rows { kind, eps, width: weight.elem_count() });
    Ok(match x.dtype() {
        DType::F32 => rows.apply::<f32>(x, weight, bias)?,
        DType::F64 => rows.apply::<f64>(x, weight, bias)?,
        other => return Err(unsupported(other, "norm").into()),
    })
}

fn positive(option: &'static str, value: usize) -> Result<()> {
    if value == 0 { Err(Error::option(option, value, "at least 1")) } else { Ok(()) }
}

fn check_features(x: &Tensor, features: usize, kind: &str, name: &str) -> Result<()> {
    match x.dims().last() {
        Some(last) if *last == features => Ok(()),
        _ => Err(Error::shape(
            format!("the input of {kind} {name:?}"),
            format!("[.., {features}]"),
            x.dims(),
        )),
    }
}

fn check_channels(x: &Tensor, channels: usize, kind: &str, name: &str) -> Result<()> {
    match x.dims() {
        [_, got, ..] if *got == channels => Ok(()),
        dims => Err(Error::shape(
            format!("the input of {kind} {name:?}"),
            format!("[rows, {channels}, ..]"),
            dims,
        )),
    }
}
