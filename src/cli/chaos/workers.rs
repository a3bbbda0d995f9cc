//! The worker processes of a program and of all that it has started: who works for a group is what
//! each program says itself, and the kernel says whether that is below our program, and since when.

use super::plan::Worker;
use mobula::run::unix_time;
use mobula_core::status::{self, Status};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

/// Of the times in `/proc`: the kernel's USER_HZ, part of its interface on every machine that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// The processes of this machine, by id.
struct Processes(BTreeMap<u32, Process>);

struct Process {
    parent: u32,
    /// Seconds since 1970.
    started: f64,
}

impl Processes {
    fn look() -> Self {
        let booted = boot_time();
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let process = |entry: std::fs::DirEntry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, Process::read(pid, booted)?))
        };
        Self(entries.filter_map(process).collect())
    }

    /// This process and all that descend from it.
    fn below(&self, root: u32) -> BTreeSet<u32> {
        let mut below = BTreeSet::from([root]);
        loop {
            let before = below.len();
            let children = self.0.iter().filter(|(_, process)| below.contains(&process.parent));
            let children: Vec<u32> = children.map(|(pid, _)| *pid).collect();
            below.extend(children);
            if below.len() == before {
                return below;
            }
        }
    }
}

impl Process {
    /// `None` if it has ended.
    fn read(pid: u32, booted: f64) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may have spaces, and parentheses.
        let (_, fields) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let ticks: f64 = fields.get(19)?.parse().ok()?;
        let started = booted + ticks / TICKS_PER_SECOND;
        Some(Self { parent: fields.get(1)?.parse().ok()?, started })
    }
}

/// Seconds since 1970.
fn boot_time() -> f64 {
    let up = clock_gettime(ClockId::Boottime);
    unix_time() - (up.tv_sec as f64 + up.tv_nsec as f64 * 1e-9)
}

/// The members of groups that work on this machine for the program with this process id.
pub(super) fn of_program(program: u32) -> Vec<Worker> {
    let processes = Processes::look();
    let below = processes.below(program);
    // The program may be a script, and the one with the workers a child of it.
    let answers = below.iter().filter_map(|pid| status::of_pid(*pid).ok());
    let named = answers.flat_map(|status| members(&status));
    let worker = |(pid, name): (u32, String)| {
        let process = processes.0.get(&pid).filter(|_| below.contains(&pid))?;
        Some(Worker { name, pid, started: process.started })
    };
    named.filter_map(worker).collect()
}

/// Neither workers for tasks nor actors: a group and a rank.
fn members(status: &Status) -> Vec<(u32, String)> {
    let here = status.nodes.first().map(|node| &node.name);
    let actors: BTreeSet<u32> = status.actors.iter().filter_map(|actor| actor.pid).collect();
    let has_rank = |name: &str| {
        let rank = name.rsplit_once(" rank ").map(|(_, rank)| rank.parse::<usize>());
        matches!(rank, Some(Ok(_)))
    };
    let workers = status.workers.iter().filter(|worker| {
        Some(&worker.node) == here && has_rank(&worker.name) && !actors.contains(&worker.pid)
    });
    workers.map(|worker| (worker.pid, worker.name.clone())).collect()
}

/// A process that cannot be taken for another one that has got its id.
pub(super) struct Victim(OwnedFd);

impl Victim {
    /// `None` if the worker has ended.
    pub(super) fn find(worker: &Worker) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(worker.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // After it was opened: from here on the id is that of the process which this says it is. Two
        // looks at the clock differ a little.
        let process = Process::read(worker.pid, boot_time())?;
        ((process.started - worker.started).abs() < 0.5).then_some(Self(pidfd))
    }

    /// Whether it was still there.
    pub(super) fn send(&self, signal: Signal) -> bool {
        pidfd_send_signal(&self.0, signal).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_below_us_and_has_just_begun() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let processes = Processes::look();
        assert!(processes.below(std::process::id()).contains(&child.id()));
        assert!(!processes.below(child.id()).contains(&std::process::id()));
        let started = processes.0[&child.id()].started;
        assert!((unix_time() - started).abs() < 30.0, "{started}");

        let worker = Worker { name: "x rank 0".into(), pid: child.id(), started };
        let earlier = Worker { started: started - 100.0, ..worker.clone() };
        assert!(Victim::find(&earlier).is_none(), "another process had the id");
        let victim = Victim::find(&worker).expect("it runs");
        assert!(victim.send(Signal::KILL));
        child.wait().expect("a child");
        assert!(!victim.send(Signal::KILL) && Victim::find(&worker).is_none());
    }

    #[test]
    fn members_of_groups_are_told_from_others() {
        let worker = |pid: u32, name: &str, node: &str| serde_json::json!({ "pid": pid, "name": name, "node": node });
        let status: Status = serde_json::from_value(serde_json::json!({
            "nodes": [{ "name": "here" }],
            "actors": [{
                "name": "a rank 1", "state": "running", "restarts": 0, "failed_checkpoints": 0,
                "pending": 0, "pid": 3
            }],
            "workers": [
                worker(1, "tasks", "here"),
                worker(2, "digits rank 0", "here"),
                worker(3, "a rank 1", "here"),
                worker(4, "digits rank 1", "there"),
                worker(5, "rank", "here"),
            ],
        }))
        .expect("a status");
        assert_eq!(members(&status), [(2, "digits rank 0".to_owned())]);
    }
}
