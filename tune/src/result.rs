//! What a study has found.

use crate::history::TrialState;
use crate::record::{Event, TrialRecord};
use crate::study::replay;
use crate::{Error, Metric, Params, journal};
use comfy_table::{Table, presets};
use std::fmt;
use std::path::Path;

/// One trial of a finished study.
#[derive(Clone, Debug)]
pub struct TrialResult {
    /// Its number, from 0.
    pub number: usize,
    /// Its parameters.
    pub params: Params,
    /// How it ended.
    pub state: TrialState,
    /// Its last value of the metric; NaN for a trial that reported none.
    pub value: f64,
    /// The step of that value.
    pub step: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// All trials of a study. Its `Display` is a table, best trial first.
#[derive(Clone, Debug)]
pub struct ResultGrid {
    metric: Metric,
    trials: Vec<TrialResult>,
}

impl ResultGrid {
    pub(crate) fn new(metric: &Metric, records: &[TrialRecord]) -> Self {
        let trials = records.iter().map(TrialResult::new).collect();
        Self { metric: metric.clone(), trials }
    }

    /// What a journal holds so far; another process may be writing it.
    pub fn load(journal: impl AsRef<Path>) -> Result<Self, Error> {
        let path = journal.as_ref();
        let events: Vec<Event> = journal::read(path)?;
        let (info, records) = replay(&events, path)?;
        Ok(Self::new(&info.metric, &records))
    }

    /// The metric that was optimised.
    pub fn metric(&self) -> &Metric {
        &self.metric
    }

    /// All trials by number.
    pub fn trials(&self) -> &[TrialResult] {
        &self.trials
    }

    /// How many trials are in this state.
    pub fn count(&self, state: TrialState) -> usize {
        self.trials.iter().filter(|t| t.state == state).count()
    }

    /// The complete trial with the best last value; the earlier one of two equal ones. Pruned
    /// trials only count where none is complete.
    pub fn best(&self) -> Result<&TrialResult, Error> {
        let best_in = |state| {
            let candidates = self.trials.iter().filter(|t| t.state == state && t.value.is_finite());
            candidates.reduce(|a, b| if self.metric.is_better(b.value, a.value) { b } else { a })
        };
        let best = best_in(TrialState::Complete).or_else(|| best_in(TrialState::Pruned));
        best.ok_or(Error::NoBest { trials: self.trials.len() })
    }

    /// `best: trial 3, accuracy 0.971 at step 9, lr=0.0032 width=64`.
    pub fn best_line(&self) -> Result<String, Error> {
        let best = self.best()?;
        let value = best.describe_value(&self.metric);
        Ok(format!("best: trial {}, {value}, {}", best.number, best.params))
    }
}

impl TrialResult {
    pub(crate) fn new(record: &TrialRecord) -> Self {
        Self {
            number: record.number,
            params: record.params.clone(),
            state: record.state,
            value: record.value().unwrap_or(f64::NAN),
            step: record.last().map_or(0, |report| report.step),
            error: record.error.clone(),
        }
    }

    pub(crate) fn describe_value(&self, metric: &Metric) -> String {
        format!("{} {} at step {}", metric.name, crate::params::short(self.value), self.step)
    }
}

impl fmt::Display for ResultGrid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["trial", "state", "step", self.metric.name.as_str(), "params"]);
        let mut sorted: Vec<&TrialResult> = self.trials.iter().collect();
        let rank = |t: &TrialResult| (t.state != TrialState::Complete, t.value.is_nan());
        let loss = |t: &TrialResult| self.metric.loss(t.value);
        sorted.sort_by(|a, b| rank(a).cmp(&rank(b)).then(loss(a).total_cmp(&loss(b))));
        for t in sorted {
            let value =
                if t.value.is_nan() { "-".to_owned() } else { crate::params::short(t.value) };
            let (number, step) = (t.number.to_string(), t.step.to_string());
            table.add_row([number, t.state.to_string(), step, value, t.params.to_string()]);
        }
        write!(f, "{table}")
    }
}
