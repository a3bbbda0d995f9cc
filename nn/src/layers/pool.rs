//! Max-pooling.
//!
//! Own kernels: candle 0.11 divides the gradient by the window's area where a window has one
//! maximum, and is right only where all of a window is equal.

use crate::cpu::{TASK_ELEMENTS, elements};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

const OP: &str = "max-pool2d";

/// The largest value of each `kernel`×`kernel` window, windows side by side:
/// `[rows, channels, h, w]` to `[rows, channels, h / kernel, w / kernel]`, rounded down.
///
/// The gradient goes to the first maximum of a window in reading order, as in PyTorch; a NaN
/// counts as the maximum.
pub fn max_pool2d(x: &Tensor, kernel: usize) -> Result<Tensor> {
    let fits = |size: usize| kernel > 0 && size >= kernel;
    match *x.dims() {
        [_, _, h, w] if fits(h) && fits(w) => Ok(x.contiguous()?.apply_op1(MaxPool { kernel })?),
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

struct MaxPoolGrad(MaxPool);

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
    fn windows<T: WithDType>(&self, kernel: usize, plane: &[T], mut visit: impl FnMut(T, usize)) {
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
    fn each_max<T: WithDType>(&self, plane: &[T], visit: impl FnMut(T, usize)) {
        match self.kernel {
            2 => self.windows(2, plane, visit),
            kernel => self.windows(kernel, plane, visit),
        }
    }

    fn forward<T: WithDType>(&self, x: &[T]) -> Vec<T> {
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

    fn backward<T: WithDType>(&self, x: &[T], grad: &[T]) -> Vec<T> {
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

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let planes = self.planes(layout)?;
        let out = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(planes.forward(elements(x, layout, OP)?)),
            CpuStorage::F64(x) => CpuStorage::F64(planes.forward(elements(x, layout, OP)?)),
            other => return Err(unsupported(other)),
        };
        Ok((out, planes.shape.as_slice().into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        x.apply_op2_no_bwd(&grad, &MaxPoolGrad(*self)).map(Some)
    }
}

impl CustomOp2 for MaxPoolGrad {
    fn name(&self) -> &'static str {
        "max-pool2d-grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let planes = self.0.planes(x_layout)?;
        let out = match (x, grad) {
            (CpuStorage::F32(x), CpuStorage::F32(grad)) => CpuStorage::F32(
                planes.backward(elements(x, x_layout, OP)?, elements(grad, grad_layout, OP)?),
            ),
            (CpuStorage::F64(x), CpuStorage::F64(grad)) => CpuStorage::F64(
                planes.backward(elements(x, x_layout, OP)?, elements(grad, grad_layout, OP)?),
            ),
            (other, _) => return Err(unsupported(other)),
        };
        Ok((out, x_layout.shape().clone()))
    }
}

fn unsupported(storage: &CpuStorage) -> candle_core::Error {
    use candle_core::backend::BackendStorage;
    let dtype: DType = storage.dtype();
    candle_core::Error::UnsupportedDTypeForOp(dtype, OP).bt()
}
