//! A learning rate that falls when a metric no longer improves.

use super::check;
use crate::Result;
use serde::{Deserialize, Serialize};

/// Settings of [`Plateau`]; the defaults are those of PyTorch's `ReduceLROnPlateau`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlateauOptions {
    /// The metric, as the training function reports it at the end of an epoch; where ranks report
    /// different values, rank 0's counts. Default: `"loss"`, the mean training loss of the epoch.
    pub metric: String,
    /// Whether lower or higher is better. Default: lower.
    pub mode: Mode,
    /// What the learning rate is multiplied by. Default 0.1.
    pub factor: f64,
    /// Epochs without improvement that are tolerated. Default 10.
    pub patience: u64,
    /// What counts as an improvement. Default 0.0001.
    pub threshold: f64,
    /// Whether the threshold is relative to the best value or absolute. Default: relative.
    pub threshold_mode: ThresholdMode,
    /// Epochs after a reduction in which nothing is counted. Default 0.
    pub cooldown: u64,
    /// The learning rate is not reduced below this. Default 0.
    pub min_lr: f64,
}

/// Whether lower or higher is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Lower is better.
    #[default]
    Min,
    /// Higher is better.
    Max,
}

impl Mode {
    /// Times this, more is better.
    pub(crate) fn sign(self) -> f64 {
        match self {
            Self::Min => -1.0,
            Self::Max => 1.0,
        }
    }
}

/// What a threshold is relative to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ThresholdMode {
    /// To the best value.
    #[default]
    Rel,
    /// To nothing.
    Abs,
}

impl Default for PlateauOptions {
    fn default() -> Self {
        Self {
            metric: "loss".to_owned(),
            mode: Mode::Min,
            factor: 0.1,
            patience: 10,
            threshold: 1e-4,
            threshold_mode: ThresholdMode::Rel,
            cooldown: 0,
            min_lr: 0.0,
        }
    }
}

/// Multiplies the learning rate by a factor each time a metric has not improved for a while, as
/// PyTorch's `ReduceLROnPlateau` does, but without its `eps`. A value to save as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    options: PlateauOptions,
    scale: f64,
    best: Option<f64>,
    bad_epochs: u64,
    cooldown: u64,
}

impl Plateau {
    /// Errors when an option is out of its range.
    pub fn new(options: PlateauOptions) -> Result<Self> {
        let good = options.factor > 0.0 && options.factor < 1.0;
        check::option("factor", options.factor, good, "between 0 and 1")?;
        check::not_negative("threshold", options.threshold)?;
        check::not_negative("min_lr", options.min_lr)?;
        Ok(Self { options, scale: 1.0, best: None, bad_epochs: 0, cooldown: 0 })
    }

    /// The settings.
    pub fn options(&self) -> &PlateauOptions {
        &self.options
    }

    /// The learning rate, where it were `lr` without this.
    pub fn lr(&self, lr: f64) -> f64 {
        // A warm-up may be below the least learning rate.
        (lr * self.scale).max(self.options.min_lr.min(lr))
    }

    /// Takes in the metric of an epoch.
    pub fn observe(&mut self, metric: f64) {
        self.bad_epochs += 1;
        if self.is_better(metric) {
            (self.best, self.bad_epochs) = (Some(metric), 0);
        }
        if self.cooldown > 0 {
            (self.cooldown, self.bad_epochs) = (self.cooldown - 1, 0);
        }
        if self.bad_epochs > self.options.patience {
            self.scale *= self.options.factor;
            (self.cooldown, self.bad_epochs) = (self.options.cooldown, 0);
        }
    }

    fn is_better(&self, metric: f64) -> bool {
        let Some(best) = self.best else {
            return !metric.is_nan();
        };
        let PlateauOptions { threshold, threshold_mode, mode, .. } = self.options;
        let margin = match threshold_mode {
            ThresholdMode::Rel => best * threshold,
            ThresholdMode::Abs => threshold,
        };
        match mode {
            Mode::Min => metric < best - margin,
            Mode::Max => metric > best + margin,
        }
    }

    /// Goes on from what was saved, with these settings.
    pub(super) fn resume(&mut self, saved: &Self) {
        let options = self.options.clone();
        *self = Self { options, ..saved.clone() };
    }
}
