//! Pooling: a number for each window of an image.

mod average;
mod max;
mod windows;

use super::conv::pooling::{LARGEST, Pooling};
use crate::cpu::unsupported;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use windows::{Spans, Windows};

/// How the windows of a pooling lie, on all axes alike. [`PoolOptions::new`], or a number where
/// options are taken, gives windows side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    /// Side of a window in pixels; at least 1.
    pub kernel: usize,
    /// Pixels from one window to the next; at least 1. Default `kernel`.
    pub stride: usize,
    /// Pixels by which windows may stand out on each side, half of `kernel` at most. They are no
    /// maximum, and zeros for an average. Default 0.
    pub padding: usize,
    /// Whether an average counts the pixels outside; no effect on maxima. Default true.
    pub count_include_pad: bool,
}

impl PoolOptions {
    /// Windows of `kernel` pixels, side by side.
    pub fn new(kernel: usize) -> Self {
        Self { kernel, stride: kernel, padding: 0, count_include_pad: true }
    }

    fn check(self) -> Result<Self> {
        for (option, value) in [("kernel", self.kernel), ("stride", self.stride)] {
            if value == 0 {
                return Err(Error::option(option, value, "at least 1"));
            }
        }
        if self.padding > self.kernel / 2 {
            let expected = format!("half of the kernel, {}, at most", self.kernel / 2);
            return Err(Error::option("padding", self.padding, expected));
        }
        Ok(self)
    }

    fn is_side_by_side(&self) -> bool {
        self.stride == self.kernel && self.padding == 0 && (2..=LARGEST).contains(&self.kernel)
    }
}

impl From<usize> for PoolOptions {
    fn from(kernel: usize) -> Self {
        Self::new(kernel)
    }
}

/// The largest value of each window: `[rows, channels, height, width]` to
/// `[rows, channels, out, out]` with `out = (size + 2·padding − kernel) / stride + 1` of each axis,
/// rounded down. `options` may be the kernel alone.
///
/// The gradient goes to the first maximum of a window in reading order, as in PyTorch; a NaN
/// counts as the maximum. Errors when no window fits.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::layers::{PoolOptions, max_pool2d};
///
/// let x = Tensor::arange(0f32, 25.0, &Device::Cpu)?.reshape((1, 1, 5, 5))?;
/// assert_eq!(max_pool2d(&x, 2)?.dims(), [1, 1, 2, 2]);
/// let overlapping = PoolOptions { stride: 2, padding: 1, ..PoolOptions::new(3) };
/// assert_eq!(max_pool2d(&x, overlapping)?.dims(), [1, 1, 3, 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn max_pool2d(x: &Tensor, options: impl Into<PoolOptions>) -> Result<Tensor> {
    let options = options.into().check()?;
    max_pool(x, options, sliding2d("max_pool2d", x, options)?)
}

/// [`max_pool2d`] along one axis: `[rows, channels, length]` to `[rows, channels, out]`.
pub fn max_pool1d(x: &Tensor, options: impl Into<PoolOptions>) -> Result<Tensor> {
    let options = options.into().check()?;
    max_pool(x, options, sliding1d("max_pool1d", x, options)?)
}

/// The average of each window; shapes and errors as for [`max_pool2d`].
pub fn avg_pool2d(x: &Tensor, options: impl Into<PoolOptions>) -> Result<Tensor> {
    avg_pool(x, sliding2d("avg_pool2d", x, options.into().check()?)?)
}

/// [`avg_pool2d`] along one axis: `[rows, channels, length]` to `[rows, channels, out]`.
pub fn avg_pool1d(x: &Tensor, options: impl Into<PoolOptions>) -> Result<Tensor> {
    avg_pool(x, sliding1d("avg_pool1d", x, options.into().check()?)?)
}

/// The averages of `height`×`width` windows that share the image as evenly as whole pixels allow:
/// `[rows, channels, ..]` to `[rows, channels, height, width]`.
///
/// Window `i` of `n` on an axis reaches from `⌊i · size / n⌋` to `⌈(i + 1) · size / n⌉`, as in
/// PyTorch: windows overlap where the size is no multiple. Errors for a size of 0.
pub fn adaptive_avg_pool2d(x: &Tensor, [height, width]: [usize; 2]) -> Result<Tensor> {
    match *x.dims() {
        [rows, channels, h, w] if [h, w, height, width].iter().all(|size| *size > 0) => {
            let windows =
                Windows { height: Spans::adaptive(h, height), width: Spans::adaptive(w, width) };
            avg_pool(x, (windows, vec![rows, channels, height, width]))
        }
        _ => Err(no_windows("adaptive_avg_pool2d", "[rows, channels, height, width]", x)),
    }
}

/// [`adaptive_avg_pool2d`] along one axis: `[rows, channels, ..]` to `[rows, channels, length]`.
pub fn adaptive_avg_pool1d(x: &Tensor, length: usize) -> Result<Tensor> {
    match *x.dims() {
        [rows, channels, size] if size > 0 && length > 0 => {
            let windows = Windows { height: one(), width: Spans::adaptive(size, length) };
            avg_pool(x, (windows, vec![rows, channels, length]))
        }
        _ => Err(no_windows("adaptive_avg_pool1d", "[rows, channels, length]", x)),
    }
}

/// The average of each channel: `[rows, channels, ..]`, with one axis more or several, to
/// `[rows, channels]`. Errors when there is nothing to average.
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor> {
    match x.dims() {
        [rows, channels, rest @ ..] if !rest.is_empty() && !rest.contains(&0) => {
            let width = Spans::adaptive(rest.iter().product(), 1);
            avg_pool(x, (Windows { height: one(), width }, vec![*rows, *channels]))
        }
        _ => Err(no_windows("global_avg_pool", "[rows, channels, ..]", x)),
    }
}

fn no_windows(name: &str, expected: &str, x: &Tensor) -> Error {
    let expected = format!("{expected}, and all sizes but rows and channels at least 1");
    Error::shape(format!("the input of {name}"), expected, x.dims())
}

/// The other axis of images of one axis.
fn one() -> Spans {
    Spans::adaptive(1, 1)
}

/// Windows, and the shape of what is made of them.
type Plan = (Windows, Vec<usize>);

fn sliding2d(name: &str, x: &Tensor, options: PoolOptions) -> Result<Plan> {
    if let [rows, channels, h, w] = *x.dims() {
        let axes = [h, w].map(|size| Spans::sliding(size, options));
        if let [Some(height), Some(width)] = axes {
            let shape = vec![rows, channels, height.out(), width.out()];
            return Ok((Windows { height, width }, shape));
        }
    }
    let expected =
        format!("[rows, channels, height, width] with a {0}×{0} window in it", options.kernel);
    Err(Error::shape(format!("the input of {name}"), expected, x.dims()))
}

fn sliding1d(name: &str, x: &Tensor, options: PoolOptions) -> Result<Plan> {
    if let [rows, channels, size] = *x.dims()
        && let Some(width) = Spans::sliding(size, options)
    {
        let shape = vec![rows, channels, width.out()];
        return Ok((Windows { height: one(), width }, shape));
    }
    let expected = format!("[rows, channels, length] with a window of {} in it", options.kernel);
    Err(Error::shape(format!("the input of {name}"), expected, x.dims()))
}

fn max_pool(x: &Tensor, options: PoolOptions, (windows, shape): Plan) -> Result<Tensor> {
    if !crate::cpu::has_kernels(x) {
        return Ok(max::composed(x, &windows, shape)?);
    }
    if windows.area() > u32::MAX as usize {
        return Err(Error::shape(
            "the input of max-pooling",
            "planes of less than 2³² pixels",
            x.dims(),
        ));
    }
    let (x, height, width) = (&x.contiguous()?, windows.height.size, windows.width.size);
    let pooling = Pooling { kernel: options.kernel, height, width };
    let is_side_by_side = options.is_side_by_side() && shape.len() == 4;
    Ok(match (x.dtype(), is_side_by_side) {
        (DType::F32, true) => max::max_pool_side_by_side::<f32>(x, pooling, shape)?,
        (DType::F64, true) => max::max_pool_side_by_side::<f64>(x, pooling, shape)?,
        (DType::F32, false) => max::max_pool::<f32>(x, &windows, shape)?,
        (DType::F64, false) => max::max_pool::<f64>(x, &windows, shape)?,
        (other, _) => return Err(unsupported(other, "max-pooling").into()),
    })
}

fn avg_pool(x: &Tensor, (windows, shape): Plan) -> Result<Tensor> {
    if !crate::cpu::has_kernels(x) {
        return Ok(average::composed(x, &windows, shape)?);
    }
    let x = &x.contiguous()?;
    Ok(match x.dtype() {
        DType::F32 => average::avg_pool::<f32>(x, windows, shape)?,
        DType::F64 => average::avg_pool::<f64>(x, windows, shape)?,
        other => return Err(unsupported(other, "average-pooling").into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// Two implementations, one answer: for outputs and for gradients, with ties among the maxima.
    #[test]
    fn the_kernels_agree_with_candles_operations() {
        let options = [
            PoolOptions::new(1),
            PoolOptions::new(2),
            PoolOptions { stride: 2, padding: 1, ..PoolOptions::new(3) },
            PoolOptions { stride: 1, padding: 2, count_include_pad: false, ..PoolOptions::new(4) },
            PoolOptions { stride: 3, ..PoolOptions::new(2) },
        ];
        for [h, w] in [[7, 9], [4, 5], [5, 4]] {
            let values = (0..2 * 3 * h * w).map(|at| f64::from((at * at % 11) as u32)).collect();
            let x = Tensor::from_vec(values, (2, 3, h, w), &Device::Cpu).expect("tensor");
            let x = Var::from_tensor(&x).expect("var");
            for options in options {
                let (windows, shape) = sliding2d("test", &x, options).expect("windows");
                let theirs = max::composed(&x, &windows, shape.clone()).expect("composed");
                assert_same(&x, max_pool2d(&x, options).expect("kernel"), theirs);
                let general = max::max_pool::<f64>(&x, &windows, shape.clone()).expect("kernel");
                assert_same(&x, max_pool2d(&x, options).expect("kernel"), general);
                let theirs = average::composed(&x, &windows, shape).expect("composed");
                assert_same(&x, avg_pool2d(&x, options).expect("kernel"), theirs);
            }
            for [height, width] in [[1, 1], [3, 4], [h, w], [h + 2, 2]] {
                let [rows, columns] = [Spans::adaptive(h, height), Spans::adaptive(w, width)];
                let windows = Windows { height: rows, width: columns };
                let theirs =
                    average::composed(&x, &windows, vec![2, 3, height, width]).expect("composed");
                assert_same(&x, adaptive_avg_pool2d(&x, [height, width]).expect("kernel"), theirs);
            }
        }
    }

    fn assert_same(x: &Var, ours: Tensor, theirs: Tensor) {
        assert_close(&ours, &theirs);
        let weights = (0..ours.elem_count()).map(|at| at as f64 + 1.0).collect();
        let weights = Tensor::from_vec(weights, ours.dims(), &Device::Cpu).expect("weights");
        let gradient = |y: Tensor| {
            let gradients = (y * &weights).and_then(|y| y.backward()).expect("backward");
            gradients.get(x).expect("gradient").clone()
        };
        assert_close(&gradient(ours), &gradient(theirs));
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        assert_eq!(a.dims(), b.dims());
        let greatest = (a - b).and_then(|d| d.abs()?.max_all()?.to_scalar::<f64>());
        assert!(greatest.expect("difference") < 1e-9, "{a} {b}");
    }
}
