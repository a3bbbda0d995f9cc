//! What the CPU operations of this crate share: how they meet candle.

use crate::Precision;
use crate::kernels::Real;
use candle_core::{DType, Device, Error, Layout, Result, Shape, Storage, Tensor};

/// Elements that are worth a task of their own: below this, starting one costs more than it saves.
pub(crate) const TASK_ELEMENTS: usize = 1 << 14;

/// Whether this crate has kernels for where the tensor is. For elsewhere its layers are composed of
/// candle's own operations.
pub(crate) fn has_kernels(x: &Tensor) -> bool {
    #[cfg(test)]
    if crate::agreement::is_composed() {
        return false;
    }
    x.device().is_cpu()
}

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
            let text = "an input is on the CPU and a parameter is not: move the input to the \
                        model's device with Tensor::to_device";
            return Err(Error::Msg(text.into()).bt());
        };
        *slice = elements(storage.as_slice()?, layout, "backward")?;
    }
    f(slices)
}

/// A tensor on the CPU.
pub(crate) fn tensor<T: Real>(values: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// `a · b` in candle's own operations.
pub(crate) fn matmul(a: &Tensor, b: &Tensor, precision: Precision) -> Result<Tensor> {
    lowered(a, b, precision, Tensor::matmul)
}

/// Candle's `product` of two tensors, which are rounded before it where the precision says so.
pub(crate) fn lowered(
    a: &Tensor,
    b: &Tensor,
    precision: Precision,
    product: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    if precision == Precision::F32 || a.dtype() != DType::F32 {
        return product(a, b);
    }
    // Candle has no products of `bf16` on the CPU; those of rounded numbers are the same in `f32`.
    let dtype = if a.device().is_cpu() { DType::F32 } else { DType::BF16 };
    let [a, b] = [a, b].map(|x| x.to_dtype(DType::BF16)?.to_dtype(dtype));
    product(&a?, &b?)?.to_dtype(DType::F32)
}

pub(crate) fn unsupported(dtype: DType, op: &'static str) -> Error {
    Error::UnsupportedDTypeForOp(dtype, op).bt()
}
