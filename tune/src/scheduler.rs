//! Schedulers: which trials are worth going on with.
//!
//! A scheduler is a pure state machine: it sees starts and reports, in the order of the journal,
//! and answers each report. Replaying a journal rebuilds its state.

use crate::Error;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Debug;

/// A scheduler's answer to a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Decision {
    /// Go on.
    Continue,
    /// Not promising: stop now; the trial counts as pruned.
    Stop,
    /// It has had its full budget: stop now; the trial counts as complete.
    Complete,
}

/// Decides at each report whether a trial goes on.
pub trait Scheduler: Debug + Send {
    /// A trial starts, for the first time or again after a failure or an interruption.
    fn on_start(&mut self, _trial: usize) {}

    /// A trial reports its metric as a loss (smaller is better, NaN possible) at `step`.
    fn on_report(&mut self, trial: usize, step: u64, loss: f64) -> Decision;

    /// Name and options, for the journal: a study is resumed only under the same.
    fn config(&self) -> Value;

    /// Errors when the options make no sense.
    fn validate(&self) -> Result<(), Error> {
        Ok(())
    }

    /// The step at which a trial is complete, if there is one: for progress displays.
    fn max_step(&self) -> Option<u64> {
        None
    }
}

/// Every trial runs to its end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fifo;

impl Scheduler for Fifo {
    fn on_report(&mut self, _: usize, _: u64, _: f64) -> Decision {
        Decision::Continue
    }

    fn config(&self) -> Value {
        json!({"fifo": {}})
    }
}

/// How ASHA halves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum AshaMode {
    /// A trial that is not among the best 1/η of its rung ends there and then.
    #[default]
    Stopping,
}

/// Asynchronous successive halving (arXiv 1810.05934), with Ray Tune's stopping rule.
///
/// Rungs lie at `grace_period · reduction_factorᵏ` steps. A trial is judged at the first report
/// at or past a rung: it stops if it is worse than the `1/reduction_factor` quantile (linear
/// interpolation) of what other trials recorded there before. The first to arrive goes on. A
/// report that jumps over rungs counts only for the last one it passed, so no rung ever holds a
/// value from a later stage. A NaN stops the trial.
///
/// ```
/// use mobula_tune::{AshaScheduler, Decision, Scheduler};
///
/// let mut asha = AshaScheduler::new(27).with_reduction_factor(3.0);
/// assert_eq!(asha.milestones(), [1, 3, 9]);
/// assert_eq!(asha.on_report(0, 1, 0.5), Decision::Continue);
/// assert_eq!(asha.on_report(1, 1, 0.9), Decision::Stop);
/// assert_eq!(asha.on_report(0, 27, 0.1), Decision::Complete);
/// ```
#[derive(Clone, Debug)]
pub struct AshaScheduler {
    /// A trial is complete at this step.
    pub max_t: u64,
    /// No trial is stopped before this step; the first rung. Default 1.
    pub grace_period: u64,
    /// η: each rung lets about one in so many pass. Default 4.
    pub reduction_factor: f64,
    /// How trials are halved.
    pub mode: AshaMode,
    /// By rung: trial → loss.
    rungs: Vec<BTreeMap<usize, f64>>,
    /// By trial: how many rungs it has passed in its present attempt.
    passed: BTreeMap<usize, usize>,
}

impl AshaScheduler {
    /// Grace period 1, reduction factor 4.
    pub fn new(max_t: u64) -> Self {
        Self {
            max_t,
            grace_period: 1,
            reduction_factor: 4.0,
            mode: AshaMode::Stopping,
            rungs: Vec::new(),
            passed: BTreeMap::new(),
        }
    }

    /// The same with another first rung.
    pub fn with_grace_period(self, grace_period: u64) -> Self {
        Self { grace_period, ..self }
    }

    /// The same with another reduction factor.
    pub fn with_reduction_factor(self, reduction_factor: f64) -> Self {
        Self { reduction_factor, ..self }
    }

    /// The steps of the rungs, all below `max_t`.
    pub fn milestones(&self) -> Vec<u64> {
        let at = |k: i32| (self.grace_period as f64 * self.reduction_factor.powi(k)).round() as u64;
        (0..64).map(at).take_while(|step| *step < self.max_t).collect()
    }

    /// The loss that a newcomer to a rung must not exceed.
    fn cutoff(&self, rung: usize, trial: usize) -> Option<f64> {
        let others = self.rungs[rung].iter().filter(|(other, _)| **other != trial);
        let losses: Vec<f64> = others.map(|(_, loss)| *loss).collect();
        quantile(losses, 1.0 / self.reduction_factor)
    }
}

impl Scheduler for AshaScheduler {
    fn on_start(&mut self, trial: usize) {
        self.passed.remove(&trial);
    }

    fn on_report(&mut self, trial: usize, step: u64, loss: f64) -> Decision {
        if step >= self.max_t {
            return Decision::Complete;
        }
        if loss.is_nan() {
            return Decision::Stop;
        }
        let passed = self.milestones().iter().filter(|milestone| **milestone <= step).count();
        let before = self.passed.insert(trial, passed).unwrap_or(0);
        if passed <= before {
            self.passed.insert(trial, before);
            return Decision::Continue;
        }
        self.rungs.resize(self.rungs.len().max(passed), BTreeMap::new());
        let cutoff = self.cutoff(passed - 1, trial);
        self.rungs[passed - 1].insert(trial, loss);
        match cutoff {
            Some(cutoff) if loss > cutoff => Decision::Stop,
            _ => Decision::Continue,
        }
    }

    fn config(&self) -> Value {
        json!({"asha": {
            "max_t": self.max_t,
            "grace_period": self.grace_period,
            "reduction_factor": self.reduction_factor,
            "mode": self.mode,
        }})
    }

    fn validate(&self) -> Result<(), Error> {
        let wrong = |option, expected, got| Err(Error::Option { option, expected, got });
        if self.grace_period == 0 || self.grace_period > self.max_t {
            let got = format!("{} with max_t {}", self.grace_period, self.max_t);
            return wrong("asha: grace_period", "1 ..= max_t", got);
        }
        if !(self.reduction_factor >= 1.5 && self.reduction_factor.is_finite()) {
            let got = self.reduction_factor.to_string();
            return wrong("asha: reduction_factor", "a number of at least 1.5", got);
        }
        Ok(())
    }

    fn max_step(&self) -> Option<u64> {
        Some(self.max_t)
    }
}

/// The `q` quantile with linear interpolation; none of no values.
fn quantile(mut values: Vec<f64>, q: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let at = q * values.len().checked_sub(1)? as f64;
    let (low, high) = (values[at.floor() as usize], values[at.ceil() as usize]);
    // Equal ends are taken as they are: infinities have no difference.
    Some(if low == high { low } else { low + (high - low) * at.fract() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asha() -> AshaScheduler {
        AshaScheduler::new(81).with_reduction_factor(3.0)
    }

    #[test]
    fn rungs_lie_at_powers_of_the_reduction_factor() {
        assert_eq!(asha().milestones(), [1, 3, 9, 27]);
        assert_eq!(AshaScheduler::new(100).with_grace_period(5).milestones(), [5, 20, 80]);
        assert!(AshaScheduler::new(1).milestones().is_empty());
        let bad = |asha: AshaScheduler| asha.validate().expect_err("bad options").to_string();
        assert!(bad(AshaScheduler::new(4).with_grace_period(5)).contains("5 with max_t 4"));
        assert!(bad(asha().with_reduction_factor(1.0)).contains("at least 1.5"));
        assert!(bad(asha().with_reduction_factor(f64::NAN)).contains("NaN"));
    }

    /// What Ray Tune's rule keeps of 256 trials that arrive at one rung with η = 4: all of them
    /// if each is better than the last, only the first if each is worse.
    #[test]
    fn arrival_order_decides_as_in_ray() {
        let kept = |loss: fn(usize) -> f64| {
            let mut asha = AshaScheduler::new(100);
            (0..256).filter(|i| asha.on_report(*i, 1, loss(*i)) == Decision::Continue).count()
        };
        assert_eq!(kept(|i| -(i as f64)), 256);
        assert_eq!(kept(|i| i as f64), 1);
    }

    #[test]
    fn a_report_that_jumps_over_rungs_counts_for_the_last_one_only() {
        let mut asha = asha();
        assert_eq!(asha.on_report(0, 5, 0.5), Decision::Continue);
        assert_eq!(asha.on_report(0, 6, 0.4), Decision::Continue);
        assert!(asha.rungs[0].is_empty(), "nothing was measured at rung 1");
        assert_eq!(asha.rungs[1], BTreeMap::from([(0, 0.5)]));
        // A late trial is not held to a value of a later stage.
        assert_eq!(asha.on_report(1, 1, 0.9), Decision::Continue);
    }

    #[test]
    fn a_nan_stops_and_is_not_recorded() {
        let mut asha = asha();
        assert_eq!(asha.on_report(0, 1, f64::NAN), Decision::Stop);
        assert_eq!(asha.on_report(1, 1, f64::INFINITY), Decision::Continue);
        assert_eq!(asha.on_report(2, 1, 1e300), Decision::Continue);
    }

    /// A second attempt is judged again at every rung, against the others, not against itself.
    #[test]
    fn a_restarted_trial_is_judged_anew() {
        let mut asha = asha();
        assert_eq!(asha.on_report(0, 1, 0.1), Decision::Continue);
        asha.on_start(0);
        assert_eq!(asha.on_report(0, 1, 0.9), Decision::Continue);
        assert_eq!(asha.rungs[0], BTreeMap::from([(0, 0.9)]));
    }

    proptest! {
        /// INV-RUNG: a rung holds only values measured between its step and the next rung's; the
        /// best of a rung is never stopped; a replay decides the same.
        #[test]
        fn event_streams_keep_the_invariants(reports in prop::collection::vec((0usize..12, 1u64..40, -100i32..100), 1..200)) {
            let (mut asha, mut replay) = (asha(), asha());
            for (trial, step, loss) in reports {
                let rungs_before = asha.rungs.clone();
                let decision = asha.on_report(trial, step, f64::from(loss));
                prop_assert_eq!(decision, replay.on_report(trial, step, f64::from(loss)));
                for (rung, (values, milestone)) in asha.rungs.iter().zip(asha.milestones()).enumerate() {
                    let old = rungs_before.get(rung).and_then(|r| r.get(&trial));
                    if values.get(&trial) != old {
                        prop_assert!(milestone <= step && step < milestone * 3);
                    }
                }
                if decision == Decision::Stop {
                    let rung = asha.milestones().iter().filter(|m| **m <= step).count() - 1;
                    prop_assert!(rungs_before[rung].values().any(|other| *other < f64::from(loss)));
                }
            }
        }
    }
}
