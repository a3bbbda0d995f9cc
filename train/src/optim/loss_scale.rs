//! Dynamic loss scaling.

use super::check;
use crate::Result;
use serde::{Deserialize, Serialize};

/// Settings of [`LossScale`]; the defaults are those of PyTorch's `torch.amp.GradScaler`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossScaleOptions {
    /// The scale of the first step. Default 65536.
    pub init_scale: f32,
    /// What the scale is multiplied by when it grows. Default 2.
    pub growth_factor: f32,
    /// What the scale is multiplied by after a step whose gradients overflowed. Default 0.5.
    pub backoff_factor: f32,
    /// Good steps in a row after which the scale grows. Default 2000.
    pub growth_interval: u64,
    /// The scale does not fall below. Gradients that overflow even then are none of the scale's
    /// doing. Default 1, as DeepSpeed's; PyTorch has none.
    pub min_scale: f32,
}

impl Default for LossScaleOptions {
    fn default() -> Self {
        Self {
            init_scale: 65536.0,
            growth_factor: 2.0,
            backoff_factor: 0.5,
            growth_interval: 2000,
            min_scale: 1.0,
        }
    }
}

/// Keeps the gradients of half-precision training in range (Micikevicius et al. 2018, arXiv
/// 1710.03740): the loss is multiplied by [`scale`](LossScale::scale), the gradients are divided
/// by it, and a step whose gradients are not finite is left out. A value to save as it is.
///
/// [`WorkerContext::step`](crate::WorkerContext::step) does all of this for an
/// [`Updater::with_loss_scale`](super::Updater::with_loss_scale).
///
/// ```
/// use mobula_train::optim::{LossScale, LossScaleOptions};
///
/// let mut scale = LossScale::new(LossScaleOptions::default())?;
/// assert_eq!(scale.scale(), 65536.0);
/// assert!(!scale.update(false), "a step whose gradients overflow is left out");
/// assert_eq!(scale.scale(), 32768.0);
/// # Ok::<(), mobula_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    options: LossScaleOptions,
    scale: f32,
    good_steps: u64,
    #[serde(default)]
    skipped_steps: u64,
}

impl LossScale {
    /// The scale of the first step. Errors when an option is out of its range.
    pub fn new(options: LossScaleOptions) -> Result<Self> {
        let LossScaleOptions { init_scale, growth_factor, backoff_factor, min_scale, .. } = options;
        check::positive("min_scale", min_scale.into())?;
        let good = init_scale.is_finite() && init_scale >= min_scale;
        check::option("init_scale", init_scale.into(), good, "finite, `min_scale` or above")?;
        let growth = f64::from(growth_factor);
        check::option("growth_factor", growth, growth.is_finite() && growth > 1.0, "above 1")?;
        let backoff = f64::from(backoff_factor);
        check::option(
            "backoff_factor",
            backoff,
            backoff > 0.0 && backoff < 1.0,
            "between 0 and 1",
        )?;
        check::at_least_one("growth_interval", options.growth_interval)?;
        Ok(Self { options, scale: init_scale, good_steps: 0, skipped_steps: 0 })
    }

    /// What to multiply the loss of the next step by, and to divide its gradients by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Good steps since the scale last changed.
    pub fn good_steps(&self) -> u64 {
        self.good_steps
    }

    /// Steps left out so far.
    pub fn skipped_steps(&self) -> u64 {
        self.skipped_steps
    }

    /// Whether it can fall no further.
    pub fn is_at_min(&self) -> bool {
        self.scale <= self.options.min_scale
    }

    /// Takes in whether all gradients of a step are finite, on all ranks. Gives whether to take
    /// the step.
    #[must_use = "a step whose gradients are not finite must be left out"]
    pub fn update(&mut self, finite: bool) -> bool {
        if !finite {
            let backed_off = self.scale * self.options.backoff_factor;
            (self.scale, self.good_steps) = (backed_off.max(self.options.min_scale), 0);
            self.skipped_steps += 1;
            return false;
        }
        self.good_steps += 1;
        if self.good_steps >= self.options.growth_interval {
            let grown = self.scale * self.options.growth_factor;
            self.scale = if grown.is_finite() { grown } else { self.scale };
            self.good_steps = 0;
        }
        true
    }

    /// Goes on from what was saved, with these settings.
    pub(super) fn resume(&mut self, saved: &Self) {
        let options = self.options;
        let scale = saved.scale.max(options.min_scale);
        *self = Self { options, scale, ..saved.clone() };
    }
}
