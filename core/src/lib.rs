//! Tasks, actors and groups of workers in threads and processes; run directories; checkpoints.
//!
//! Everything that Mobula runs elsewhere is placed by a [`Runtime`]: training workers are a
//! [`Group`] with ranks, trials are [`Task`]s, model replicas are actors.
//!
//! ```
//! use mobula_core::{Resources, Runtime, Task};
//!
//! let runtime = Runtime::local(Resources::cpus(2.0))?;
//! let squares: Vec<_> = (0..4)
//!     .map(|i| runtime.submit(Task::new(format!("square {i}"), move || Ok::<_, String>(i * i))))
//!     .collect();
//! assert_eq!(*squares[3].get()?, 9);
//! # Ok::<(), mobula_core::Error>(())
//! ```
//!
//! It has no cluster scheduler and no daemon: a driver starts its own workers, and they end with
//! it. It knows nothing of data sets, models or HTTP.

pub mod actor;
mod allocator;
pub mod batch;
pub mod checkpoint;
pub mod clock;
pub mod console;
mod current;
mod drops;
pub mod error;
mod files;
pub mod group;
mod init;
mod interrupt;
mod job;
mod nested;
mod nodes;
mod object;
mod panics;
mod parcel;
mod placement;
mod process;
pub mod random;
pub mod remote;
mod resources;
pub mod run;
mod runtime;
mod scheduler;
pub mod scratch;
pub mod status;
mod store;
mod stream;
pub mod task;
pub mod tensorboard;
mod threads;
mod timeline;
mod timer;
pub mod value;
pub mod world;

pub use actor::{
    ActorHandle, ActorOptions, ActorPool, ActorPoolOptions, ActorRef, RemoteActor, Reply,
    RestartPolicy,
};
pub use batch::{Batch, BatchSource, BatchStream, Shard, StreamState};
pub use checkpoint::{Checkpoint, CheckpointStore};
pub use error::{BoxError, Error};
pub use group::{
    Elastic, Group, GroupEvent, GroupOptions, GroupTask, Host, Member, OnLoss, Rendezvous,
};
pub use init::{init, init_with};
pub use interrupt::{InterruptGuard, on_interrupt};
pub use mobula_macros::remote;
pub use object::{ObjectRef, collect, wait};
pub use placement::{Bundle, Node, NodeInfo, PlacementGroup, PlacementGroupOptions};
pub use resources::Resources;
pub use run::RunDir;
pub use runtime::Runtime;
pub use scheduler::PlacementStrategy;
pub use stream::{ObjectStream, StreamTask, Yield};
pub use task::{Backoff, Flow, Placement, Task, TaskOptions};
pub use world::World;
