//! Layers: structs that hold the tensors of their parameters, and functions without any.

mod activation;
mod conv;
mod dropout;
mod embedding;
mod linear;
mod linear_op;
mod norm;
mod pool;
mod recurrent;

pub use activation::Activation;
pub use conv::{Conv2d, Conv2dOptions};
pub use dropout::Dropout;
pub use embedding::Embedding;
pub use linear::Linear;
pub use norm::{BatchNorm, BatchNormOptions, GroupNorm, LayerNorm, RmsNorm};
pub use pool::max_pool2d;
pub use recurrent::{Gru, Lstm, LstmState, RecurrentOptions};
pub(crate) use recurrent::{Kind, Sequences, Stack};

use crate::Result;
use candle_core::Tensor;

/// `[rows, ..]` to `[rows, features]`. As `Tensor::flatten_from(1)`, and cheaper to differentiate.
pub fn flatten(x: &Tensor) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let features = x.dims()[1..].iter().product::<usize>();
    Ok(crate::link::reshape(x, (rows, features))?)
}
