//! What rows or elements count.

use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Weights for a loss of shape `dims`: each of `weights`, whose shape is the first axes of `dims`,
/// repeated over the axes that it lacks.
pub(super) fn repeated(weights: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let own = weights.dims();
    if own.is_empty() || !dims.starts_with(own) {
        let expected = format!("the first axes, one or more, of {dims:?}");
        return Err(Error::shape("the weights of a loss", expected, own));
    }
    if weights.track_op() {
        let expected = "constants: detach them, for a loss has no gradient of its weights";
        return Err(Error::option("weights", "a tensor that wants a gradient", expected));
    }
    let ones = vec![1; dims.len() - own.len()];
    Ok(weights.reshape([own, &ones].concat())?.broadcast_as(dims)?.contiguous()?)
}

/// Σ weights in `f64`; without any, their number.
pub(super) fn total(weights: Option<&Tensor>, count: usize) -> Result<f64> {
    match weights {
        Some(weights) => Ok(to_f64(weights)?.iter().sum()),
        None => Ok(count as f64),
    }
}

pub(super) fn to_f64(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
