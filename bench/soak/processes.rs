//! The processes of this machine, as /proc tells of them.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::os::fd::OwnedFd;
use std::path::Path;

/// The children of this process and of its fork server, other than that itself; also those that
/// wait to be reaped, and what a worker has left behind.
pub(crate) fn workers() -> Vec<u32> {
    let (servers, mut workers): (Vec<u32>, Vec<u32>) =
        children(&[std::process::id()]).into_iter().partition(|pid| is_fork_server(*pid));
    workers.extend(children(&servers));
    workers
}

/// Those of them that may be killed: a child that is not known as a worker may be a fork server
/// that is about to begin.
pub(crate) fn victims() -> Vec<u32> {
    let is_worker = |pid: &u32| has_variable(*pid, "MOBULA_WORKER_FD");
    let mut victims = children(&[std::process::id()]);
    victims.retain(is_worker);
    victims.extend(children(&fork_servers()));
    victims
}

pub(crate) fn fork_servers() -> Vec<u32> {
    children(&[std::process::id()]).into_iter().filter(|pid| is_fork_server(*pid)).collect()
}

fn children(parents: &[u32]) -> Vec<u32> {
    all().filter(|pid| parent(*pid).is_some_and(|parent| parents.contains(&parent))).collect()
}

/// A worker has the same environment, but is no child of this process.
fn is_fork_server(child: u32) -> bool {
    has_variable(child, "MOBULA_FORK_SERVER_FD")
}

fn has_variable(pid: u32, name: &str) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let value = |entry: &[u8]| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"=").map(drop);
    environment.split(|byte| *byte == 0).any(|entry| value(entry).is_some())
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
        victims().contains(&pid).then_some(worker)
    }

    /// `false` if it has ended.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        pidfd_send_signal(&self.0, signal).is_ok()
    }
}

pub(crate) fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
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
