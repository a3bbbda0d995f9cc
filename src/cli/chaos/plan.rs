//! When to send which signal to whom, and what came of it. Pure: what was seen in, what to do out.
//! All times are seconds since 1970, as in `metrics.jsonl`.

use super::Kind;
use mobula::random::Stream;
use std::collections::{BTreeMap, BTreeSet};

/// A worker process of a group.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Worker {
    /// The group and its rank: a worker that takes the place of a lost one has the same.
    pub(super) name: String,
    pub(super) pid: u32,
    pub(super) started: f64,
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, PartialEq, serde::Deserialize)]
pub(super) struct Line {
    pub(super) step: u64,
    pub(super) time: f64,
}

/// What there was to be seen at a moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Sighting {
    pub(super) now: f64,
    pub(super) workers: Vec<Worker>,
    /// The newest ones, in the order of the file.
    pub(super) lines: Vec<Line>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Command {
    Wait,
    /// Send it; [`Plan::struck`] is to hear of it, unless the process has just ended.
    Strike(Worker, Kind),
    /// Nothing has moved for too long.
    GiveUp,
}

/// A signal that was sent.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fault {
    pub(super) at: f64,
    pub(super) kind: Kind,
    pub(super) worker: String,
    pub(super) pid: u32,
    /// The newest step by then.
    pub(super) step: Option<u64>,
    /// When the process began that took the place of the worker.
    replaced_at: Option<f64>,
    pub(super) recovery: Option<Recovery>,
}

/// Training is where it was before a fault.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Recovery {
    /// From the signal to the first line of a worker's successor with at least the step before.
    pub(super) seconds: f64,
    /// At most so many of the steps that `metrics.jsonl` had told of were made again.
    pub(super) lost_steps: u64,
}

/// What a run is to endure.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// Seconds from one signal to the next.
    pub(super) every: f64,
    pub(super) kinds: Vec<Kind>,
    pub(super) seed: u64,
    /// At most so many signals.
    pub(super) most: u64,
    /// Seconds without a step beyond all before, after which to give up.
    pub(super) patience: f64,
}

/// The course of a run.
#[derive(Debug)]
pub(super) struct Plan {
    rules: Rules,
    dice: Stream,
    /// Known while there are workers to strike.
    next_at: Option<f64>,
    /// The process ids that each worker ever had.
    known: BTreeMap<String, BTreeSet<u32>>,
    /// The workers that got a new process in the restart that is under way.
    renewed: BTreeSet<String>,
    /// The highest step, and when it was there.
    highest: Option<u64>,
    moved_at: f64,
    pub(super) faults: Vec<Fault>,
    /// How often workers were started again, all of them or the lost ones.
    pub(super) restarts: u64,
}

impl Plan {
    pub(super) fn new(rules: Rules, now: f64) -> Self {
        Self {
            dice: Stream::new(rules.seed, "chaos"),
            rules,
            next_at: None,
            known: BTreeMap::new(),
            renewed: BTreeSet::new(),
            highest: None,
            moved_at: now,
            faults: Vec::new(),
            restarts: 0,
        }
    }

    /// The highest step that was reached.
    pub(super) fn step_reached(&self) -> Option<u64> {
        self.highest
    }

    pub(super) fn step(&mut self, seen: &Sighting) -> Command {
        self.notice_progress(seen);
        seen.workers.iter().for_each(|worker| self.notice_worker(worker));
        self.faults.iter_mut().for_each(|fault| fault.notice_recovery(&seen.lines));
        if seen.now - self.moved_at > self.rules.patience {
            return Command::GiveUp;
        }
        self.strike(seen)
    }

    /// A step that is made again is no progress.
    fn notice_progress(&mut self, seen: &Sighting) {
        let step = seen.lines.iter().map(|line| line.step).max();
        if step > self.highest {
            (self.highest, self.moved_at) = (step, seen.now);
        }
    }

    fn notice_worker(&mut self, worker: &Worker) {
        let pids = self.known.entry(worker.name.clone()).or_default();
        let is_first = pids.is_empty();
        if !pids.insert(worker.pid) || is_first {
            return;
        }
        // A second training of the same name is no restart.
        if self.faults.iter().any(|fault| fault.replaced_at.is_none()) {
            self.count_restart(&worker.name);
        }
        let lost = |fault: &&mut Fault| fault.replaced_at.is_none() && fault.worker == worker.name;
        if let Some(fault) = self.faults.iter_mut().find(lost) {
            fault.replaced_at = Some(worker.started.max(fault.at));
        }
    }

    /// Those who get new processes together are not seen in one moment.
    fn count_restart(&mut self, name: &str) {
        if self.renewed.is_empty() || self.renewed.contains(name) {
            self.restarts += 1;
            self.renewed.clear();
        }
        self.renewed.insert(name.to_owned());
    }

    fn strike(&mut self, seen: &Sighting) -> Command {
        let mut targets: Vec<&Worker> =
            seen.workers.iter().filter(|worker| !self.was_struck(worker.pid)).collect();
        if targets.is_empty() {
            // Those who come get their time: a program may wait long before it starts workers again.
            self.next_at = None;
            return Command::Wait;
        }
        let next_at = *self.next_at.get_or_insert(seen.now + self.rules.every);
        if seen.now < next_at || self.faults.len() as u64 >= self.rules.most {
            return Command::Wait;
        }
        // By name, for what is drawn must not depend on process ids.
        targets.sort_by(|a, b| {
            (&a.name, a.started)
                .partial_cmp(&(&b.name, b.started))
                .unwrap_or(std::cmp::Ordering::Equal)
        });
        let mut dice = self.dice.at(self.faults.len() as u64, 0);
        let target = targets[dice.below(targets.len() as u64) as usize];
        let kind = self.rules.kinds[dice.below(self.rules.kinds.len() as u64) as usize];
        Command::Strike(target.clone(), kind)
    }

    /// One that hangs is left to hang.
    fn was_struck(&self, pid: u32) -> bool {
        self.faults.iter().any(|fault| fault.pid == pid)
    }

    /// The signal was sent at `now`.
    pub(super) fn struck(&mut self, worker: Worker, kind: Kind, seen: &Sighting, now: f64) {
        self.renewed.clear();
        self.next_at = Some(now + self.rules.every);
        self.faults.push(Fault {
            at: now,
            kind,
            worker: worker.name,
            pid: worker.pid,
            step: seen.lines.last().map(|line| line.step),
            replaced_at: None,
            recovery: None,
        });
    }
}

impl Fault {
    fn notice_recovery(&mut self, lines: &[Line]) {
        let (None, Some(replaced_at)) = (self.recovery, self.replaced_at) else { return };
        let mut after = lines.iter().filter(|line| line.time >= replaced_at);
        let Some(back) = after.find(|line| Some(line.step) >= self.step) else { return };
        // What came later than where training went on from is no longer in the file.
        let before = lines.iter().rev().find(|line| line.time < replaced_at);
        let kept = before.map_or(0, |line| line.step);
        let lost_steps = self.step.unwrap_or(0).saturating_sub(kept);
        self.recovery = Some(Recovery { seconds: back.time - self.at, lost_steps });
    }
}

#[cfg(test)]
mod tests;
