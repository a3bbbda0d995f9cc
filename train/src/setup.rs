//! What the trainer tells its workers.

use crate::Result;
use crate::collective::{self, Collective, Compression, Transport};
use crate::config::BestCheckpoints;
use crate::nccl::{DeviceSums, first_gpu};
use crate::outer::LocalSgd;
use crate::overlap::Overlap;
use candle_core::Device;
use mobula_core::Member;
use mobula_core::checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What the trainer tells its workers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Setup {
    /// A number of its own for each training.
    pub(crate) training: u64,
    pub(crate) checkpoints: Option<PathBuf>,
    pub(crate) keep: usize,
    pub(crate) best: Option<BestCheckpoints>,
    pub(crate) every_epochs: u64,
    pub(crate) every_steps: Option<u64>,
    pub(crate) asynchronous: bool,
    pub(crate) resume_from: Option<Checkpoint>,
    /// Whether new ranks get what the others have.
    pub(crate) heals: bool,
    /// Whether there may be more or fewer ranks later.
    pub(crate) is_elastic: bool,
    pub(crate) sync_batch_norm: bool,
    pub(crate) shard_optimizer: bool,
    pub(crate) mirror_optimizer: bool,
    pub(crate) overlap: Overlap,
    pub(crate) local_sgd: Option<LocalSgd>,
    pub(crate) virtual_shards: Option<usize>,
    /// Of each worker.
    pub(crate) gpus: f64,
    pub(crate) transport: Transport,
    pub(crate) compression: Compression,
    #[serde(default = "collective::default_timeout")]
    pub(crate) timeout: Duration,
    /// The host that each rank is said to be on, for tests.
    pub(crate) hosts: Option<Vec<u64>>,
    /// Gradients on the CPU are taken for those of another device, for tests.
    pub(crate) elsewhere: bool,
}

impl Setup {
    pub(crate) fn connect(&self, member: &Arc<Member>) -> Result<Arc<dyn Collective>> {
        let (in_tree, hosts) = (self.virtual_shards.is_some(), self.hosts.as_deref());
        let (transport, compression) = (self.transport, self.compression);
        collective::connect(member, transport, compression, in_tree, self.timeout, hosts)
    }

    /// The first GPU that this process sees is the worker's own.
    pub(crate) fn device(&self) -> Result<Device> {
        if self.gpus > 0.0 { first_gpu() } else { Ok(Device::Cpu) }
    }

    /// What sums gradients where they are, if that is asked for.
    pub(crate) fn device_sums(
        &self,
        member: &Arc<Member>,
        device: &Device,
    ) -> Result<Option<DeviceSums>> {
        let is_wanted = self.transport == Transport::Nccl;
        is_wanted.then(|| DeviceSums::connect(member, device, self.timeout)).transpose()
    }
}
