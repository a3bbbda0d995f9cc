//! Layers: structs that hold the tensors of their parameters, and functions without any.

mod activation;
mod conv;
mod conv_op;
mod dropout;
mod im2col;
mod linear;
mod linear_op;
mod pool;

pub use activation::Activation;
pub use conv::{Conv2d, Conv2dOptions};
pub use dropout::Dropout;
pub use linear::Linear;
pub use pool::max_pool2d;
