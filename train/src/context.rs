//! What a training function gets: its share of the work, and the steps that all ranks take
//! together.

use crate::collective::{Alone, Collective, Element, ReduceOp, Transport};
use crate::keeper::Keeper;
use crate::nccl::DeviceSums;
use crate::overlap::{EarlySums, Overlap};
use crate::pace::Timed;
use crate::report::{EpochReport, Meter, WorkerReport};
use crate::setup::Setup;
use crate::share::Share;
use crate::state::TrainState;
use crate::stream::{WorkerStream, owned};
use crate::{Error, Result};
use candle_core::Device;
use mobula_core::{Batch, BatchSource, BatchStream, BoxError, Flow, Member, Shard};
use std::ops::Range;
use std::sync::Arc;

/// The training function's view of its group, or of a world of one.
pub struct WorkerContext<'a> {
    pub(crate) place: Place<'a>,
    pub(crate) collective: Arc<dyn Collective>,
    pub(crate) setup: Setup,
    device: Device,
    pub(crate) meter: Meter,
    pub(crate) early_sums: Option<EarlySums>,
    /// Of gradients that are on a GPU.
    pub(crate) device_sums: Option<DeviceSums>,
    /// A checkpoint within the epoch waits for the one before it to be written.
    pub(crate) is_due: bool,
}

/// Who listens: the trainer, or whoever runs the function alone.
pub(crate) enum Place<'a> {
    Member(Arc<Member>, Box<Keeper>),
    Alone(Listener<'a>),
}

pub(crate) type Listener<'a> = Box<dyn FnMut(&EpochReport) -> Result<Flow, BoxError> + 'a>;

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
        let device_sums = setup.device_sums(&member, &device)?;
        let keeper = Box::new(Keeper::new(&member, &setup));
        Ok(Self {
            device,
            device_sums,
            ..Self::new(Place::Member(member, keeper), collective, setup)
        })
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
            || setup.local_sgd.is_some()
            || setup.transport == Transport::Nccl;
        let overlap = if in_turns { Overlap::Never } else { setup.overlap };
        let early_sums = EarlySums::new(&collective, overlap);
        let (clock, waits) = (Arc::clone(&meter.clock), Arc::clone(&meter.waits));
        let collective = Arc::new(Timed { inner: collective, clock, waits });
        let device_sums = None;
        Self { place, collective, setup, device, meter, early_sums, device_sums, is_due: false }
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

    pub(crate) fn keeper(&mut self) -> Option<&mut Keeper> {
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

    /// Has gradients on the CPU be taken for those of another device, to test what is done there.
    #[doc(hidden)]
    #[must_use]
    pub fn with_gradients_elsewhere(mut self) -> Self {
        self.setup.elsewhere = true;
        self
    }

    /// Has a state do what the setup asks for, if it does not yet.
    pub(crate) fn prepare(&self, state: &mut TrainState) -> Result<()> {
        self.check_policy(state)?;
        let is_alone =
            self.shard().world == 1 && state.updater.updates_elsewhere(state.model.params());
        let is_whole = self.setup.virtual_shards.is_none() && self.setup.local_sgd.is_none();
        state.gradients.stay_elsewhere(self.device_sums.is_some() || (is_alone && is_whole));
        let is_shared = |share: &Share| share.is_with(&self.collective);
        let is_wanted = self.setup.shard_optimizer && self.shard().world > 1;
        if is_wanted && !state.updater.shared().is_some_and(is_shared) {
            let mirror = self.setup.mirror_optimizer;
            state.updater.share(Share::of(&state.gradients, &self.collective, mirror))?;
        }
        match &self.setup.local_sgd {
            Some(options) if state.outer.is_none() => state.add_outer(options),
            _ => Ok(()),
        }
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

    /// Leaves for the next generation, if there is one, before it computes what nobody will sum up.
    pub(crate) fn before_step(&mut self) -> Result<()> {
        self.keeper().map_or(Ok(()), |keeper| keeper.check_generation())
    }

    pub(crate) fn report_progress(&mut self, state: &TrainState) -> Result<()> {
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
