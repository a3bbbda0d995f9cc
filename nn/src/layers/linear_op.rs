//! A matrix product, a bias and an activation as one operation.

use super::activation::{Activation, Scalar, Slopes, Visitor};
use crate::backward::parameter_gradient;
use crate::cpu::{Forward, Operand, TASK_ELEMENTS, forward, tensor, unsupported, with_values};
use crate::kernels::{Mat, Real, Threads, column_sums, gemm, gemm_add, output, vectorized};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::{Mutex, MutexGuard, PoisonError};

const OP: &str = "linear";

/// Of `x [.., inputs]`, a weight `[outputs, inputs]` and a bias `[outputs]`, all contiguous.
pub(super) struct Affine {
    activation: Activation,
    /// What the activation was applied to, where its slope needs that.
    inner: Mutex<Option<CpuStorage>>,
}

impl Affine {
    pub(super) fn new(activation: Activation) -> Self {
        Self { activation, inner: Mutex::default() }
    }

    fn backward<T: Real>(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = weight.dims2()?;
        let grad = self.inner_gradient::<T>(y, grad)?;
        with_values([x, weight, &grad], |[x_values, weight_values, grad]| {
            let rows = rows(x.dims());
            let grad_matrix = Mat::new(grad, rows, outputs);
            // Data rarely needs a gradient; then its product is not computed.
            let dx = x.track_op().then(|| {
                output(x_values.len(), |dx| {
                    let weight = Mat::new(weight_values, outputs, inputs);
                    gemm(dx, T::one(), grad_matrix, weight, Threads::All)
                })
            });
            let dx = dx.map(|dx| tensor(dx, x.shape())).transpose()?;
            let x = Mat::new(x_values, rows, inputs);
            let dw = parameter_gradient(weight, |dw, is_added| match is_added {
                true => gemm_add(dw, grad_matrix.t(), x, Threads::All),
                false => gemm(dw, T::one(), grad_matrix.t(), x, Threads::All),
            })?;
            let db = parameter_gradient(bias, |db, is_added| column_sums(grad, db, is_added))?;
            Ok((dx, dw, db))
        })
    }

    fn inner(&self) -> MutexGuard<'_, Option<CpuStorage>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gradient of what the activation was applied to.
    fn inner_gradient<T: Real>(&self, y: &Tensor, grad: &Tensor) -> Result<Tensor> {
        if self.activation == Activation::Identity {
            return Ok(grad.clone());
        }
        let inner = self.inner();
        let out = with_values([y, grad], |[y, grad]| {
            let x = match &*inner {
                Some(inner) => T::cpu_storage_as_slice(inner)?,
                None => y,
            };
            Ok(output(y.len(), |out| self.activation.visit(Slopes { x, y, grad, out })))
        })?;
        tensor::<T>(out, y.shape())
    }
}

impl Forward<3> for Affine {
    const NAME: &'static str = OP;

    fn run<T: Real>(&self, [x, weight, bias]: [Operand<'_, T>; 3]) -> Result<(Vec<T>, Shape)> {
        let [outputs, inputs] = *weight.dims else { return Err(unsupported(T::DTYPE, OP)) };
        let rows = rows(x.dims);
        let (x_matrix, weight) = (Mat::new(x.values, rows, inputs), Mat::new(weight.values, outputs, inputs));
        let product = |y: &mut [T]| gemm(y, T::one(), x_matrix, weight.t(), Threads::All);
        let bias = bias.values;
        let y = if self.activation.needs_input() {
            let mut inner = output(rows * outputs, product);
            let y = output(rows * outputs, |y| {
                self.activation.visit(Finish { inner: &mut inner, bias, y: Some(y) })
            });
            let inner = T::to_cpu_storage_owned(inner);
            *self.inner() = Some(inner);
            y
        } else {
            let mut y = output(rows * outputs, product);
            self.activation.visit(Finish { inner: &mut y, bias, y: None });
            y
        };
        let mut shape = x.dims.to_vec();
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        Ok((y, shape.into()))
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
            Some(y) => inner.par_chunks_mut(task).zip(y.par_chunks_mut(task)).for_each(|(rows, y)| {
                vectorized(
                    #[inline(always)]
                    || finish::<S, T>(rows, bias, y),
                )
            }),
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

impl CustomOp3 for Affine {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        forward(self, [(x, x_layout), (weight, weight_layout), (bias, bias_layout)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        match x.dtype() {
            DType::F32 => self.backward::<f32>(x, weight, bias, y, &grad),
            DType::F64 => self.backward::<f64>(x, weight, bias, y, &grad),
            other => Err(unsupported(other, OP)),
        }
    }
}
