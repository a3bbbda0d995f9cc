//! The system calls that a fork server needs and rustix does not have.
#![allow(unsafe_code)]

use rustix::process::Pid;
use std::io::{Error, Result};
use std::os::fd::{FromRawFd, OwnedFd};

/// One of the two processes that a fork makes of one.
pub(super) enum Side {
    Child,
    Parent(Pid),
}

/// Forks this process.
///
/// # Safety
///
/// This process has one thread. In a process with more, the child would have copies of locks whose
/// holders are not there.
pub(super) unsafe fn fork() -> Result<Side> {
    // SAFETY: with one thread the child is a full copy of this process, in which any code may run.
    let pid = unsafe { libc::fork() };
    match Pid::from_raw(pid) {
        _ if pid < 0 => Err(Error::last_os_error()),
        None => Ok(Side::Child),
        Some(pid) => Ok(Side::Parent(pid)),
    }
}

/// A child of this process that has ended and waits to be reaped.
pub(super) fn ended_child() -> Option<Pid> {
    // SAFETY: `siginfo_t` is plain data, for which all zeros is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is valid for writing, and nothing else is passed by address.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, options) };
    // SAFETY: `waitid` has filled in what it fills in for a child, or left the zeros.
    let pid = unsafe { info.si_pid() };
    Pid::from_raw(pid).filter(|_| result == 0)
}

/// Reaps a child that has ended: its status as `wait` gives it, and the most bytes that it, or a
/// program that it ran and waited for, held in memory.
pub(super) fn reap(child: Pid) -> Option<(i32, u64)> {
    let mut status = 0;
    // SAFETY: `rusage` is plain data, for which all zeros is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    let child = child.as_raw_nonzero().get();
    // SAFETY: both pointers are valid for writing, and the kernel keeps neither.
    let reaped = unsafe { libc::wait4(child, &mut status, libc::WNOHANG, &mut usage) };
    // In units of KiB.
    let peak = u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024;
    (reaped == child).then_some((status, peak))
}

/// Signals that this process takes from a descriptor, or not at all; what it did before.
pub(super) struct Held {
    before: libc::sigset_t,
    /// What it did with the news of its children.
    children: libc::sigaction,
}

impl Held {
    /// Holds back what would end this process when it is to guard, and the news of its children,
    /// which the descriptor tells.
    pub(super) fn hold() -> Result<(Self, OwnedFd)> {
        let children = set_of(&[libc::SIGCHLD]);
        let all = set_of(&[libc::SIGCHLD, libc::SIGINT, libc::SIGTERM, libc::SIGHUP]);
        let mut before = set_of(&[]);
        // SAFETY: `sigaction` is plain data, for which all zeros is a value: the default, no flags.
        let (default, mut handled): (libc::sigaction, libc::sigaction) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        // Ignored, children would be reaped before anybody sees how they ended.
        // SAFETY: no handler is installed; both are initialised and outlive the call.
        if unsafe { libc::sigaction(libc::SIGCHLD, &default, &mut handled) } != 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: both sets are initialised and outlive the call.
        if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &all, &mut before) } != 0 {
            return Err(Error::last_os_error());
        }
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: the set is initialised and outlives the call.
        let fd = unsafe { libc::signalfd(-1, &children, flags) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the call has just opened it, and nothing else knows it.
        Ok((Self { before, children: handled }, unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Has this process take signals again as it did before.
    pub(super) fn release(&self) -> Result<()> {
        // SAFETY: a handler is one that the program has installed in this same process image, and a
        // null pointer asks for nothing back.
        if unsafe { libc::sigaction(libc::SIGCHLD, &self.children, std::ptr::null_mut()) } != 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the set is initialised, and a null pointer asks for nothing back.
        match unsafe { libc::sigprocmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        }
    }
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: `sigset_t` is plain data, and `sigemptyset` initialises it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is valid for writing.
    unsafe { libc::sigemptyset(&mut set) };
    for signal in signals {
        // SAFETY: `set` is initialised, and the numbers are signals.
        unsafe { libc::sigaddset(&mut set, *signal) };
    }
    set
}
