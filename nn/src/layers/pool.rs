//! Max-pooling.
//!
//! Own kernels: candle 0.11 divides the gradient by the window's area where a window has one
//! maximum, and is right only where all of a window is equal.

use crate::cpu::{TASK_ELEMENTS, unsupported, with_values};
use crate::kernels::Real;
use crate::link::{Source, result};
use crate::{Error, Result};
use candle_core::{DType, Layout, Tensor};
use rayon::prelude::*;

/// The largest value of each `kernel`×`kernel` window, windows side by side:
/// `[rows, channels, h, w]` to `[rows, channels, h / kernel, w / kernel]`, rounded down.
///
/// The gradient goes to the first maximum of a window in reading order, as in PyTorch; a NaN
/// counts as the maximum.
pub fn max_pool2d(x: &Tensor, kernel: usize) -> Result<Tensor> {
    let fits = |size: usize| kernel > 0 && size >= kernel;
    match *x.dims() {
        [_, _, h, w] if fits(h) && fits(w) => {
            let (x, pool) = (&x.contiguous()?, MaxPool { kernel });
            Ok(match x.dtype() {
                DType::F32 => pool.apply::<f32>(x)?,
                DType::F64 => pool.apply::<f64>(x)?,
                other => return Err(unsupported(other, "max-pool2d").into()),
            })
        }
        _ => {
            let expected =
                format!("[rows, channels, height, width] with a {kernel}×{kernel} window in it");
            Err(Error::shape("the input of max_pool2d", expected, x.dims()))
        }
    }
}

#[derive(Clone, Copy)]
struct MaxPool {
    kernel: usize,
}

/// The sizes of one pooling: of a plane going in, and of one coming out.
#[derive(Clone, Copy)]
struct Planes {
    kernel: usize,
    width: usize,
    area: usize,
    out_width: usize,
    out_area: usize,
    shape: [usize; 4],
}

impl MaxPool {
    fn planes(self, layout: &Layout) -> candle_core::Result<Planes> {
        let (n, c, h, w) = layout.shape().dims4()?;
        let (out_h, out_w) = (h / self.kernel, w / self.kernel);
        Ok(Planes {
            kernel: self.kernel,
            width: w,
            area: h * w,
            out_width: out_w,
            out_area: out_h * out_w,
            shape: [n, c, out_h, out_w],
        })
    }
}

impl Planes {
    /// Calls `visit` for each window in order with its first maximum and that one's place in
    /// `plane`. Selects instead of branching: which of four pixels is largest is not predictable.
    #[inline(always)]
    fn windows<T: Real>(&self, kernel: usize, plane: &[T], mut visit: impl FnMut(T, usize)) {
        for first in (0..self.out_area / self.out_width).map(|row| row * kernel * self.width) {
            for corner in (0..self.out_width).map(|column| first + column * kernel) {
                let (mut max, mut best) = (plane[corner], corner);
                for y in 0..kernel {
                    for x in 0..kernel {
                        let at = corner + y * self.width + x;
                        let value = plane[at];
                        #[expect(clippy::eq_op, reason = "true for a NaN alone")]
                        let larger = (value > max) | (value != value);
                        (max, best) = if larger { (value, at) } else { (max, best) };
                    }
                }
                visit(max, best);
            }
        }
    }

    /// The same; the usual kernel gets code of its own.
    #[inline(always)]
    fn each_max<T: Real>(&self, plane: &[T], visit: impl FnMut(T, usize)) {
        match self.kernel {
            2 => self.windows(2, plane, visit),
            kernel => self.windows(kernel, plane, visit),
        }
    }

    fn forward<T: Real>(&self, x: &[T]) -> Vec<T> {
        let mut out = vec![T::zero(); x.len() / self.area * self.out_area];
        let planes = out.par_chunks_mut(self.out_area).zip(x.par_chunks(self.area));
        planes.with_min_len(self.planes_per_task()).for_each(|(out, plane)| {
            let mut out = out.iter_mut();
            self.each_max(plane, |max, _| {
                if let Some(out) = out.next() {
                    *out = max;
                }
            });
        });
        out
    }

    fn backward<T: Real>(&self, x: &[T], grad: &[T]) -> Vec<T> {
        let mut out = vec![T::zero(); x.len()];
        let planes = out.par_chunks_mut(self.area).zip(x.par_chunks(self.area));
        let planes = planes.zip(grad.par_chunks(self.out_area));
        planes.with_min_len(self.planes_per_task()).for_each(|((out, plane), grad)| {
            // Windows do not overlap, so each input is written at most once.
            let mut grad = grad.iter();
            self.each_max(plane, |_, best| {
                if let Some(grad) = grad.next() {
                    out[best] = *grad;
                }
            });
        });
        out
    }

    fn planes_per_task(&self) -> usize {
        (TASK_ELEMENTS / self.area).max(1)
    }
}

impl MaxPool {
    fn apply<T: Real>(self, x: &Tensor) -> candle_core::Result<Tensor> {
        let planes = self.planes(x.layout())?;
        let y = with_values([x], |[x]| Ok(planes.forward::<T>(x)))?;
        let (source, x) = (Source::of(x), x.detach());
        let to = source.clone();
        result(y, planes.shape.as_slice(), &[&source], move |gradient| {
            let gradient = T::cpu_storage_as_slice(&gradient)?;
            let gradient = with_values([&x], |[x]| Ok(planes.backward(x, gradient)))?;
            Ok(vec![to.give(gradient)?])
        })
    }
}
