//! A small convolutional network for images.

use super::positive;
use crate::layers::{Activation, Conv2d, Conv2dOptions, Dropout, Linear, flatten};
use crate::{Architecture, Error, Module, Params, Pass, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The options of [`Cnn`]: architecture `"cnn"`.
///
/// The defaults are for one-channel images of 28×28 pixels in ten classes, such as
/// Fashion-MNIST.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CnnOptions {
    /// Channels of the image.
    pub channels: usize,
    /// Pixels from top to bottom.
    pub height: usize,
    /// Pixels from left to right.
    pub width: usize,
    /// Output channels of each convolution, first to last.
    pub conv: Vec<usize>,
    /// Side of the kernels: odd, since images are padded to keep their size.
    pub kernel: usize,
    /// Side of the max-pooling windows after each convolution; 1 for none.
    pub pool: usize,
    /// Width of the hidden linear layer.
    pub hidden: usize,
    /// Numbers that come out for a row, such as one logit per class.
    pub outputs: usize,
    /// The rate of dropout after the hidden linear layer, in `[0, 1)`.
    pub dropout: f64,
    /// What follows each convolution and the hidden linear layer.
    pub activation: Activation,
}

impl Default for CnnOptions {
    fn default() -> Self {
        Self {
            channels: 1,
            height: 28,
            width: 28,
            conv: vec![32, 64],
            kernel: 3,
            pool: 2,
            hidden: 128,
            outputs: 10,
            dropout: 0.0,
            activation: Activation::Relu,
        }
    }
}

impl CnnOptions {
    fn check(&self) -> Result<()> {
        positive(&[("channels", self.channels), ("height", self.height), ("width", self.width)])?;
        positive(&[("pool", self.pool), ("hidden", self.hidden), ("outputs", self.outputs)])?;
        if self.kernel.is_multiple_of(2) {
            return Err(Error::option("kernel", self.kernel, "an odd number"));
        }
        match self.features() {
            0 => Err(Error::option(
                "conv",
                format!("{:?}", self.conv),
                format!(
                    "channels of at least 1, and so few layers that {}×{} pixels last for a {p}×{p} pooling after each",
                    self.height,
                    self.width,
                    p = self.pool
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Numbers per row after the last pooling; 0 when nothing is left of the image.
    fn features(&self) -> usize {
        let left = |size| self.conv.iter().fold(size, |size, _| size / self.pool);
        let channels = self.conv.last().copied().unwrap_or(self.channels);
        let all_positive = !self.conv.contains(&0);
        usize::from(all_positive) * channels * left(self.height) * left(self.width)
    }
}

/// Convolutions with activation and max-pooling, then two linear layers:
/// `[rows, channels, height, width]` to `[rows, outputs]`.
///
/// Parameters `conv1.weight`, `conv1.bias` and so on, `fc1.*` and `fc2.*`.
#[derive(Clone, Debug)]
pub struct Cnn {
    convolutions: Vec<Conv2d>,
    hidden: Linear,
    dropout: Dropout,
    output: Linear,
}

impl Cnn {
    /// Creates the layers in `params`.
    pub fn new(options: &CnnOptions, params: &Params) -> Result<Self> {
        options.check()?;
        let same_size = Conv2dOptions { padding: options.kernel / 2, ..Conv2dOptions::default() };
        let (mut convolutions, mut inputs) = (Vec::new(), options.channels);
        for (index, &outputs) in options.conv.iter().enumerate() {
            let scope = params.scope(&format!("conv{}", index + 1));
            let convolution = Conv2d::new(&scope, inputs, outputs, options.kernel, same_size)?
                .with_activation(options.activation)
                .with_max_pool(options.pool);
            convolutions.push(convolution);
            inputs = outputs;
        }
        Ok(Self {
            convolutions,
            hidden: Linear::new(&params.scope("fc1"), options.features(), options.hidden)?
                .with_activation(options.activation),
            dropout: Dropout::new(&params.scope("dropout1"), options.dropout)?,
            output: Linear::new(&params.scope("fc2"), options.hidden, options.outputs)?,
        })
    }
}

impl Module for Cnn {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut x = x.clone();
        for convolution in &self.convolutions {
            x = convolution.forward(&x, pass)?;
        }
        let x = flatten(&x)?;
        let x = self.dropout.forward(&self.hidden.forward(&x, pass)?, pass)?;
        self.output.forward(&x, pass)
    }
}

impl Architecture for CnnOptions {
    fn input_shape(&self) -> Vec<usize> {
        vec![self.channels, self.height, self.width]
    }

    fn output_shape(&self) -> Vec<usize> {
        vec![self.outputs]
    }

    fn build(&self, params: &Params) -> Result<Box<dyn Module>> {
        Ok(Box::new(Cnn::new(self, params)?))
    }
}
