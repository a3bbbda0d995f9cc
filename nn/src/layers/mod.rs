//! Layers: structs that hold the tensors of their parameters, and functions without any.

mod activation;
mod attention;
mod conv;
mod dropout;
mod embedding;
mod linear;
mod linear_op;
mod mean;
mod norm;
mod pool;
mod recurrent;
mod residual;
mod transformer;

pub use activation::Activation;
pub use attention::{AttentionMask, MultiHeadAttention, Rotary, attention};
pub use conv::{
    Conv1d, Conv1dOptions, Conv2d, Conv2dOptions, ConvTranspose1d, ConvTranspose2d,
    ConvTransposeOptions,
};
pub use dropout::Dropout;
pub use embedding::Embedding;
pub use linear::Linear;
pub use mean::mean_places;
pub use norm::{BatchNorm, BatchNormOptions, GroupNorm, LayerNorm, RmsNorm};
pub use pool::{
    PoolOptions, adaptive_avg_pool1d, adaptive_avg_pool2d, avg_pool1d, avg_pool2d, global_avg_pool,
    max_pool1d, max_pool2d,
};
pub use recurrent::{Gru, Lstm, LstmState, RecurrentOptions};
pub(crate) use recurrent::{Kind, Sequences, Stack};
pub use residual::add;
pub(crate) use residual::add_to_rows;
pub use transformer::TransformerBlock;

use crate::Result;
use candle_core::Tensor;

/// `[rows, ..]` to `[rows, features]`. As `Tensor::flatten_from(1)`, and cheaper to differentiate.
pub fn flatten(x: &Tensor) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let features = x.dims()[1..].iter().product::<usize>();
    Ok(crate::link::reshape(x, (rows, features))?)
}
