//! What a training function gets: its share of the work, and the steps that all ranks take
//! together.

use crate::collective::{self, Alone, Collective, Element, ReduceOp, Transport};
use crate::device::OnDevice;
use crate::report::{EpochReport, Meter, WorkerReport};
use crate::state::TrainState;
use crate::{Error, Result};
use candle_core::Device;
use mobula_core::checkpoint::{Checkpoint, CheckpointStore};
use mobula_core::{Batch, BatchSource, BatchStream, BoxError, Flow, Member, Shard};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What the trainer tells its workers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) checkpoints: Option<PathBuf>,
    pub(crate) keep: usize,
    pub(crate) every_epochs: u64,
    pub(crate) resume_from: Option<Checkpoint>,
    #[serde(default)]
    pub(crate) sync_batch_norm: bool,
    /// Of each worker.
    #[serde(default)]
    pub(crate) gpus: f64,
    #[serde(default)]
    pub(crate) transport: Transport,
    #[serde(default = "collective::default_timeout")]
    pub(crate) timeout: Duration,
    /// The host that each rank is said to be on, for tests.
    #[serde(default)]
    pub(crate) hosts: Option<Vec<u64>>,
}

impl Setup {
    fn connect(&self, member: &Arc<Member>) -> Result<Arc<dyn Collective>> {
        collective::connect(member, self.transport, self.timeout, self.hosts.as_deref())
    }

    /// The first GPU that this process sees is the worker's own.
    fn device(&self) -> Result<Device> {
        if self.gpus > 0.0 { Ok(Device::new_cuda(0)?) } else { Ok(Device::Cpu) }
    }
}

/// The training function's view of its group, or of a world of one.
pub struct WorkerContext<'a> {
    place: Place<'a>,
    pub(crate) collective: Arc<dyn Collective>,
    pub(crate) setup: Setup,
    device: Device,
    files: BTreeMap<String, Vec<u8>>,
    pub(crate) meter: Meter,
}

/// Who listens: the trainer, or whoever runs the function alone.
enum Place<'a> {
    Member(Arc<Member>),
    Alone(Listener<'a>),
}

type Listener<'a> = Box<dyn FnMut(&EpochReport) -> Result<Flow, BoxError> + 'a>;

impl std::fmt::Debug for WorkerContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerContext").field("shard", &self.shard()).finish_non_exhaustive()
    }
}

impl WorkerContext<'static> {
    /// The context of a member of a [`Trainer`](crate::Trainer)'s group.
    pub fn join(member: Member) -> Result<Self> {
        let (setup, member): (Setup, _) = (member.context()?, Arc::new(member));
        let (collective, device) = (setup.connect(&member)?, setup.device()?);
        Ok(Self { device, ..Self::new(Place::Member(member), collective, setup) })
    }
}

impl<'a> WorkerContext<'a> {
    /// A world of one without checkpoints, for trials and tests. `on_epoch` hears of each epoch
    /// and may stop the training.
    pub fn alone(on_epoch: impl FnMut(&EpochReport) -> Result<Flow, BoxError> + 'a) -> Self {
        Self::new(Place::Alone(Box::new(on_epoch)), Arc::new(Alone), Setup::default())
    }

    fn new(place: Place<'a>, collective: Arc<dyn Collective>, setup: Setup) -> Self {
        let (files, meter) = (BTreeMap::new(), Meter::default());
        Self { place, collective, setup, device: Device::Cpu, files, meter }
    }

    /// This worker's share of a stream.
    pub fn shard(&self) -> Shard {
        self.collective.shard()
    }

    /// The device to compute on: the first GPU that the worker was given, or the CPU if it was given
    /// none. The model has to be there; batches of [`batches`](Self::batches) are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// This worker's share of a source, on its device.
    pub fn batches(&self, source: &dyn BatchSource) -> Result<Box<dyn BatchStream>> {
        let stream = source.open(self.shard())?;
        match &self.device {
            Device::Cpu => Ok(stream),
            device => Ok(Box::new(OnDevice { stream, device: device.clone() })),
        }
    }

    /// Computes on this device, in a world of one: a [`Trainer`](crate::Trainer)'s workers have that
    /// of their resources.
    pub fn on_device(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    /// Has every checkpoint hold one more file, such as the fitted preprocessor that goes with
    /// the model.
    pub fn add_checkpoint_file(&mut self, name: &str, content: impl Into<Vec<u8>>) {
        self.files.insert(name.to_owned(), content.into());
    }

    /// Continues from the run's newest valid checkpoint, if there is one. Says whether.
    pub fn restore(
        &mut self,
        state: &mut TrainState,
        stream: &mut dyn BatchStream,
    ) -> Result<bool> {
        let Some(checkpoint) = &self.setup.resume_from else {
            return Ok(false);
        };
        state.restore(checkpoint, stream)?;
        self.meter.restart_clock();
        Ok(true)
    }

    /// The mean over all rows of one epoch of `stream` on all ranks; `total` gives the sum over
    /// the rows of a batch, such as the number of correct ones.
    pub fn mean_over<E: Into<BoxError>>(
        &mut self,
        stream: &mut dyn BatchStream,
        mut total: impl FnMut(&Batch) -> Result<f64, E>,
    ) -> Result<f64> {
        let mut sums = [0.0, 0.0];
        while let Some(batch) = stream.next_batch()? {
            if batch.rows() > 0 {
                sums[0] += total(&batch).map_err(Error::program)?;
                sums[1] += batch.rows() as f64;
            }
        }
        self.all_reduce_sum(&mut sums)?;
        self.meter.restart_clock();
        if sums[1] == 0.0 {
            return Err(Error::NoRows);
        }
        Ok(sums[0] / sums[1])
    }

    /// What the ranks can do together beside steps.
    pub fn collective(&self) -> &dyn Collective {
        self.collective.as_ref()
    }

    /// Replaces the values on every rank by their sums over all ranks. All ranks must call it
    /// alike.
    pub fn all_reduce_sum<T: Element>(&mut self, values: &mut [T]) -> Result<()> {
        self.collective.all_reduce(values, ReduceOp::Sum)
    }

    /// Ends an epoch: counts it, commits a checkpoint when one is due, reports the metrics and
    /// the mean loss. When the training is to stop here, `state` is finished afterwards, on all
    /// ranks alike.
    pub fn end_epoch(
        &mut self,
        state: &mut TrainState,
        stream: &dyn BatchStream,
        metrics: &[(&str, f64)],
    ) -> Result<()> {
        state.count_epoch();
        let mut all = self.meter.end_epoch();
        all.insert("lr".to_owned(), state.updater.lr());
        if let Some(scale) = state.updater.loss_scale() {
            all.insert("loss_scale".to_owned(), scale.scale().into());
            all.insert("skipped_steps".to_owned(), scale.skipped_steps() as f64);
        }
        all.extend(metrics.iter().map(|(name, value)| ((*name).to_owned(), *value)));
        let metrics = all;
        self.observe(state, &metrics)?;
        self.checkpoint_if_due(state, stream, &metrics)?;
        let report = EpochReport {
            epoch: state.epoch(),
            epochs: state.epochs(),
            step: state.step(),
            metrics,
        };
        let mut stop = [f64::from(u8::from(self.tell_epoch(report)?.is_stop()))];
        self.collective.all_reduce(&mut stop, ReduceOp::Max)?;
        self.meter.restart_clock();
        if stop[0] > 0.0 {
            state.stop();
        }
        Ok(())
    }

    /// Rank 0's metric counts, so that the learning rate stays the same on all ranks.
    fn observe(&mut self, state: &mut TrainState, metrics: &BTreeMap<String, f64>) -> Result<()> {
        let Some(metric) = state.updater.plateau_metric(metrics)? else {
            return Ok(());
        };
        let mut shared = [metric];
        self.collective.broadcast(&mut shared, 0)?;
        state.updater.observe(shared[0]);
        Ok(())
    }

    fn tell_epoch(&mut self, report: EpochReport) -> Result<Flow> {
        match &mut self.place {
            Place::Alone(listener) => listener(&report).map_err(Error::program),
            Place::Member(member) => {
                if member.rank() == 0 {
                    member.report(&WorkerReport::Epoch(report))?;
                }
                Ok(Flow::stop_if(member.stop_requested()))
            }
        }
    }

    /// Rank 0 writes; the others wait, so that nobody runs ahead of a checkpoint that failed.
    fn checkpoint_if_due(
        &mut self,
        state: &TrainState,
        stream: &dyn BatchStream,
        metrics: &BTreeMap<String, f64>,
    ) -> Result<()> {
        let due =
            state.is_finished() || state.epoch().is_multiple_of(self.setup.every_epochs.max(1));
        let Some(dir) = self.setup.checkpoints.clone().filter(|_| due) else {
            return Ok(());
        };
        if self.shard().rank == 0 {
            let store = CheckpointStore::new(dir, self.setup.keep);
            let files = &self.files;
            store.save(state.step(), |dir| {
                state.save(dir, stream, metrics).map_err(mobula_core::Error::layer)?;
                for (name, content) in files {
                    std::fs::write(dir.join(name), content).map_err(mobula_core::Error::layer)?;
                }
                Ok(())
            })?;
        }
        self.collective.patient_barrier()
    }

    pub(crate) fn report_progress(&mut self, state: &TrainState) -> Result<()> {
        if let Place::Member(member) = &self.place
            && member.rank() == 0
            && let Some(progress) = self.meter.progress(state)
        {
            member.report(&WorkerReport::Progress(progress))?;
        }
        Ok(())
    }
}
