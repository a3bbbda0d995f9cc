//! The affine map.

use super::Activation;
use super::linear_op::affine;
use crate::cpu::matmul;
use crate::{Error, Init, Module, Params, Pass, Precision, Result};
use candle_core::{D, Tensor};

/// `y = activation(x Wᵀ + b)`: `[.., inputs]` to `[.., outputs]`, in one operation.
///
/// Parameters `weight [outputs, inputs]` and `bias [outputs]`, initialised as PyTorch does.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
    activation: Activation,
    name: String,
}

impl Linear {
    /// Creates the parameters in `params`. No activation.
    pub fn new(params: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        let bias = params.get(outputs, "bias", Init::default_bias(inputs))?;
        Ok(Self { bias, ..Self::without_bias(params, inputs, outputs)? })
    }

    /// The same without a bias: `weight` is the only parameter.
    pub fn without_bias(params: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            weight: params.get((outputs, inputs), "weight", Init::default_weight())?,
            bias: Tensor::zeros(outputs, params.dtype(), params.device())?,
            activation: Activation::Identity,
            name: params.path().to_owned(),
        })
    }

    /// Applies `activation` to what comes out, which costs hardly anything here.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// `[outputs, inputs]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[outputs]`; zeros, and no parameter, in a layer without a bias.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// In candle's own operations, for devices that this crate has no kernel for.
    fn composed(&self, x: &Tensor, shape: &[usize], precision: Precision) -> Result<Tensor> {
        let (_, inputs) = self.weight.dims2()?;
        let y = matmul(&x.reshape(((), inputs))?, &self.weight.t()?, precision)?;
        let y = y.broadcast_add(&self.bias)?;
        Ok(self.activation.composed(&y)?.reshape(shape)?)
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let (outputs, inputs) = self.weight.dims2()?;
        if x.rank() < 2 || x.dim(D::Minus1)? != inputs {
            let what = format!("the input of linear layer {:?}", self.name);
            return Err(Error::shape(what, format!("[.., {inputs}]"), x.dims()));
        }
        if crate::cpu::has_kernels(x) {
            return Ok(affine(x, &self.weight, &self.bias, self.activation, pass.precision())?);
        }
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = outputs;
        self.composed(x, &shape, pass.precision())
    }
}
