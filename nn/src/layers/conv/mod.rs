//! Convolutions.

mod columns;
mod composed;
mod conv1d;
mod finish;
mod geometry;
mod method;
mod op;
mod plan;
pub(super) mod pooling;
mod transpose;
mod transpose_op;
mod winograd;

use super::Activation;
use crate::cpu::{lowered, unsupported};
use crate::{Error, Init, Module, Params, Pass, Precision, Result};
use candle_core::{DType, Tensor};
use geometry::{Axis, Geometry};
use op::Convolution;
use pooling::{LARGEST, Pooling};

pub use conv1d::{Conv1d, Conv1dOptions};
pub use transpose::{ConvTranspose1d, ConvTranspose2d, ConvTransposeOptions};

/// How a convolution's window moves, on both axes alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dOptions {
    /// Pixels from one window to the next; at least 1. Default 1.
    pub stride: usize,
    /// Zeros added on each side of the image. Default 0.
    pub padding: usize,
    /// Pixels from one tap of the kernel to the next; at least 1. Default 1.
    pub dilation: usize,
    /// Into how many groups the channels are cut, each with kernels of its own; a divisor of inputs
    /// and outputs. Default 1.
    pub groups: usize,
    /// Whether a number is added to each output channel; not needed before a normalisation.
    /// Default true.
    pub bias: bool,
}

impl Default for Conv2dOptions {
    fn default() -> Self {
        Self { stride: 1, padding: 0, dilation: 1, groups: 1, bias: true }
    }
}

/// Cross-correlation of images `[rows, inputs, height, width]` with square kernels, then, if asked
/// for, an activation and a max-pooling, in one operation.
///
/// Parameters `weight [outputs, inputs / groups, kernel, kernel]` and `bias [outputs]`, initialised
/// as PyTorch does. Each output axis has
/// `(size + 2·padding − dilation·(kernel − 1) − 1) / stride + 1` pixels, rounded down.
///
/// On the CPU, windows of 3×3 with stride and dilation 1, and channels and outputs of each group in
/// whole sixteens, take Winograd's way where a batch has 64 or more tiles of 2×2 results: as exact
/// as the other to rounding, but an infinite pixel makes up to sixteen results NaN, where else nine
/// are infinite, and the last bits of an image's results depend on whether its batch is that large.
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// Without the height in [`Conv1d`], which is this with images of height 1.
    weight: Tensor,
    bias: Option<Tensor>,
    options: Conv2dOptions,
    activation: Activation,
    pool: usize,
    name: String,
}

impl Conv2d {
    /// Creates the parameters in `params`. Errors when the kernel, the stride or the dilation is
    /// 0, or the groups do not divide the channels.
    pub fn new(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        options: Conv2dOptions,
    ) -> Result<Self> {
        Self::with_kernel(params, inputs, outputs, &[kernel, kernel], options)
    }

    fn with_kernel(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: &[usize],
        options: Conv2dOptions,
    ) -> Result<Self> {
        let Conv2dOptions { stride, dilation, groups, .. } = options;
        at_least_one(&[("kernel", kernel[0]), ("stride", stride), ("dilation", dilation)])?;
        check_groups(groups, inputs, outputs)?;
        let shape = [&[outputs, inputs / groups], kernel].concat();
        let fan_in = shape[1..].iter().product();
        let bias = || params.get(outputs, "bias", Init::default_bias(fan_in));
        Ok(Self {
            weight: params.get(shape, "weight", Init::default_weight())?,
            bias: options.bias.then(bias).transpose()?,
            options,
            activation: Activation::Identity,
            pool: 1,
            name: params.path().to_owned(),
        })
    }

    /// Applies `activation` to what comes out.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// Then takes the largest value of each window of `kernel`×`kernel` pixels, windows side by
    /// side, as [`max_pool2d`](super::max_pool2d) does; 1 for none.
    #[must_use]
    pub fn with_max_pool(self, kernel: usize) -> Self {
        Self { pool: kernel.max(1), ..self }
    }

    /// In candle's own operations, for devices that this crate has no kernel for.
    ///
    /// What the last windows leave of both axes is cut off first.
    fn composed(&self, x: &Tensor, precision: Precision) -> Result<Tensor> {
        let Conv2dOptions { stride, dilation, groups, .. } = self.options;
        let geometry = self.geometry(x.dim(2)?, x.dim(3)?)?;
        let mut x = x.clone();
        for (dim, axis) in [(2, geometry.height), (3, geometry.width)] {
            let covered = (axis.out - 1) * axis.stride + Axis::reach(axis.kernel, axis.dilation);
            x = x.pad_with_zeros(dim, axis.padding, axis.padding)?.narrow(dim, 0, covered)?;
        }
        let kernel = (geometry.height.kernel, geometry.width.kernel);
        let weight = self.weight.reshape(((), geometry.channels, kernel.0, kernel.1))?;
        let mut y = lowered(&x.contiguous()?, &weight, precision, |x, weight| {
            composed::conv2d(x, weight, composed::Windows { stride, dilation, groups })
        })?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
        }
        self.finish(&y)
    }

    /// What follows the convolution, in operations of their own.
    fn finish(&self, y: &Tensor) -> Result<Tensor> {
        let y = self.activation.forward(y)?;
        if self.pool > 1 { super::max_pool2d(&y, self.pool) } else { Ok(y) }
    }

    fn inputs(&self) -> usize {
        self.weight.dims()[1] * self.options.groups
    }

    /// Pixels that an axis must have.
    fn least(&self) -> usize {
        let reach = Axis::reach(self.weight.dims()[2], self.options.dilation);
        reach.saturating_sub(2 * self.options.padding).max(1)
    }

    fn check(&self, dims: &[usize]) -> Result<()> {
        let (inputs, least) = (self.inputs(), self.least());
        match *dims {
            [_, channels, h, w] if channels == inputs && h.min(w) >= least => Ok(()),
            _ => {
                let what = format!("the input of convolution {:?}", self.name);
                let expected = format!("[rows, {inputs}, height ≥ {least}, width ≥ {least}]");
                Err(Error::shape(what, expected, dims))
            }
        }
    }

    fn axis(&self, size: usize, kernel: usize) -> Axis {
        let Conv2dOptions { stride, padding, dilation, .. } = self.options;
        let out = (size + 2 * padding - Axis::reach(kernel, dilation)) / stride + 1;
        Axis { size, kernel, stride, padding, dilation, out }
    }

    fn geometry(&self, height: usize, width: usize) -> Result<Geometry> {
        let groups = self.options.groups;
        let (outputs, channels) = (self.weight.dim(0)?, self.weight.dim(1)?);
        let (height, width) = match self.weight.dims()[2..] {
            [kernel] => (Axis::ONE, self.axis(width, kernel)),
            _ => (self.axis(height, self.weight.dim(2)?), self.axis(width, self.weight.dim(3)?)),
        };
        Ok(Geometry { channels, outputs: outputs / groups, groups, height, width })
    }

    /// With this crate's kernel, for checked contiguous images on the CPU.
    fn kernel(&self, x: &Tensor, precision: Precision) -> Result<Tensor> {
        let (rows, _, height, width) = x.dims4()?;
        let geometry = self.geometry(height, width)?;
        let pooling =
            Pooling { kernel: self.pool, height: geometry.height.out, width: geometry.width.out };
        let can_pool = (2..=LARGEST).contains(&self.pool) && pooling.area() > 0;
        let is_fused = !self.activation.needs_input() && (self.pool == 1 || can_pool);
        let activation = if is_fused { self.activation } else { Activation::Identity };
        let pooling = Some(pooling).filter(|_| is_fused && can_pool);
        let convolution = Convolution { geometry, activation, pooling, precision };
        let outputs = self.weight.dim(0)?;
        let (height, width) = match pooling {
            Some(Pooling { kernel, height, width }) => (height / kernel, width / kernel),
            None => (geometry.height.out, geometry.width.out),
        };
        let shape = [rows, outputs, height, width];
        let bias = bias_or_zeros(self.bias.as_ref(), outputs, x)?;
        let y = match x.dtype() {
            DType::F32 => convolution.apply::<f32>(x, &self.weight, &bias, shape)?,
            DType::F64 => convolution.apply::<f64>(x, &self.weight, &bias, shape)?,
            other => return Err(unsupported(other, "conv2d").into()),
        };
        if is_fused { Ok(y) } else { self.finish(&y) }
    }
}

fn at_least_one(options: &[(&'static str, usize)]) -> Result<()> {
    match options.iter().find(|(_, value)| *value == 0) {
        Some((option, value)) => Err(Error::option(option, value, "at least 1")),
        None => Ok(()),
    }
}

fn check_groups(groups: usize, inputs: usize, outputs: usize) -> Result<()> {
    if groups == 0 || !inputs.is_multiple_of(groups) || !outputs.is_multiple_of(groups) {
        let expected = format!("a divisor of {inputs} inputs and {outputs} outputs");
        return Err(Error::option("groups", groups, expected));
    }
    Ok(())
}

fn bias_or_zeros(bias: Option<&Tensor>, outputs: usize, x: &Tensor) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(bias.clone()),
        None => Ok(Tensor::zeros(outputs, x.dtype(), x.device())?),
    }
}

impl Module for Conv2d {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.check(x.dims())?;
        match crate::cpu::has_kernels(x) {
            true => self.kernel(&x.contiguous()?, pass.precision()),
            false => self.composed(x, pass.precision()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::method::Method;
    use super::*;
    use crate::kernels::Threads;
    use candle_core::{DType, Device};

    /// Two implementations, one answer: for outputs and for every gradient.
    #[test]
    fn the_kernel_agrees_with_candles_operations() {
        let cases = [
            (3, [1, 1, 1, 1], [5, 6], 1, Activation::Relu, 9),
            (3, [1, 0, 1, 1], [5, 6], 2, Activation::Identity, 9),
            (2, [2, 0, 1, 1], [6, 7], 1, Activation::Gelu, 9),
            (3, [2, 1, 2, 2], [9, 8], 2, Activation::Tanh, 9),
            (5, [3, 4, 1, 1], [3, 2], 1, Activation::Identity, 9),
            (1, [1, 0, 1, 4], [6, 4], 2, Activation::Silu, 9),
            // Taps that meet nothing but padding.
            (5, [1, 2, 1, 1], [1, 1], 1, Activation::Relu, 9),
            (3, [1, 12, 12, 1], [4, 4], 1, Activation::Identity, 3),
            // More images than one matrix has, and few and large ones.
            (3, [1, 1, 1, 2], [12, 10], 3, Activation::Relu, 60),
            (3, [1, 1, 1, 1], [70, 70], 2, Activation::Relu, 3),
        ];
        for (
            kernel,
            [stride, padding, dilation, groups],
            [height, width],
            pool,
            activation,
            rows,
        ) in cases
        {
            let params = Params::with_dtype(1, &Device::Cpu, DType::F64);
            let bias = kernel != 2;
            let options = Conv2dOptions { stride, padding, dilation, groups, bias };
            let channels = if height == 70 { 30 } else { 4 };
            let layer = Conv2d::new(&params, channels, 8, kernel, options).expect("layer");
            let layer = layer.with_activation(activation).with_max_pool(pool);
            let init = Init::Normal { mean: 0.0, std: 1.0 };
            let x = params.get((rows, channels, height, width), "x", init).expect("input");
            let theirs = layer.composed(&x, Precision::F32).expect("composed");
            assert_agree(&params, layer.forward(&x, &Pass::eval()).expect("kernel"), theirs);
        }
    }

    #[test]
    fn along_one_axis_too() {
        for (kernel, [stride, padding, dilation, groups], length, rows) in
            [(3, [1, 1, 1, 1], 5, 2), (4, [3, 2, 2, 4], 11, 3), (1, [2, 0, 1, 2], 6, 60)]
        {
            let params = Params::with_dtype(1, &Device::Cpu, DType::F64);
            let options = Conv1dOptions { stride, padding, dilation, groups, bias: kernel > 1 };
            let layer = Conv2d::with_kernel(&params, 4, 8, &[kernel], options).expect("layer");
            let init = Init::Normal { mean: 0.0, std: 1.0 };
            let x = params.get((rows, 4, 1, length), "x", init).expect("input");
            let theirs = layer.composed(&x, Precision::F32).expect("composed");
            assert_agree(&params, layer.kernel(&x, Precision::F32).expect("kernel"), theirs);
        }
    }

    /// With fewer multiplications: 3×3 windows of many channels.
    #[test]
    fn tiles_agree_with_candles_operations() {
        let cases = [
            // Padding, groups; channels, outputs; height, width; rows; pooling.
            ([1, 1], [16, 32], [8, 8], 4, 1),
            ([0, 1], [16, 16], [9, 12], 5, 1),
            ([2, 1], [32, 16], [5, 3], 11, 1),
            ([1, 2], [32, 32], [6, 7], 9, 3),
            // Parts of two images; a run of rows that ends inside an image.
            ([1, 1], [16, 16], [40, 70], 33, 2),
        ];
        let sized = cases.into_iter().flat_map(|case| [(case, DType::F64), (case, DType::F32)]);
        for (([padding, groups], [channels, outputs], [height, width], rows, pool), dtype) in sized
        {
            let params = Params::with_dtype(1, &Device::Cpu, dtype);
            let options = Conv2dOptions { padding, groups, ..Conv2dOptions::default() };
            let layer = Conv2d::new(&params, channels, outputs, 3, options).expect("layer");
            // Rounding must not take one pixel for the largest here and another there.
            let pool = if dtype == DType::F64 { pool } else { 1 };
            let layer = layer.with_activation(Activation::Tanh).with_max_pool(pool);
            let init = Init::Normal { mean: 0.0, std: 1.0 };
            let x = params.get((rows, channels, height, width), "x", init).expect("input");
            let method = layer.method(height, width, rows);
            assert!(matches!(method, Method::Tiles(_)));
            assert_eq!(method.plan(rows).threads == Threads::One, rows == 33);
            let theirs = layer.composed(&x, Precision::F32).expect("composed");
            assert_agree(&params, layer.forward(&x, &Pass::eval()).expect("kernel"), theirs);
            // Without a gradient of the images.
            let (x, theirs) =
                (x.detach(), layer.composed(&x.detach(), Precision::F32).expect("composed"));
            let ours = layer.forward(&x, &Pass::eval()).expect("kernel");
            let of_weight = |y: Tensor| y.sqr()?.sum_all()?.backward();
            let [ours, theirs] = [ours, theirs].map(|y| of_weight(y).expect("backward"));
            let weight = ours.get(&layer.weight).expect("ours");
            assert_close(weight, theirs.get(&layer.weight).expect("theirs"));
        }
    }

    /// Where each part has images of its own.
    #[test]
    fn parts_agree_with_candles_operations() {
        let params = Params::with_dtype(1, &Device::Cpu, DType::F64);
        let options = Conv2dOptions { padding: 1, ..Conv2dOptions::default() };
        let layer = Conv2d::new(&params, 4, 8, 3, options).expect("layer").with_max_pool(2);
        let init = Init::Normal { mean: 0.0, std: 1.0 };
        let x = params.get((67, 4, 40, 40), "x", init).expect("input");
        let method = layer.method(40, 40, 67);
        assert!(matches!(method, Method::Columns(_)));
        assert_eq!(method.plan(67).threads, Threads::One);
        let theirs = layer.composed(&x, Precision::F32).expect("composed");
        assert_agree(&params, layer.forward(&x, &Pass::eval()).expect("kernel"), theirs);
    }

    impl Conv2d {
        fn method(&self, height: usize, width: usize, rows: usize) -> Method {
            Method::new(&self.geometry(height, width).expect("geometry"), rows)
        }
    }

    /// In values, and in the gradients of all parameters.
    pub(super) fn assert_agree(params: &Params, ours: Tensor, theirs: Tensor) {
        assert_close(&ours, &theirs);
        let weights = theirs.detach();
        let gradients = |y: Tensor| (y * &weights).and_then(|y| y.backward()).expect("backward");
        let (ours, theirs) = (gradients(ours), gradients(theirs));
        for (_, var) in params.vars() {
            assert_close(ours.get(&var).expect("ours"), theirs.get(&var).expect("theirs"));
        }
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        assert_eq!(a.dims(), b.dims());
        let greatest = |t: &Tensor| t.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>();
        let difference = (a - b).and_then(|d| greatest(&d)).expect("difference");
        let rounding = if a.dtype() == DType::F64 { 1e-12 } else { 1e-5 };
        let allowed = rounding * greatest(b).expect("greatest").max(100.0);
        assert!(difference < allowed, "{difference:e}, {allowed:e} allowed");
    }
}
