//! Model serving: replicas on their own threads, micro-batching, and the Open Inference Protocol
//! over HTTP.
//!
//! A [`Deployment`] says what to serve: a model's inputs and outputs, how to load it, and how many
//! replicas of it. A [`Server`] loads the replicas and listens. Requests that arrive while the
//! replicas are busy, or at the same moment, run as one batch; while one is idle nothing waits.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use mobula_core::{Batch, BoxError, Resources, Runtime};
//! use mobula_serve::{Client, Datatype, Deployment, Model, ModelMetadata, Server, TensorSpec};
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! let double = |batch: &Batch| -> Result<Batch, BoxError> {
//!     Ok(Batch::new(vec![("y".to_owned(), (batch.get("x")? * 2.0)?)])?)
//! };
//! let metadata = ModelMetadata::new("double")
//!     .with_input(TensorSpec::new("x", Datatype::Fp32, [3]))
//!     .with_output(TensorSpec::new("y", Datatype::Fp32, [3]));
//! let loader = Arc::new(move || Ok(Box::new(double) as Box<dyn Model>));
//!
//! let runtime = Runtime::local(Resources::cpus(2.0))?;
//! let deployment = Deployment::new(metadata, loader).with_replicas(2);
//! let server = Server::new(&runtime).deploy(deployment)?.bind("127.0.0.1:0")?;
//!
//! let x = Tensor::from_vec(vec![1f32, 2.0, 3.0], (1, 3), &Device::Cpu)?;
//! let rows = Batch::new(vec![("x".to_owned(), x)])?;
//! let answer = Client::new(server.addr())?.infer("double", &rows)?;
//! assert_eq!(answer.get("y")?.to_vec2::<f32>()?, [[2.0, 4.0, 6.0]]);
//!
//! server.shutdown(Duration::from_secs(5))?;
//! # Ok::<(), BoxError>(())
//! ```
//!
//! It does not know any architecture: a [`Loader`] makes the model. It has no TLS and no login;
//! put a proxy in front of it for both. gRPC and binary tensors are not spoken yet.

mod batcher;
mod client;
mod deployment;
mod dispatcher;
mod error;
mod http;
mod load;
mod metrics;
mod model;
mod options;
mod protocol;
mod replica;
mod repository;
mod server;
mod wire;

pub use client::Client;
pub use deployment::Deployment;
pub use error::Error;
pub use load::{LoadReport, LoadTest};
pub use metrics::ModelStats;
pub use model::{Datatype, Loader, Model, ModelMetadata, TensorSpec};
pub use options::BatchingOptions;
pub use repository::{BatchingConfig, ModelConfig, Repository, RepositoryModel};
pub use server::{RunningServer, Server};
