//! What a training function gets: its share of the work, and the steps that all ranks take
//! together.

use crate::collective::{self, Alone, Collective, Compression, Element, ReduceOp, Transport};
use crate::keeper::Keeper;
use crate::outer::LocalSgd;
use crate::overlap::{EarlySums, Overlap};
use crate::pace::{Spread, Timed};
use crate::report::{EpochReport, Meter, Resumed, WorkerReport};
use crate::share::Share;
use crate::snapshot::broadcast_text;
use crate::state::TrainState;
use crate::stream::{WorkerStream, owned};
use crate::trainer::BestCheckpoints;
use crate::{Error, Result};
use candle_core::Device;
use mobula_core::checkpoint::Checkpoint;
use mobula_core::{Batch, BatchSource, BatchStream, BoxError, Flow, Member, Shard};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
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
}

impl Setup {
    fn connect(&self, member: &Arc<Member>) -> Result<Arc<dyn Collective>> {
        let (in_tree, hosts) = (self.virtual_shards.is_some(), self.hosts.as_deref());
        let (transport, compression) = (self.transport, self.compression);
        collective::connect(member, transport, compression, in_tree, self.timeout, hosts)
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
    pub(crate) meter: Meter,
    pub(crate) early_sums: Option<EarlySums>,
    /// A checkpoint within the epoch waits for the one before it to be written.
    is_due: bool,
}

/// Who listens: the trainer, or whoever runs the function alone.
enum Place<'a> {
    Member(Arc<Member>, Box<Keeper>),
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
        let keeper = Box::new(Keeper::new(&member, &setup));
        Ok(Self { device, ..Self::new(Place::Member(member, keeper), collective, setup) })
    }
}

impl<'a> WorkerContext<'a> {
    /// A world of one without checkpoints, for trials and tests. `on_epoch` hears of each epoch
    /// and may stop the training.
    pub fn alone(on_epoch: impl FnMut(&EpochReport) -> Result<Flow, BoxError> + 'a) -> Self {
        Self::new(Place::Alone(Box::new(on_epoch)), Arc::new(Alone), Setup::default())
    }

    fn new(place: Place<'a>, collective: Arc<dyn Collective>, setup: Setup) -> Self {
        let (device, meter) = (Device::Cpu, Meter::default());
        // Of these, each has sums of its own within the pass, or sums another thing.
        let in_turns = setup.sync_batch_norm
            || setup.shard_optimizer
            || setup.virtual_shards.is_some()
            || setup.local_sgd.is_some();
        let overlap = if in_turns { Overlap::Never } else { setup.overlap };
        let early_sums = EarlySums::new(&collective, overlap);
        let (clock, waits) = (Arc::clone(&meter.clock), Arc::clone(&meter.waits));
        let collective = Arc::new(Timed { inner: collective, clock, waits });
        Self { place, collective, setup, device, meter, early_sums, is_due: false }
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
        let (shard, virtual_shards) = (self.shard(), self.setup.virtual_shards);
        Ok(Box::new(WorkerStream::open(source, shard, virtual_shards, &self.device)?))
    }

    /// The virtual shards of this rank, or itself as one.
    pub(crate) fn own_shards(&self) -> Range<usize> {
        let world = self.shard().world;
        owned(self.shard(), self.setup.virtual_shards.unwrap_or(world))
    }

    fn keeper(&mut self) -> Option<&mut Keeper> {
        match &mut self.place {
            Place::Member(_, keeper) => Some(keeper),
            Place::Alone(_) => None,
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
        if let Some(keeper) = self.keeper() {
            keeper.files.insert(name.to_owned(), content.into());
        }
    }

    /// Continues from what other ranks still have, if this is after the loss of some, else from the
    /// run's newest valid checkpoint, if there is one. Says whether.
    pub fn restore(
        &mut self,
        state: &mut TrainState,
        stream: &mut dyn BatchStream,
    ) -> Result<bool> {
        self.prepare(state)?;
        let resumed = self.resume(state)?;
        let is_first = self.keeper().is_none_or(|keeper| keeper.is_first_generation());
        let setup = self.setup.clone();
        self.keeper().map_or(Ok(()), |keeper| keeper.make_room(state, &setup))?;
        if resumed.is_none() && is_first {
            return Ok(false);
        }
        let (is_resumed, resumed) = (resumed.is_some(), resumed.unwrap_or_default());
        let is_healed = resumed.from_rank.is_some();
        if is_resumed {
            stream.restore(&state.saved().stream)?;
        }
        if let Place::Member(member, keeper) = &mut self.place {
            if is_resumed {
                keeper.remember(state)?;
            }
            if member.rank() == 0 {
                member.report(&WorkerReport::Resumed(resumed))?;
            }
        }
        // The one that was due when a rank was lost may not have been taken.
        if is_healed && (state.is_finished() || (state.tally.rows == 0 && state.step() > 0)) {
            self.checkpoint_after_epoch(state)?;
        }
        self.meter.restart_clock();
        Ok(is_resumed)
    }

    /// Has a state do what the setup asks for, if it does not yet.
    pub(crate) fn prepare(&self, state: &mut TrainState) -> Result<()> {
        let is_shared = |share: &Share| share.is_with(&self.collective);
        let is_wanted = self.setup.shard_optimizer && self.shard().world > 1;
        if is_wanted && !state.updater.shared().is_some_and(is_shared) {
            state.updater.share(Share::of(&state.gradients, &self.collective));
        }
        match &self.setup.local_sgd {
            Some(options) if state.outer.is_none() => state.add_outer(options),
            _ => Ok(()),
        }
    }

    fn resume(&mut self, state: &mut TrainState) -> Result<Option<Resumed>> {
        let collective = Arc::clone(&self.collective);
        if let Some(keeper) = self.keeper()
            && let Some(resumed) = keeper.heal(state, collective.as_ref())?
        {
            return Ok(Some(resumed));
        }
        let Some(checkpoint) = &self.setup.resume_from else {
            return Ok(None);
        };
        state.restore(checkpoint)?;
        let (step, epoch, metrics) = (state.step(), state.epoch(), state.metrics().clone());
        Ok(Some(Resumed { step, epoch, metrics, from_rank: None }))
    }

    /// The mean over all rows of one epoch of `stream` on all ranks; `total` gives the sum over
    /// the rows of a batch, such as the number of correct ones.
    pub fn mean_over<E: Into<BoxError>>(
        &mut self,
        stream: &mut dyn BatchStream,
        mut total: impl FnMut(&Batch) -> Result<f64, E>,
    ) -> Result<f64> {
        let means = self.means_over(stream, 1, |batch| total(batch).map(|total| vec![total]))?;
        Ok(means[0])
    }

    /// The same of several numbers: as many as `totals` gives.
    pub fn means_over<E: Into<BoxError>>(
        &mut self,
        stream: &mut dyn BatchStream,
        numbers: usize,
        mut totals: impl FnMut(&Batch) -> Result<Vec<f64>, E>,
    ) -> Result<Vec<f64>> {
        // By virtual shard, so that the order of additions does not depend on the number of ranks.
        let mut sums = vec![vec![0.0; numbers + 1]; self.own_shards().len()];
        while let Some(batch) = stream.next_batch()? {
            // Others may be waiting for this rank to begin anew with them.
            self.before_step()?;
            for (sums, part) in sums.iter_mut().zip(batch.parts()?) {
                if part.rows() > 0 {
                    let totals = totals(&part).map_err(Error::program)?;
                    if totals.len() != numbers {
                        return Err(Error::Totals { expected: numbers, got: totals.len() });
                    }
                    let totals = totals.into_iter().chain([part.rows() as f64]);
                    sums.iter_mut().zip(totals).for_each(|(sum, total)| *sum += total);
                }
            }
        }
        let mut sums = in_tree(&sums);
        self.all_reduce_sum(&mut sums)?;
        self.meter.restart_clock();
        match sums.pop() {
            Some(rows) if rows > 0.0 => Ok(sums.into_iter().map(|sum| sum / rows).collect()),
            _ => Err(Error::NoRows),
        }
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

    /// Ends an epoch: counts it, reports the metrics and the mean loss, and takes a checkpoint when
    /// one is due. When the training is to stop here, `state` is finished afterwards, on all ranks
    /// alike.
    pub fn end_epoch(
        &mut self,
        state: &mut TrainState,
        stream: &dyn BatchStream,
        metrics: &[(&str, f64)],
    ) -> Result<()> {
        self.end_epoch_with(state, stream, metrics, |_, _| Ok(Flow::Continue))
    }

    /// The same, of which `hears` hears before its end is final.
    pub(crate) fn end_epoch_with(
        &mut self,
        state: &mut TrainState,
        stream: &dyn BatchStream,
        metrics: &[(&str, f64)],
        hears: impl FnOnce(&mut TrainState, &EpochReport) -> Result<Flow>,
    ) -> Result<()> {
        self.synchronise(state)?;
        let spread = self.epoch_spread()?;
        let metrics = self.epoch_metrics(state, spread, metrics)?;
        let observed = self.plateau_metric(state, &metrics)?;
        let (epoch, epochs, step) = (state.epoch() + 1, state.epochs(), state.step());
        let report = EpochReport { epoch, epochs, step, metrics: metrics.clone() };
        let stop = hears(state, &report)?.is_stop() | self.tell_epoch(report)?.is_stop();
        let stop = self.any(stop)?;
        // From here on a rank does not wait for others before all is done: a loss finds the epoch
        // ended, or not yet.
        if let Some(metric) = observed {
            state.updater.observe(metric);
        }
        state.count_epoch(stream.state(), metrics, stop);
        if let Some(keeper) = self.keeper() {
            keeper.remember(state)?;
        }
        self.checkpoint_after_epoch(state)?;
        self.meter.restart_clock();
        Ok(())
    }

    /// Of what the ranks have computed in the steps of this epoch, the same on all.
    fn epoch_spread(&mut self) -> Result<Option<Spread>> {
        let step_ms = self.meter.take_epoch_pace().step_ms();
        Ok(Spread::of(self.collective.gather_one(step_ms)?.into_iter().enumerate()))
    }

    fn epoch_metrics(
        &self,
        state: &TrainState,
        spread: Option<Spread>,
        metrics: &[(&str, f64)],
    ) -> Result<BTreeMap<String, f64>> {
        let mut all = BTreeMap::from([
            ("loss".to_owned(), state.tally.mean_loss()),
            ("samples_per_second".to_owned(), state.tally.rows_per_second()),
            ("lr".to_owned(), state.updater.lr()),
        ]);
        if let Some(scale) = state.updater.loss_scale() {
            all.insert("loss_scale".to_owned(), scale.scale().into());
            all.insert("skipped_steps".to_owned(), scale.skipped_steps() as f64);
        }
        if let Some(steps) = state.non_finite_steps() {
            all.insert("non_finite_steps".to_owned(), steps as f64);
        }
        let spread = spread.map(|spread| spread.metrics());
        let metrics = spread.iter().flatten().chain(metrics);
        all.extend(metrics.map(|(name, value)| ((*name).to_owned(), *value)));
        match &self.setup.best {
            Some(best) if !all.contains_key(&best.metric) => {
                let (metric, names) = (best.metric.clone(), all.into_keys().collect());
                Err(Error::NoMetric { what: "the best checkpoint", metric, names })
            }
            _ => Ok(all),
        }
    }

    /// Rank 0's metric counts, so that the learning rate stays the same on all ranks.
    fn plateau_metric(
        &self,
        state: &TrainState,
        metrics: &BTreeMap<String, f64>,
    ) -> Result<Option<f64>> {
        let Some(metric) = state.updater.plateau_metric(metrics)? else {
            return Ok(None);
        };
        let mut shared = [metric];
        self.collective.broadcast(&mut shared, 0)?;
        Ok(Some(shared[0]))
    }

    fn tell_epoch(&mut self, report: EpochReport) -> Result<Flow> {
        match &mut self.place {
            Place::Alone(listener) => listener(&report).map_err(Error::program),
            Place::Member(member, _) => {
                if member.rank() == 0 {
                    member.report(&WorkerReport::Epoch(report))?;
                }
                // Else the report may be of a generation that counts no more: the epoch ends again.
                member.check_generation()?;
                Ok(Flow::stop_if(member.stop_requested()))
            }
        }
    }

    /// Ends the training within an epoch, with a checkpoint if there are any: `state` is finished
    /// afterwards. All ranks must call it alike, and without [`end_epoch`](Self::end_epoch) for the
    /// epoch that is not over. A training that goes on from there ends the epoch.
    pub fn stop(&mut self, state: &mut TrainState) -> Result<()> {
        self.synchronise(state)?;
        state.stop();
        if let Some(keeper) = self.keeper() {
            keeper.remember(state)?;
        }
        match state.has_position() {
            true => self.checkpoint(state),
            false => Ok(()),
        }
    }

    /// Whether the training is to end soon, as [`Trainer::fit_with`](crate::Trainer::fit_with) or
    /// whoever started the group asks for. [`end_epoch`](Self::end_epoch) ends it then by itself;
    /// a function that asks after a step, and calls [`stop`](Self::stop), ends sooner. All ranks must
    /// call it alike, and get the same answer: it costs a collective of one number.
    pub fn should_stop(&self) -> Result<bool> {
        let asked = match &self.place {
            Place::Member(member, _) => member.stop_requested(),
            Place::Alone(_) => false,
        };
        self.any(asked)
    }

    /// Has the run's metrics hold these, as of the last step. Those of rank 0 count.
    pub fn report(&mut self, state: &TrainState, metrics: &[(&str, f64)]) -> Result<()> {
        let metrics = metrics.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        match &self.place {
            Place::Member(member, _) if member.rank() == 0 => {
                Ok(member.report(&WorkerReport::Metrics { step: state.step(), metrics })?)
            }
            _ => Ok(()),
        }
    }

    /// Whether it is so on any rank.
    pub(crate) fn any(&self, here: bool) -> Result<bool> {
        let mut any = [f64::from(u8::from(here))];
        self.collective.all_reduce(&mut any, ReduceOp::Max)?;
        Ok(any[0] > 0.0)
    }

    /// If one is due. The one before it may still be written: then it is due later, within the epoch,
    /// or, where the best ones are kept, which are those after epochs, it is waited for.
    fn checkpoint_after_epoch(&mut self, state: &mut TrainState) -> Result<()> {
        let is_due = state.epoch().is_multiple_of(self.setup.every_epochs.max(1));
        if self.setup.checkpoints.is_none() || !(is_due || state.is_finished()) {
            return Ok(());
        }
        let is_busy = self.keeper().is_some_and(|keeper| !keeper.is_idle());
        match self.any(is_busy)? && !state.is_finished() {
            true if self.setup.best.is_none() => {
                self.is_due = true;
                Ok(())
            }
            true => {
                let saved = self.checkpoint(state);
                self.agree(saved)
            }
            false => self.checkpoint(state),
        }
    }

    /// Rank 0 writes. The others wait for a last one, which may be all that is left of the training,
    /// and for each where they are not written in the background.
    fn checkpoint(&mut self, state: &mut TrainState) -> Result<()> {
        let in_background = self.setup.asynchronous && !state.is_finished();
        self.is_due = false;
        let setup = self.setup.clone();
        let Some(keeper) = self.keeper().filter(|_| setup.checkpoints.is_some()) else {
            return Ok(());
        };
        let saved = keeper.save(state, &setup, in_background);
        if in_background { saved } else { self.agree(saved) }
    }

    /// Waits for what rank 0 does. If it fails, all fail by the same reason.
    fn agree(&self, saved: Result<()>) -> Result<()> {
        if !self.collective.patient_any(saved.is_err())? {
            return Ok(());
        }
        let mut reason = saved.as_ref().err().map(ToString::to_string).unwrap_or_default();
        broadcast_text(self.collective(), &mut reason, 0)?;
        saved?;
        Err(Error::Unwritten { rank: 0, reason })
    }

    /// Leaves for the next generation, if there is one, before it computes what nobody will sum up.
    pub(crate) fn before_step(&mut self) -> Result<()> {
        self.keeper().map_or(Ok(()), |keeper| keeper.check_generation())
    }

    /// The weights are about to change.
    pub(crate) fn before_update(&mut self, state: &TrainState) {
        if let Some(keeper) = self.keeper() {
            keeper.let_go(state);
        }
    }

    /// Remembers, saves and reports what is due.
    pub(crate) fn after_step(&mut self, state: &mut TrainState) -> Result<()> {
        if let Some(keeper) = self.keeper() {
            keeper.remember(state)?;
            keeper.poll()?;
        }
        let every = self.setup.every_steps.filter(|_| self.setup.checkpoints.is_some());
        self.is_due |= every.is_some_and(|steps| state.step().is_multiple_of(steps));
        if self.is_due && every.is_some() && !state.has_position() {
            return Err(Error::NoPosition);
        }
        if self.is_due && state.has_position() && state.is_synchronised() && !self.waits(state)? {
            self.checkpoint(state)?;
        }
        self.report_progress(state)
    }

    /// Whether a checkpoint is being written, on any of the ranks that write one.
    fn waits(&mut self, state: &TrainState) -> Result<bool> {
        let is_busy = self.keeper().is_some_and(|keeper| !keeper.is_idle());
        match state.updater.shared() {
            _ if !self.setup.asynchronous => Ok(false),
            None => Ok(is_busy),
            Some(_) => self.any(is_busy),
        }
    }

    fn report_progress(&mut self, state: &TrainState) -> Result<()> {
        if let Place::Member(member, _) = &self.place
            && let Some(progress) = self.meter.progress(state)
        {
            member.report(&match member.rank() {
                0 => WorkerReport::Progress(progress),
                _ => WorkerReport::StepMs(progress.step_ms),
            })?;
        }
        Ok(())
    }
}

/// The sum of neighbours, two by two.
fn in_tree(values: &[Vec<f64>]) -> Vec<f64> {
    match values {
        [] => Vec::new(),
        [one] => one.clone(),
        _ => {
            let (low, high) = values.split_at(values.len() / 2);
            let (low, high) = (in_tree(low), in_tree(high));
            low.into_iter().zip(high).map(|(low, high)| low + high).collect()
        }
    }
}
