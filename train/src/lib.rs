//! Data-parallel training of candle models: workers in processes, gradients summed in shared
//! memory, checkpoints that are whole or not there.
//!
//! A training function is ordinary code with its loop in sight. The same function runs on a group
//! of worker processes under a [`Trainer`], and alone, for example as a trial of a search:
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use mobula_core::{Batch, Flow};
//! use mobula_nn::{Model, ModelSpec, loss::cross_entropy, models::MlpOptions};
//! use mobula_train::{AdamW, AdamWOptions, TrainState, WorkerContext};
//!
//! let spec = ModelSpec::new("mlp", &MlpOptions::new(2, [8], 2))?;
//! let model = Model::build(&spec, 7, &Device::Cpu)?;
//! let mut state = TrainState::new(model, AdamW::new(AdamWOptions::default())?, 7, 1);
//! let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
//!
//! let x = Tensor::new(&[[0f32, 1.], [1., 0.]], &Device::Cpu)?;
//! let y = Tensor::new(&[0u32, 1], &Device::Cpu)?;
//! let batch = Batch::new(vec![("x".into(), x), ("y".into(), y)])?;
//! let mut loss = || {
//!     context.step(&mut state, &batch, |model, pass, batch| {
//!         cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
//!     })
//! };
//! let first = loss()?;
//! for _ in 0..20 {
//!     loss()?;
//! }
//! assert!(loss()? < first);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! It knows nothing of data sets (batches come through `mobula_core::BatchStream`) and nothing
//! of hyperparameter search.

mod buffers;
mod checkpointing;
pub mod collective;
mod config;
mod context;
mod epochs;
mod error;
mod fit;
mod heal;
mod journal;
mod keeper;
mod nccl;
pub mod optim;
mod outer;
mod overlap;
mod pace;
mod report;
mod rollback;
mod saver;
mod setup;
mod share;
mod snapshot;
mod state;
mod step;
mod stream;
mod sync;
mod tensors;
mod trainer;
mod workers;

pub use collective::{Collective, Compression, Element, ReduceOp, Transport};
pub use config::{BestCheckpoints, CheckpointConfig, FailureConfig, ScalingConfig};
pub use context::WorkerContext;
pub use error::{Error, Result};
pub use fit::{Callback, EarlyStopping, StepReport, TimeBudget, TrainLoop};
pub use mobula_nn::Gradients;
#[cfg(feature = "cuda")]
pub use nccl::nccl_version;
pub use optim::{AdamW, AdamWOptions, Optimizer, Schedule, Updater, UpdaterOptions};
pub use outer::LocalSgd;
pub use overlap::Overlap;
pub use report::EpochReport;
pub use state::{EpochTally, NonFinite, SavedState, Skips, TrainState, load_model};
pub use step::Loss;
pub use trainer::{Trainer, TrainingResult};
pub use workers::WorkerCount;
