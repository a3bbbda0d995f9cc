//! What workers tell the trainer.

use crate::pace::{Pace, Waits};
use crate::state::{EpochTally, TrainState};
use mobula_core::clock::{Clock, SystemClock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Progress is reported at most this often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// To the trainer, from rank 0 unless it says otherwise.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WorkerReport {
    Progress(Progress),
    /// From each other rank as often: how long it computes in a step, in milliseconds.
    StepMs(f64),
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

impl WorkerReport {
    /// The end of an epoch, if that is what it tells.
    pub(crate) fn epoch(&self) -> Option<EpochReport> {
        if let Self::Epoch(epoch) = self { Some(epoch.clone()) } else { None }
    }
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
    /// How long this rank computes in a step.
    pub(crate) step_ms: f64,
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
    /// where the loss is scaled, `loss_scale` and the `skipped_steps` since the training began. Of
    /// several workers also the milliseconds that the fastest and the slowest of them compute in a
    /// step, without waiting for others: `ranks/step_ms_min`, `ranks/step_ms_max`, `ranks/slowest`.
    pub metrics: BTreeMap<String, f64>,
}

/// Counts rows, losses and the time of training steps, from the end of one to the end of the next:
/// evaluations and checkpoints between them are not counted.
#[derive(Debug)]
pub(crate) struct Meter {
    pub(crate) clock: Arc<dyn Clock>,
    /// What of the time is not this rank's own.
    pub(crate) waits: Arc<Waits>,
    recent: EpochTally,
    recent_pace: Pace,
    epoch_pace: Pace,
    last_loss: f64,
    step_began: Duration,
    reported: Duration,
}

impl Default for Meter {
    fn default() -> Self {
        Self::new(Arc::new(SystemClock::new()))
    }
}

impl Meter {
    fn new(clock: Arc<dyn Clock>) -> Self {
        let now = clock.now();
        Self {
            clock,
            waits: Arc::default(),
            recent: EpochTally::default(),
            recent_pace: Pace::default(),
            epoch_pace: Pace::default(),
            last_loss: f64::NAN,
            step_began: now,
            reported: now,
        }
    }

    pub(crate) fn count(&mut self, epoch: &mut EpochTally, rows: usize, weight: f64, loss: f64) {
        let (elapsed, waited) = self.restart();
        epoch.count(rows, weight, loss, elapsed);
        self.recent.count(rows, weight, loss, elapsed);
        for pace in [&mut self.recent_pace, &mut self.epoch_pace] {
            pace.count(elapsed.saturating_sub(waited));
        }
        self.last_loss = loss;
    }

    /// Waits for others, which is no time of this rank's own.
    pub(crate) fn waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        let start = self.clock.now();
        let waited = wait();
        self.waits.add(self.clock.now().saturating_sub(start));
        waited
    }

    /// Leaves out the time since the last step.
    pub(crate) fn restart_clock(&mut self) {
        self.restart();
    }

    /// The time since then, and how much of it was waited for others.
    fn restart(&mut self) -> (Duration, Duration) {
        let now = self.clock.now();
        let elapsed = now.saturating_sub(self.step_began);
        self.step_began = now;
        (elapsed, self.waits.take())
    }

    /// How long this rank has computed in each step since it was last asked.
    pub(crate) fn take_epoch_pace(&mut self) -> Pace {
        std::mem::take(&mut self.epoch_pace)
    }

    /// The progress since the last report, if one is due.
    pub(crate) fn progress(&mut self, state: &TrainState) -> Option<Progress> {
        let now = self.clock.now();
        if now.saturating_sub(self.reported) < PROGRESS_INTERVAL {
            return None;
        }
        self.reported = now;
        let recent = std::mem::take(&mut self.recent);
        Some(Progress {
            step: state.step(),
            epoch: state.epoch(),
            epochs: state.epochs(),
            loss: self.last_loss,
            lr: state.updater.lr(),
            samples_per_second: recent.rows_per_second(),
            step_ms: std::mem::take(&mut self.recent_pace).step_ms(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::{Collective, Exchange, Values};
    use crate::pace::{Spread, Timed};
    use crate::{ReduceOp, Result};
    use mobula_core::Shard;
    use mobula_core::clock::VirtualClock;

    /// The others come this much later.
    #[derive(Debug)]
    struct Late(VirtualClock, Duration);

    impl Collective for Late {
        fn shard(&self) -> Shard {
            Shard::ALL
        }

        fn exchange(&self, _: Values<'_>, _: &Exchange) -> Result<()> {
            self.0.advance(self.1);
            Ok(())
        }
    }

    /// Of a rank that computes for so long in each of three steps and then waits until the
    /// slowest, which needs 40 ms, is there; what lies between steps takes 70 ms and counts for none.
    fn pace_of(compute_ms: u64) -> f64 {
        let (clock, ms) = (VirtualClock::default(), Duration::from_millis);
        let mut meter = Meter::new(Arc::new(clock.clone()));
        let inner = Arc::new(Late(clock.clone(), ms(40 - compute_ms)));
        let (waits, time) = (Arc::clone(&meter.waits), Arc::clone(&meter.clock));
        let collective: &dyn Collective = &Timed { inner, clock: time, waits };
        let mut epoch = EpochTally::default();
        for _ in 0..3 {
            clock.advance(ms(compute_ms));
            collective.all_reduce(&mut [0.0f32], ReduceOp::Sum).expect("sum");
            meter.count(&mut epoch, 8, 8.0, 0.5);
            clock.advance(ms(70));
            collective.barrier().expect("barrier");
            meter.restart_clock();
        }
        assert_eq!(epoch.elapsed, ms(120), "waiting is a part of the step");
        let step_ms = meter.take_epoch_pace().step_ms();
        assert!(meter.take_epoch_pace().step_ms().is_nan(), "the next epoch begins anew");
        step_ms
    }

    #[test]
    fn the_one_that_the_others_wait_for_is_the_slowest() {
        let spread = Spread::of((0..3).map(|rank| (rank, pace_of([10, 15, 40][rank]))));
        let shown = spread.expect("three ranks").to_string();
        assert_eq!(shown, "steps 10.0-40.0 ms, rank 2 slowest");
    }
}
