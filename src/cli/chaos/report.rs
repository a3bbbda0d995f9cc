//! What came of it, for people and as JSON.

use super::Kind;
use super::plan::Fault;
use super::watch::{Course, Ending};
use super::weights::{Comparison, compare};
use crate::cli::output::table;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The tensors that are named, of those that differ.
const MOST_NAMED: usize = 5;

pub(super) struct Report {
    reference: Option<Course>,
    disturbed: Course,
    weights: Option<Weights>,
}

/// What the comparison says, or why there is none.
type Weights = Result<Comparison, String>;

/// What `--json` prints.
#[derive(Serialize)]
pub(super) struct Json<'a> {
    survived: bool,
    problems: Vec<String>,
    reference: Option<RunJson>,
    disturbed: RunJson,
    faults: Vec<FaultJson<'a>>,
    signals: BTreeMap<Kind, usize>,
    restarts: u64,
    recovery_seconds: Option<Spread>,
    /// Upper bounds.
    lost_steps: Option<Spread>,
    /// None without a reference, or where there was nothing to compare.
    weights: Option<&'a Comparison>,
}

#[derive(Serialize)]
struct RunJson {
    run: Option<PathBuf>,
    ending: String,
    exit_code: Option<i32>,
    seconds: f64,
    step: Option<u64>,
}

#[derive(Serialize)]
struct FaultJson<'a> {
    /// Seconds since 1970.
    at: f64,
    signal: Kind,
    worker: &'a str,
    pid: u32,
    step: Option<u64>,
    recovery_seconds: Option<f64>,
    lost_steps_at_most: Option<u64>,
}

/// The middle of some numbers, and the largest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    median: f64,
    worst: f64,
}

impl Spread {
    /// `None` of none.
    fn of(numbers: impl Iterator<Item = f64>) -> Option<Self> {
        let mut numbers: Vec<f64> = numbers.collect();
        numbers.sort_by(f64::total_cmp);
        let middle = numbers.len() / 2;
        let (upper, worst) = (*numbers.get(middle)?, *numbers.last()?);
        let lower = if numbers.len().is_multiple_of(2) { numbers[middle - 1] } else { upper };
        Some(Self { median: (lower + upper) / 2.0, worst })
    }
}

impl Report {
    /// Compares the weights, if there are some to compare them with.
    pub(super) fn new(reference: Option<Course>, disturbed: Course) -> anyhow::Result<Self> {
        let weights = match &reference {
            Some(reference) if disturbed.ending.is_good() => {
                Some(compare(reference.run()?, disturbed.run()?).map_err(|e| format!("{e:#}")))
            }
            _ => None,
        };
        Ok(Self { reference, disturbed, weights })
    }

    /// Why the program did not survive; none if it did.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let faults = self.disturbed.faults.len();
        match self.disturbed.ending {
            Ending::Exited(status) if status.success() => {}
            Ending::Exited(status) => {
                problems
                    .push(format!("the disturbed run failed after {faults} signal(s): {status}"));
            }
            Ending::Stalled(seconds) => problems.push(format!(
                "for {seconds} s and {faults} signal(s) the disturbed run has come no further than \
                 step {}: it may need more time between signals (--kill-every) or more --patience",
                self.disturbed.step.unwrap_or(0)
            )),
        }
        if self.disturbed.faults.is_empty() {
            problems.push(format!(
                "no signal was sent: the run took {:.1} s, and had no worker processes of a group \
                 by then, or --kill-every is longer",
                self.disturbed.seconds
            ));
        }
        match &self.weights {
            None => {}
            Some(Err(reason)) => problems.push(format!("the weights were not compared: {reason}")),
            Some(Ok(compared)) if compared.is_identical() => {}
            Some(Ok(_)) => problems.push("the weights differ".to_owned()),
        }
        problems
    }

    pub(super) fn json(&self) -> Json<'_> {
        let problems = self.problems();
        Json {
            survived: problems.is_empty(),
            problems,
            reference: self.reference.as_ref().map(RunJson::of),
            disturbed: RunJson::of(&self.disturbed),
            faults: self.disturbed.faults.iter().map(FaultJson::of).collect(),
            signals: self.signals(),
            restarts: self.disturbed.restarts,
            recovery_seconds: self.recovery_seconds(),
            lost_steps: self.lost_steps(),
            weights: self.weights.as_ref().and_then(|weights| weights.as_ref().ok()),
        }
    }

    fn signals(&self) -> BTreeMap<Kind, usize> {
        let mut counts = BTreeMap::new();
        for fault in &self.disturbed.faults {
            *counts.entry(fault.kind).or_default() += 1;
        }
        counts
    }

    fn recovery_seconds(&self) -> Option<Spread> {
        Spread::of(self.disturbed.faults.iter().filter_map(|f| Some(f.recovery?.seconds)))
    }

    fn lost_steps(&self) -> Option<Spread> {
        Spread::of(self.disturbed.faults.iter().filter_map(|f| Some(f.recovery?.lost_steps as f64)))
    }

    pub(super) fn text(&self) -> String {
        let mut lines = Vec::new();
        if let Some(reference) = &self.reference {
            lines.push(run_line("reference", reference));
        }
        lines.push(run_line("disturbed", &self.disturbed));
        if !self.disturbed.faults.is_empty() {
            lines.push(format!("\n{}\n", self.faults()));
        }
        lines.extend(self.totals());
        lines.extend(self.weights.as_ref().map(weights_line));
        lines.push(match &self.problems()[..] {
            [] => "it survived".to_owned(),
            problems => format!("it did not survive: {}", problems.join("; ")),
        });
        lines.join("\n")
    }

    fn faults(&self) -> String {
        let run = &self.disturbed;
        let rows = run.faults.iter().map(|fault| {
            let unseen = || "not seen".to_owned();
            [
                format!("{:.1} s", fault.at - run.begun),
                fault.kind.to_string(),
                fault.worker.clone(),
                fault.step.map_or("-".to_owned(), |step| step.to_string()),
                fault.recovery.map_or_else(unseen, |back| format!("{:.2} s", back.seconds)),
                fault.recovery.map_or_else(unseen, |back| back.lost_steps.to_string()),
            ]
        });
        table(["after", "signal", "worker", "step", "recovery", "lost steps, at most"], rows)
    }

    fn totals(&self) -> Vec<String> {
        let counts = self.signals();
        let counts: Vec<String> = counts.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        let faults = self.disturbed.faults.len();
        let mut lines = vec![
            format!("{:<12} {faults} ({})", "faults", counts.join(", ")),
            format!("{:<12} {}", "restarts", self.disturbed.restarts),
        ];
        if let (Some(seconds), Some(steps)) = (self.recovery_seconds(), self.lost_steps()) {
            let Spread { median, worst } = seconds;
            lines.push(format!("{:<12} median {median:.2} s, worst {worst:.2} s", "recovery"));
            let Spread { median, worst } = steps;
            lines.push(format!(
                "{:<12} at most {median} (median), {worst} (worst), and those of the 0.2 s by which \
                 metrics.jsonl lags",
                "lost steps"
            ));
        }
        if faults == 0 { Vec::new() } else { lines }
    }
}

fn run_line(name: &str, course: &Course) -> String {
    let step = course.step.map_or("no step".to_owned(), |step| format!("step {step}"));
    format!("{name:<12} {}, {:.1} s, {step}", course.ending, course.seconds)
}

fn weights_line(weights: &Weights) -> String {
    let said = match weights {
        Err(reason) => format!("not compared: {reason}"),
        Ok(compared) if compared.is_identical() => format!(
            "the same to the bit: {} tensors at step {}",
            compared.tensors, compared.steps[0]
        ),
        Ok(compared) => differences(compared),
    };
    format!("{:<12} {said}", "weights")
}

fn differences(compared: &Comparison) -> String {
    let different = compared.different.len();
    let named = compared.different.iter().take(MOST_NAMED).map(|difference| {
        let largest = difference.largest.map_or(String::new(), |by| format!(" by up to {by:.3e}"));
        format!("{} {}{largest}", difference.tensor, difference.reason)
    });
    let named: Vec<String> = named.collect();
    let more = if different > MOST_NAMED { ", …" } else { "" };
    let [reference, disturbed] = compared.steps;
    let steps = match reference == disturbed {
        true => String::new(),
        false => format!("; the newest checkpoints are of steps {reference} and {disturbed}"),
    };
    let (all, named) = (compared.tensors, named.join(", "));
    format!("{different} of {all} tensors differ: {named}{more}{steps}")
}

impl RunJson {
    fn of(course: &Course) -> Self {
        let exit_code = match course.ending {
            Ending::Exited(status) => status.code(),
            Ending::Stalled(_) => None,
        };
        Self {
            run: course.run().ok().map(|run| run.path().to_owned()),
            ending: course.ending.to_string(),
            exit_code,
            seconds: course.seconds,
            step: course.step,
        }
    }
}

impl<'a> FaultJson<'a> {
    fn of(fault: &'a Fault) -> Self {
        Self {
            at: fault.at,
            signal: fault.kind,
            worker: &fault.worker,
            pid: fault.pid,
            step: fault.step,
            recovery_seconds: fault.recovery.map(|back| back.seconds),
            lost_steps_at_most: fault.recovery.map(|back| back.lost_steps),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_largest() {
        let spread = |numbers: &[f64]| Spread::of(numbers.iter().copied());
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[3.0]), Some(Spread { median: 3.0, worst: 3.0 }));
        assert_eq!(spread(&[9.0, 1.0, 2.0]), Some(Spread { median: 2.0, worst: 9.0 }));
        assert_eq!(spread(&[4.0, 1.0]), Some(Spread { median: 2.5, worst: 4.0 }));
    }
}
