//! The trainer: runs a training function on a group of workers, and again when one is lost.

use crate::collective::{self, Compression, Transport};
use crate::context::Setup;
use crate::keeper;
use crate::optim::Mode;
use crate::outer::LocalSgd;
use crate::overlap::Overlap;
use crate::pace::Spread;
use crate::report::{EpochReport, Progress, Resumed, WorkerReport};
use crate::saver::remove_parts;
use crate::workers::{Changes, WorkerCount};
use crate::{Error, Result};
use mobula_core::checkpoint::Checkpoint;
use mobula_core::console::{self, Progress as Bar};
use mobula_core::group::decode_report;
use mobula_core::run::{MetricsWriter, RunDir, RunState};
use mobula_core::{
    BoxError, Elastic, Flow, Group, GroupEvent, GroupOptions, GroupTask, OnLoss, Placement,
    Resources, RestartPolicy, Runtime,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
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
    /// then. Default: no.
    pub shard_optimizer: bool,
    /// Cuts each batch into so many shards, whose gradients are computed one by one and added up in
    /// one tree, so that any number of workers trains to the same bits. A power of two; then the number
    /// of workers has to be one too, and those of a range that are too many for one are let go. The
    /// batch's rows are best a multiple of it. Batch norms take
    /// their statistics over a shard. The computation of a worker is that of smaller batches, and costs what
    /// these do. Default: no.
    pub virtual_shards: Option<usize>,
    /// Whether gradients are summed while the backward pass still computes. Not with `sync_batch_norm`,
    /// `shard_optimizer` or `virtual_shards`, where all are summed after it. Default:
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
            sync_batch_norm: false,
            shard_optimizer: false,
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

    fn check(&self) -> Result<()> {
        let (workers, invalid) = (self.num_workers, |option, got: String, expected| {
            Err(Error::Option { option, got, expected })
        });
        workers.check()?;
        let each_step =
            self.virtual_shards.is_some() || self.sync_batch_norm || self.shard_optimizer;
        let most = workers.power_of_two();
        match self.virtual_shards {
            _ if self.local_sgd.as_ref().is_some_and(|local| local.every_steps == 0) => {
                invalid("local_sgd.every_steps", "0".to_owned(), "at least 1")
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
    fn restart_policy(&self) -> RestartPolicy {
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

    /// Where workers may join, all have what they are to go on from.
    fn check_range(&self) -> Result<()> {
        let is_parted = self.scaling.shard_optimizer || self.scaling.local_sgd.is_some();
        let (option, got, expected) = match self.failure.on_loss {
            _ if !self.is_elastic() => return Ok(()),
            OnLoss::RestartAll => {
                ("on_loss", "RestartAll", "ReplaceLost where num_workers is a range")
            }
            OnLoss::ReplaceLost if is_parted => {
                let expected = "one number with `shard_optimizer` or `local_sgd`: to grow would lose the steps since the checkpoint";
                ("num_workers", "a range", expected)
            }
            OnLoss::ReplaceLost => return Ok(()),
        };
        Err(Error::Option { option, got: got.to_owned(), expected })
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
        Ok(Setup {
            training: RandomState::new().build_hasher().finish(),
            checkpoints: checkpoints.map(|store| store.dir().to_owned()),
            keep: self.checkpoint.keep.max(least),
            best: self.checkpoint.best.clone(),
            every_epochs: self.checkpoint.every_epochs,
            every_steps: self.checkpoint.every_steps,
            asynchronous: self.checkpoint.asynchronous,
            resume_from: self.newest_checkpoint()?,
            // Those on threads are never lost one by one.
            heals: replaces
                && !self.scaling.shard_optimizer
                && self.scaling.local_sgd.is_none()
                && (self.failure.max_failures > 0 || self.is_elastic())
                && self.scaling.placement == Placement::Process,
            is_elastic: self.is_elastic(),
            sync_batch_norm: self.scaling.sync_batch_norm,
            shard_optimizer: self.scaling.shard_optimizer,
            virtual_shards: self.scaling.virtual_shards,
            gpus: self.scaling.resources_per_worker.gpus,
            overlap: self.scaling.overlap,
            local_sgd: self.scaling.local_sgd.clone(),
            transport: self.scaling.transport,
            compression: self.scaling.compression,
            timeout: self.scaling.timeout,
            hosts: None,
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

/// Where reports go: the run's metrics, and the user's eyes.
struct Journal {
    bar: Option<Bar>,
    name: String,
    run: Option<RunDir>,
    metrics: Option<MetricsWriter>,
    last: BTreeMap<String, f64>,
    /// How long each rank computes in a step, as far as it has told.
    step_ms: BTreeMap<usize, f64>,
    changes: Changes,
}

impl Journal {
    fn new(name: &str, run: Option<&RunDir>) -> Result<Self> {
        Ok(Self {
            bar: None,
            name: name.to_owned(),
            run: run.cloned(),
            metrics: run.map(RunDir::metrics_writer).transpose()?,
            last: BTreeMap::new(),
            step_ms: BTreeMap::new(),
            changes: Changes::default(),
        })
    }

    fn record(&mut self, rank: usize, report: WorkerReport) -> Result<()> {
        match report {
            WorkerReport::Progress(progress) => {
                self.step_ms.insert(rank, progress.step_ms);
                self.progress(&progress)
            }
            WorkerReport::StepMs(step_ms) => {
                self.step_ms.insert(rank, step_ms);
                Ok(())
            }
            WorkerReport::Epoch(report) => self.epoch(report),
            WorkerReport::Metrics { step, metrics } => self.log(step, &metrics),
            WorkerReport::Resumed(resumed) => self.resume(resumed),
            WorkerReport::Note(text) => {
                console::note(format!("{}: {text}", self.name));
                Ok(())
            }
        }
    }

    /// Goes back to the step that training goes on from: what comes after it will be made again.
    fn resume(&mut self, resumed: Resumed) -> Result<()> {
        let Resumed { step, epoch, metrics, from_rank } = resumed;
        let kept = from_rank.map_or(String::new(), |rank| format!(", which rank {rank} has kept"));
        let (changes, workers) = self.changes.take();
        console::note(match step {
            0 => format!("{}: {changes}beginning anew{workers}", self.name),
            _ => format!("{}: {changes}continuing{workers} from step {step}{kept}", self.name),
        });
        self.last = metrics;
        self.step_ms.clear();
        if let Some(run) = &self.run {
            run.rewind_metrics(step, epoch)?;
            self.metrics = Some(run.metrics_writer()?);
        }
        Ok(())
    }

    fn progress(&mut self, progress: &Progress) -> Result<()> {
        let Progress { step, epoch, epochs, loss, lr, samples_per_second, .. } = progress;
        let spread = self.show(*epoch, *epochs, *step, *loss, *samples_per_second);
        let values = [("loss", *loss), ("lr", *lr), ("samples_per_second", *samples_per_second)];
        let spread = spread.map(|spread| spread.metrics());
        let values = values.into_iter().chain(spread.into_iter().flatten());
        let values = values.map(|(name, value)| (format!("step/{name}"), value));
        self.log(*step, &values.collect())
    }

    fn epoch(&mut self, report: EpochReport) -> Result<()> {
        let value = |name: &str| report.metrics.get(name).copied().unwrap_or(f64::NAN);
        let (loss, rate) = (value("loss"), value("samples_per_second"));
        self.show(report.epoch, report.epochs, report.step, loss, rate);
        let mut values = report.metrics.clone();
        values.insert("epoch".to_owned(), report.epoch as f64);
        self.last = report.metrics;
        self.log(report.step, &values)
    }

    /// With how the ranks differ, as far as that is known, which it gives.
    fn show(&mut self, epoch: u64, epochs: u64, step: u64, loss: f64, rate: f64) -> Option<Spread> {
        let spread = Spread::of(self.step_ms.clone());
        let shown = spread.map_or(String::new(), |spread| format!("  {spread}"));
        let bar = self.bar.get_or_insert_with(|| Bar::new(format!("{} epoch", self.name), epochs));
        bar.update(epoch, format!("step {step}  loss {loss:.4}  {rate:.0} samples/s{shown}"));
        spread
    }

    fn log(&mut self, step: u64, values: &BTreeMap<String, f64>) -> Result<()> {
        Ok(self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.log(step, values))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(step_ms: f64) -> WorkerReport {
        let (step, epoch, epochs) = (1, 0, 2);
        let (loss, lr, samples_per_second) = (0.5, 0.1, 100.0);
        let progress = Progress { step, epoch, epochs, loss, lr, samples_per_second, step_ms };
        WorkerReport::Progress(progress)
    }

    #[test]
    fn the_slowest_rank_is_shown_until_all_begin_anew() {
        let mut journal = Journal::new("test", None).expect("a journal");
        let mut shown = |reports: Vec<(usize, WorkerReport)>| {
            for (rank, report) in reports {
                journal.record(rank, report).expect("recorded");
            }
            journal.show(0, 2, 1, 0.5, 100.0).map(|spread| spread.to_string())
        };
        assert_eq!(shown(vec![(0, progress(5.14))]), None);
        let others = vec![(1, WorkerReport::StepMs(9.76)), (2, WorkerReport::StepMs(6.0))];
        assert_eq!(shown(others).as_deref(), Some("steps 5.1-9.8 ms, rank 1 slowest"));
        assert_eq!(shown(vec![(0, WorkerReport::Resumed(Resumed::default()))]), None);
    }
}
