//! Memory limits of worker processes: one thread looks at their resident size. What grows faster
//! than it looks is for [`cgroup`](super::cgroup).

use super::handle::Process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How often it looks.
const INTERVAL: Duration = Duration::from_millis(50);

struct Watched {
    process: Weak<Process>,
    limit: u64,
}

struct Watch {
    processes: Vec<Watched>,
    is_running: bool,
}

static WATCH: Mutex<Watch> = Mutex::new(Watch { processes: Vec::new(), is_running: false });

/// Kills the process when it holds more than `limit` bytes of memory. It dies alone, before the
/// system picks a victim.
pub(super) fn limit(process: &Arc<Process>, limit: u64) {
    let mut watch = lock();
    watch.processes.push(Watched { process: Arc::downgrade(process), limit });
    if !watch.is_running {
        let thread = std::thread::Builder::new().name("mobula-memory".to_owned());
        watch.is_running = thread.spawn(look_around).is_ok();
    }
}

/// Ends when nothing is left to watch.
fn look_around() {
    loop {
        std::thread::sleep(INTERVAL);
        let mut watch = lock();
        watch.processes.retain(Watched::look);
        if watch.processes.is_empty() {
            watch.is_running = false;
            return;
        }
    }
}

impl Watched {
    /// `false` when there is nothing more to see.
    fn look(&self) -> bool {
        let Some(process) = self.process.upgrade() else { return false };
        if process.has_ended() {
            return false;
        }
        let peak = process.see_memory();
        if peak <= self.limit {
            return true;
        }
        process.kill_because(over_limit(peak, self.limit));
        false
    }
}

pub(super) fn over_limit(peak: u64, limit: u64) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    format!(
        "its process held {:.0} MiB of memory, over its limit of {:.0} MiB, and was killed",
        mib(peak),
        mib(limit)
    )
}

/// What a process holds in memory, if it lives.
pub(crate) fn resident_bytes(pid: u32) -> Option<u64> {
    of_status(pid, "VmRSS:")
}

/// The most that a process has held in memory so far, if it lives.
pub(super) fn peak_bytes(pid: u32) -> Option<u64> {
    of_status(pid, "VmHWM:")
}

fn of_status(pid: u32, field: &str) -> Option<u64> {
    let kib: u64 = status(pid, field)?.trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

/// Whether a process was stopped by a signal. One that a debugger has stopped is another matter.
pub(super) fn is_stopped(pid: u32) -> bool {
    status(pid, "State:").is_some_and(|state| state.starts_with('T'))
}

fn status(pid: u32, field: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().to_owned())
}

fn lock() -> MutexGuard<'static, Watch> {
    WATCH.lock().unwrap_or_else(PoisonError::into_inner)
}
