//! The processes of this machine, as /proc tells of them.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::os::fd::OwnedFd;

/// The children of this process and of its fork server, other than that itself; also those that
/// wait to be reaped, and what a worker has left behind.
pub(crate) fn workers() -> Vec<u32> {
    let (servers, mut workers): (Vec<u32>, Vec<u32>) =
        children(&[std::process::id()]).into_iter().partition(|pid| is_fork_server(*pid));
    workers.extend(children(&servers));
    workers
}

fn children(parents: &[u32]) -> Vec<u32> {
    all().filter(|pid| parent(*pid).is_some_and(|parent| parents.contains(&parent))).collect()
}

/// A worker has the same environment, but is no child of this process.
fn is_fork_server(child: u32) -> bool {
    let environment = std::fs::read(format!("/proc/{child}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|entry| entry.starts_with(b"MOBULA_FORK_SERVER_FD="))
}

/// Living processes that have this in their environment.
pub(crate) fn with_variable(name: &str, value: &str) -> Vec<u32> {
    let expected = format!("{name}={value}");
    let has_it = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == expected.as_bytes())
    };
    all().filter(has_it).collect()
}

/// What a process is, for whoever wonders why it is still there.
pub(crate) fn describe(pid: u32) -> String {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = status.rsplit(") ").next().and_then(|rest| rest.get(..1)).unwrap_or("?").to_owned();
    format!("{pid} (state {state}, parent {:?}): {command}", parent(pid))
}

/// A worker of this process, under a handle that never means another one.
pub(crate) struct Worker(OwnedFd);

impl Worker {
    /// `None` if it has ended.
    pub(crate) fn open(pid: u32) -> Option<Self> {
        let handle = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let worker = Self(pidfd_open(handle, PidfdFlags::empty()).ok()?);
        // The id may have been somebody else's by the time it was opened.
        workers().contains(&pid).then_some(worker)
    }

    /// `false` if it has ended.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        pidfd_send_signal(&self.0, signal).is_ok()
    }
}

fn all() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent(pid: u32) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it is in brackets and may contain anything.
    text.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()
}
