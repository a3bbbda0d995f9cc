//! What workers tell the trainer.

use crate::state::{EpochTally, TrainState};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Progress is reported at most this often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// From rank 0 to the trainer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WorkerReport {
    Progress(Progress),
    Epoch(EpochReport),
    /// Metrics of a step within an epoch.
    Metrics {
        step: u64,
        metrics: BTreeMap<String, f64>,
    },
    Resumed(Resumed),
    /// What the user should know, and training survives.
    Note(String),
}

/// Training goes on from what was saved, or from what a rank still had, or, by default, anew.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Resumed {
    pub(crate) step: u64,
    pub(crate) epoch: u64,
    /// Of the last whole epoch.
    pub(crate) metrics: BTreeMap<String, f64>,
    /// The rank that had it in memory.
    pub(crate) from_rank: Option<usize>,
}

/// How far a training is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) step: u64,
    pub(crate) epoch: u64,
    pub(crate) epochs: u64,
    pub(crate) loss: f64,
    pub(crate) lr: f64,
    pub(crate) samples_per_second: f64,
}

/// The end of an epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochReport {
    /// Epochs done.
    pub epoch: u64,
    /// Epochs in all.
    pub epochs: u64,
    /// Global steps done.
    pub step: u64,
    /// Name → value; `loss` and `samples_per_second` of the epoch and its last `lr` among them, and
    /// where the loss is scaled, `loss_scale` and the `skipped_steps` since the training began.
    pub metrics: BTreeMap<String, f64>,
}

/// Counts rows, losses and the time of training steps, from the end of one to the end of the next:
/// evaluations and checkpoints between them are not counted.
#[derive(Debug)]
pub(crate) struct Meter {
    recent: EpochTally,
    last_loss: f64,
    clock: Instant,
    reported: Instant,
}

impl Default for Meter {
    fn default() -> Self {
        let now = Instant::now();
        Self { recent: EpochTally::default(), last_loss: f64::NAN, clock: now, reported: now }
    }
}

impl Meter {
    pub(crate) fn count(&mut self, epoch: &mut EpochTally, rows: usize, weight: f64, loss: f64) {
        let elapsed = self.clock.elapsed();
        self.restart_clock();
        epoch.count(rows, weight, loss, elapsed);
        self.recent.count(rows, weight, loss, elapsed);
        self.last_loss = loss;
    }

    /// Leaves out the time since the last step.
    pub(crate) fn restart_clock(&mut self) {
        self.clock = Instant::now();
    }

    /// The progress since the last report, if one is due.
    pub(crate) fn progress(&mut self, state: &TrainState) -> Option<Progress> {
        if self.reported.elapsed() < PROGRESS_INTERVAL {
            return None;
        }
        self.reported = Instant::now();
        let recent = std::mem::take(&mut self.recent);
        Some(Progress {
            step: state.step(),
            epoch: state.epoch(),
            epochs: state.epochs(),
            loss: self.last_loss,
            lr: state.updater.lr(),
            samples_per_second: recent.rows_per_second(),
        })
    }
}
