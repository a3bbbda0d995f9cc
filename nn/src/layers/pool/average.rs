//! Average-pooling.

use super::max::planes_per_task;
use super::windows::{Spans, Windows};
use crate::cpu::with_values;
use crate::kernels::{Real, lane_sum, output, vectorized};
use crate::link::{Source, result};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Of contiguous planes on the CPU.
pub(super) fn avg_pool<T: Real>(x: &Tensor, windows: Windows, shape: Vec<usize>) -> Result<Tensor> {
    let (area, out_area) = (windows.area(), windows.out_area());
    let y = with_values([x], |[x]| {
        Ok(output(shape.iter().product(), |y: &mut [T]| {
            let planes = y.par_chunks_mut(out_area).zip(x.par_chunks(area));
            planes.with_min_len(planes_per_task(area)).for_each(|(y, plane)| {
                vectorized(
                    #[inline(always)]
                    || averages(&windows, plane, y),
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
            let planes = dx.par_chunks_mut(area).zip(gradient.par_chunks(out_area));
            planes.with_min_len(planes_per_task(area)).for_each(|(dx, gradient)| {
                vectorized(
                    #[inline(always)]
                    || spread(&windows, gradient, dx),
                )
            });
        });
        Ok(vec![to.give(dx)?])
    })
}

#[inline(always)]
fn averages<T: Real>(windows: &Windows, plane: &[T], y: &mut [T]) {
    let mut y = y.iter_mut();
    windows.each(|window| {
        let count = T::from_f64(window.count as f64);
        let mut sum = T::zero();
        window.rows().for_each(|row| sum += row_sum(&plane[row]));
        if let Some(y) = y.next() {
            *y = sum / count;
        }
    });
}

/// Lanes pay for rows that fill them.
#[inline(always)]
fn row_sum<T: Real>(row: &[T]) -> T {
    if row.len() >= 16 {
        return lane_sum(row);
    }
    let mut sum = T::zero();
    row.iter().for_each(|x| sum += *x);
    sum
}

#[inline(always)]
fn spread<T: Real>(windows: &Windows, gradient: &[T], dx: &mut [T]) {
    dx.fill(T::zero());
    let mut gradient = gradient.iter();
    windows.each(|window| {
        let count = T::from_f64(window.count as f64);
        let share = gradient.next().map_or(T::zero(), |gradient| *gradient / count);
        window.rows().for_each(|row| dx[row].iter_mut().for_each(|dx| *dx += share));
    });
}

/// In candle's own operations, for devices that this crate has no kernel for: a matrix for each
/// axis.
pub(super) fn composed(x: &Tensor, windows: &Windows, shape: Vec<usize>) -> Result<Tensor> {
    let x = x.reshape(((), windows.height.size, windows.width.size))?;
    let [rows, columns] = [matrix(&windows.height, &x)?, matrix(&windows.width, &x)?];
    rows.broadcast_matmul(&x)?.broadcast_matmul(&columns.t()?)?.reshape(shape)
}

/// `[out, size]`: the share of each pixel in each average.
fn matrix(axis: &Spans, like: &Tensor) -> Result<Tensor> {
    let mut shares = vec![0.0; axis.out() * axis.size];
    let rows = shares.chunks_mut(axis.size).zip(axis.spans.iter().zip(&axis.counts));
    rows.for_each(|(row, (span, count))| row[span.clone()].fill(1.0 / *count as f64));
    Tensor::from_vec(shares, (axis.out(), axis.size), like.device())?.to_dtype(like.dtype())
}
