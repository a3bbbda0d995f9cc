//! What the CPU operations of this crate share: how they meet candle.

use crate::kernels::Real;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, Error, Layout, Result, Shape, Storage, Tensor};

/// Elements that are worth a task of their own: below this, starting one costs more than it saves.
pub(crate) const TASK_ELEMENTS: usize = 1 << 14;

/// The elements of a contiguous tensor. Callers make theirs contiguous first.
pub(crate) fn elements<'a, T>(data: &'a [T], layout: &Layout, op: &'static str) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => Err(Error::RequiresContiguous { op }.bt()),
    }
}

/// One operand of an operation.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a, T> {
    pub(crate) values: &'a [T],
    pub(crate) dims: &'a [usize],
}

/// The forward pass of an operation of `N` tensors, for `f32` and `f64`.
pub(crate) trait Forward<const N: usize> {
    /// For messages.
    const NAME: &'static str;

    /// The values of the result, and its shape.
    fn run<T: Real>(&self, inputs: [Operand<'_, T>; N]) -> Result<(Vec<T>, Shape)>;
}

/// Calls an operation as `CustomOp`s are: contiguous tensors of one type.
pub(crate) fn forward<F: Forward<N>, const N: usize>(
    op: &F,
    inputs: [(&CpuStorage, &Layout); N],
) -> Result<(CpuStorage, Shape)> {
    match inputs[0].0 {
        CpuStorage::F32(_) => forward_as::<F, f32, N>(op, inputs),
        CpuStorage::F64(_) => forward_as::<F, f64, N>(op, inputs),
        other => Err(unsupported(other.dtype(), F::NAME)),
    }
}

fn forward_as<F: Forward<N>, T: Real, const N: usize>(
    op: &F,
    inputs: [(&CpuStorage, &Layout); N],
) -> Result<(CpuStorage, Shape)> {
    let mut operands = [Operand { values: &[], dims: &[] }; N];
    for (operand, (storage, layout)) in operands.iter_mut().zip(inputs) {
        let values = elements(storage.as_slice::<T>()?, layout, F::NAME)?;
        *operand = Operand { values, dims: layout.dims() };
    }
    let (values, shape) = op.run(operands)?;
    Ok((T::to_cpu_storage_owned(values), shape))
}

/// Calls `f` with the elements of contiguous CPU tensors of type `T`.
pub(crate) fn with_values<T: Real, const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[T]; N]) -> Result<R>,
) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut slices: [&[T]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let Storage::Cpu(storage) = &**storage else {
            return Err(Error::Msg("a CPU kernel was given a tensor of another device".into()).bt());
        };
        *slice = elements(storage.as_slice()?, layout, "backward")?;
    }
    f(slices)
}

/// A tensor on the CPU.
pub(crate) fn tensor<T: Real>(values: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

pub(crate) fn unsupported(dtype: DType, op: &'static str) -> Error {
    Error::UnsupportedDTypeForOp(dtype, op).bt()
}
