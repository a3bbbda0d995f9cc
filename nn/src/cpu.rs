//! What the CPU operations of this crate share: how they meet candle.

use crate::kernels::Real;
use candle_core::{DType, Device, Error, Layout, Result, Shape, Storage, Tensor};

/// Elements that are worth a task of their own: below this, starting one costs more than it saves.
pub(crate) const TASK_ELEMENTS: usize = 1 << 14;

/// The elements of a contiguous tensor. Callers make theirs contiguous first.
pub(crate) fn elements<'a, T>(data: &'a [T], layout: &Layout, op: &'static str) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => Err(Error::RequiresContiguous { op }.bt()),
    }
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
