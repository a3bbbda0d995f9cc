//! Residual networks for images.

use super::positive;
use crate::layers::{
    Activation, BatchNorm, BatchNormOptions, Conv2d, Conv2dOptions, Linear, PoolOptions,
    global_avg_pool, max_pool2d,
};
use crate::{Architecture, Error, Module, Params, Pass, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The options of [`ResNet`]: architecture `"resnet"`.
///
/// The defaults are ResNet-18 for three-channel images of 32×32 pixels in ten classes, such as
/// CIFAR-10: a 3×3 convolution at the start and no pooling after it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResNetOptions {
    /// Channels of the image.
    pub channels: usize,
    /// Pixels from top to bottom.
    pub height: usize,
    /// Pixels from left to right.
    pub width: usize,
    /// Channels of the first stage; each further stage has twice as many, and half the pixels.
    pub base: usize,
    /// Blocks of each stage.
    pub blocks: Vec<usize>,
    /// Starts with a 7×7 convolution of stride 2 and a pooling, as for ImageNet.
    pub large_images: bool,
    /// Numbers that come out for a row, such as one logit per class.
    pub outputs: usize,
}

impl Default for ResNetOptions {
    fn default() -> Self {
        Self {
            channels: 3,
            height: 32,
            width: 32,
            base: 64,
            blocks: vec![2, 2, 2, 2],
            large_images: false,
            outputs: 10,
        }
    }
}

/// Basic blocks of two 3×3 convolutions (He, Zhang, Ren, Sun: *Deep Residual Learning*, 2016):
/// `[rows, channels, height, width]` to `[rows, outputs]`.
///
/// Parameters named as torchvision's: `conv1.weight`, `bn1.*`, `layer1.0.conv1.weight`,
/// `layer2.0.downsample.0.weight`, `fc.*` and so on.
#[derive(Clone, Debug)]
pub struct ResNet {
    stem: Convolution,
    pools: bool,
    blocks: Vec<Block>,
    head: Linear,
}

impl ResNet {
    /// Creates the layers in `params`.
    pub fn new(options: &ResNetOptions, params: &Params) -> Result<Self> {
        positive(&[
            ("channels", options.channels),
            ("base", options.base),
            ("outputs", options.outputs),
        ])?;
        positive(&[("height", options.height), ("width", options.width)])?;
        if options.blocks.is_empty() || options.blocks.contains(&0) {
            let got = format!("{:?}", options.blocks);
            return Err(Error::option("blocks", got, "at least one block in each stage"));
        }
        let (kernel, stride) = if options.large_images { (7, 2) } else { (3, 1) };
        let stem = Convolution::new(
            params,
            "conv1",
            "bn1",
            [options.channels, options.base],
            kernel,
            stride,
        )?;
        let (mut blocks, mut inputs) = (Vec::new(), options.base);
        for (stage, count) in options.blocks.iter().enumerate() {
            let outputs = u32::try_from(stage).ok().and_then(|stage| 2usize.checked_pow(stage));
            let outputs = outputs.and_then(|factor| options.base.checked_mul(factor));
            let outputs = outputs.ok_or_else(|| {
                Error::option(
                    "blocks",
                    options.blocks.len(),
                    "so few stages that channels can be counted",
                )
            })?;
            for block in 0..*count {
                let scope = params.scope(&format!("layer{}.{block}", stage + 1));
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                blocks.push(Block::new(&scope, inputs, outputs, stride)?);
                inputs = outputs;
            }
        }
        let head = Linear::new(&params.scope("fc"), inputs, options.outputs)?;
        Ok(Self { stem: stem.with_activation(), pools: options.large_images, blocks, head })
    }
}

impl Module for ResNet {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut x = self.stem.forward(x, pass)?;
        if self.pools {
            let options = PoolOptions { stride: 2, padding: 1, ..PoolOptions::new(3) };
            x = max_pool2d(&x, options)?;
        }
        for block in &self.blocks {
            x = block.forward(&x, pass)?;
        }
        self.head.forward(&global_avg_pool(&x)?, pass)
    }
}

/// A convolution and its norm.
#[derive(Clone, Debug)]
struct Convolution {
    convolution: Conv2d,
    norm: BatchNorm,
}

impl Convolution {
    fn new(
        params: &Params,
        name: &str,
        norm: &str,
        [inputs, outputs]: [usize; 2],
        kernel: usize,
        stride: usize,
    ) -> Result<Self> {
        let options =
            Conv2dOptions { stride, padding: kernel / 2, bias: false, ..Conv2dOptions::default() };
        Ok(Self {
            convolution: Conv2d::new(&params.scope(name), inputs, outputs, kernel, options)?,
            norm: BatchNorm::new(&params.scope(norm), outputs, BatchNormOptions::default())?,
        })
    }

    fn with_activation(self) -> Self {
        Self { norm: self.norm.with_activation(Activation::Relu), ..self }
    }
}

impl Module for Convolution {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.norm.forward(&self.convolution.forward(x, pass)?, pass)
    }
}

#[derive(Clone, Debug)]
struct Block {
    first: Convolution,
    second: Convolution,
    /// Where the shape changes.
    downsample: Option<Convolution>,
}

impl Block {
    fn new(params: &Params, inputs: usize, outputs: usize, stride: usize) -> Result<Self> {
        let new = |conv, norm, inputs, kernel, stride| {
            Convolution::new(params, conv, norm, [inputs, outputs], kernel, stride)
        };
        let changes = stride != 1 || inputs != outputs;
        let downsample = changes.then(|| new("downsample.0", "downsample.1", inputs, 1, stride));
        Ok(Self {
            first: new("conv1", "bn1", inputs, 3, stride)?.with_activation(),
            second: new("conv2", "bn2", outputs, 3, 1)?.with_activation(),
            downsample: downsample.transpose()?,
        })
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let skip = match &self.downsample {
            Some(downsample) => downsample.forward(x, pass)?,
            None => x.clone(),
        };
        let y = self.first.forward(x, pass)?;
        let y = self.second.convolution.forward(&y, pass)?;
        self.second.norm.forward_residual(&y, &skip, pass)
    }
}

impl Architecture for ResNetOptions {
    fn input_shape(&self) -> Vec<usize> {
        vec![self.channels, self.height, self.width]
    }

    fn output_shape(&self) -> Vec<usize> {
        vec![self.outputs]
    }

    fn build(&self, params: &Params) -> Result<Box<dyn Module>> {
        Ok(Box::new(ResNet::new(self, params)?))
    }
}
