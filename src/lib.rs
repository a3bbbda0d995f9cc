//! Mobula: ML pipelines in Rust. Stream data, train on many workers, tune, serve, from one binary.
//!
//! A Mobula program is an ordinary program. Its first line is [`init`], which gives the driver its
//! [`Runtime`] and turns every process that the runtime starts, which is the same binary, into a
//! worker:
//!
//! ```
//! use mobula::{Placement, Runtime};
//!
//! #[mobula::remote]
//! fn hypotenuse(a: f64, b: f64) -> f64 {
//!     a.hypot(b)
//! }
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let runtime: Runtime = mobula::init()?;
//!     let answer = runtime.submit(hypotenuse::remote(3.0, 4.0).on(Placement::Process));
//!     assert_eq!(*answer.get()?, 5.0);
//!     Ok(())
//! }
//! ```
//!
//! | layer | feature | what it is for |
//! |---|---|---|
//! | [`data`] | `data` | lazy datasets on DataFusion, exact shuffles, preprocessors, tensor batches |
//! | [`nn`] | `train` | layers and losses on candle tensors whose gradients work |
//! | [`train`] | `train` | data-parallel training, all-reduce, checkpoints, resumption |
//! | [`tune`] | `tune` | hyperparameter search with TPE and ASHA, crash-safe journals |
//! | [`serve`] | `serve` | replicas, micro-batching, the Open Inference Protocol |
//!
//! All four are on by default; a program that only trains depends on
//! `mobula = { default-features = false, features = ["train"] }` and compiles no DataFusion.
//! `examples/pipeline.rs` walks through all of them in one program.
//!
//! It is no cluster scheduler and no daemon: a program starts its own workers, and they end with
//! it.

pub use mobula_core::{
    ActorOptions, ActorPool, ActorRef, Backoff, Batch, BatchSource, BatchStream, BoxError, Bundle,
    Checkpoint, CheckpointStore, Elastic, Error, Flow, Group, GroupEvent, GroupOptions, GroupTask,
    Member, Node, NodeInfo, ObjectRef, ObjectStream, OnLoss, Placement, PlacementGroup,
    PlacementGroupOptions, PlacementStrategy, RemoteActor, Rendezvous, Resources, RestartPolicy,
    RunDir, Runtime, Shard, StreamTask, Task, TaskOptions, World, Yield, collect, console, init,
    init_with, on_interrupt, random, remote, run, status, value, wait, world,
};

#[cfg(feature = "data")]
pub use mobula_data as data;
#[cfg(feature = "train")]
pub use mobula_nn as nn;
#[cfg(feature = "serve")]
pub use mobula_serve as serve;
#[cfg(feature = "train")]
pub use mobula_train as train;
#[cfg(feature = "tune")]
pub use mobula_tune as tune;

#[cfg(all(feature = "serve", feature = "train"))]
pub mod models;

#[cfg(doctest)]
mod guides;
