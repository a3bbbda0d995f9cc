//! What a trainer is told: how many workers, what failures, which checkpoints.

use crate::collective::{self, Compression, Transport};
use crate::optim::Mode;
use crate::outer::LocalSgd;
use crate::overlap::Overlap;
use crate::workers::WorkerCount;
use crate::{Error, Result};
use mobula_core::{Elastic, OnLoss, Placement, Resources, RestartPolicy};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How many workers, and what each one holds.
#[derive(Clone, Debug)]
pub struct ScalingConfig {
    /// Workers. With a range the training is elastic: it begins with as many as there is room for,
    /// goes on with those that are left when lost ones cannot be replaced, and with more when there is
    /// room again, as another job has ended or a machine has joined. Workers on threads stay as many as
    /// they are at the start. Default: 1.
    pub num_workers: WorkerCount,
    /// How long after its start, or another change of the workers, an elastic training may take in more
    /// of them. They begin behind the step that the others are in. Default: 10 seconds.
    pub grow_interval: Duration,
    /// What each worker holds. One that holds a GPU, or a part of one, computes there. Default: 1 CPU.
    pub resources_per_worker: Resources,
    /// Where workers run. Default: each in a process of its own.
    pub placement: Placement,
    /// How long the training waits for workers' resources that others hold: at its start, and, where
    /// their number is fixed, for those in the place of lost ones. Default: 10 minutes.
    pub placement_timeout: Duration,
    /// Whether batch norms take their statistics over the rows of all workers, as PyTorch's
    /// `SyncBatchNorm` does, instead of over those of each by itself. Training is then the same
    /// for any number of workers, but for rounding and dropout, at the price of three sums over them in each of these layers
    /// in each step. Default: no.
    pub sync_batch_norm: bool,
    /// Whether each worker keeps the optimizer's state of a part of the parameters only, updates these,
    /// and gives the new weights to the others: ZeRO, stage 1. Trains as without it, on one machine to the
    /// same bits, and saves all of that memory but one part in so many. Parts are of whole parameters, so
    /// the largest is no smaller than the largest parameter. Checkpoints hold the parts in files of their own, which any number of workers
    /// goes on from. A lost worker takes its part with it, so training goes on from the newest checkpoint
    /// then, unless `mirror_optimizer` says otherwise. Default: no.
    pub shard_optimizer: bool,
    /// Whether each worker also keeps, and updates, the part of another one, on another machine unless
    /// one has more than half of the workers. A lost worker then costs no step, as without
    /// `shard_optimizer`, nor does a lost machine, unless a part is lost with its mirror, such as by those
    /// that are let go to come to a power of two. Parts take twice the memory, and gradients travel as
    /// without `shard_optimizer`. Only with that, and does nothing where lost workers are not replaced
    /// one by one, as on threads. Default: no.
    pub mirror_optimizer: bool,
    /// Cuts each batch into so many shards, whose gradients are computed one by one and added up in
    /// one tree, so that any number of workers trains to the same bits. A power of two; then the number
    /// of workers has to be one too, and those of a range that are too many for one are let go. The
    /// batch's rows are best a multiple of it. Batch norms take
    /// their statistics over a shard. The computation of a worker is that of smaller batches, and costs what
    /// these do. Default: no.
    pub virtual_shards: Option<usize>,
    /// Whether gradients are summed while the backward pass still computes. Not with `sync_batch_norm`,
    /// `shard_optimizer`, `virtual_shards` or [`Transport::Nccl`], where all are summed after it. Default:
    /// [`Overlap::Auto`], between machines.
    pub overlap: Overlap,
    /// Has workers take steps of their own, over their own rows, and meet now and then: for networks
    /// that are too slow to meet in each step. Not with `shard_optimizer`, `sync_batch_norm` or
    /// `virtual_shards`; `overlap` and `compression` have nothing to do then. A lost worker means
    /// the newest checkpoint, and checkpoints are taken when workers meet. Default: no.
    pub local_sgd: Option<LocalSgd>,
    /// How workers reach each other. Default: by the fastest way that there is.
    pub transport: Transport,
    /// How gradients travel between machines. Not with `virtual_shards`, whose bits would depend on the
    /// number of machines. Default: as they are.
    pub compression: Compression,
    /// How long a worker waits in a step for the others before it gives up and says who is late.
    /// Lost workers are noticed sooner, by their heartbeats, and a checkpoint may take longer.
    /// Default: 60 seconds.
    pub timeout: Duration,
}

impl Default for ScalingConfig {
    fn default() -> Self {
        Self {
            num_workers: 1.into(),
            grow_interval: Elastic::default().grow_interval,
            resources_per_worker: Resources::cpus(1.0),
            placement: Placement::Process,
            placement_timeout: Duration::from_secs(600),
            sync_batch_norm: false,
            shard_optimizer: false,
            mirror_optimizer: false,
            virtual_shards: None,
            overlap: Overlap::default(),
            local_sgd: None,
            transport: Transport::Auto,
            compression: Compression::None,
            timeout: collective::default_timeout(),
        }
    }
}

impl ScalingConfig {
    /// So many worker processes with 1 CPU each: `4`, or `2..=4` of an elastic training.
    pub fn workers(num_workers: impl Into<WorkerCount>) -> Self {
        Self { num_workers: num_workers.into(), ..Self::default() }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let (workers, invalid) = (self.num_workers, |option, got: String, expected| {
            Err(Error::Option { option, got, expected })
        });
        workers.check()?;
        let each_step =
            self.virtual_shards.is_some() || self.sync_batch_norm || self.shard_optimizer;
        let most = workers.power_of_two();
        match self.virtual_shards {
            _ if self.mirror_optimizer && !self.shard_optimizer => {
                invalid("mirror_optimizer", "true".to_owned(), "false without `shard_optimizer`")
            }
            _ if self.local_sgd.as_ref().is_some_and(|local| local.every_steps == 0) => {
                invalid("local_sgd.every_steps", "0".to_owned(), "at least 1")
            }
            _ if self.transport == Transport::Nccl && self.is_for_the_cpu() => {
                let expected = "Auto with `virtual_shards`, `local_sgd` or `compression`, or without a GPU for each worker";
                invalid("transport", "Nccl".to_owned(), expected)
            }
            _ if self.local_sgd.is_some() && each_step => {
                let expected = "none with `virtual_shards`, `sync_batch_norm` or `shard_optimizer`, which meet in each step";
                invalid("local_sgd", "some".to_owned(), expected)
            }
            None => self.check_gpus(),
            Some(shards) if !shards.is_power_of_two() || shards < most.unwrap_or(workers.max) => {
                let expected = "a power of two, and at least the number of workers";
                invalid("virtual_shards", shards.to_string(), expected)
            }
            Some(_) if most.is_none() => {
                let expected = "a power of two where there are virtual shards";
                invalid("num_workers", workers.to_string(), expected)
            }
            Some(_) if self.sync_batch_norm => {
                let expected = "false where there are virtual shards: they are computed one by one";
                invalid("sync_batch_norm", "true".to_owned(), expected)
            }
            Some(_) if self.compression != Compression::None => {
                let expected =
                    "None where there are virtual shards: roundings depend on the machines";
                invalid("compression", format!("{:?}", self.compression), expected)
            }
            Some(_) => self.check_gpus(),
        }
    }

    /// Whether gradients are summed in a way that there is on the CPU alone.
    fn is_for_the_cpu(&self) -> bool {
        self.virtual_shards.is_some()
            || self.local_sgd.is_some()
            || self.compression != Compression::None
            || self.resources_per_worker.gpus < 1.0
    }

    fn check_gpus(&self) -> Result<()> {
        let gpus = self.resources_per_worker.gpus;
        let missing = match self.placement {
            _ if gpus == 0.0 => return Ok(()),
            _ if !cfg!(feature = "cuda") => "to be built with the feature `cuda`",
            Placement::Thread => "`placement` to be `Placement::Process`",
            Placement::Process => return Ok(()),
        };
        Err(Error::Gpus { gpus, missing })
    }
}

/// How often a training may lose workers, and what it goes on from.
#[derive(Clone, Copy, Debug)]
pub struct FailureConfig {
    /// Losses of workers that are survived. Errors of the training function itself are never
    /// retried: they would come again. Default: 3.
    pub max_failures: u32,
    /// Losses longer ago than this count no more. Default: all count, however long ago.
    pub window: Duration,
    /// Which workers get new processes then. The training function begins anew on all of them.
    ///
    /// Default: [`OnLoss::ReplaceLost`]: the lost ones, to which the others give what they have in
    /// memory, so that no step is lost; the newest checkpoint counts where nobody has anything. With
    /// [`OnLoss::RestartAll`] all get new ones, and go on from the newest checkpoint.
    pub on_loss: OnLoss,
    /// How long an elastic training looks for room in place of a machine that it has lost, before it
    /// goes on with fewer workers, or ends where that are too few. Default: 5 seconds.
    pub replace_within: Duration,
}

impl Default for FailureConfig {
    fn default() -> Self {
        Self {
            max_failures: 3,
            window: Duration::MAX,
            on_loss: OnLoss::ReplaceLost,
            replace_within: Elastic::default().replace_within,
        }
    }
}

impl FailureConfig {
    pub(crate) fn restart_policy(&self) -> RestartPolicy {
        RestartPolicy { window: self.window, ..RestartPolicy::at_most(self.max_failures) }
    }
}

/// When checkpoints are taken, and how many stay.
#[derive(Clone, Debug)]
pub struct CheckpointConfig {
    /// Epochs between two checkpoints; the last epoch always has one. Default: 1.
    pub every_epochs: u64,
    /// Steps between two more checkpoints, which may be within an epoch. One that is due while the
    /// one before it is being written is taken after that. Default: none.
    pub every_steps: Option<u64>,
    /// Checkpoints kept, at least 1, the newest. Default: 2, so that a damaged one has one before it.
    pub keep: usize,
    /// Keeps the best ones beside these. Default: no.
    pub best: Option<BestCheckpoints>,
    /// Whether training goes on while a checkpoint is written. What is written is copied while the
    /// next step computes its gradients, so weights must be changed by [`step`] alone. One that cannot
    /// be written is noted, and training goes on; the last one is waited for, and is an error.
    /// Default: yes.
    ///
    /// [`step`]: crate::WorkerContext::step
    pub asynchronous: bool,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_epochs: 1, every_steps: None, keep: 2, best: None, asynchronous: true }
    }
}

/// The checkpoints of the best epochs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestCheckpoints {
    /// The metric that decides, of those of an epoch.
    pub metric: String,
    /// Whether lower or higher is better.
    pub mode: Mode,
    /// How many are kept.
    pub keep: usize,
}
