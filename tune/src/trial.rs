//! A running trial's side of the study.

use crate::{Error, Params};
use mobula_core::Flow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// The coordinator answers in milliseconds; after this it is as good as gone.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What a trial tells its coordinator.
#[derive(Debug)]
pub(crate) enum Message {
    /// Its task has its resources and runs.
    Began,
    /// A report, which waits for its answer.
    Report { number: usize, attempt: u32, step: u64, value: f64, answer: SyncSender<Flow> },
    /// Its task is over, however that came about.
    Ended { number: usize },
}

/// Stops a study from outside; clones stop the same one.
#[derive(Clone, Debug, Default)]
pub struct StopHandle {
    flag: Arc<AtomicBool>,
}

impl StopHandle {
    /// Starts no further trial and tells the running ones to stop. They run again, with the same
    /// parameters, when the study is resumed from its journal.
    pub fn stop(&self) {
        self.flag.store(true, Ordering::Release);
    }

    /// Whether the study was stopped.
    pub fn is_stopped(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }
}

/// A running trial: its parameters, and where it reports to.
#[derive(Debug)]
pub struct Trial {
    /// Its number, from 0.
    pub number: usize,
    /// Its parameters.
    pub params: Params,
    /// Which attempt this is, from 1: above 1 after a failure or an interruption.
    pub attempt: u32,
    /// A seed of its own, the same in every attempt.
    pub seed: u64,
    pub(crate) metric: String,
    pub(crate) coordinator: SyncSender<Message>,
    pub(crate) stop: StopHandle,
    pub(crate) stopped: bool,
}

impl Trial {
    /// Reports the metric's value at a step, such as an epoch, and waits until the report is in
    /// the journal. `values` is the metric's value, or several by name, of which the study's
    /// metric must be one:
    /// `trial.report(epoch, accuracy)?` or
    /// `trial.report(epoch, &[("accuracy", a), ("loss", l)])?`.
    ///
    /// Errors when the metric is missing, or the study is gone. A trial that was told to stop and
    /// reports again is told so again.
    pub fn report(&mut self, step: u64, values: impl Values) -> Result<Flow, Error> {
        let value = values.value_of(&self.metric).map_err(|reported| Error::MetricMissing {
            trial: self.number,
            metric: self.metric.clone(),
            reported,
        })?;
        if self.should_stop() {
            return Ok(Flow::Stop);
        }
        let flow = self.send(step, value).ok_or(Error::StudyGone { trial: self.number })?;
        self.stopped = flow == Flow::Stop;
        Ok(flow)
    }

    /// Whether the trial should end: it was told to, or the study was stopped. For trials that
    /// report seldom.
    pub fn should_stop(&self) -> bool {
        self.stopped || self.stop.is_stopped() || mobula_core::task::cancelled()
    }

    fn send(&self, step: u64, value: f64) -> Option<Flow> {
        let (answer, answered): (_, Receiver<Flow>) = sync_channel(1);
        let (number, attempt) = (self.number, self.attempt);
        let report = Message::Report { number, attempt, step, value, answer };
        self.coordinator.send(report).ok()?;
        answered.recv_timeout(ANSWER_TIMEOUT).ok()
    }
}

/// What [`Trial::report`] takes: one number, or numbers by name.
pub trait Values {
    /// The value of `metric`, or the names there are instead.
    fn value_of(&self, metric: &str) -> Result<f64, Vec<String>>;
}

impl Values for f64 {
    fn value_of(&self, _: &str) -> Result<f64, Vec<String>> {
        Ok(*self)
    }
}

impl Values for f32 {
    fn value_of(&self, _: &str) -> Result<f64, Vec<String>> {
        Ok(f64::from(*self))
    }
}

impl Values for &[(&str, f64)] {
    fn value_of(&self, metric: &str) -> Result<f64, Vec<String>> {
        let found = self.iter().find(|(name, _)| *name == metric).map(|(_, value)| *value);
        found.ok_or_else(|| self.iter().map(|(name, _)| (*name).to_owned()).collect())
    }
}

impl<const N: usize> Values for &[(&str, f64); N] {
    fn value_of(&self, metric: &str) -> Result<f64, Vec<String>> {
        self.as_slice().value_of(metric)
    }
}

impl Values for &BTreeMap<String, f64> {
    fn value_of(&self, metric: &str) -> Result<f64, Vec<String>> {
        self.get(metric).copied().ok_or_else(|| self.keys().cloned().collect())
    }
}
