//! Transposed convolutions.

use super::composed::{Windows, conv2d, spread, turned};
use super::geometry::{Axis, Geometry};
use super::op::Convolution;
use super::{at_least_one, bias_or_zeros, check_groups};
use crate::cpu::{lowered, unsupported};
use crate::layers::Activation;
use crate::link::reshape;
use crate::{Error, Init, Module, Params, Pass, Precision, Result};
use candle_core::{DType, Tensor};

/// How a transposed convolution spreads its input, on all axes alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvTransposeOptions {
    /// Pixels of the output from one pixel of the input to the next; at least 1. Default 1.
    pub stride: usize,
    /// Pixels that are cut off each side of the output. Default 0.
    pub padding: usize,
    /// Pixels that the far end of each axis has more; less than the stride or the dilation. A
    /// convolution with a stride gives images of several sizes one size: this says which of them
    /// comes back. Default 0.
    pub output_padding: usize,
    /// Pixels from one tap of the kernel to the next; at least 1. Default 1.
    pub dilation: usize,
    /// Into how many groups the channels are cut; a divisor of inputs and outputs. Default 1.
    pub groups: usize,
    /// Whether a number is added to each output channel. Default true.
    pub bias: bool,
}

impl Default for ConvTransposeOptions {
    fn default() -> Self {
        Self { stride: 1, padding: 0, output_padding: 0, dilation: 1, groups: 1, bias: true }
    }
}

/// The transpose of a convolution with square kernels: what takes gradients of its output to
/// those of its input, here to make images larger. An activation follows if asked for.
///
/// Parameters `weight [inputs, outputs / groups, kernel, kernel]` and `bias [outputs]`, initialised
/// as PyTorch does. `[rows, inputs, height, width]` become images whose axes have
/// `(size − 1)·stride − 2·padding + dilation·(kernel − 1) + output_padding + 1` pixels.
#[derive(Clone, Debug)]
pub struct ConvTranspose2d(Transposed);

/// [`ConvTranspose2d`] along one axis, `[rows, inputs, length]`; its weight is
/// `[inputs, outputs / groups, kernel]`.
#[derive(Clone, Debug)]
pub struct ConvTranspose1d(Transposed);

impl ConvTranspose2d {
    /// Creates the parameters in `params`. Errors when the kernel, the stride or the dilation is
    /// 0, the groups do not divide the channels, or the output padding is too large.
    pub fn new(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        options: ConvTransposeOptions,
    ) -> Result<Self> {
        Transposed::new(params, inputs, outputs, &[kernel, kernel], options).map(Self)
    }

    /// Applies `activation` to what comes out.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self(Transposed { activation, ..self.0 })
    }
}

impl ConvTranspose1d {
    /// Creates the parameters in `params`; errors as for [`ConvTranspose2d::new`].
    pub fn new(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        options: ConvTransposeOptions,
    ) -> Result<Self> {
        Transposed::new(params, inputs, outputs, &[kernel], options).map(Self)
    }

    /// Applies `activation` to what comes out.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self(Transposed { activation, ..self.0 })
    }
}

impl Module for ConvTranspose2d {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        match *x.dims() {
            [_, channels, height, width] if self.0.takes(channels, height.min(width)) => {
                self.0.forward(x, pass.precision())
            }
            _ => Err(self.0.shape_error(&["height", "width"], x)),
        }
    }
}

impl Module for ConvTranspose1d {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        match *x.dims() {
            [rows, channels, length] if self.0.takes(channels, length) => {
                let x = reshape(&x.contiguous()?, (rows, channels, 1, length))?;
                let y = self.0.forward(&x, pass.precision())?;
                let (rows, outputs, _, length) = y.dims4()?;
                Ok(reshape(&y, (rows, outputs, length))?)
            }
            _ => Err(self.0.shape_error(&["length"], x)),
        }
    }
}

/// With a kernel of one axis or two.
#[derive(Clone, Debug)]
struct Transposed {
    /// That of the convolution whose transpose it is, which has the roles of inputs and outputs
    /// the other way around.
    weight: Tensor,
    bias: Option<Tensor>,
    options: ConvTransposeOptions,
    activation: Activation,
    name: String,
}

impl Transposed {
    fn new(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: &[usize],
        options: ConvTransposeOptions,
    ) -> Result<Self> {
        let ConvTransposeOptions { stride, output_padding, dilation, groups, .. } = options;
        at_least_one(&[("kernel", kernel[0]), ("stride", stride), ("dilation", dilation)])?;
        check_groups(groups, inputs, outputs)?;
        if output_padding >= stride.max(dilation) {
            let expected = format!("less than a stride of {stride} or a dilation of {dilation}");
            return Err(Error::option("output_padding", output_padding, expected));
        }
        let shape = [&[inputs, outputs / groups], kernel].concat();
        // PyTorch's: of the outputs, though it is called fan in.
        let fan_in = shape[1..].iter().product();
        let bias = || params.get(outputs, "bias", Init::default_bias(fan_in));
        Ok(Self {
            weight: params.get(shape, "weight", Init::default_weight())?,
            bias: options.bias.then(bias).transpose()?,
            options,
            activation: Activation::Identity,
            name: params.path().to_owned(),
        })
    }

    fn reach(&self) -> usize {
        Axis::reach(self.weight.dims()[2], self.options.dilation)
    }

    fn inputs(&self) -> usize {
        self.weight.dims()[0]
    }

    /// Pixels that an axis must have for one to come out.
    fn least(&self) -> usize {
        let ConvTransposeOptions { stride, padding, output_padding, .. } = self.options;
        (2 * padding + 1).saturating_sub(self.reach() + output_padding).div_ceil(stride) + 1
    }

    fn takes(&self, channels: usize, size: usize) -> bool {
        channels == self.inputs() && size >= self.least()
    }

    fn shape_error(&self, axes: &[&str], x: &Tensor) -> Error {
        let axes: Vec<String> =
            axes.iter().map(|axis| format!("{axis} ≥ {}", self.least())).collect();
        let expected = format!("[rows, {}, {}]", self.inputs(), axes.join(", "));
        Error::shape(
            format!("the input of transposed convolution {:?}", self.name),
            expected,
            x.dims(),
        )
    }

    /// Of the convolution that takes what comes out of this to what goes in.
    fn axis(&self, size: usize, kernel: usize) -> Axis {
        let ConvTransposeOptions { stride, padding, output_padding, dilation, .. } = self.options;
        let large = (size - 1) * stride + self.reach() + output_padding - 2 * padding;
        Axis { size: large, kernel, stride, padding, dilation, out: size }
    }

    fn geometry(&self, height: usize, width: usize) -> Result<Geometry> {
        let groups = self.options.groups;
        let (outputs, channels) = (self.weight.dim(0)? / groups, self.weight.dim(1)?);
        let (height, width) = match self.weight.dims()[2..] {
            [kernel] => (Axis::ONE, self.axis(width, kernel)),
            _ => (self.axis(height, self.weight.dim(2)?), self.axis(width, self.weight.dim(3)?)),
        };
        Ok(Geometry { channels, outputs, groups, height, width })
    }

    /// Of checked images `[rows, inputs, height, width]`.
    fn forward(&self, x: &Tensor, precision: Precision) -> Result<Tensor> {
        let (rows, _, height, width) = x.dims4()?;
        let geometry = self.geometry(height, width)?;
        if !crate::cpu::has_kernels(x) {
            return self.activation.forward(&self.composed(x, &geometry, precision)?);
        }
        let outputs = geometry.channels * geometry.groups;
        let shape = [rows, outputs, geometry.height.size, geometry.width.size];
        let (activation, pooling) = (Activation::Identity, None);
        let convolution = Convolution { geometry, activation, pooling, precision };
        let (x, bias) = (&x.contiguous()?, bias_or_zeros(self.bias.as_ref(), outputs, x)?);
        let y = match x.dtype() {
            DType::F32 => convolution.apply_transposed::<f32>(x, &self.weight, &bias, shape)?,
            DType::F64 => convolution.apply_transposed::<f64>(x, &self.weight, &bias, shape)?,
            other => return Err(unsupported(other, "transposed convolution").into()),
        };
        self.activation.forward(&y)
    }

    /// In candle's own operations, for devices that this crate has no kernel for. Candle's own
    /// transposed convolutions have no groups, or no gradient; this is a convolution, with the
    /// kernel turned around, of an image with zeros between its pixels.
    fn composed(
        &self,
        x: &Tensor,
        geometry: &Geometry,
        precision: Precision,
    ) -> candle_core::Result<Tensor> {
        let ConvTransposeOptions { dilation, groups, output_padding, .. } = self.options;
        let Geometry { channels, height, width, .. } = *geometry;
        let x = spread(&spread(x, 2, height)?, 3, width)?.contiguous()?;
        let weight = self.weight.reshape(((), channels, height.kernel, width.kernel))?;
        let mut y = lowered(&x, &turned(&weight, groups)?, precision, |x, weight| {
            conv2d(x, weight, Windows { stride: 1, dilation, groups })
        })?;
        for (dim, axis) in [(2, height), (3, width)] {
            y = y.pad_with_zeros(dim, 0, output_padding)?.narrow(dim, axis.padding, axis.size)?;
        }
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
            None => Ok(y),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::assert_agree;
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_kernel_agrees_with_candles_operations() {
        let cases = [
            (3, [1, 0, 0, 1, 1], [5, 6], 2),
            (2, [2, 0, 1, 1, 1], [4, 3], 2),
            (4, [2, 1, 0, 1, 4], [5, 4], 3),
            (3, [3, 2, 2, 2, 2], [4, 5], 2),
            (1, [2, 0, 1, 3, 2], [3, 2], 1),
            // More images than one matrix has, and few and large ones.
            (3, [2, 1, 1, 1, 2], [6, 5], 60),
            (3, [1, 1, 0, 1, 1], [70, 70], 3),
            // By tiles.
            (3, [1, 1, 0, 1, 1], [12, 11], 5),
        ];
        for (kernel, [stride, padding, output_padding, dilation, groups], [height, width], rows) in
            cases
        {
            let params = Params::with_dtype(1, &Device::Cpu, DType::F64);
            let bias = kernel != 2;
            let options =
                ConvTransposeOptions { stride, padding, output_padding, dilation, groups, bias };
            let (inputs, outputs) = match height {
                70 => (30, 8),
                12 => (16, 32),
                _ => (4, 8),
            };
            let layer = ConvTranspose2d::new(&params, inputs, outputs, kernel, options);
            let layer = layer.expect("layer").0;
            let init = Init::Normal { mean: 0.0, std: 1.0 };
            let x = params.get((rows, inputs, height, width), "x", init).expect("input");
            let geometry = layer.geometry(height, width).expect("geometry");
            let theirs = layer.composed(&x, &geometry, Precision::F32).expect("composed");
            assert_agree(&params, layer.forward(&x, Precision::F32).expect("kernel"), theirs);
        }
    }
}
