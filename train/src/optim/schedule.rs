//! Learning rates that change from step to step.

use super::check;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// The learning rate of each step, as a function of the optimizer's own and of the steps done.
///
/// Values are those of PyTorch's schedulers when they are stepped once a step. A schedule that has
/// an end keeps its last value after it.
///
/// ```
/// use mobula_train::optim::Schedule;
///
/// let schedule = Schedule::warmup(10).then(Schedule::cosine(90));
/// assert_eq!(schedule.lr(0.1, 5), 0.05);
/// assert_eq!(schedule.lr(0.1, 10), 0.1);
/// assert!(schedule.lr(0.1, 100) < 1e-9);
/// # schedule.validate()?;
/// # Ok::<(), mobula_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Schedule {
    /// Always the optimizer's.
    Constant {},
    /// From `start_factor` times the optimizer's to `end_factor` times it in so many steps, as
    /// PyTorch's `LinearLR`.
    Linear {
        /// At the first step. Default 1/3.
        #[serde(default = "third")]
        start_factor: f64,
        /// After `steps`. Default 1.
        #[serde(default = "one")]
        end_factor: f64,
        /// Steps from one to the other.
        steps: u64,
    },
    /// Half a cosine from the optimizer's to `min_lr`, as PyTorch's `CosineAnnealingLR`.
    Cosine {
        /// Steps from one to the other.
        steps: u64,
        /// Default 0.
        #[serde(default)]
        min_lr: f64,
    },
    /// The same again and again, as PyTorch's `CosineAnnealingWarmRestarts`.
    CosineRestarts {
        /// Steps of the first time.
        steps: u64,
        /// How many times longer each next one is. Default 1.
        #[serde(default = "once")]
        multiply: u64,
        /// Default 0.
        #[serde(default)]
        min_lr: f64,
    },
    /// Up to the optimizer's and down to almost nothing, as PyTorch's `OneCycleLR`.
    OneCycle {
        /// Steps in all.
        steps: u64,
        /// The share of steps on the way up. Default 0.3.
        #[serde(default = "pct_start")]
        pct_start: f64,
        /// The optimizer's over that of the first step. Default 25.
        #[serde(default = "div_factor")]
        div_factor: f64,
        /// The learning rate of the first step over that of the last. Default 10000.
        #[serde(default = "final_div_factor")]
        final_div_factor: f64,
        /// Whether it goes down as it went up, and then on. Default: no.
        #[serde(default)]
        three_phase: bool,
        /// The shape of the ways. Default: cosine.
        #[serde(default)]
        anneal: Anneal,
    },
    /// Times `gamma` every so many steps, as PyTorch's `StepLR`.
    Step {
        /// Steps between two.
        every: u64,
        /// Default 0.1.
        #[serde(default = "tenth")]
        gamma: f64,
    },
    /// Times `gamma` at each of these steps, as PyTorch's `MultiStepLR`.
    MultiStep {
        /// The steps, ascending.
        milestones: Vec<u64>,
        /// Default 0.1.
        #[serde(default = "tenth")]
        gamma: f64,
    },
    /// Times `gamma` at every step, as PyTorch's `ExponentialLR`.
    Exponential {
        /// From 0 to 1.
        gamma: f64,
    },
    /// The optimizer's · (1 − t/steps) to the power, as PyTorch's `PolynomialLR`.
    Polynomial {
        /// Steps to 0.
        steps: u64,
        /// Default 1: a straight line.
        #[serde(default = "one")]
        power: f64,
    },
    /// One after the other, as optax's `join_schedules`: each counts its steps from its start.
    Join {
        /// One more than there are boundaries.
        schedules: Vec<Schedule>,
        /// The steps at which the second, third and so on begin, ascending.
        boundaries: Vec<u64>,
    },
}

/// The shape of a way from one learning rate to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Anneal {
    /// Half a cosine.
    #[default]
    Cos,
    /// A straight line.
    Linear,
}

fn third() -> f64 {
    1.0 / 3.0
}

fn one() -> f64 {
    1.0
}

fn once() -> u64 {
    1
}

fn tenth() -> f64 {
    0.1
}

fn pct_start() -> f64 {
    0.3
}

fn div_factor() -> f64 {
    25.0
}

fn final_div_factor() -> f64 {
    1e4
}

/// The start of whatever comes after a schedule that has no end.
const NEVER: u64 = u64::MAX;

impl Schedule {
    /// From 0 to the optimizer's learning rate in so many steps.
    pub fn warmup(steps: u64) -> Self {
        Self::Linear { start_factor: 0.0, end_factor: 1.0, steps }
    }

    /// Half a cosine to 0 in so many steps.
    pub fn cosine(steps: u64) -> Self {
        Self::Cosine { steps, min_lr: 0.0 }
    }

    /// Up and down in so many steps, with PyTorch's defaults.
    pub fn one_cycle(steps: u64) -> Self {
        Self::OneCycle {
            steps,
            pct_start: pct_start(),
            div_factor: div_factor(),
            final_div_factor: final_div_factor(),
            three_phase: false,
            anneal: Anneal::Cos,
        }
    }

    /// This one to its end, then `next`. To end one that has no end of its own, give
    /// [`Schedule::Join`] the step.
    pub fn then(self, next: Self) -> Self {
        let boundary = self.steps().unwrap_or(NEVER);
        match self {
            Self::Join { mut schedules, mut boundaries } => {
                schedules.push(next);
                boundaries.push(boundary);
                Self::Join { schedules, boundaries }
            }
            first => Self::Join { schedules: vec![first, next], boundaries: vec![boundary] },
        }
    }

    /// Steps to its end, if it has one.
    pub fn steps(&self) -> Option<u64> {
        match self {
            Self::Linear { steps, .. }
            | Self::Cosine { steps, .. }
            | Self::OneCycle { steps, .. }
            | Self::Polynomial { steps, .. } => Some(*steps),
            Self::Join { schedules, boundaries } => {
                let start = boundaries.last().copied().unwrap_or(0);
                schedules.last()?.steps()?.checked_add(start)
            }
            _ => None,
        }
    }

    /// The learning rate after `step` steps, where the optimizer's is `base`.
    pub fn lr(&self, base: f64, step: u64) -> f64 {
        let t = step as f64;
        match self {
            Self::Constant {} => base,
            Self::Linear { start_factor, end_factor, steps } => {
                base * (start_factor + (end_factor - start_factor) * share(step, *steps))
            }
            Self::Cosine { steps, min_lr } => cosine(base, *min_lr, share(step, *steps)),
            Self::CosineRestarts { steps, multiply, min_lr } => {
                cosine(base, *min_lr, share_of_round(step, *steps, *multiply))
            }
            Self::OneCycle { .. } => self.one_cycle_lr(base, t),
            Self::Step { every, gamma } => base * gamma.powf((step / (*every).max(1)) as f64),
            Self::MultiStep { milestones, gamma } => {
                let passed = milestones.iter().filter(|milestone| **milestone <= step).count();
                base * gamma.powf(passed as f64)
            }
            Self::Exponential { gamma } => base * gamma.powf(t),
            Self::Polynomial { steps, power } => base * (1.0 - share(step, *steps)).powf(*power),
            Self::Join { schedules, boundaries } => {
                let at = boundaries.iter().filter(|boundary| **boundary <= step).count();
                let start = at.checked_sub(1).map_or(0, |before| boundaries[before]);
                schedules.get(at).map_or(base, |schedule| schedule.lr(base, step - start))
            }
        }
    }

    fn one_cycle_lr(&self, peak: f64, t: f64) -> f64 {
        let Self::OneCycle { steps, pct_start, div_factor, final_div_factor, three_phase, anneal } =
            self
        else {
            return peak;
        };
        let (total, up) = (*steps as f64, pct_start * *steps as f64 - 1.0);
        let first = peak / div_factor;
        let last = first / final_div_factor;
        // Each phase: the step at its end, and the learning rate then.
        let phases: &[(f64, f64)] = match three_phase {
            true => &[(up, peak), (2.0 * up, first), (total - 1.0, last)],
            false => &[(up, peak), (total - 1.0, last)],
        };
        let (mut start, mut from) = (0.0, first);
        for (end, to) in phases {
            if t <= *end {
                // Of a phase of no steps there is the end alone.
                let done = if *end > start { (t - start) / (end - start) } else { 1.0 };
                return anneal.between(from, *to, done);
            }
            (start, from) = (*end, *to);
        }
        last
    }

    /// Errors when an option is out of its range.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Constant {} => Ok(()),
            Self::Linear { start_factor, end_factor, steps } => {
                check::not_negative("start_factor", *start_factor)?;
                check::not_negative("end_factor", *end_factor)?;
                check::at_least_one("steps", *steps)
            }
            Self::Cosine { steps, min_lr } => {
                check::not_negative("min_lr", *min_lr)?;
                check::at_least_one("steps", *steps)
            }
            Self::CosineRestarts { steps, multiply, min_lr } => {
                check::not_negative("min_lr", *min_lr)?;
                check::at_least_one("multiply", *multiply)?;
                check::at_least_one("steps", *steps)
            }
            Self::OneCycle { steps, pct_start, div_factor, final_div_factor, .. } => {
                let pct = *pct_start;
                check::option("pct_start", pct, (0.0..=1.0).contains(&pct), "from 0 to 1")?;
                check::positive("div_factor", *div_factor)?;
                check::positive("final_div_factor", *final_div_factor)?;
                check::at_least_one("steps", *steps)
            }
            Self::Step { every, gamma } => {
                check::positive("gamma", *gamma)?;
                check::at_least_one("every", *every)
            }
            Self::MultiStep { milestones, gamma } => {
                check::positive("gamma", *gamma)?;
                ascending("milestones", milestones)
            }
            Self::Exponential { gamma } => check::positive("gamma", *gamma),
            Self::Polynomial { steps, power } => {
                check::positive("power", *power)?;
                check::at_least_one("steps", *steps)
            }
            Self::Join { schedules, boundaries } => {
                schedules.iter().try_for_each(Self::validate)?;
                ascending("boundaries", boundaries)?;
                joined(schedules, boundaries)
            }
        }
    }
}

/// How much of the steps is done, at most all.
fn share(step: u64, steps: u64) -> f64 {
    step.min(steps) as f64 / steps.max(1) as f64
}

/// How much of the round that the step is in is done.
fn share_of_round(step: u64, steps: u64, multiply: u64) -> f64 {
    let (mut step, mut round) = (step, steps.max(1));
    if multiply <= 1 {
        return share(step % round, round);
    }
    while step >= round {
        step -= round;
        round = round.saturating_mul(multiply);
    }
    share(step, round)
}

fn cosine(from: f64, to: f64, share: f64) -> f64 {
    to + (from - to) * (1.0 + (PI * share).cos()) / 2.0
}

impl Anneal {
    fn between(self, from: f64, to: f64, share: f64) -> f64 {
        match self {
            Self::Cos => cosine(from, to, share),
            Self::Linear => from + (to - from) * share,
        }
    }
}

fn ascending(option: &'static str, steps: &[u64]) -> Result<()> {
    if steps.is_sorted_by(|a, b| a < b) {
        return Ok(());
    }
    Err(Error::Option { option, got: format!("{steps:?}"), expected: "steps in ascending order" })
}

fn joined(schedules: &[Schedule], boundaries: &[u64]) -> Result<()> {
    let (option, got) = ("boundaries", format!("{boundaries:?}"));
    if schedules.len() != boundaries.len() + 1 {
        return Err(Error::Option { option, got, expected: "one less than there are schedules" });
    }
    if boundaries.contains(&NEVER) {
        let expected = "steps; a schedule without an end needs one written down before the next";
        return Err(Error::Option { option, got, expected });
    }
    Ok(())
}
