//! What a study's journal holds: its identity, its events, and the trials they describe.

use crate::history::TrialState;
use crate::{Error, Metric, Params, SearchSpace};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// What a study is: everything that must be the same when it is resumed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StudyInfo {
    /// The parameters.
    pub(crate) space: SearchSpace,
    /// What is optimised.
    pub(crate) metric: Metric,
    /// The seed of the sampler.
    pub(crate) seed: u64,
    /// The sampler's name and options.
    pub(crate) sampler: Value,
    /// The scheduler's name and options.
    pub(crate) scheduler: Value,
}

/// One record of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(crate) enum Event {
    Study(StudyInfo),
    Created {
        trial: usize,
        params: Params,
    },
    Started {
        trial: usize,
        attempt: u32,
    },
    Report {
        trial: usize,
        step: u64,
        #[serde(with = "nan_as_null")]
        value: f64,
    },
    /// Back to waiting: after a failure that may be retried, or (no error) an interruption.
    Requeued {
        trial: usize,
        error: Option<String>,
    },
    Finished {
        trial: usize,
        state: TrialState,
        error: Option<String>,
    },
}

/// JSON has neither NaN nor infinity; a value that is not finite comes back as NaN.
mod nan_as_null {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        value.is_finite().then_some(*value).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

/// One report of a trial.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Report {
    /// Which attempt of the trial, from 1.
    pub(crate) attempt: u32,
    /// Its step: epochs, batches, whatever the scheduler counts.
    pub(crate) step: u64,
    /// The metric; NaN where it was not finite.
    pub(crate) value: f64,
}

/// A trial as the study knows it.
#[derive(Clone, Debug)]
pub(crate) struct TrialRecord {
    /// Its number, from 0.
    pub(crate) number: usize,
    /// Its parameters.
    pub(crate) params: Params,
    /// How it stands.
    pub(crate) state: TrialState,
    /// How often it was started.
    pub(crate) attempt: u32,
    /// Every report of every attempt.
    pub(crate) reports: Vec<Report>,
    /// Why it failed, or failed before it was tried again.
    pub(crate) error: Option<String>,
}

impl TrialRecord {
    /// The last report of the present attempt.
    pub(crate) fn last(&self) -> Option<&Report> {
        self.reports.last().filter(|report| report.attempt == self.attempt)
    }

    /// The last value of the present attempt.
    pub(crate) fn value(&self) -> Option<f64> {
        self.last().map(|report| report.value)
    }
}

impl TrialRecord {
    /// Brings the record up to date.
    pub(crate) fn apply(&mut self, event: &Event) {
        match event {
            Event::Started { attempt, .. } => {
                self.state = TrialState::Running;
                self.attempt = *attempt;
            }
            Event::Report { step, value, .. } => {
                let (attempt, step, value) = (self.attempt, *step, *value);
                self.reports.push(Report { attempt, step, value });
            }
            Event::Requeued { error, .. } => {
                self.state = TrialState::Waiting;
                self.error.clone_from(error);
            }
            Event::Finished { state, error, .. } => {
                self.state = *state;
                self.error.clone_from(error);
            }
            Event::Study(_) | Event::Created { .. } => {}
        }
    }
}

/// Names the first thing in which a recorded study is another one.
pub(crate) fn compare(recorded: &StudyInfo, asked: &StudyInfo, path: &Path) -> Result<(), Error> {
    let mismatch = |what, recorded: String, asked: String| {
        Err(Error::StudyMismatch { path: path.to_owned(), what, recorded, asked })
    };
    if let Some((recorded, asked)) = recorded.space.difference(&asked.space) {
        return mismatch("search space", recorded, asked);
    }
    let parts = |info: &StudyInfo| {
        [
            ("metric", info.metric.to_string()),
            ("seed", info.seed.to_string()),
            ("sampler", info.sampler.to_string()),
            ("scheduler", info.scheduler.to_string()),
        ]
    };
    let pairs = parts(recorded).into_iter().zip(parts(asked));
    match pairs.into_iter().find(|(a, b)| a.1 != b.1) {
        Some(((what, recorded), (_, asked))) => mismatch(what, recorded, asked),
        None => Ok(()),
    }
}
