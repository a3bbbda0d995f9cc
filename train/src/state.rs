//! What a training run carries from step to step, and its checkpoint.

use crate::optim::{LossScale, SavedUpdater, Updater, scale};
use crate::{Error, Result};
use candle_core::Device;
use mobula_core::checkpoint::Checkpoint;
use mobula_core::{BatchStream, StreamState};
use mobula_nn::{Gradients, Model, Precision};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

pub(crate) const STATE: &str = "state.json";
const MODEL: &str = "model.safetensors";

/// Model, optimizer and position of a run: all that a checkpoint needs beside the stream's
/// position, which the stream itself knows.
#[derive(Debug)]
pub struct TrainState {
    /// The model.
    pub model: Model,
    /// The optimizer, its state, and what goes with it.
    pub updater: Updater,
    gradients: Gradients,
    precision: Precision,
    seed: u64,
    step: u64,
    epoch: u64,
    epochs: u64,
    stopped: bool,
}

/// `state.json` of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// Global steps done.
    pub step: u64,
    /// Epochs done.
    pub epoch: u64,
    /// The seed of dropout and everything else random in a step.
    pub seed: u64,
    /// Where the stream of training batches stands.
    pub stream: StreamState,
    /// The metrics of the epoch just done.
    pub metrics: BTreeMap<String, f64>,
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
            precision: Precision::default(),
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

    /// Whether all epochs are done, or the training was told to stop.
    pub fn is_finished(&self) -> bool {
        self.stopped || self.epoch >= self.epochs
    }

    /// The seed of everything random in a step.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The buffer of gradients.
    pub(crate) fn gradients_mut(&mut self) -> &mut Gradients {
        &mut self.gradients
    }

    /// The gradients of the last step, divided by the scale of the loss.
    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// What the next loss is multiplied by before its backward pass.
    pub(crate) fn loss_scale(&self) -> f32 {
        self.updater.loss_scale().map_or(1.0, LossScale::scale)
    }

    /// Updates the model by its gradients, once these are checked and divided by the scale of the
    /// loss; a step in which they overflowed is left out.
    pub(crate) fn update(&mut self) -> Result<()> {
        let unscale = 1.0 / self.loss_scale();
        scale(self.gradients.values_mut(), unscale);
        let overflow = self.gradients.first_non_finite().map(str::to_owned);
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
        match is_taken {
            true => self.updater.step(self.model.params(), &mut self.gradients),
            false => Ok(()),
        }
    }

    /// Runs `evaluate` on the model while its weights are their averages over the steps. Errors
    /// when the updater keeps none.
    pub fn with_averages<T>(&mut self, evaluate: impl FnOnce(&Model) -> T) -> Result<T> {
        self.updater.with_averages(self.model.params(), || evaluate(&self.model))
    }

    pub(crate) fn count_step(&mut self) {
        self.step += 1;
    }

    pub(crate) fn stop(&mut self) {
        self.stopped = true;
    }

    pub(crate) fn count_epoch(&mut self) {
        self.epoch += 1;
    }

    /// Writes `model.safetensors`, `model.json`, `optimizer.safetensors`, `state.json`, and
    /// `ema.safetensors` where averages are kept.
    pub(crate) fn save(
        &self,
        dir: &Path,
        stream: &dyn BatchStream,
        metrics: &BTreeMap<String, f64>,
    ) -> Result<()> {
        self.model.save(dir)?;
        let updater = self.updater.save(self.model.params(), dir)?;
        let saved = SavedState {
            step: self.step,
            epoch: self.epoch,
            seed: self.seed,
            stream: stream.state(),
            metrics: metrics.clone(),
            updater,
        };
        let text = serde_json::to_vec_pretty(&saved).map_err(mobula_core::Error::layer)?;
        let path = dir.join(STATE);
        std::fs::write(&path, text)
            .map_err(|e| Error::program(format!("cannot write {}: {e}", path.display())))
    }

    /// Continues where the checkpoint was taken.
    pub(crate) fn restore(
        &mut self,
        from: &Checkpoint,
        stream: &mut dyn BatchStream,
    ) -> Result<()> {
        let saved: SavedState = from.json(STATE)?;
        self.model.params().load(from.file(MODEL))?;
        self.updater.load(self.model.params(), from.path(), &saved.updater)?;
        stream.restore(&saved.stream)?;
        (self.step, self.epoch, self.seed) = (saved.step, saved.epoch, saved.seed);
        Ok(())
    }
}

/// The trained model of a checkpoint, on the CPU.
pub fn load_model(checkpoint: &Checkpoint) -> Result<Model> {
    Ok(Model::load(checkpoint.path(), &Device::Cpu)?)
}
