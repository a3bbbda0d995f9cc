//! The tensors that queries, keys and values are columns of.

use super::kernel::Attention;
use crate::cpu::with_values;
use crate::kernels::{Mat, Real, output};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Where the heads of queries, keys or values are: the column of the first in rows of `stride`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    pub(super) first: usize,
    pub(super) stride: usize,
}

/// Tensors of which queries, keys and values are columns: one of all, or one each.
pub(super) struct Inputs<'a> {
    pub(super) tensors: Vec<&'a Tensor>,
    /// Of each of the three, which tensor, and where in it.
    pub(super) at: [(usize, Columns); 3],
}

/// One of queries, keys and values.
#[derive(Clone, Copy)]
pub(super) struct Part<'a, T> {
    pub(super) values: &'a [T],
    pub(super) columns: Columns,
    /// Places of a row of the batch.
    pub(super) places: usize,
    pub(super) size: usize,
}

impl<'a, T: Real> Part<'a, T> {
    /// `[places, size]` of one head.
    pub(super) fn head(&self, row: usize, head: usize, places: Range<usize>) -> Mat<'a, T> {
        let Columns { first, stride } = self.columns;
        let start = (row * self.places + places.start) * stride + first + head * self.size;
        let rows = places.len();
        let reach = if rows == 0 { 0 } else { (rows - 1) * stride + self.size };
        Mat::strided(&self.values[start..start + reach], rows, self.size, stride)
    }
}

pub(super) struct Parts<'a, T> {
    pub(super) q: Part<'a, T>,
    pub(super) k: Part<'a, T>,
    pub(super) v: Part<'a, T>,
}

impl Attention {
    /// Gradients by heads in the places of their tensors.
    pub(super) fn in_place<T: Real>(
        &self,
        heads: &[Vec<T>; 3],
        tensors: &[&Tensor],
        at: &[(usize, Columns); 3],
    ) -> Vec<Vec<T>> {
        let sizes =
            [(self.heads, self.queries), (self.kv_heads, self.keys), (self.kv_heads, self.keys)];
        let mut gradients = Vec::new();
        for (index, tensor) in tensors.iter().enumerate() {
            // Every column belongs to one of the three.
            gradients.push(output(tensor.elem_count(), |to: &mut [T]| {
                for ((heads, (count, places)), (of, columns)) in heads.iter().zip(sizes).zip(at) {
                    if *of == index {
                        self.by_place(heads, count, places, *columns, to);
                    }
                }
            }));
        }
        gradients
    }

    fn by_place<T: Real>(
        &self,
        from: &[T],
        heads: usize,
        places: usize,
        Columns { first, stride }: Columns,
        to: &mut [T],
    ) {
        to.par_chunks_mut(stride).enumerate().with_min_len(16).for_each(|(at, to)| {
            let (row, place) = (at / places, at % places);
            let to = &mut to[first..first + heads * self.size];
            for (head, to) in to.chunks_exact_mut(self.size).enumerate() {
                let start = ((row * heads + head) * places + place) * self.size;
                to.copy_from_slice(&from[start..start + self.size]);
            }
        });
    }
}

/// [`with_values`] of up to three tensors.
pub(super) fn with_all<T: Real, R>(
    tensors: &[&Tensor],
    f: impl FnOnce(&[&[T]]) -> Result<R>,
) -> Result<R> {
    match tensors {
        [a] => with_values([*a], |values| f(&values)),
        [a, b] => with_values([*a, *b], |values| f(&values)),
        [a, b, c] => with_values([*a, *b, *c], |values| f(&values)),
        _ => Err(candle_core::Error::Msg("attention of one to three tensors".into()).bt()),
    }
}
