//! Normalisation of the last dimension, as one operation.

use crate::backward::parameter_gradient;
use crate::cpu::{TASK_ELEMENTS, with_values};
use crate::kernels::{Real, add_assign, lane_sum, output, put, vectorized};
use crate::link::{Source, result};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Less the mean, by the standard deviation.
    Layer,
    /// By the root of the mean square.
    Rms,
}

/// A normalisation of rows of `width` elements.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) kind: Kind,
    pub(super) eps: f64,
    pub(super) width: usize,
}

/// Of one row: what is subtracted, and what it is then multiplied by.
#[derive(Clone, Copy)]
struct Moments<T> {
    mean: T,
    scale: T,
}

impl Rows {
    /// `weight` and `bias` are `[width]`; a bias of [`Kind::Rms`] is not looked at.
    pub(super) fn apply<T: Real>(
        self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
    ) -> Result<Tensor> {
        let sources = [x, weight, bias].map(Source::of);
        let (y, moments) = with_values([x, weight, bias], |[x, weight, bias]| {
            let mut moments =
                vec![Moments { mean: T::zero(), scale: T::zero() }; x.len() / self.width];
            let y = output(x.len(), |y| self.forward(x, weight, bias, y, &mut moments));
            Ok((y, moments))
        })?;
        let (shape, x) = (x.shape().clone(), x.detach());
        let (weight, bias, to) = (weight.clone(), bias.clone(), sources.clone());
        let [a, b, c] = &sources;
        result(y, shape, &[a, b, c], move |gradient| {
            let gradient = T::cpu_storage_as_slice(&gradient)?;
            with_values([&x, &weight], |[x, weight_values]| {
                let mut sums = Vec::new();
                let dx = output(x.len(), |dx| {
                    sums = self.backward(x, weight_values, &moments, gradient, dx);
                });
                let (dw, db) = sums.split_at(self.width);
                let dw = parameter_gradient(&weight, |to, is_added| put(dw, to, is_added))?;
                let db = match to[2].is_tracked() {
                    true => parameter_gradient(&bias, |to, is_added| put(db, to, is_added))?,
                    false => None,
                };
                Ok(vec![to[0].give(dx)?, dw, db])
            })
        })
    }

    /// Elements of the rows of one task; the order of sums over rows follows from it.
    fn task(&self) -> usize {
        (TASK_ELEMENTS / self.width).max(8) * self.width
    }

    fn forward<T: Real>(
        self,
        x: &[T],
        weight: &[T],
        bias: &[T],
        y: &mut [T],
        moments: &mut [Moments<T>],
    ) {
        let task = self.task();
        let tasks = y.par_chunks_mut(task).zip(x.par_chunks(task));
        tasks.zip(moments.par_chunks_mut(task / self.width)).for_each(|((y, x), moments)| {
            vectorized(
                #[inline(always)]
                || {
                    let rows = y.chunks_exact_mut(self.width).zip(x.chunks_exact(self.width));
                    for ((y, x), moments) in rows.zip(moments) {
                        *moments = self.moments(x);
                        let Moments { mean, scale } = *moments;
                        for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                            *y = ((*x - mean) * scale).mul_add(*weight, *bias);
                        }
                    }
                },
            )
        });
    }

    #[inline(always)]
    fn moments<T: Real>(&self, row: &[T]) -> Moments<T> {
        let width = T::from_f64(self.width as f64);
        let mean = match self.kind {
            Kind::Layer => lane_sum(row) / width,
            Kind::Rms => T::zero(),
        };
        let variance = square_sum(row, mean) / width;
        Moments { mean, scale: T::one() / (variance + T::from_f64(self.eps)).sqrt() }
    }

    /// The gradients of the weight, then of the bias.
    fn backward<T: Real>(
        self,
        x: &[T],
        weight: &[T],
        moments: &[Moments<T>],
        gradient: &[T],
        dx: &mut [T],
    ) -> Vec<T> {
        let (task, width) = (self.task(), self.width);
        let mut partial = vec![T::zero(); x.len().div_ceil(task) * 2 * width];
        let tasks = dx.par_chunks_mut(task).zip(x.par_chunks(task)).zip(gradient.par_chunks(task));
        let tasks =
            tasks.zip(moments.par_chunks(task / width)).zip(partial.par_chunks_mut(2 * width));
        tasks.for_each(|((((dx, x), gradient), moments), partial)| {
            let (dw, db) = partial.split_at_mut(width);
            vectorized(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    let rows = rows.zip(gradient.chunks_exact(width)).zip(moments);
                    for (((dx, x), gradient), moments) in rows {
                        self.row_backward(x, weight, *moments, gradient, dx, dw, db);
                    }
                },
            );
        });
        let mut sums = vec![T::zero(); 2 * width];
        partial.chunks_exact(2 * width).for_each(|partial| add_assign(&mut sums, partial));
        sums
    }

    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "one row of everything")]
    fn row_backward<T: Real>(
        &self,
        x: &[T],
        weight: &[T],
        Moments { mean, scale }: Moments<T>,
        gradient: &[T],
        dx: &mut [T],
        dw: &mut [T],
        db: &mut [T],
    ) {
        for (((dw, db), x), g) in dw.iter_mut().zip(db).zip(x).zip(gradient) {
            *dw += *g * ((*x - mean) * scale);
            *db += *g;
        }
        // dx holds what the normalised row gets, until its two means are known.
        for ((dx, g), weight) in dx.iter_mut().zip(gradient).zip(weight) {
            *dx = *g * *weight;
        }
        let width = T::from_f64(self.width as f64);
        let mean_gradient = match self.kind {
            Kind::Layer => lane_sum(dx) / width,
            Kind::Rms => T::zero(),
        };
        let slope = product_sum(dx, x, mean) * scale / width;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = (*dx - mean_gradient - (*x - mean) * scale * slope) * scale;
        }
    }
}

/// Σ (x − mean)² in the lanes of [`lane_sum`].
#[inline(always)]
pub(super) fn square_sum<T: Real>(values: &[T], mean: T) -> T {
    lanes(values, values, |x, _| (x - mean) * (x - mean))
}

/// Σ a (x − mean), likewise.
#[inline(always)]
pub(super) fn product_sum<T: Real>(a: &[T], x: &[T], mean: T) -> T {
    lanes(a, x, |a, x| a * (x - mean))
}

#[inline(always)]
fn lanes<T: Real>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut lanes = [T::zero(); 16];
    for (a, b) in a.iter().zip(b) {
        for at in 0..16 {
            lanes[at] += f(a[at], b[at]);
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += f(*a, *b);
    }
    lane_sum(&lanes)
}
