//! How many workers a training has, and what is said when their number changes.

use crate::{Error, Result};
use std::fmt;
use std::ops::RangeInclusive;

/// How many workers: `4`, or `2..=4`, in an elastic training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerCount {
    /// The fewest.
    pub min: usize,
    /// The most.
    pub max: usize,
}

impl From<usize> for WorkerCount {
    fn from(workers: usize) -> Self {
        Self { min: workers, max: workers }
    }
}

impl From<RangeInclusive<usize>> for WorkerCount {
    fn from(workers: RangeInclusive<usize>) -> Self {
        Self { min: *workers.start(), max: *workers.end() }
    }
}

impl fmt::Display for WorkerCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_elastic() {
            true => write!(f, "{}..={}", self.min, self.max),
            false => write!(f, "{}", self.max),
        }
    }
}

impl WorkerCount {
    pub(crate) fn is_elastic(&self) -> bool {
        self.min != self.max
    }

    /// The largest power of two among them.
    pub(crate) fn power_of_two(&self) -> Option<usize> {
        (self.min..=self.max).rev().find(|workers| workers.is_power_of_two())
    }

    pub(crate) fn check(&self) -> Result<()> {
        let expected = match (self.min, self.max) {
            (0, _) => "at least 1",
            (min, max) if min > max => "the fewest first, then the most",
            _ => return Ok(()),
        };
        Err(Error::Option { option: "num_workers", got: self.to_string(), expected })
    }
}

/// What has become of the workers since training was last said to go on.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    said: Vec<String>,
    /// Who was lost last, by the ranks that they had.
    lost: Vec<usize>,
    workers: usize,
}

impl Changes {
    pub(crate) fn lost(&mut self, ranks: Vec<usize>) {
        self.lost = ranks;
    }

    /// From so many to so many, without those that are gone.
    pub(crate) fn resized(&mut self, before: usize, gone: &[usize], workers: usize) {
        let (lost, let_go): (Vec<usize>, _) =
            gone.iter().partition(|rank| self.lost.contains(rank));
        if !lost.is_empty() {
            self.said.push(format!("{} lost and not replaced", ranks(&lost)));
        }
        if !let_go.is_empty() {
            self.said.push(format!("{} let go", ranks(&let_go)));
        }
        match workers.saturating_sub(before) {
            0 => {}
            1 => self.said.push("1 worker has joined".to_owned()),
            more => self.said.push(format!("{more} workers have joined")),
        }
        self.workers = workers;
    }

    /// What to say before how training goes on, and with how many workers. Once.
    pub(crate) fn take(&mut self) -> (String, String) {
        let said = std::mem::take(self);
        match (said.said.join("; "), said.workers) {
            (text, _) if text.is_empty() => (text, String::new()),
            (text, 1) => (format!("{text}: "), " with 1 worker".to_owned()),
            (text, workers) => (format!("{text}: "), format!(" with {workers} workers")),
        }
    }
}

fn ranks(ranks: &[usize]) -> String {
    let names: Vec<String> = ranks.iter().map(|rank| format!("rank {rank}")).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_said_once() {
        let mut changes = Changes::default();
        assert_eq!(changes.take(), (String::new(), String::new()));
        changes.lost(vec![1, 2]);
        changes.resized(4, &[1, 3], 2);
        let text = "rank 1 lost and not replaced; rank 3 let go: ".to_owned();
        assert_eq!(changes.take(), (text, " with 2 workers".to_owned()));
        assert_eq!(changes.take(), (String::new(), String::new()));
        changes.resized(2, &[], 4);
        assert_eq!(changes.take().0, "2 workers have joined: ");
        changes.resized(2, &[0], 1);
        assert_eq!(changes.take(), ("rank 0 let go: ".to_owned(), " with 1 worker".to_owned()));
    }

    #[test]
    fn a_count_is_a_number_or_a_range() {
        assert_eq!(WorkerCount::from(4).to_string(), "4");
        assert_eq!(WorkerCount::from(2..=4).to_string(), "2..=4");
        assert_eq!(WorkerCount::from(5..=7).power_of_two(), None);
        assert_eq!(WorkerCount::from(3..=9).power_of_two(), Some(8));
    }
}
