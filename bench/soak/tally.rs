//! What has happened so far.

use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) rounds: u64,
    pub(crate) kills: BTreeMap<&'static str, u64>,
    pub(crate) drivers_killed: u64,
    /// Tasks, and calls of actors.
    pub(crate) tasks: u64,
    pub(crate) right: u64,
    pub(crate) lost: u64,
    pub(crate) cancelled: u64,
    pub(crate) timed_out: u64,
    /// Runs after the first one of a task.
    pub(crate) repeated: u64,
    pub(crate) actors: u64,
    pub(crate) restarts: u64,
    pub(crate) groups: u64,
    pub(crate) groups_restarted: u64,
    pub(crate) groups_lost: u64,
    /// Bytes of the driver, at each look for leaks.
    pub(crate) resident: Vec<u64>,
}

impl Tally {
    pub(crate) fn killed(&mut self, signal: &'static str) {
        *self.kills.entry(signal).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: Self) {
        other.kills.into_iter().for_each(|(name, n)| *self.kills.entry(name).or_default() += n);
        let fields = [
            (&mut self.rounds, other.rounds),
            (&mut self.drivers_killed, other.drivers_killed),
            (&mut self.tasks, other.tasks),
            (&mut self.right, other.right),
            (&mut self.lost, other.lost),
            (&mut self.cancelled, other.cancelled),
            (&mut self.timed_out, other.timed_out),
            (&mut self.repeated, other.repeated),
            (&mut self.actors, other.actors),
            (&mut self.restarts, other.restarts),
            (&mut self.groups, other.groups),
            (&mut self.groups_restarted, other.groups_restarted),
            (&mut self.groups_lost, other.groups_lost),
        ];
        fields.into_iter().for_each(|(sum, more)| *sum += more);
    }

    pub(crate) fn print(&self) {
        let row = |name: &str, value: String| println!("{name:<32} {value}");
        row("rounds", self.rounds.to_string());
        row("workers killed", self.kills.values().sum::<u64>().to_string());
        for (signal, count) in &self.kills {
            row(&format!("  by {signal}"), count.to_string());
        }
        row("drivers killed", self.drivers_killed.to_string());
        row("tasks and calls", self.tasks.to_string());
        row("  right", self.right.to_string());
        row("  lost, and said so", self.lost.to_string());
        row("  cancelled", self.cancelled.to_string());
        row("  timed out", self.timed_out.to_string());
        row("  run again", self.repeated.to_string());
        row("actors, restarts", format!("{}, {}", self.actors, self.restarts));
        let groups = [self.groups, self.groups_restarted, self.groups_lost];
        row("groups, restarts, lost", groups.map(|count| count.to_string()).join(", "));
        let looks = self.resident.iter().map(|bytes| (bytes >> 20).to_string());
        let looks: Vec<_> = looks.collect();
        row("looks for leaks, leaks", format!("{}, 0", looks.len()));
        row("  driver's MiB at each", looks.join(" "));
    }
}
