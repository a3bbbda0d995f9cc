//! The affine map.

use crate::{Error, Init, Module, Params, Pass, Result};
use candle_core::{D, Tensor};

/// `y = x Wᵀ + b`: `[.., inputs]` to `[.., outputs]`.
///
/// Parameters `weight [outputs, inputs]` and `bias [outputs]`, initialised as PyTorch does.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
    name: String,
}

impl Linear {
    /// Creates the parameters in `params`.
    pub fn new(params: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            weight: params.get((outputs, inputs), "weight", Init::default_weight())?,
            bias: params.get(outputs, "bias", Init::default_bias(inputs))?,
            name: params.path().to_owned(),
        })
    }

    /// `[outputs, inputs]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[outputs]`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor, _pass: &Pass) -> Result<Tensor> {
        let (outputs, inputs) = self.weight.dims2()?;
        if x.rank() < 2 || x.dim(D::Minus1)? != inputs {
            let what = format!("the input of linear layer {:?}", self.name);
            return Err(Error::shape(what, format!("[.., {inputs}]"), x.dims()));
        }
        let rows = x.elem_count() / inputs;
        let y = x.reshape((rows, inputs))?.matmul(&self.weight.t()?)?;
        // The bias goes on the right: candle then completes its gradient first.
        let y = y.broadcast_add(&self.bias)?;
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = outputs;
        Ok(y.reshape(shape)?)
    }
}
