//! Tasks and actors in threads and worker processes, run directories, checkpoints.
#![warn(missing_docs)]

pub mod batch;
pub mod checkpoint;
pub mod clock;
pub mod console;
pub mod error;
pub mod random;
mod resources;
pub mod run;
pub mod tensorboard;

pub use batch::{Batch, BatchSource, BatchStream, Shard, StreamState};
pub use checkpoint::{Checkpoint, CheckpointStore};
pub use error::{BoxError, Error};
pub use resources::{Ledger, Resources};
pub use run::RunDir;
