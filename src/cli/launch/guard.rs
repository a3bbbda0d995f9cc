//! What remains when a launcher is killed. Its copies end with it, by the kernel's hand; the
//! processes that they have started, such as those of a shell script, need someone who does it.

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::BTreeSet;
use std::io::{BufRead, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

/// The launcher's end: tells the guard which process groups there are.
pub(super) struct Guard {
    child: Child,
    groups: Option<ChildStdin>,
}

impl Guard {
    pub(super) fn start() -> anyhow::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        // In a group of its own: what ends the launcher's must not end it.
        command.arg("launch-guard").process_group(0).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().context("starting the guard of the copies")?;
        let groups = child.stdin.take();
        Ok(Self { child, groups })
    }

    /// From now on, the group ends with the launcher.
    pub(super) fn add(&mut self, group: Pid) {
        self.tell('+', group);
    }

    /// The group is gone; its number may soon be another's.
    pub(super) fn remove(&mut self, group: Pid) {
        self.tell('-', group);
    }

    fn tell(&mut self, sign: char, group: Pid) {
        // A guard that was killed protects nobody, which is no reason to end the launch.
        if let Some(groups) = &mut self.groups {
            let _ = writeln!(groups, "{sign}{}", group.as_raw_pid());
        }
    }

    /// Sends it home: there is nobody left to end.
    pub(super) fn finish(&mut self) {
        self.groups = None;
        let _ = self.child.wait();
    }
}

/// The guard's end: `mobula launch-guard`. The pipe closes when the launcher ends, however it does.
pub(super) fn run() -> anyhow::Result<ExitCode> {
    let mut groups = BTreeSet::new();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match line.split_at_checked(1).map(|(sign, id)| (sign, id.parse::<i32>())) {
            Some(("+", Ok(id))) => groups.insert(id),
            Some(("-", Ok(id))) => groups.remove(&id),
            _ => false,
        };
    }
    for group in groups.into_iter().filter_map(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    Ok(ExitCode::SUCCESS)
}
