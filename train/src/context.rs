//! What a training function gets: its share of the work, and the steps that all ranks take
//! together.

use crate::collective::{Collective, Element};
use crate::report::{EpochReport, Meter, WorkerReport};
use crate::state::TrainState;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use mobula_core::checkpoint::{Checkpoint, CheckpointStore};
use mobula_core::{Batch, BatchStream, BoxError, Flow, Member, Shard};
use mobula_nn::{Gradients, Model, Pass};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What the trainer tells its workers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) checkpoints: Option<PathBuf>,
    pub(crate) keep: usize,
    pub(crate) every_epochs: u64,
    pub(crate) resume_from: Option<Checkpoint>,
}

/// The training function's view of its group, or of a world of one.
pub struct WorkerContext<'a> {
    place: Place<'a>,
    collective: Collective,
    setup: Setup,
    files: BTreeMap<String, Vec<u8>>,
    meter: Meter,
}

/// Who listens: the trainer, or whoever runs the function alone.
enum Place<'a> {
    Member(Member),
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
        let setup = member.context()?;
        let collective = Collective::of(&member);
        Ok(Self::new(Place::Member(member), collective, setup))
    }
}

impl<'a> WorkerContext<'a> {
    /// A world of one without checkpoints, for trials and tests. `on_epoch` hears of each epoch
    /// and may stop the training.
    pub fn alone(on_epoch: impl FnMut(&EpochReport) -> Result<Flow, BoxError> + 'a) -> Self {
        Self::new(Place::Alone(Box::new(on_epoch)), Collective::Alone, Setup::default())
    }

    fn new(place: Place<'a>, collective: Collective, setup: Setup) -> Self {
        Self { place, collective, setup, files: BTreeMap::new(), meter: Meter::default() }
    }

    /// This worker's share of a stream.
    pub fn shard(&self) -> Shard {
        match self.member() {
            Some(member) => Shard { rank: member.rank(), world: member.world_size() },
            None => Shard::ALL,
        }
    }

    /// The device to compute on.
    pub fn device(&self) -> Device {
        Device::Cpu
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

    /// One step of all ranks: loss and gradients of this rank's rows, averaged over the rows of
    /// all ranks, then the same update everywhere. Gives the global mean loss.
    ///
    /// `loss` is called with the model and the pass, and gives the mean over this rank's rows. It
    /// is not called on a rank without rows.
    pub fn step<E: Into<BoxError>>(
        &mut self,
        state: &mut TrainState,
        batch: &Batch,
        loss: impl FnOnce(&Model, &Pass) -> Result<Tensor, E>,
    ) -> Result<f64> {
        if batch.rows() == 0 {
            state.gradients_mut().clear();
        } else {
            // Disjoint rows for the ranks' random numbers. Where a stream deals rows out in turns
            // these are not the rows' places in the global batch: with dropout, worlds of
            // different sizes draw different masks.
            let first_row = self.shard().rank as u64 * batch.global_rows() as u64;
            let pass = Pass::train(state.seed(), state.step()).with_row_offset(first_row);
            let loss = loss(&state.model, &pass).map_err(Error::program)?;
            let share = batch.rows() as f32 / batch.global_rows().max(1) as f32;
            state.gradients_mut().start();
            add_backward(&loss, share, state)?;
        }
        self.finish_step(state, batch.global_rows())
    }

    /// One step over several batches, whose gradients are accumulated: the same step as over one
    /// batch with all their rows, in the memory of the largest. Takes the batches in their order,
    /// and gives the mean loss over the rows of all of them on all ranks.
    ///
    /// `loss` gives the mean over this rank's rows of one batch. The batches of a step must be of
    /// the same global rows on all ranks, as those of a stream are.
    pub fn step_accumulated<E: Into<BoxError>>(
        &mut self,
        state: &mut TrainState,
        batches: &[Batch],
        mut loss: impl FnMut(&Model, &Pass, &Batch) -> Result<Tensor, E>,
    ) -> Result<f64> {
        let global_rows: usize = batches.iter().map(Batch::global_rows).sum();
        let mut first_row = self.shard().rank as u64 * global_rows as u64;
        state.gradients_mut().clear();
        for batch in batches.iter().filter(|batch| batch.rows() > 0) {
            let pass = Pass::train(state.seed(), state.step()).with_row_offset(first_row);
            first_row += batch.rows() as u64;
            let loss = loss(&state.model, &pass, batch).map_err(Error::program)?;
            add_backward(&loss, batch.rows() as f32 / global_rows as f32, state)?;
        }
        self.finish_step(state, global_rows)
    }

    /// What all ranks do alike once each has the gradients of its rows.
    fn finish_step(&mut self, state: &mut TrainState, global_rows: usize) -> Result<f64> {
        self.reduce(state.gradients_mut().as_reduced_mut())?;
        let loss = check_finite(state.gradients(), state.step())?;
        state.update()?;
        state.count_step();
        self.meter.count(global_rows, loss);
        self.report_progress(state)?;
        Ok(loss)
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

    /// Replaces the values on every rank by their sums over all ranks. All ranks must call it
    /// alike.
    pub fn all_reduce_sum<T: Element>(&mut self, values: &mut [T]) -> Result<()> {
        self.reduce(values)
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
        self.reduce(&mut stop)?;
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
        let mut shared = [if self.shard().rank == 0 { metric } else { 0.0 }];
        self.reduce(&mut shared)?;
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
        self.reduce(&mut [0.0f32])
    }

    fn report_progress(&mut self, state: &TrainState) -> Result<()> {
        if let Place::Member(member) = &self.place
            && member.rank() == 0
            && let Some(progress) = self.meter.progress(state)
        {
            member.report(&WorkerReport::Progress(progress))?;
        }
        Ok(())
    }

    fn reduce<T: Element>(&mut self, values: &mut [T]) -> Result<()> {
        let member = match &self.place {
            Place::Member(member) => Some(member),
            Place::Alone(_) => None,
        };
        self.collective.all_reduce(member, values)
    }

    fn member(&self) -> Option<&Member> {
        match &self.place {
            Place::Member(member) => Some(member),
            Place::Alone(_) => None,
        }
    }
}

/// Adds loss and gradients of this rank's rows, scaled by its share of all rows.
fn add_backward(loss: &Tensor, share: f32, state: &mut TrainState) -> Result<()> {
    if loss.elem_count() != 1 {
        return Err(Error::LossShape { shape: loss.dims().to_vec() });
    }
    // The gradients of a loss that is no number are none either; the sum will tell all ranks.
    let gradients = state.gradients_mut();
    gradients.add_backward(loss, f64::from(share))?;
    match gradients.missing() {
        missing if missing.is_empty() => Ok(()),
        names => Err(Error::NoGradient { names }),
    }
}

/// After the sum all ranks hold the same bits, so all come to the same conclusion.
fn check_finite(gradients: &Gradients, step: u64) -> Result<f64> {
    let loss = f64::from(gradients.loss());
    if !loss.is_finite() {
        return Err(Error::NonFiniteLoss { step, loss });
    }
    match gradients.first_non_finite() {
        Some(name) => Err(Error::NonFiniteGradient { parameter: name.to_owned(), step }),
        None => Ok(loss),
    }
}
