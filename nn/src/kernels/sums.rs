//! Sums whose order depends on the shape alone.

use super::{Real, output, vectorized};
use crate::cpu::TASK_ELEMENTS;
use rayon::prelude::*;

/// Rows that are summed one after the other; the sums of such blocks are then added in order.
const BLOCK: usize = 64;

/// The sum of each column of a matrix with rows as long as `sums`.
pub(crate) fn column_sums<T: Real>(matrix: &[T], sums: &mut [T], is_added: bool) {
    let width = sums.len();
    if !is_added {
        sums.fill(T::zero());
    }
    if matrix.is_empty() {
        return;
    }
    let blocks = matrix.len().div_ceil(BLOCK * width);
    let partial = output(blocks * width, |partial: &mut [T]| {
        let blocks = partial.par_chunks_mut(width).zip(matrix.par_chunks(BLOCK * width));
        blocks.for_each(|(sums, rows)| {
            sums.fill(T::zero());
            add_rows(rows, sums);
        });
    });
    add_rows(&partial, sums);
}

fn add_rows<T: Real>(rows: &[T], sums: &mut [T]) {
    vectorized(
        #[inline(always)]
        || {
            for row in rows.chunks_exact(sums.len()) {
                sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += *value);
            }
        },
    );
}

/// `to += from`. Panics unless they are of one length.
pub(crate) fn add_assign<T: Real>(to: &mut [T], from: &[T]) {
    assert_eq!(to.len(), from.len(), "a sum of gradients");
    let tasks = to.par_chunks_mut(TASK_ELEMENTS).zip(from.par_chunks(TASK_ELEMENTS));
    tasks.for_each(|(to, from)| {
        vectorized(
            #[inline(always)]
            || to.iter_mut().zip(from).for_each(|(to, from)| *to += *from),
        )
    });
}

/// A sum in sixteen lanes, which are vector additions, and are then added pair by pair.
#[inline(always)]
pub(crate) fn lane_sum<T: Real>(values: &[T]) -> T {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [T::zero(); 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane += *value);
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, value)| *lane += *value);
    fold_lanes(lanes)
}

#[inline(always)]
fn fold_lanes<T: Real>(mut lanes: [T; 16]) -> T {
    for width in [8, 4, 2, 1] {
        for at in 0..width {
            lanes[at] += lanes[at + width];
        }
    }
    lanes[0]
}

/// The largest; −∞ of nothing. Not that of NaNs.
#[inline(always)]
pub(crate) fn lane_max<T: Real>(values: &[T]) -> T {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [T::from_f64(f64::NEG_INFINITY); 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane = value.larger(*lane));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, value)| *lane = value.larger(*lane));
    lanes.into_iter().fold(T::from_f64(f64::NEG_INFINITY), |max, lane| lane.larger(max))
}

/// Sets a sum, or adds to it, as [`parameter_gradient`](crate::backward::parameter_gradient) asks.
pub(crate) fn put<T: Real>(from: &[T], to: &mut [T], is_added: bool) {
    match is_added {
        true => add_assign(to, from),
        false => to.copy_from_slice(from),
    }
}
