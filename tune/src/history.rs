//! What a sampler sees of the trials so far: columns of numbers, kept sorted as trials are added.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How a trial stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrialState {
    /// It has parameters and waits to run, for the first time or again.
    Waiting,
    /// It is at work.
    Running,
    /// It came to its end, or to its scheduler's full budget.
    Complete,
    /// Its scheduler stopped it early.
    Pruned,
    /// It ended with an error or a panic, or without a finite value.
    Failed,
}

impl TrialState {
    /// Whether nothing more will happen to the trial.
    pub fn is_finished(self) -> bool {
        !matches!(self, Self::Waiting | Self::Running)
    }
}

impl fmt::Display for TrialState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Pruned => "pruned",
            Self::Failed => "failed",
        })
    }
}

/// One trial as a sampler sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observation {
    /// How it stands.
    pub state: TrialState,
    /// Its last value as a loss: smaller is better, whatever the metric's goal. NaN without one.
    pub loss: f64,
    /// The step of that value.
    pub step: Option<u64>,
}

/// All trials so far by number, with their parameters as internal coordinates: a real number or
/// its logarithm, an integer or its logarithm, the index of a choice.
#[derive(Clone, Debug, Default)]
pub struct History {
    trials: Vec<Observation>,
    columns: Vec<Vec<f64>>,
    sorted: Vec<Vec<u32>>,
}

impl History {
    pub(crate) fn new(parameters: usize) -> Self {
        Self {
            trials: Vec::new(),
            columns: vec![Vec::new(); parameters],
            sorted: vec![Vec::new(); parameters],
        }
    }

    /// The trials by number.
    pub fn trials(&self) -> &[Observation] {
        &self.trials
    }

    /// How many trials have come to an end with a value: complete or pruned.
    pub fn observed(&self) -> usize {
        let observed =
            |t: &&Observation| matches!(t.state, TrialState::Complete | TrialState::Pruned);
        self.trials.iter().filter(observed).count()
    }

    /// The coordinates of one parameter, in its order in the space, by trial number.
    pub fn column(&self, parameter: usize) -> &[f64] {
        &self.columns[parameter]
    }

    /// Trial numbers by ascending coordinate of one parameter; ties by number.
    pub fn sorted(&self, parameter: usize) -> &[u32] {
        &self.sorted[parameter]
    }

    pub(crate) fn push(&mut self, coordinates: &[f64]) {
        let number = self.trials.len() as u32;
        let (state, loss, step) = (TrialState::Waiting, f64::NAN, None);
        self.trials.push(Observation { state, loss, step });
        for (parameter, x) in coordinates.iter().enumerate() {
            let column = &mut self.columns[parameter];
            let order = &mut self.sorted[parameter];
            let at = order.partition_point(|other| column[*other as usize] <= *x);
            column.push(*x);
            order.insert(at, number);
        }
    }

    pub(crate) fn set_state(&mut self, number: usize, state: TrialState) {
        self.trials[number].state = state;
    }

    pub(crate) fn set_value(&mut self, number: usize, step: Option<u64>, loss: f64) {
        self.trials[number].loss = loss;
        self.trials[number].step = step;
    }
}
