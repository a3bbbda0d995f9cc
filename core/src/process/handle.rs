//! A worker process of this machine, as its driver holds it: killed and waited for without ever
//! touching a reused process id.
#![allow(unsafe_code)]

use super::affinity::Bound;
use super::cgroup::Cgroup;
use super::logs::LogTarget;
use super::{ending, memory};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group, pidfd_send_signal};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a process that was killed is waited for.
const DEATH: Duration = Duration::from_secs(1);
/// `PIDFD_SIGNAL_PROCESS_GROUP` of Linux 6.9.
const WHOLE_GROUP: libc::c_uint = 1 << 2;

/// A worker process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    whose: Whose,
    status: Mutex<Option<ExitStatus>>,
    ended: Condvar,
    ended_async: tokio::sync::Notify,
    why_killed: Mutex<Option<String>>,
    /// The most bytes of memory that it was seen to hold.
    peak: AtomicU64,
    /// What it runs on, until it has ended.
    bound: Mutex<Option<Bound>>,
    /// What limits its memory beside who watches it, until it has ended.
    cgroup: Mutex<Option<Cgroup>>,
}

/// Who reaps it.
#[derive(Debug)]
enum Whose {
    /// The fork server, which says so; this is the process's pidfd.
    ForkServers(OwnedFd),
    /// This process.
    Own(Mutex<Child>),
}

impl Process {
    /// A child of the fork server.
    pub(super) fn forked(pid: Pid, pidfd: OwnedFd) -> Self {
        Self::new(pid, Whose::ForkServers(pidfd))
    }

    /// A child of this process.
    pub(super) fn own(child: Child) -> Self {
        Self::new(Pid::from_child(&child), Whose::Own(Mutex::new(child)))
    }

    fn new(pid: Pid, whose: Whose) -> Self {
        Self {
            pid,
            whose,
            status: Mutex::new(None),
            ended: Condvar::new(),
            ended_async: tokio::sync::Notify::new(),
            why_killed: Mutex::new(None),
            peak: AtomicU64::new(0),
            bound: Mutex::new(None),
            cgroup: Mutex::new(None),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Binds it to CPUs, which are kept from others until it has ended.
    pub(super) fn bind(&self, bound: Option<Bound>) {
        if let Some(bound) = &bound
            && self.is_alive()
        {
            bound.apply(self.pid);
        }
        *lock(&self.bound) = bound;
        if !self.is_alive() {
            *lock(&self.bound) = None;
        }
    }

    /// Has the kernel kill it when it holds far more bytes of memory than these, where it can.
    pub(super) fn confine(&self, limit: u64) {
        if !self.is_alive() {
            return;
        }
        *lock(&self.cgroup) = Cgroup::of(self.pid, limit);
        if !self.is_alive() {
            // Its number may have been somebody else's, who is free again with this.
            *lock(&self.cgroup) = None;
        }
    }

    /// Whether its number is its own: as far as the system knows, which is before the fork server
    /// says so.
    fn is_alive(&self) -> bool {
        let has_ended = match &self.whose {
            Whose::ForkServers(pidfd) => is_readable(pidfd, Duration::ZERO),
            // Not reaped before it `has_ended`.
            Whose::Own(_) => false,
        };
        !has_ended && !self.has_ended()
    }

    /// Looks at its memory, as far as it lives: of one that has ended the system tells no more.
    /// Gives the most bytes that it has held so far.
    pub(crate) fn see_memory(&self) -> u64 {
        if !self.has_ended() {
            self.note_peak(memory::peak_bytes(self.pid()).unwrap_or(0));
            if let Some(cgroup) = &mut *lock(&self.cgroup) {
                cgroup.look(Instant::now());
            }
        }
        self.peak()
    }

    /// Whether it lives and was stopped by a signal.
    pub(super) fn is_stopped(&self) -> bool {
        !self.has_ended() && memory::is_stopped(self.pid())
    }

    fn note_peak(&self, bytes: u64) {
        self.peak.fetch_max(bytes, Ordering::Relaxed);
    }

    pub(super) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Kills the process at once, and what it has started with it.
    pub(crate) fn kill(&self) {
        match &self.whose {
            Whose::ForkServers(pidfd) => {
                kill_group_of(pidfd);
                let _ = pidfd_send_signal(pidfd, Signal::KILL);
            }
            // `std` knows whether it was reaped. Its group is killed when it has ended.
            Whose::Own(child) => drop(lock(child).kill()),
        }
    }

    pub(crate) fn kill_because(&self, reason: String) {
        lock(&self.why_killed).get_or_insert(reason);
        self.kill();
    }

    pub(super) fn has_ended(&self) -> bool {
        lock(&self.status).is_some()
    }

    /// Waits for the end of the process, at most so long.
    pub(crate) fn wait(&self, timeout: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + timeout;
        let mut status = lock(&self.status);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if status.is_some() || left.is_zero() {
                return *status;
            }
            status =
                self.ended.wait_timeout(status, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Returns once it has ended; at once, if that was so already.
    pub(super) async fn ended(&self) {
        self.ended_async.notified().await;
    }

    /// Whether it is a child of this process, which is to reap it.
    pub(super) fn is_own(&self) -> bool {
        matches!(self.whose, Whose::Own(_))
    }

    /// Blocks until it has ended, then reaps it, if it is a child of this process.
    pub(super) fn reap(&self) {
        let Whose::Own(child) = &self.whose else { return };
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        // Look without reaping first: `kill` must not be locked out while this waits.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(self.pid), options) {}
        // What the worker had started is of its process group, whose id cannot be reused as long
        // as the worker has not been reaped.
        let _ = kill_process_group(self.pid, Signal::KILL);
        let status = lock(child).wait().unwrap_or_default();
        self.reaped(status, 0);
    }

    /// It was reaped: how it ended, and the most bytes that it held, as far as that is known.
    pub(super) fn reaped(&self, status: ExitStatus, peak: u64) {
        self.note_peak(peak);
        let cgroup = lock(&self.cgroup).take();
        // Not only a program of its own was killed, now or long ago.
        let was_killed = status.signal() == Some(Signal::KILL.as_raw());
        let overrun = cgroup.and_then(|mut group| group.overrun(Instant::now()));
        if let Some((held, limit)) = overrun.filter(|_| was_killed) {
            lock(&self.why_killed).get_or_insert(memory::over_limit(held, limit));
        }
        *lock(&self.bound) = None;
        *lock(&self.status) = Some(status);
        self.ended.notify_all();
        // Stored until somebody waits, so that an early end is not missed.
        self.ended_async.notify_one();
    }

    /// Its fork server has ended, with which the kernel ended it.
    pub(super) fn orphaned(&self, reason: String) {
        self.kill_because(reason);
        if let Whose::ForkServers(pidfd) = &self.whose
            && is_readable(pidfd, DEATH)
            && !kill_group_of(pidfd)
        {
            // On an old kernel by its number, which is not reused as long as the group has members,
            // and not so soon if it has none.
            let _ = kill_process_group(self.pid, Signal::KILL);
        }
        self.reaped(ExitStatus::from_raw(Signal::KILL.as_raw()), 0);
    }

    pub(super) fn describe_end(&self, log: &LogTarget) -> String {
        let status = self.wait(Duration::from_secs(5));
        // Known by then.
        let killed = lock(&self.why_killed).clone();
        let how = match (killed, status) {
            (Some(reason), _) => reason,
            (None, Some(status)) => ending::describe(status, self.peak()),
            (None, None) => "its control stream closed".to_owned(),
        };
        match &log.file {
            Some(path) => format!("{how}; its output is in {}", path.display()),
            None => how,
        }
    }
}

/// Kills the process group of that id, also after its leader was reaped: the descriptor stands for
/// this id and never for a later one. `false` if this kernel cannot.
fn kill_group_of(pidfd: &OwnedFd) -> bool {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open for as long as it is borrowed, and the kernel takes a null
    // pointer for "as `kill` does"; nothing else is passed by address.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            no_info,
            WHOLE_GROUP,
        )
    };
    result == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL)
}

/// Whether the process of that pidfd ends in time.
pub(super) fn is_readable(pidfd: &OwnedFd, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            polled => return polled.is_ok_and(|ready| ready > 0),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
