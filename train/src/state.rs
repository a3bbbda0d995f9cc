//! What a training run carries from step to step, and its checkpoint.

use crate::optim::{LossScale, SavedUpdater, Updater, scale, scale_elsewhere};
use crate::outer::Outer;
use crate::share::Share;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use mobula_core::StreamState;
use mobula_core::checkpoint::Checkpoint;
use mobula_nn::{Gradients, Model, Precision};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

pub(crate) const STATE: &str = "state.json";

/// Model, optimizer and position of a run: all that a checkpoint needs beside the stream's
/// position, which the stream itself knows.
#[derive(Debug)]
pub struct TrainState {
    /// The model.
    pub model: Model,
    /// The optimizer, its state, and what goes with it.
    pub updater: Updater,
    pub(crate) gradients: Gradients,
    /// For the sums of virtual shards.
    pub(crate) spare: Vec<Gradients>,
    /// Where ranks take steps of their own.
    pub(crate) outer: Option<Outer>,
    pub(crate) tally: EpochTally,
    /// Where the stream of training batches stands, if that is known.
    position: Option<StreamState>,
    /// Of the epoch before.
    metrics: BTreeMap<String, f64>,
    /// What the callbacks of a loop remember, by name.
    pub(crate) callbacks: BTreeMap<String, serde_json::Value>,
    /// Which one it is of those that the context has restored.
    pub(crate) slot: Option<usize>,
    precision: Precision,
    non_finite: NonFinite,
    skips: Skips,
    seed: u64,
    step: u64,
    epoch: u64,
    epochs: u64,
    stopped: bool,
}

/// What happens in a step whose loss or gradients are no finite numbers, after the sum over all rows of
/// all ranks. A scaled loss whose gradients overflow is another matter, see
/// [`LossScale`](crate::optim::LossScale).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NonFinite {
    /// The training ends with an error that names the step. The default.
    #[default]
    Fail,
    /// The step counts, and leaves weights and optimizer as they are; the metric `non_finite_steps`
    /// tells how many were. The training ends with one more than so many in a row.
    Skip {
        /// How many.
        in_a_row: u32,
    },
    /// Steps are left out in the same way, up to so many in a row, also those whose gradients overflow
    /// although the loss is scaled as little as it may be. With one more, weights, optimizer and all that
    /// goes with it, such as how far a schedule is, become those of the newest checkpoint from before
    /// these steps, and training goes on behind them: what was learnt since then is given up, and its
    /// rows are not seen again in this epoch. Where that leads to no finite step, the next time it is the
    /// checkpoint before that one. Needs a trainer with a run directory. The metric `rollbacks` tells how
    /// often it was done.
    ///
    /// Which checkpoint is the newest depends on how fast they are written, where one is due before the
    /// one before it is there and they are written in the background.
    RollBack {
        /// How many steps are left out before; with 0, none.
        in_a_row: u32,
        /// How often in a run. The training ends when it would be done once more.
        at_most: u32,
    },
}

/// What becomes of a training whose step has no finite numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fail,
    LeaveOut,
    RollBack { at_most: u32 },
}

/// Steps that were left out because their numbers were not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Skips {
    /// The last ones, without one between them that was not.
    pub in_a_row: u32,
    /// All of them.
    pub total: u64,
    /// How often training went back to a checkpoint.
    pub rollbacks: u32,
    /// To that of which step it did last, if none was taken since.
    pub gone_back_to: Option<u64>,
    /// The first of the last ones that were not taken, those left out by the scale of a loss included.
    pub unchanged_since: Option<u64>,
}

/// What has been counted of an epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EpochTally {
    /// Rows of all ranks.
    pub rows: u64,
    /// Their weights: as many, unless the loss says otherwise.
    pub weight: f64,
    /// The sum over the steps of the mean loss times the weight.
    pub weighted_loss: f64,
    /// How long the steps took.
    pub elapsed: Duration,
}

impl EpochTally {
    pub(crate) fn count(&mut self, rows: usize, weight: f64, loss: f64, elapsed: Duration) {
        self.rows += rows as u64;
        self.weight += weight;
        self.weighted_loss += loss * weight;
        self.elapsed += elapsed;
    }

    pub(crate) fn rows_per_second(&self) -> f64 {
        self.rows as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// By weight.
    pub(crate) fn mean_loss(&self) -> f64 {
        self.weighted_loss / self.weight
    }
}

/// `state.json` of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// Global steps done.
    pub step: u64,
    /// Epochs done.
    pub epoch: u64,
    /// The seed of dropout and everything else random in a step.
    pub seed: u64,
    /// Where the stream of training batches stands.
    pub stream: StreamState,
    /// The metrics of the last whole epoch.
    pub metrics: BTreeMap<String, f64>,
    /// What has been counted of the epoch under way: nothing between epochs.
    #[serde(default)]
    pub tally: EpochTally,
    /// Steps that were left out.
    #[serde(default)]
    pub skips: Skips,
    /// What the callbacks of a loop remember, by name.
    #[serde(default)]
    pub callbacks: BTreeMap<String, serde_json::Value>,
    /// The learning-rate schedule and what else goes with the optimizer.
    #[serde(default)]
    pub updater: SavedUpdater,
}

impl TrainState {
    /// A run at its start, to go on for so many epochs. An optimizer is an updater.
    pub fn new(model: Model, updater: impl Into<Updater>, seed: u64, epochs: u64) -> Self {
        let (updater, gradients) = (updater.into(), Gradients::zeros(model.params()));
        Self {
            model,
            updater,
            gradients,
            spare: Vec::new(),
            outer: None,
            tally: EpochTally::default(),
            position: None,
            metrics: BTreeMap::new(),
            callbacks: BTreeMap::new(),
            slot: None,
            precision: Precision::default(),
            non_finite: NonFinite::default(),
            skips: Skips::default(),
            seed,
            step: 0,
            epoch: 0,
            epochs,
            stopped: false,
        }
    }

    /// Computes the matrix products of steps in `precision`. Default [`Precision::F32`].
    ///
    /// A setting of the program, like the rows of a batch: no checkpoint has it. Weights, gradients
    /// and the optimizer's state are `f32` in any case.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Sets what happens when numbers are not finite. Default [`NonFinite::Fail`]. A setting of the
    /// program, as the precision is.
    #[must_use]
    pub fn with_non_finite(self, non_finite: NonFinite) -> Self {
        Self { non_finite, ..self }
    }

    /// Steps that were left out, if the policy is to leave some out.
    pub(crate) fn non_finite_steps(&self) -> Option<u64> {
        (self.non_finite != NonFinite::Fail).then_some(self.skips.total)
    }

    /// How often training went back to a checkpoint, if the policy is to do so.
    pub(crate) fn rollbacks(&self) -> Option<u32> {
        matches!(self.non_finite, NonFinite::RollBack { .. }).then_some(self.skips.rollbacks)
    }

    /// What the policy says to this error of a step.
    pub(crate) fn verdict(&self, error: &Error) -> Verdict {
        let so_far = self.skips.in_a_row;
        let is_scaled = matches!(error, Error::LossScale { .. });
        match self.non_finite {
            _ if !error.is_of_numbers() => Verdict::Fail,
            NonFinite::Skip { in_a_row } if so_far < in_a_row && !is_scaled => Verdict::LeaveOut,
            NonFinite::Fail | NonFinite::Skip { .. } => Verdict::Fail,
            NonFinite::RollBack { in_a_row, .. } if so_far < in_a_row => Verdict::LeaveOut,
            NonFinite::RollBack { at_most, .. } => Verdict::RollBack { at_most },
        }
    }

    /// Checkpoints of this step and later ones have the weights that led to the steps left out now, or
    /// to those after the last time that training went back.
    pub(crate) fn first_spoilt(&self) -> u64 {
        let Skips { gone_back_to, unchanged_since, .. } = self.skips;
        gone_back_to.or(unchanged_since).unwrap_or(self.step)
    }

    /// The step changes nothing, for whatever reason.
    pub(crate) fn count_unchanged(&mut self) {
        self.skips.unchanged_since.get_or_insert(self.step);
    }

    /// The step is left out.
    pub(crate) fn skip(&mut self) {
        self.skips.in_a_row += 1;
        self.skips.total += 1;
    }

    /// The numbers of a step are finite.
    pub(crate) fn end_skips(&mut self) {
        let Skips { total, rollbacks, .. } = self.skips;
        self.skips = Skips { total, rollbacks, ..Skips::default() };
    }

    pub(crate) fn skips(&self) -> Skips {
        self.skips
    }

    /// Weights, optimizer and what goes with it are again those of the checkpoint; how far the training
    /// is stays.
    pub(crate) fn roll_back(&mut self, to: &Checkpoint) -> Result<()> {
        self.load(to)?;
        self.skips.total += 1;
        self.skips.rollbacks += 1;
        (self.skips.in_a_row, self.skips.unchanged_since) = (0, None);
        self.skips.gone_back_to = Some(to.step());
        Ok(())
    }

    /// What the matrix products of steps are computed in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Global steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Epochs done.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Epochs in all.
    pub fn epochs(&self) -> u64 {
        self.epochs
    }

    /// Whether steps were done since the last epoch.
    pub(crate) fn is_within_epoch(&self) -> bool {
        self.tally.rows > 0
    }

    /// Whether all epochs are done, or the training was told to stop.
    pub fn is_finished(&self) -> bool {
        self.stopped || self.epoch >= self.epochs
    }

    /// The metrics of the last whole epoch.
    pub fn metrics(&self) -> &BTreeMap<String, f64> {
        &self.metrics
    }

    /// Ends the training here.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
    }

    /// The seed of everything random in a step.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The gradients of the last step, divided by the scale of the loss. Not where the optimizer's state is
    /// divided among the ranks, or these have met after steps of their own: there, their memory holds
    /// something else by now. On a GPU they may be [elsewhere](Gradients::elsewhere).
    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// What the next loss is multiplied by before its backward pass.
    pub(crate) fn loss_scale(&self) -> f32 {
        self.updater.loss_scale().map_or(1.0, LossScale::scale)
    }

    /// Checks, rescales and clips the gradients, and divides them by the scale of the loss. A step in
    /// which they overflowed is to be left out. Says whether it is not.
    pub(crate) fn check(&mut self, rescale: f32) -> Result<bool> {
        let unscale = rescale / self.loss_scale();
        let overflow = match self.gradients.elsewhere() {
            Some(_) => self.scale_elsewhere(unscale)?,
            None => self.scale_here(unscale)?,
        };
        let is_taken = match (self.updater.loss_scale_mut(), overflow) {
            (None, None) => true,
            (None, Some(parameter)) => {
                return Err(Error::NonFiniteGradient { parameter, step: self.step });
            }
            (Some(scale), Some(parameter)) if scale.is_at_min() => {
                return Err(Error::LossScale { scale: scale.scale(), parameter, step: self.step });
            }
            (Some(scale), overflow) => scale.update(overflow.is_none()),
        };
        if is_taken {
            self.updater.clip(self.model.params(), &mut self.gradients)?;
        }
        Ok(is_taken)
    }

    /// Has gradients that are elsewhere be on the CPU, if the optimizer works there.
    pub(crate) fn bring_gradients(&mut self) -> Result<()> {
        match self.updater.updates_elsewhere(self.model.params()) {
            true => Ok(()),
            false => Ok(self.gradients.bring_here()?),
        }
    }

    /// The opposite, for tests: what is on the CPU then is no number.
    pub(crate) fn send_gradients(&mut self) -> Result<()> {
        let params = self.model.params();
        if self.gradients.elsewhere().is_none() && self.updater.updates_elsewhere(params) {
            let values = Tensor::new(self.gradients.values(), params.device())?;
            self.gradients.values_mut().fill(f32::NAN);
            self.gradients.put_elsewhere(values)?;
        }
        Ok(())
    }

    /// Multiplies the gradients. Gives the first parameter with one that is not finite then.
    fn scale_here(&mut self, factor: f32) -> Result<Option<String>> {
        let summed = self.updater.shared().map_or(0..self.gradients.values().len(), Share::summed);
        scale(&mut self.gradients.values_mut()[summed], factor);
        match self.updater.shared() {
            None => Ok(self.gradients.first_non_finite().map(str::to_owned)),
            Some(share) => share.first_non_finite(&self.gradients),
        }
    }

    /// The same of those that are on another device: they stay there, unless one is not finite.
    fn scale_elsewhere(&mut self, factor: f32) -> Result<Option<String>> {
        if scale_elsewhere(&mut self.gradients, factor)? {
            return Ok(None);
        }
        self.gradients.bring_here()?;
        Ok(self.gradients.first_non_finite().map(str::to_owned))
    }

    /// Updates the model by its gradients, or what this rank has of it.
    pub(crate) fn update(&mut self) -> Result<()> {
        self.updater.update(self.model.params(), &self.gradients)
    }

    /// Runs `evaluate` on the model while its weights are their averages over the steps. Errors
    /// when the updater keeps none.
    pub fn with_averages<T>(&mut self, evaluate: impl FnOnce(&Model) -> T) -> Result<T> {
        self.updater.with_averages(self.model.params(), || evaluate(&self.model))
    }

    /// A step is done, and the stream stands there, if that is known.
    pub(crate) fn count_step(&mut self, position: Option<StreamState>) {
        self.step += 1;
        self.position = position;
    }

    /// An epoch is done, with these metrics, and the stream stands there.
    pub(crate) fn count_epoch(
        &mut self,
        position: StreamState,
        metrics: BTreeMap<String, f64>,
        stop: bool,
    ) {
        self.epoch += 1;
        self.stopped |= stop;
        (self.position, self.metrics) = (Some(position), metrics);
        self.tally = EpochTally::default();
    }

    /// Whether what a step has changed before its update may have to be undone.
    pub(crate) fn may_skip(&self) -> bool {
        self.non_finite != NonFinite::Fail || self.updater.loss_scale().is_some()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Whether it is known where the stream of training batches stands.
    pub(crate) fn has_position(&self) -> bool {
        self.position.is_some()
    }

    /// `state.json` of a checkpoint.
    pub(crate) fn saved(&self) -> SavedState {
        SavedState {
            step: self.step,
            epoch: self.epoch,
            seed: self.seed,
            stream: self.position.clone().unwrap_or_default(),
            // What is no number has no place in JSON.
            metrics: self.metrics.iter().filter(|metric| metric.1.is_finite()).map(own).collect(),
            tally: self.tally.clone(),
            skips: self.skips,
            callbacks: self.callbacks.clone(),
            updater: self.updater.saved(),
        }
    }

    /// Continues where the checkpoint was taken.
    pub(crate) fn restore(&mut self, from: &Checkpoint) -> Result<()> {
        let saved = self.load(from)?;
        self.outer.as_mut().map_or(Ok(()), |outer| outer.load(from.path()))?;
        self.resume(&saved, false);
        Ok(())
    }

    /// The weights and what updates them.
    fn load(&mut self, from: &Checkpoint) -> Result<SavedState> {
        let saved: SavedState = from.json(STATE)?;
        self.model.params().load(from.file(Model::WEIGHTS_FILE))?;
        self.updater.load(self.model.params(), from.path(), &saved.updater)?;
        Ok(saved)
    }

    pub(crate) fn resume(&mut self, saved: &SavedState, stopped: bool) {
        self.stopped = stopped;
        (self.step, self.epoch, self.seed) = (saved.step, saved.epoch, saved.seed);
        (self.tally, self.metrics) = (saved.tally.clone(), saved.metrics.clone());
        (self.callbacks, self.skips) = (saved.callbacks.clone(), saved.skips);
        self.position = Some(saved.stream.clone());
    }
}

fn own((name, value): (&String, &f64)) -> (String, f64) {
    (name.clone(), *value)
}

/// The trained model of a checkpoint, on the CPU.
pub fn load_model(checkpoint: &Checkpoint) -> Result<Model> {
    Ok(Model::load(checkpoint.path(), &Device::Cpu)?)
}
