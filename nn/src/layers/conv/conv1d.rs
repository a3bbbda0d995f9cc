//! Convolutions along one axis.

use super::{Conv2d, Conv2dOptions};
use crate::layers::Activation;
use crate::link::reshape;
use crate::{Error, Module, Params, Pass, Result};
use candle_core::Tensor;

/// How the window of [`Conv1d`] moves; as for images, with one axis.
pub type Conv1dOptions = Conv2dOptions;

/// Cross-correlation of sequences `[rows, inputs, length]`, then an activation if asked for, in one
/// operation.
///
/// Parameters `weight [outputs, inputs / groups, kernel]` and `bias [outputs]`, initialised as
/// PyTorch does. What comes out has
/// `(length + 2·padding − dilation·(kernel − 1) − 1) / stride + 1` numbers per channel, rounded
/// down.
#[derive(Clone, Debug)]
pub struct Conv1d(Conv2d);

impl Conv1d {
    /// Creates the parameters in `params`. Errors when the kernel, the stride or the dilation is
    /// 0, or the groups do not divide the channels.
    pub fn new(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        options: Conv1dOptions,
    ) -> Result<Self> {
        Conv2d::with_kernel(params, inputs, outputs, &[kernel], options).map(Self)
    }

    /// Applies `activation` to what comes out.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self(self.0.with_activation(activation))
    }

    fn check(&self, dims: &[usize]) -> Result<[usize; 3]> {
        let (inputs, least) = (self.0.inputs(), self.0.least());
        match *dims {
            [rows, channels, length] if channels == inputs && length >= least => {
                Ok([rows, channels, length])
            }
            _ => {
                let what = format!("the input of convolution {:?}", self.0.name);
                Err(Error::shape(what, format!("[rows, {inputs}, length ≥ {least}]"), dims))
            }
        }
    }
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let [rows, channels, length] = self.check(x.dims())?;
        let x = reshape(&x.contiguous()?, (rows, channels, 1, length))?;
        let y = match crate::cpu::has_kernels(&x) {
            true => self.0.kernel(&x, pass.precision())?,
            false => self.0.composed(&x, pass.precision())?,
        };
        let (rows, outputs, _, length) = y.dims4()?;
        Ok(reshape(&y, (rows, outputs, length))?)
    }
}
