//! Max-pooling.
//!
//! Own kernels: candle 0.11 divides the gradient by the window's area where a window has one
//! maximum, and is right only where all of a window is equal.

use super::windows::{Spans, Windows};
use crate::cpu::{TASK_ELEMENTS, with_values};
use crate::kernels::{Real, output, vectorized};
use crate::layers::conv::pooling::Pooling;
use crate::link::{Source, result};
use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

/// Of contiguous planes on the CPU, each less than 2³² pixels.
pub(super) fn max_pool<T: Real>(
    x: &Tensor,
    windows: &Windows,
    shape: Vec<usize>,
) -> Result<Tensor> {
    let (area, out_area) = (windows.area(), windows.out_area());
    let mut best = vec![0u32; shape.iter().product()];
    let y = with_values([x], |[x]| {
        Ok(output(best.len(), |y: &mut [T]| {
            let planes = y.par_chunks_mut(out_area).zip(best.par_chunks_mut(out_area));
            let planes = planes.zip(x.par_chunks(area)).with_min_len(planes_per_task(area));
            planes.for_each(|((y, best), plane)| largest(windows, plane, y, best));
        }))
    })?;
    let source = Source::of(x);
    let to = source.clone();
    let elements = x.elem_count();
    result(y, shape, &[&source], move |gradient| {
        let gradient = T::cpu_storage_as_slice(&gradient)?;
        let mut dx = vec![T::zero(); elements];
        let planes = gradient.par_chunks(out_area).zip(best.par_chunks(out_area));
        let planes = dx.par_chunks_mut(area).zip(planes).with_min_len(planes_per_task(area));
        planes.for_each(|(dx, (gradient, best))| {
            // Windows may overlap.
            gradient.iter().zip(best).for_each(|(gradient, best)| dx[*best as usize] += *gradient);
        });
        Ok(vec![to.give(dx)?])
    })
}

/// The first maximum of each window in reading order, and its place in the plane; a NaN counts as
/// the maximum.
fn largest<T: Real>(windows: &Windows, plane: &[T], y: &mut [T], best: &mut [u32]) {
    let mut out = y.iter_mut().zip(best);
    windows.each(|window| {
        let first = window.first();
        let mut max = (plane[first], first as u32);
        for row in window.rows() {
            for (at, &value) in (row.start as u32..).zip(&plane[row]) {
                // Selects instead of branching: which pixel is largest is not predictable.
                #[expect(clippy::eq_op, reason = "true for a NaN alone")]
                let is_larger = (value > max.0) | (value != value);
                max.0 = if is_larger { value } else { max.0 };
                max.1 = if is_larger { at } else { max.1 };
            }
        }
        if let Some((y, best)) = out.next() {
            (*y, *best) = max;
        }
    });
}

/// The same for windows side by side, which is vector code.
pub(super) fn max_pool_side_by_side<T: Real>(
    x: &Tensor,
    pooling: Pooling,
    shape: Vec<usize>,
) -> Result<Tensor> {
    let (area, out_area) = (pooling.height * pooling.width, pooling.area());
    let mut best = vec![0u8; shape.iter().product()];
    let y = with_values([x], |[x]| {
        Ok(output(best.len(), |y: &mut [T]| {
            let planes = y.par_chunks_mut(out_area).zip(best.par_chunks_mut(out_area));
            let planes = planes.zip(x.par_chunks(area)).with_min_len(planes_per_task(area));
            planes.for_each(|((y, best), plane)| {
                vectorized(
                    #[inline(always)]
                    || pooling.pool(plane, y, best),
                )
            });
        }))
    })?;
    let source = Source::of(x);
    let to = source.clone();
    let elements = x.elem_count();
    result(y, shape, &[&source], move |gradient| {
        let gradient = T::cpu_storage_as_slice(&gradient)?;
        let dx = output(elements, |dx: &mut [T]| {
            let planes = gradient.par_chunks(out_area).zip(best.par_chunks(out_area));
            let planes = dx.par_chunks_mut(area).zip(planes).with_min_len(planes_per_task(area));
            planes.for_each(|(dx, (gradient, best))| {
                vectorized(
                    #[inline(always)]
                    || pooling.unpool(gradient, best, dx),
                )
            });
        });
        Ok(vec![to.give(dx)?])
    })
}

pub(super) fn planes_per_task(area: usize) -> usize {
    (TASK_ELEMENTS / area).max(1)
}

/// In candle's own operations, for devices that this crate has no kernel for: gathers the windows.
pub(super) fn composed(x: &Tensor, windows: &Windows, shape: Vec<usize>) -> Result<Tensor> {
    let x = x.reshape(((), windows.height.size, windows.width.size))?;
    let mut taps = Vec::new();
    for rows in indices(&windows.height, &x)? {
        let rows = x.index_select(&rows, 1)?;
        for columns in indices(&windows.width, &x)? {
            taps.push(rows.index_select(&columns, 2)?);
        }
    }
    let windows = Tensor::stack(&taps, D::Minus1)?;
    let best = nan_as_largest(&windows.detach())?.argmax_keepdim(D::Minus1)?;
    windows.gather(&best, D::Minus1)?.reshape(shape)
}

/// Candle's comparisons would pass over a NaN.
fn nan_as_largest(x: &Tensor) -> Result<Tensor> {
    x.ne(x)?.where_cond(&(x.zeros_like()? + f64::INFINITY)?, x)
}

/// For each tap its pixel in every window. The last pixel of a short window comes twice, which
/// changes neither its maximum nor which one is first.
fn indices(axis: &Spans, x: &Tensor) -> Result<Vec<Tensor>> {
    let taps = axis.spans.iter().map(|span| span.len()).max().unwrap_or(0);
    let pixels =
        |tap: usize| axis.spans.iter().map(move |span| (span.start + tap).min(span.end - 1) as u32);
    (0..taps).map(|tap| Tensor::from_iter(pixels(tap), x.device())).collect()
}
