//! The trainer: runs a training function on a group of workers, and again when one is lost.

use crate::config::{CheckpointConfig, FailureConfig, ScalingConfig};
use crate::journal::Journal;
use crate::keeper;
use crate::report::{EpochReport, WorkerReport};
use crate::saver::remove_parts;
use crate::setup::Setup;
use crate::{Error, Result};
use mobula_core::checkpoint::Checkpoint;
use mobula_core::console;
use mobula_core::group::decode_report;
use mobula_core::run::{RunDir, RunState};
use mobula_core::{
    BoxError, Elastic, Flow, Group, GroupEvent, GroupOptions, GroupTask, OnLoss, Placement, Runtime,
};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// Trains a model on a group of workers.
#[derive(Debug)]
pub struct Trainer<T> {
    task: GroupTask<T>,
    name: String,
    scaling: ScalingConfig,
    failure: FailureConfig,
    checkpoint: CheckpointConfig,
    run: Option<RunDir>,
    show_logs: bool,
}

/// How a training ended.
#[derive(Debug)]
pub struct TrainingResult<T> {
    /// The metrics of the last epoch.
    pub metrics: BTreeMap<String, f64>,
    /// The newest checkpoint, if the trainer has a run directory.
    pub checkpoint: Option<Checkpoint>,
    /// The best checkpoint, if [`CheckpointConfig::best`] says which that is.
    pub best_checkpoint: Option<Checkpoint>,
    /// How often workers were lost and the group started again.
    pub restarts: u32,
    /// What the training function returned, by rank: of as many as there were at the end.
    pub values: Vec<T>,
}

/// Who hears of each epoch, and may end the training.
type OnEpoch<'a> = dyn FnMut(&EpochReport) -> Result<Flow, BoxError> + 'a;

impl<T> Trainer<T> {
    /// A trainer of what `some_function::remote(config)` describes: a `#[mobula::remote]`
    /// function whose first parameter is a [`Member`](mobula_core::Member).
    pub fn new(task: GroupTask<T>) -> Self {
        Self {
            task,
            name: "train".to_owned(),
            scaling: ScalingConfig::default(),
            failure: FailureConfig::default(),
            checkpoint: CheckpointConfig::default(),
            run: None,
            show_logs: true,
        }
    }

    /// Sets how many workers there are.
    pub fn with_scaling(self, scaling: ScalingConfig) -> Self {
        Self { scaling, ..self }
    }

    /// Sets what failures are survived.
    pub fn with_failure(self, failure: FailureConfig) -> Self {
        Self { failure, ..self }
    }

    /// Sets when checkpoints are taken.
    pub fn with_checkpoints(self, checkpoint: CheckpointConfig) -> Self {
        Self { checkpoint, ..self }
    }

    /// Sets whether what workers print is shown behind `[rank r]`. Default: yes.
    pub fn with_logs_shown(self, show_logs: bool) -> Self {
        Self { show_logs, ..self }
    }

    /// Writes metrics, logs and checkpoints into this run, and continues from its newest
    /// checkpoint if it has one.
    pub fn with_run(mut self, run: &RunDir) -> Self {
        self.name = run.path().file_name().map_or(self.name, |n| n.to_string_lossy().into_owned());
        self.run = Some(run.clone());
        self
    }

    /// Trains until the function has returned on every rank.
    pub fn fit(&self, runtime: &Runtime) -> Result<TrainingResult<T>> {
        self.fit_with(runtime, |_| Ok(Flow::Continue))
    }

    /// The same. `on_epoch` hears of each epoch here, where the trainer is, and may ask the training to
    /// stop: it ends with the epoch that it is in by then, or, where the function asks
    /// [`should_stop`](crate::WorkerContext::should_stop), sooner. Fitted again, the run goes on. An
    /// error of `on_epoch` ends the training at once.
    pub fn fit_with(
        &self,
        runtime: &Runtime,
        mut on_epoch: impl FnMut(&EpochReport) -> Result<Flow, BoxError>,
    ) -> Result<TrainingResult<T>> {
        self.scaling.check()?;
        self.check_range()?;
        if self.checkpoint.every_steps == Some(0) {
            let (option, got) = ("every_steps", "0".to_owned());
            return Err(Error::Option { option, got, expected: "at least 1, or none" });
        }
        self.run.as_ref().map_or(Ok(()), RunDir::claim)?;
        let run = self.run.clone();
        let _interrupted = mobula_core::on_interrupt(move || {
            run.and_then(|run| run.set_state(RunState::Interrupted).err()).map(|e| e.to_string())
        });
        let result = self.fit_with_restarts(runtime, &mut on_epoch);
        let state = if result.is_ok() { RunState::Finished } else { RunState::Failed };
        // A status that cannot be written must not hide how the training ended.
        if let Some(Err(error)) = self.run.as_ref().map(|run| run.set_state(state)) {
            console::note(error.to_string());
        }
        result
    }

    /// Where workers may join, all have what they are to go on from.
    fn check_range(&self) -> Result<()> {
        let is_parted = self.is_lost_in_part() || self.scaling.local_sgd.is_some();
        let (option, got, expected) = match self.failure.on_loss {
            _ if !self.is_elastic() => return Ok(()),
            OnLoss::RestartAll => {
                ("on_loss", "RestartAll", "ReplaceLost where num_workers is a range")
            }
            OnLoss::ReplaceLost if is_parted => {
                let expected = "one number with `local_sgd`, or with `shard_optimizer` without `mirror_optimizer`: to grow would lose the steps since the checkpoint";
                ("num_workers", "a range", expected)
            }
            OnLoss::ReplaceLost => return Ok(()),
        };
        Err(Error::Option { option, got: got.to_owned(), expected })
    }

    fn fit_with_restarts(
        &self,
        runtime: &Runtime,
        on_epoch: &mut OnEpoch<'_>,
    ) -> Result<TrainingResult<T>> {
        let mut journal = Journal::new(&self.name, self.run.as_ref())?;
        let setup = self.setup()?;
        if let Some(checkpoints) = &setup.checkpoints {
            remove_parts(checkpoints, None);
        }
        let mut restarts = 0;
        let mut group = self.start(runtime, &setup, &mut restarts)?;
        let none = |workers| (0..workers).map(|_| None).collect();
        let mut values: Vec<Option<T>> = none(group.size());
        while values.iter().any(Option::is_none) {
            match next(&mut group) {
                GroupEvent::Report { rank, payload, .. } => {
                    let report: WorkerReport = decode_report(&payload)?;
                    let epoch = report.epoch();
                    journal.record(rank, report)?;
                    if let Some(epoch) = epoch
                        && on_epoch(&epoch).map_err(Error::program)?.is_stop()
                    {
                        group.stop();
                    }
                }
                GroupEvent::Finished { rank, value } => values[rank] = Some(value),
                GroupEvent::Restarting { replaced, .. } => {
                    restarts += 1;
                    // What has been done since the checkpoint is done again, on all ranks.
                    values.fill_with(|| None);
                    journal.changes.lost(replaced);
                    self.set_context(&mut group, &setup)?;
                }
                GroupEvent::Resized { gone, size, .. } => {
                    journal.changes.resized(values.len(), &gone, size);
                    values = none(size);
                    self.set_context(&mut group, &setup)?;
                }
                GroupEvent::Failed { error, .. } => return Err(self.failure(error, restarts)),
            }
        }
        Ok(TrainingResult {
            metrics: journal.last,
            checkpoint: self.newest_checkpoint()?,
            best_checkpoint: self.best_checkpoint(&setup)?,
            restarts,
            values: values.into_iter().flatten().collect(),
        })
    }

    /// The newest checkpoint is for the next generation.
    fn set_context(&self, group: &mut Group<T>, first: &Setup) -> Result<()> {
        let training = first.training;
        Ok(group.set_context(&Setup { training, ..self.setup()? })?)
    }

    /// Whether a lost worker has what no other one has.
    fn is_lost_in_part(&self) -> bool {
        self.scaling.shard_optimizer && !self.scaling.mirror_optimizer
    }

    fn is_elastic(&self) -> bool {
        self.scaling.num_workers.is_elastic()
    }

    /// A machine may be lost in the very moment in which workers are started there.
    fn start(&self, runtime: &Runtime, setup: &Setup, restarts: &mut u32) -> Result<Group<T>> {
        let options = self.group_options(setup)?;
        loop {
            match runtime.group(&options, &self.task) {
                Ok(group) => return Ok(group),
                Err(error) if error.is_retryable() && *restarts < self.failure.max_failures => {
                    console::note(error.to_string());
                    *restarts += 1;
                }
                Err(error) => return Err(self.failure(error, *restarts)),
            }
        }
    }

    fn failure(&self, error: mobula_core::Error, restarts: u32) -> Error {
        if !error.is_retryable() {
            return error.into();
        }
        let allowed = self.failure.max_failures;
        Error::TooManyFailures { failures: restarts + 1, allowed, source: error }
    }

    /// What the workers are to continue from.
    fn setup(&self) -> Result<Setup> {
        let checkpoints = self.run.as_ref().map(|run| run.checkpoints(self.checkpoint.keep));
        let replaces = self.failure.on_loss == OnLoss::ReplaceLost;
        // A survivor of a loss may be about to save: what the others continue from has to stay.
        let least = if replaces { 2 } else { 1 };
        // Those on threads are never lost one by one.
        let heals = replaces
            && !self.is_lost_in_part()
            && self.scaling.local_sgd.is_none()
            && (self.failure.max_failures > 0 || self.is_elastic())
            && self.scaling.placement == Placement::Process;
        Ok(Setup {
            training: RandomState::new().build_hasher().finish(),
            checkpoints: checkpoints.map(|store| store.dir().to_owned()),
            keep: self.checkpoint.keep.max(least),
            best: self.checkpoint.best.clone(),
            every_epochs: self.checkpoint.every_epochs,
            every_steps: self.checkpoint.every_steps,
            asynchronous: self.checkpoint.asynchronous,
            resume_from: self.newest_checkpoint()?,
            heals,
            is_elastic: self.is_elastic(),
            sync_batch_norm: self.scaling.sync_batch_norm,
            shard_optimizer: self.scaling.shard_optimizer,
            mirror_optimizer: self.scaling.mirror_optimizer && heals,
            virtual_shards: self.scaling.virtual_shards,
            gpus: self.scaling.resources_per_worker.gpus,
            overlap: self.scaling.overlap,
            local_sgd: self.scaling.local_sgd.clone(),
            transport: self.scaling.transport,
            compression: self.scaling.compression,
            timeout: self.scaling.timeout,
            hosts: None,
            elsewhere: false,
        })
    }

    fn newest_checkpoint(&self) -> Result<Option<Checkpoint>> {
        let Some(run) = &self.run else {
            return Ok(None);
        };
        Ok(run.checkpoints(self.checkpoint.keep).latest()?)
    }

    fn best_checkpoint(&self, setup: &Setup) -> Result<Option<Checkpoint>> {
        let dir = setup.checkpoints.as_deref().filter(|_| setup.best.is_some());
        Ok(dir.map(|dir| keeper::store(dir, setup).best()).transpose()?.flatten())
    }

    fn group_options(&self, setup: &Setup) -> Result<GroupOptions> {
        let workers = self.scaling.num_workers;
        let elastic = Elastic {
            min_size: workers.min,
            powers_of_two: self.scaling.virtual_shards.is_some(),
            replace_within: self.failure.replace_within,
            grow_interval: self.scaling.grow_interval,
        };
        let options = GroupOptions {
            elastic: workers.is_elastic().then_some(elastic),
            resources: self.scaling.resources_per_worker.clone(),
            placement: self.scaling.placement,
            placement_timeout: self.scaling.placement_timeout,
            restart: self.failure.restart_policy(),
            on_loss: self.failure.on_loss,
            log_dir: self.run.as_ref().map(|run| run.path().join("logs")),
            show_logs: self.show_logs,
            ..GroupOptions::new(&self.name, workers.max)
        };
        Ok(options.with_context(setup)?)
    }
}

/// A process that hangs is found by its missing heartbeats, and a rank that others wait for by the
/// deadline of their collective; each ends in an event. A training function that computes forever
/// on all ranks is waited for: it may be right to.
fn next<T>(group: &mut Group<T>) -> GroupEvent<T> {
    loop {
        if let Some(event) = group.next_event(Duration::from_secs(1)) {
            return event;
        }
    }
}
