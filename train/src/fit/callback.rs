//! Who hears of a training's steps and epochs, and may end it.

use super::is_better;
use crate::optim::Mode;
use crate::{EpochReport, Error};
use mobula_core::{BoxError, Flow};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Hears of each step and epoch of a [`TrainLoop`](super::TrainLoop), on every rank. When it says
/// [`Flow::Stop`] on any of them, the training ends on all.
pub trait Callback: Send {
    /// Under which a checkpoint keeps its state: another one for each callback of a loop.
    fn name(&self) -> &str;

    /// Before the first step, once it has what it remembers. Default: nothing.
    fn on_start(&mut self) -> Result<Flow, BoxError> {
        Ok(Flow::Continue)
    }

    /// After each step. Default: nothing.
    fn on_step(&mut self, _step: &StepReport) -> Result<Flow, BoxError> {
        Ok(Flow::Continue)
    }

    /// At the end of each epoch, with its metrics. Default: nothing.
    fn on_epoch(&mut self, _epoch: &EpochReport) -> Result<Flow, BoxError> {
        Ok(Flow::Continue)
    }

    /// What it has to remember for a training that goes on from a checkpoint. Default: nothing.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Goes on from what [`state`](Self::state) gave. Default: nothing.
    fn restore(&mut self, _state: &Value) -> Result<(), BoxError> {
        Ok(())
    }
}

/// A step that is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Global steps done.
    pub step: u64,
    /// Epochs done.
    pub epoch: u64,
    /// The mean loss over all rows of all ranks.
    pub loss: f64,
}

/// Ends a training whose metric no longer improves.
#[derive(Clone, Debug)]
pub struct EarlyStopping {
    name: String,
    metric: String,
    mode: Mode,
    patience: u64,
    min_delta: f64,
    best: Option<f64>,
    /// Epochs since the best one.
    waited: u64,
}

impl EarlyStopping {
    /// Watches a metric of each epoch, of which lower or higher is better.
    pub fn new(metric: impl Into<String>, mode: Mode) -> Self {
        let (metric, best) = (metric.into(), None);
        let name = format!("early_stopping/{metric}");
        Self { name, metric, mode, patience: 3, min_delta: 0.0, best, waited: 0 }
    }

    /// Sets how many epochs without an improvement are borne: it ends with one more. Default: 3.
    pub fn with_patience(self, patience: u64) -> Self {
        Self { patience, ..self }
    }

    /// Sets by how much more than that a metric has to be better than the best. Default: 0.
    pub fn with_min_delta(self, min_delta: f64) -> Self {
        Self { min_delta, ..self }
    }

    /// The best value so far.
    pub fn best(&self) -> Option<f64> {
        self.best
    }
}

impl Callback for EarlyStopping {
    fn name(&self) -> &str {
        &self.name
    }

    /// A training that it has ended is not resumed, unless with more patience.
    fn on_start(&mut self) -> Result<Flow, BoxError> {
        Ok(Flow::stop_if(self.waited > self.patience))
    }

    /// Errors when the epoch does not report the metric. One that is no finite number is no improvement.
    fn on_epoch(&mut self, epoch: &EpochReport) -> Result<Flow, BoxError> {
        let Some(value) = epoch.metrics.get(&self.metric).copied() else {
            let (metric, names) = (self.metric.clone(), epoch.metrics.keys().cloned().collect());
            return Err(Error::NoMetric { what: "early stopping", metric, names }.into());
        };
        let improves = |best| is_better(self.mode, value, best, self.min_delta);
        match self.best.is_none_or(improves) && value.is_finite() {
            true => (self.best, self.waited) = (Some(value), 0),
            false => self.waited += 1,
        }
        Ok(Flow::stop_if(self.waited > self.patience))
    }

    fn state(&self) -> Value {
        serde_json::json!({ "best": self.best, "waited": self.waited })
    }

    fn restore(&mut self, state: &Value) -> Result<(), BoxError> {
        self.best = serde_json::from_value(state["best"].clone())?;
        self.waited = serde_json::from_value(state["waited"].clone())?;
        Ok(())
    }
}

/// Ends a training after some time of its own: that before it was resumed counts too.
#[derive(Clone)]
pub struct TimeBudget {
    budget: Duration,
    spent_before: Duration,
    clock: Arc<dyn Fn() -> Duration + Send + Sync>,
}

impl std::fmt::Debug for TimeBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TimeBudget").field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl TimeBudget {
    /// The training ends with the first step after this time.
    pub fn new(budget: Duration) -> Self {
        let start = Instant::now();
        Self::with_clock(budget, move || start.elapsed())
    }

    /// The same by a clock that gives the time since some beginning.
    pub fn with_clock(
        budget: Duration,
        clock: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> Self {
        Self { budget, spent_before: Duration::ZERO, clock: Arc::new(clock) }
    }

    fn spent(&self) -> Duration {
        self.spent_before + (self.clock)()
    }
}

impl Callback for TimeBudget {
    fn name(&self) -> &str {
        "time_budget"
    }

    fn on_start(&mut self) -> Result<Flow, BoxError> {
        Ok(Flow::stop_if(self.spent() >= self.budget))
    }

    fn on_step(&mut self, _: &StepReport) -> Result<Flow, BoxError> {
        self.on_start()
    }

    fn state(&self) -> Value {
        serde_json::json!({ "spent_seconds": self.spent().as_secs_f64() })
    }

    fn restore(&mut self, state: &Value) -> Result<(), BoxError> {
        let spent: f64 = serde_json::from_value(state["spent_seconds"].clone())?;
        self.spent_before = Duration::try_from_secs_f64(spent)?;
        Ok(())
    }
}
