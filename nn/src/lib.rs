//! Layers, losses, seeded initialisers and a model registry on candle tensors.
//!
//! A model is plain structs of candle tensors whose parameters live in [`Params`], by name. What
//! is random (initial values, dropout) is a pure function of the seed and of what it is for, so
//! results repeat, on any number of threads and workers.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use mobula_nn::{Model, ModelSpec, Pass, loss, metrics, models::MlpOptions};
//!
//! let spec = ModelSpec::new("mlp", &MlpOptions::new(2, [8], 2))?;
//! let model = Model::build(&spec, 7, &Device::Cpu)?;
//! // Is x₀ + x₁ positive?
//! let x = Tensor::new(&[[1f32, 2.0], [-1.0, -3.0], [2.0, -1.0], [-2.0, 1.0]], &Device::Cpu)?;
//! let labels = Tensor::new(&[1u32, 0, 1, 0], &Device::Cpu)?;
//! for step in 0..50 {
//!     let logits = model.forward(&x, &Pass::train(7, step))?;
//!     let gradients = loss::cross_entropy(&logits, &labels)?.backward()?;
//!     for (_, var) in model.params().vars() {
//!         if let Some(gradient) = gradients.get(var.as_tensor()) {
//!             var.set(&(var.as_tensor() - (gradient * 0.5)?)?)?;
//!         }
//!     }
//! }
//! let logits = model.predict(&x)?;
//! assert_eq!(metrics::accuracy(&logits, &labels)?, 1.0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `candle-nn` is not used: the fast paths of its norms and softmax drop gradients, and its
//! dropout draws from a generator that cannot be seeded. [`gradcheck`] is how the layers here are
//! checked, and how a program checks its own.
//!
//! What it will not do: train (optimizers, schedules and workers are `mobula-train`'s), read
//! data, or download weights.
#![deny(unsafe_code)]

#[cfg(test)]
mod agreement;
mod backward;
mod cpu;
mod error;
pub mod gradcheck;
mod init;
mod kernels;
pub mod layers;
mod link;
pub mod loss;
pub mod metrics;
mod model;
pub mod models;
mod module;
mod params;
mod pass;
mod registry;
mod weights;

pub use backward::{Gradients, OnWrite};
pub use error::{Error, Result};
pub use init::{Fan, Init};
pub use link::no_grad;
pub use model::Model;
pub use module::Module;
pub use params::Params;
pub use pass::{Pass, Precision, SyncSum, Training};
pub use registry::{Architecture, ModelSpec, Registry};
