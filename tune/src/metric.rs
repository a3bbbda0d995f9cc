//! What a study optimises, and in which direction: the only place that knows the sign.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// Smaller is better: losses, errors, latencies.
    Minimize,
    /// Larger is better: accuracies, rewards.
    Maximize,
}

/// The metric that a study optimises.
///
/// ```
/// use mobula_tune::Metric;
///
/// let metric = Metric::maximize("accuracy");
/// assert!(metric.is_better(0.9, 0.8));
/// assert_eq!(metric.to_string(), "maximize accuracy");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// The name that trials report it under.
    pub name: String,
    /// Which way is better.
    pub goal: Goal,
}

impl Metric {
    /// A metric whose smaller values are better.
    pub fn minimize(name: impl Into<String>) -> Self {
        let goal = Goal::Minimize;
        Self { name: name.into(), goal }
    }

    /// A metric whose larger values are better.
    pub fn maximize(name: impl Into<String>) -> Self {
        let goal = Goal::Maximize;
        Self { name: name.into(), goal }
    }

    /// The value as a loss, where smaller is better: what samplers and schedulers see.
    pub fn loss(&self, value: f64) -> f64 {
        match self.goal {
            Goal::Minimize => value,
            Goal::Maximize => -value,
        }
    }

    /// Whether `a` is strictly better than `b`; NaN is better than nothing.
    pub fn is_better(&self, a: f64, b: f64) -> bool {
        let (a, b) = (self.loss(a), self.loss(b));
        a < b || (b.is_nan() && !a.is_nan())
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let goal = match self.goal {
            Goal::Minimize => "minimize",
            Goal::Maximize => "maximize",
        };
        write!(f, "{goal} {}", self.name)
    }
}
