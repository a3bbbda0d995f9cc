//! Scaled dot-product attention as one operation.
//!
//! Some queries at a time: their scores with all keys, the softmax, the sum of the values. Memory
//! beyond the tensors is that of a few rows of scores, so it grows with the length and not with
//! its square. The backward pass computes the scores and the dropout again (Dao et al.:
//! *FlashAttention*, 2022, without its tiles of keys: here a row of scores is in the cache anyway).

use super::parts::{Columns, Inputs, Part, Parts, with_all};
use crate::Precision;
use crate::kernels::{
    Mat, Out, Real, Threads, gemm, gemm_add, lane_max, lane_sum, output, product, vectorized,
};
use crate::layers::dropout::Mask;
use crate::link::{Source, Told, result};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Queries of one task.
const BLOCK: usize = 64;

/// The sizes of an attention, and which keys a query sees.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    pub(super) rows: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    /// Of queries.
    pub(super) heads: usize,
    /// Of keys and values, a divisor of `heads`: each serves as many heads of queries as it goes
    /// into.
    pub(super) kv_heads: usize,
    /// Numbers of a head.
    pub(super) size: usize,
    /// A query sees the keys up to its own place, counted from the end of both.
    pub(super) is_causal: bool,
    /// How many keys each row has; the others are not seen.
    pub(super) lengths: Option<Arc<[usize]>>,
    /// `[queries, keys]`, added to the scores.
    pub(super) bias: Option<Arc<[f64]>>,
    /// What is dropped of the weights.
    pub(super) dropout: Option<Mask>,
    pub(super) precision: Precision,
}

impl Attention {
    /// `[rows, queries, heads · size]`.
    pub(super) fn apply<T: Real>(self, inputs: &Inputs<'_>) -> Result<Tensor> {
        let sources: Vec<Source> = inputs.tensors.iter().map(|x| Source::of(x)).collect();
        let shape = [self.rows, self.queries, self.heads * self.size];
        let y = with_all(&inputs.tensors, |values| {
            let parts = self.parts::<T>(values, &inputs.at);
            Ok(output(shape.iter().product(), |y| self.forward(&parts, y)))
        })?;
        let tensors: Vec<Tensor> = inputs.tensors.iter().map(|x| x.detach()).collect();
        let (at, to) = (inputs.at, sources.clone());
        let sources: Vec<&Source> = sources.iter().collect();
        result(y, shape.as_slice(), &sources, move |gradient| {
            let gradient = T::cpu_storage_as_slice(&gradient)?;
            let tensors: Vec<&Tensor> = tensors.iter().collect();
            let gradients = with_all(&tensors, |values| {
                let parts = self.parts::<T>(values, &at);
                let heads = self.backward(&parts, gradient);
                Ok(self.in_place(&heads, &tensors, &at))
            })?;
            to.iter()
                .zip(gradients)
                .map(|(to, gradient)| to.give(gradient))
                .collect::<Result<Vec<Told>>>()
        })
    }

    fn parts<'a, T>(&self, values: &[&'a [T]], at: &[(usize, Columns); 3]) -> Parts<'a, T> {
        let part = |index: usize, places| {
            let (tensor, columns) = at[index];
            Part { values: values[tensor], columns, places, size: self.size }
        };
        Parts { q: part(0, self.queries), k: part(1, self.keys), v: part(2, self.keys) }
    }

    fn forward<T: Real>(&self, parts: &Parts<'_, T>, y: &mut [T]) {
        let width = self.heads * self.size;
        let rows = y.par_chunks_mut((self.queries * width).max(1)).enumerate();
        rows.for_each(|(row, y)| {
            let blocks = y.par_chunks_mut(BLOCK * width).enumerate();
            blocks.for_each(|(block, y)| {
                let first = block * BLOCK;
                let queries = first..first + y.len() / width;
                let (mut scores, mut factors) = (Vec::new(), Vec::new());
                for head in 0..self.heads {
                    let keys = self.seen(row, &queries);
                    self.weights(parts, row, head, queries.clone(), keys.clone(), &mut scores);
                    if self.draw(row, head, queries.clone(), keys.len(), &mut factors) {
                        multiply(&mut scores, &factors);
                    }
                    let weights = Mat::new(&scores, queries.len(), keys.len());
                    let values = parts.v.head(row, head / self.group(), keys);
                    let out = Out { rows: y, first: head * self.size, stride: width };
                    product(out, false, T::one(), weights, values, Threads::One, self.precision);
                }
            });
        });
    }

    /// Heads of queries that share keys and values.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The keys that any of some queries sees.
    fn seen(&self, row: usize, queries: &Range<usize>) -> Range<usize> {
        let length = self.lengths.as_ref().map_or(self.keys, |lengths| lengths[row]);
        let last = if self.is_causal { self.last_seen(queries.end) } else { self.keys };
        0..length.min(last)
    }

    /// How many keys a causal query before place `end` sees.
    fn last_seen(&self, end: usize) -> usize {
        (self.keys + end).saturating_sub(self.queries).min(self.keys)
    }

    /// Softmax of the scores: `[queries, keys]`.
    fn weights<T: Real>(
        &self,
        parts: &Parts<'_, T>,
        row: usize,
        head: usize,
        queries: Range<usize>,
        keys: Range<usize>,
        scores: &mut Vec<T>,
    ) {
        scores.resize(queries.len() * keys.len(), T::zero());
        if keys.is_empty() {
            return;
        }
        let scale = T::from_f64(1.0 / (self.size as f64).sqrt());
        let (q, k) = (
            parts.q.head(row, head, queries.clone()),
            parts.k.head(row, head / self.group(), keys.clone()),
        );
        let out = Out { rows: scores, first: 0, stride: keys.len() };
        product(out, false, scale, q, k.t(), Threads::One, self.precision);
        for (query, scores) in queries.zip(scores.chunks_exact_mut(keys.len())) {
            let seen = self.seen(row, &(query..query + 1)).len();
            if let Some(bias) = &self.bias {
                let bias = &bias[query * self.keys..][..seen];
                scores.iter_mut().zip(bias).for_each(|(s, bias)| *s += T::from_f64(*bias));
            }
            scores[seen..].fill(T::zero());
            vectorized(
                #[inline(always)]
                || softmax(&mut scores[..seen]),
            );
        }
    }

    /// What the weights `[queries, keys]` are multiplied with; whether anything is dropped.
    fn draw<T: Real>(
        &self,
        row: usize,
        head: usize,
        queries: Range<usize>,
        keys: usize,
        factors: &mut Vec<T>,
    ) -> bool {
        let Some(dropout) = &self.dropout else {
            return false;
        };
        let of_head = dropout.child(head);
        factors.resize(queries.len() * keys, T::zero());
        for (query, factors) in queries.zip(factors.chunks_exact_mut(keys.max(1))) {
            let seen = self.seen(row, &(query..query + 1)).len();
            of_head.child(query).factors(row, &mut factors[..seen]);
            factors[seen..].fill(T::zero());
        }
        true
    }

    /// The gradients by heads: of queries `[rows, heads, queries, size]`, then of keys and of
    /// values `[rows, kv_heads, keys, size]`.
    fn backward<T: Real>(&self, parts: &Parts<'_, T>, gradient: &[T]) -> [Vec<T>; 3] {
        let q_head = self.group() * self.queries * self.size;
        let kv_head = self.keys * self.size;
        let heads = self.rows * self.kv_heads;
        let (mut dk, mut dv) = (vec![T::zero(); heads * kv_head], vec![T::zero(); heads * kv_head]);
        let dq = output(heads * q_head, |dq: &mut [T]| {
            let tasks = dq.par_chunks_mut(q_head.max(1)).zip(dk.par_chunks_mut(kv_head.max(1)));
            let tasks = tasks.zip(dv.par_chunks_mut(kv_head.max(1))).enumerate();
            tasks.for_each(|(at, ((dq, dk), dv))| {
                let (row, kv_head) = (at / self.kv_heads, at % self.kv_heads);
                let heads = kv_head * self.group()..(kv_head + 1) * self.group();
                for (head, dq) in heads.zip(dq.chunks_exact_mut((self.queries * self.size).max(1)))
                {
                    self.head_backward(parts, gradient, row, head, [dq, dk, dv]);
                }
            });
        });
        [dq, dk, dv]
    }

    fn head_backward<T: Real>(
        &self,
        parts: &Parts<'_, T>,
        gradient: &[T],
        row: usize,
        head: usize,
        [dq, dk, dv]: [&mut [T]; 3],
    ) {
        let width = self.heads * self.size;
        let dy = Part {
            values: gradient,
            columns: Columns { first: 0, stride: width },
            places: self.queries,
            size: self.size,
        };
        let mut scratch = Scratch::default();
        for (block, dq) in dq.chunks_mut(BLOCK * self.size).enumerate() {
            let first = block * BLOCK;
            let queries = first..first + dq.len() / self.size;
            let dy = dy.head(row, head, queries.clone());
            let to = [dq, &mut *dk, &mut *dv];
            self.block_backward(parts, dy, (row, head, queries), to, &mut scratch);
        }
    }

    /// Of the gradient of some queries' results: writes theirs, and adds to those of keys and values.
    fn block_backward<T: Real>(
        &self,
        parts: &Parts<'_, T>,
        dy: Mat<'_, T>,
        (row, head, queries): (usize, usize, Range<usize>),
        [dq, dk, dv]: [&mut [T]; 3],
        Scratch { scores, slopes, factors }: &mut Scratch<T>,
    ) {
        let keys = self.seen(row, &queries);
        if keys.is_empty() {
            return dq.fill(T::zero());
        }
        let (height, width) = (queries.len(), keys.len());
        self.weights(parts, row, head, queries.clone(), keys.clone(), scores);
        let kv_head = head / self.group();
        let k = parts.k.head(row, kv_head, keys.clone());
        let v = parts.v.head(row, kv_head, keys);
        let q = parts.q.head(row, head, queries.clone());
        slopes.resize(scores.len(), T::zero());
        gemm(slopes, T::one(), dy, v.t(), Threads::One, self.precision);
        let mut weights = &*scores;
        if self.draw(row, head, queries, width, factors) {
            multiply(slopes, factors);
            multiply(factors, scores);
            weights = factors;
        }
        let weights = Mat::new(weights, height, width);
        gemm_add(dv, weights.t(), dy, Threads::One, self.precision);
        for (weights, slopes) in scores.chunks_exact(width).zip(slopes.chunks_exact_mut(width)) {
            vectorized(
                #[inline(always)]
                || softmax_slopes(weights, slopes),
            );
        }
        let scale = T::from_f64(1.0 / (self.size as f64).sqrt());
        let slopes = Mat::new(slopes, height, width);
        gemm(dq, scale, slopes, k, Threads::One, self.precision);
        let dk = Out { rows: dk, first: 0, stride: self.size };
        product(dk, true, scale, slopes.t(), q, Threads::One, self.precision);
    }
}

/// Memory that the queries of a head are worked on in, block by block.
struct Scratch<T> {
    scores: Vec<T>,
    slopes: Vec<T>,
    factors: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self { scores: Vec::new(), slopes: Vec::new(), factors: Vec::new() }
    }
}

/// In place. Where nothing is seen there is nothing to weigh.
#[inline(always)]
fn softmax<T: Real>(scores: &mut [T]) {
    let max = lane_max(scores);
    scores.iter_mut().for_each(|score| *score = (*score - max).exp());
    let scale = T::one() / lane_sum(scores);
    scores.iter_mut().for_each(|score| *score *= scale);
}

fn multiply<T: Real>(values: &mut [T], factors: &[T]) {
    vectorized(
        #[inline(always)]
        || values.iter_mut().zip(factors).for_each(|(value, factor)| *value *= *factor),
    );
}

/// From the gradient of weights to that of scores, in place.
#[inline(always)]
fn softmax_slopes<T: Real>(weights: &[T], slopes: &mut [T]) {
    slopes.iter_mut().zip(weights).for_each(|(slope, weight)| *slope *= *weight);
    let sum = lane_sum(slopes);
    for (slope, weight) in slopes.iter_mut().zip(weights) {
        *slope -= *weight * sum;
    }
}
