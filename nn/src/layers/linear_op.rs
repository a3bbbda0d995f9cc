//! A matrix product, a bias and an activation as one operation.

use super::activation::{Activation, Scalar, Slopes, Visitor};
use crate::Precision;
use crate::backward::parameter_gradient;
use crate::cpu::{TASK_ELEMENTS, unsupported, with_values};
use crate::kernels::{Mat, Real, Threads, column_sums, gemm, gemm_add, output, vectorized};
use crate::link::{Source, Told, owned, result, result_kept};
use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

/// `activation(x Wᵀ + b)` of `x [.., inputs]`, a weight `[outputs, inputs]` and a bias
/// `[outputs]`, on the CPU.
pub(super) fn affine(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    activation: Activation,
    precision: Precision,
) -> Result<Tensor> {
    let x = &x.contiguous()?;
    match x.dtype() {
        DType::F32 => affine_as::<f32>(x, weight, bias, activation, precision),
        DType::F64 => affine_as::<f64>(x, weight, bias, activation, precision),
        other => Err(unsupported(other, "linear")),
    }
}

/// What the backward pass needs.
struct Saved<T> {
    sources: [Source; 3],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    /// What the activation was applied to, where its slope needs that.
    inner: Option<Vec<T>>,
    precision: Precision,
}

fn affine_as<T: Real>(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    activation: Activation,
    precision: Precision,
) -> Result<Tensor> {
    let sources = [x, weight, bias].map(Source::of);
    let keeps_inner = activation.needs_input() && sources.iter().any(Source::is_tracked);
    let (y, inner) = with_values([x, weight, bias], |values| {
        Ok(forward::<T>(values, rows(x.dims()), activation, keeps_inner, precision))
    })?;
    let (x, weight, bias) = (x.detach(), weight.clone(), bias.clone());
    let shape = [&x.dims()[..x.rank() - 1], bias.dims()].concat();
    let saved = Saved { sources: sources.clone(), x, weight, bias, inner, precision };
    let [x, weight, bias] = &sources;
    if activation == Activation::Identity {
        return result(y, shape, &[x, weight, bias], move |gradient| {
            saved.backward(owned(gradient)?)
        });
    }
    result_kept(y, shape, &[x, weight, bias], move |gradient, y| {
        let mut gradient = owned::<T>(gradient)?;
        with_values([y], |[y]| {
            let (x, gradient) = (saved.inner.as_deref().unwrap_or(y), &mut gradient[..]);
            activation.visit(Slopes { x, y, gradient });
            Ok(())
        })?;
        saved.backward(gradient)
    })
}

/// The result, and what the activation was applied to if that is to be kept.
fn forward<T: Real>(
    [x, weight, bias]: [&[T]; 3],
    rows: usize,
    activation: Activation,
    keeps_inner: bool,
    precision: Precision,
) -> (Vec<T>, Option<Vec<T>>) {
    let (outputs, inputs) = (bias.len(), weight.len() / bias.len().max(1));
    let (x, weight) = (Mat::new(x, rows, inputs), Mat::new(weight, outputs, inputs));
    let mut inner = output(rows * outputs, |y| {
        gemm(y, T::one(), x, weight.t(), Threads::All, precision);
    });
    if !keeps_inner {
        activation.visit(Finish { inner: &mut inner, bias, y: None });
        return (inner, None);
    }
    let y =
        output(inner.len(), |y| activation.visit(Finish { inner: &mut inner, bias, y: Some(y) }));
    (y, Some(inner))
}

impl<T: Real> Saved<T> {
    /// From the gradient of what the activation was applied to.
    fn backward(&self, gradient: Vec<T>) -> Result<Vec<Told>> {
        let Self { x, weight, bias, precision, .. } = self;
        let (outputs, inputs) = weight.dims2()?;
        let rows = rows(x.dims());
        let gradient = Mat::new(&gradient, rows, outputs);
        with_values([x, weight], |[x, weight_values]| {
            let x = Mat::new(x, rows, inputs);
            // Data, frozen weights and the zeros that stand for no bias need no gradient.
            let tracked = self.sources.each_ref().map(Source::is_tracked);
            let dw = match tracked[1] {
                true => parameter_gradient(weight, |dw, is_added| match is_added {
                    true => gemm_add(dw, gradient.t(), x, Threads::All, *precision),
                    false => gemm(dw, T::one(), gradient.t(), x, Threads::All, *precision),
                })?,
                false => None,
            };
            let db = match tracked[2] {
                true => parameter_gradient(bias, |db, is_added| {
                    column_sums(gradient.data(), db, is_added)
                })?,
                false => None,
            };
            let dx = match tracked[0] {
                true => self.sources[0].give(output(rows * inputs, |dx| {
                    let weight = Mat::new(weight_values, outputs, inputs);
                    gemm(dx, T::one(), gradient, weight, Threads::All, *precision)
                }))?,
                false => None,
            };
            Ok(vec![dx, dw, db])
        })
    }
}

/// How often the last dimension occurs.
fn rows(dims: &[usize]) -> usize {
    dims.iter().rev().skip(1).product()
}

/// Adds the bias to every row and applies the activation.
struct Finish<'a, T> {
    inner: &'a mut [T],
    bias: &'a [T],
    /// Where the results go, if not in place.
    y: Option<&'a mut [T]>,
}

impl<T: Real> Visitor for Finish<'_, T> {
    type Output = ();

    fn visit<S: Scalar>(self) {
        let Self { inner, bias, y } = self;
        let width = bias.len().max(1);
        let task = (TASK_ELEMENTS / width).max(1) * width;
        match y {
            None => inner.par_chunks_mut(task).for_each(|rows| {
                vectorized(
                    #[inline(always)]
                    || finish_in_place::<S, T>(rows, bias),
                )
            }),
            Some(y) => {
                inner.par_chunks_mut(task).zip(y.par_chunks_mut(task)).for_each(|(rows, y)| {
                    vectorized(
                        #[inline(always)]
                        || finish::<S, T>(rows, bias, y),
                    )
                })
            }
        }
    }
}

#[inline(always)]
fn finish_in_place<S: Scalar, T: Real>(rows: &mut [T], bias: &[T]) {
    for row in rows.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(x, bias)| *x = S::value(*x + *bias));
    }
}

#[inline(always)]
fn finish<S: Scalar, T: Real>(rows: &mut [T], bias: &[T], y: &mut [T]) {
    for (row, y) in rows.chunks_exact_mut(bias.len()).zip(y.chunks_exact_mut(bias.len())) {
        for ((x, bias), y) in row.iter_mut().zip(bias).zip(y) {
            *x += *bias;
            *y = S::value(*x);
        }
    }
}
