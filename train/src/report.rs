//! What workers tell the trainer.

use crate::state::TrainState;
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
    epoch: Window,
    recent: Window,
    last_loss: f64,
    clock: Instant,
    reported: Instant,
}

#[derive(Debug, Default)]
struct Window {
    elapsed: Duration,
    rows: usize,
    weighted_loss: f64,
}

impl Window {
    fn count(&mut self, rows: usize, loss: f64, elapsed: Duration) {
        self.rows += rows;
        self.weighted_loss += loss * rows as f64;
        self.elapsed += elapsed;
    }

    fn rows_per_second(&self) -> f64 {
        self.rows as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

impl Default for Meter {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            epoch: Window::default(),
            recent: Window::default(),
            last_loss: f64::NAN,
            clock: now,
            reported: now,
        }
    }
}

impl Meter {
    pub(crate) fn count(&mut self, rows: usize, loss: f64) {
        let elapsed = self.clock.elapsed();
        self.restart_clock();
        self.epoch.count(rows, loss, elapsed);
        self.recent.count(rows, loss, elapsed);
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

    /// Mean loss over the rows of the epoch, and rows a second of its training steps.
    pub(crate) fn end_epoch(&mut self) -> BTreeMap<String, f64> {
        let epoch = std::mem::take(&mut self.epoch);
        BTreeMap::from([
            ("loss".to_owned(), epoch.weighted_loss / epoch.rows as f64),
            ("samples_per_second".to_owned(), epoch.rows_per_second()),
        ])
    }
}
