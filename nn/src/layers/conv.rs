//! Convolution over images.

use super::conv_op::Convolution;
use crate::{Error, Init, Module, Params, Pass, Result};
use candle_core::Tensor;

/// How a convolution's window moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dOptions {
    /// Pixels from one window to the next, on both axes; at least 1.
    pub stride: usize,
    /// Zeros added on each side of the image.
    pub padding: usize,
}

impl Default for Conv2dOptions {
    fn default() -> Self {
        Self { stride: 1, padding: 0 }
    }
}

/// Cross-correlation of images `[rows, inputs, height, width]` with square kernels.
///
/// Parameters `weight [outputs, inputs, kernel, kernel]` and `bias [outputs]`, initialised as
/// PyTorch does. Each output axis has `(size + 2·padding − kernel) / stride + 1` pixels, rounded
/// down.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    options: Conv2dOptions,
    name: String,
}

impl Conv2d {
    /// Creates the parameters in `params`. Errors when the kernel or the stride is 0.
    pub fn new(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        options: Conv2dOptions,
    ) -> Result<Self> {
        for (option, value) in [("kernel", kernel), ("stride", options.stride)] {
            if value == 0 {
                return Err(Error::option(option, value, "at least 1"));
            }
        }
        let (shape, fan_in) = ((outputs, inputs, kernel, kernel), inputs * kernel * kernel);
        Ok(Self {
            weight: params.get(shape, "weight", Init::default_weight())?,
            bias: params.get(outputs, "bias", Init::default_bias(fan_in))?,
            options,
            name: params.path().to_owned(),
        })
    }

    /// In candle's own operations, for devices that this crate has no kernel for.
    ///
    /// Candle's backward pass assumes that both axes leave the same remainder after the last
    /// window (it fails for 5×6 pixels, kernel 3, stride 2), so the remainders are cut off first.
    fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let Conv2dOptions { stride, padding } = self.options;
        let mut x = x.clone();
        for axis in [2, 3] {
            let kernel = self.weight.dim(axis)?;
            x = x.pad_with_zeros(axis, padding, padding)?;
            let covered = (x.dim(axis)? - kernel) / stride * stride + kernel;
            x = x.narrow(axis, 0, covered)?;
        }
        let y = x.contiguous()?.conv2d(&self.weight, 0, stride, 1, 1)?;
        Ok(y.broadcast_add(&self.bias.reshape((1, (), 1, 1))?)?)
    }

    fn check(&self, dims: &[usize]) -> Result<()> {
        let (_, inputs, kernel, _) = self.weight.dims4()?;
        let least = kernel.saturating_sub(2 * self.options.padding).max(1);
        match *dims {
            [_, channels, h, w] if channels == inputs && h.min(w) >= least => Ok(()),
            _ => {
                let what = format!("the input of convolution {:?}", self.name);
                let expected = format!("[rows, {inputs}, height ≥ {least}, width ≥ {least}]");
                Err(Error::shape(what, expected, dims))
            }
        }
    }
}

impl Module for Conv2d {
    fn forward(&self, x: &Tensor, _pass: &Pass) -> Result<Tensor> {
        self.check(x.dims())?;
        if !x.device().is_cpu() {
            return self.composed(x);
        }
        let Conv2dOptions { stride, padding } = self.options;
        let op = Convolution { stride, padding };
        Ok(x.contiguous()?.apply_op3(&self.weight, &self.bias, op)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    /// Two implementations, one answer: for outputs and for every gradient.
    #[test]
    fn the_kernel_agrees_with_candles_operations() {
        let cases =
            [(3, 1, 1, 5, 6), (3, 1, 0, 5, 6), (2, 2, 0, 6, 7), (3, 2, 1, 5, 6), (5, 3, 4, 3, 2)];
        for (kernel, stride, padding, height, width) in cases {
            let params = Params::with_dtype(1, &Device::Cpu, DType::F64);
            let options = Conv2dOptions { stride, padding };
            let layer = Conv2d::new(&params, 3, 4, kernel, options).expect("layer");
            let x = params.get((9, 3, height, width), "x", Init::Normal { mean: 0.0, std: 1.0 });
            let x = x.expect("input");
            let ours = layer.forward(&x, &Pass::eval()).expect("kernel");
            let theirs = layer.composed(&x).expect("composed");
            assert_close(&ours, &theirs);
            let weights = theirs.detach();
            let gradients =
                |y: Tensor| (y * &weights).and_then(|y| y.backward()).expect("backward");
            let (ours, theirs) = (gradients(ours), gradients(theirs));
            for (_, var) in params.vars() {
                assert_close(ours.get(&var).expect("ours"), theirs.get(&var).expect("theirs"));
            }
        }
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        assert_eq!(a.dims(), b.dims());
        let greatest = (a - b).and_then(|d| d.abs()?.max_all()?.to_scalar::<f64>());
        assert!(greatest.expect("difference") < 1e-10);
    }
}
