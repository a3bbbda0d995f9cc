//! The trainer: runs a training function on a group of workers, and again when one is lost.

use crate::collective::{self, Transport};
use crate::context::Setup;
use crate::report::{EpochReport, Progress, WorkerReport};
use crate::state::{STATE, SavedState};
use crate::{Error, Result};
use mobula_core::checkpoint::Checkpoint;
use mobula_core::console::{self, Progress as Bar};
use mobula_core::group::decode_report;
use mobula_core::run::{MetricsWriter, RunDir, RunState};
use mobula_core::{
    Group, GroupEvent, GroupOptions, GroupTask, OnLoss, Placement, Resources, RestartPolicy,
    Runtime,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// How many workers, and what each one holds.
#[derive(Clone, Debug)]
pub struct ScalingConfig {
    /// Workers. Default: 1.
    pub num_workers: usize,
    /// What each worker holds. One that holds a GPU, or a part of one, computes there. Default: 1 CPU.
    pub resources_per_worker: Resources,
    /// Where workers run. Default: each in a process of its own.
    pub placement: Placement,
    /// Whether batch norms take their statistics over the rows of all workers, as PyTorch's
    /// `SyncBatchNorm` does, instead of over those of each by itself. Training is then the same
    /// for any number of workers, but for rounding and dropout, at the price of three sums over them in each of these layers
    /// in each step. Default: no.
    pub sync_batch_norm: bool,
    /// How workers reach each other. Default: by the fastest way that there is.
    pub transport: Transport,
    /// How long a worker waits in a step for the others before it gives up and says who is late.
    /// Lost workers are noticed sooner, by their heartbeats, and a checkpoint may take longer.
    /// Default: 60 seconds.
    pub timeout: Duration,
}

impl Default for ScalingConfig {
    fn default() -> Self {
        Self {
            num_workers: 1,
            resources_per_worker: Resources::cpus(1.0),
            placement: Placement::Process,
            sync_batch_norm: false,
            transport: Transport::Auto,
            timeout: collective::default_timeout(),
        }
    }
}

impl ScalingConfig {
    /// So many worker processes with 1 CPU each.
    pub fn workers(num_workers: usize) -> Self {
        Self { num_workers, ..Self::default() }
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

/// How often a training may fail and start again from its newest checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct FailureConfig {
    /// Losses of workers that are survived. Errors of the training function itself are never
    /// retried: they would come again. Default: 3.
    pub max_failures: u32,
    /// Which workers get new processes then. The training function begins anew on all of them.
    /// Default: every one; [`OnLoss::ReplaceLost`] saves the others their start.
    pub on_loss: OnLoss,
}

impl Default for FailureConfig {
    fn default() -> Self {
        Self { max_failures: 3, on_loss: OnLoss::RestartAll }
    }
}

impl FailureConfig {
    fn restart_policy(&self) -> RestartPolicy {
        RestartPolicy { window: Duration::MAX, ..RestartPolicy::at_most(self.max_failures) }
    }
}

/// When checkpoints are taken, and how many stay.
#[derive(Clone, Copy, Debug)]
pub struct CheckpointConfig {
    /// Epochs between two checkpoints; the last epoch always has one. Default: 1.
    pub every_epochs: u64,
    /// Checkpoints kept, at least 1. Default: 2, so that a damaged one has one before it.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_epochs: 1, keep: 2 }
    }
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
    /// How often workers were lost and the group started again.
    pub restarts: u32,
    /// What the training function returned, by rank.
    pub values: Vec<T>,
}

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
        if self.scaling.num_workers == 0 {
            let (option, got) = ("num_workers", "0".to_owned());
            return Err(Error::Option { option, got, expected: "at least 1" });
        }
        self.scaling.check_gpus()?;
        self.run.as_ref().map_or(Ok(()), RunDir::claim)?;
        let run = self.run.clone();
        let _interrupted = mobula_core::on_interrupt(move || {
            run.and_then(|run| run.set_state(RunState::Interrupted).err()).map(|e| e.to_string())
        });
        let result = self.fit_with_restarts(runtime);
        let state = if result.is_ok() { RunState::Finished } else { RunState::Failed };
        // A status that cannot be written must not hide how the training ended.
        if let Some(Err(error)) = self.run.as_ref().map(|run| run.set_state(state)) {
            console::note(error.to_string());
        }
        result
    }

    fn fit_with_restarts(&self, runtime: &Runtime) -> Result<TrainingResult<T>> {
        let mut journal = Journal::new(&self.name, self.run.as_ref())?;
        let setup = self.setup(&mut journal)?;
        let mut restarts = 0;
        let mut group = self.start(runtime, &setup, &mut restarts)?;
        let mut values: Vec<Option<T>> = (0..self.scaling.num_workers).map(|_| None).collect();
        while values.iter().any(Option::is_none) {
            match next(&mut group) {
                GroupEvent::Report { payload, .. } => journal.record(decode_report(&payload)?)?,
                GroupEvent::Finished { rank, value } => values[rank] = Some(value),
                GroupEvent::Restarting { .. } => {
                    restarts += 1;
                    // What has been done since the checkpoint is done again, on all ranks.
                    values.fill_with(|| None);
                    group.set_context(&self.setup(&mut journal)?)?;
                }
                GroupEvent::Failed { error, .. } => return Err(self.failure(error, restarts)),
            }
        }
        self.result(values.into_iter().flatten().collect(), restarts, journal)
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
    fn setup(&self, journal: &mut Journal) -> Result<Setup> {
        let resume_from = self.newest_checkpoint()?;
        journal.resume(resume_from.as_ref(), self.run.as_ref())?;
        let checkpoints = self.run.as_ref().map(|run| run.checkpoints(self.checkpoint.keep));
        // A survivor of a loss may be about to save: what the others continue from has to stay.
        let least = if self.failure.on_loss == OnLoss::ReplaceLost { 2 } else { 1 };
        Ok(Setup {
            checkpoints: checkpoints.map(|store| store.dir().to_owned()),
            keep: self.checkpoint.keep.max(least),
            every_epochs: self.checkpoint.every_epochs,
            resume_from,
            sync_batch_norm: self.scaling.sync_batch_norm,
            gpus: self.scaling.resources_per_worker.gpus,
            transport: self.scaling.transport,
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

    fn group_options(&self, setup: &Setup) -> Result<GroupOptions> {
        let options = GroupOptions {
            resources: self.scaling.resources_per_worker.clone(),
            placement: self.scaling.placement,
            restart: self.failure.restart_policy(),
            on_loss: self.failure.on_loss,
            log_dir: self.run.as_ref().map(|run| run.path().join("logs")),
            show_logs: self.show_logs,
            ..GroupOptions::new(&self.name, self.scaling.num_workers)
        };
        Ok(options.with_context(setup)?)
    }

    fn result(&self, values: Vec<T>, restarts: u32, journal: Journal) -> Result<TrainingResult<T>> {
        let checkpoint = self.newest_checkpoint()?;
        Ok(TrainingResult { metrics: journal.last, checkpoint, restarts, values })
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
    metrics: Option<MetricsWriter>,
    last: BTreeMap<String, f64>,
}

impl Journal {
    fn new(name: &str, run: Option<&RunDir>) -> Result<Self> {
        Ok(Self {
            bar: None,
            name: name.to_owned(),
            metrics: run.map(RunDir::metrics_writer).transpose()?,
            last: BTreeMap::new(),
        })
    }

    /// Goes back to where the checkpoint was taken: what comes after it will be made again.
    fn resume(&mut self, from: Option<&Checkpoint>, run: Option<&RunDir>) -> Result<()> {
        let (Some(checkpoint), Some(run)) = (from, run) else {
            return Ok(());
        };
        console::note(format!("{}: continuing from step {}", self.name, checkpoint.step()));
        self.last = checkpoint.json::<SavedState>(STATE)?.metrics;
        run.rewind_metrics(checkpoint.step())?;
        self.metrics = Some(run.metrics_writer()?);
        Ok(())
    }

    fn record(&mut self, report: WorkerReport) -> Result<()> {
        match report {
            WorkerReport::Progress(progress) => self.progress(&progress),
            WorkerReport::Epoch(report) => self.epoch(report),
        }
    }

    fn progress(&mut self, progress: &Progress) -> Result<()> {
        let Progress { step, epoch, epochs, loss, lr, samples_per_second } = progress;
        self.show(*epoch, *epochs, *step, *loss, *samples_per_second);
        let values = [("loss", *loss), ("lr", *lr), ("samples_per_second", *samples_per_second)];
        let values = values.map(|(name, value)| (format!("step/{name}"), value));
        self.log(*step, &BTreeMap::from(values))
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

    fn show(&mut self, epoch: u64, epochs: u64, step: u64, loss: f64, rate: f64) {
        let bar = self.bar.get_or_insert_with(|| Bar::new(format!("{} epoch", self.name), epochs));
        bar.update(epoch, format!("step {step}  loss {loss:.4}  {rate:.0} samples/s"));
    }

    fn log(&mut self, step: u64, values: &BTreeMap<String, f64>) -> Result<()> {
        Ok(self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.log(step, values))?)
    }
}
