//! Starting worker processes: the one place that touches `fork`.
//!
//! A worker is this same binary, started through `/proc/self/exe` so that a rebuild under a
//! running program changes nothing. It inherits one end of a socket pair, dies with its driver,
//! and is no part of the terminal's foreground group, so that Ctrl-C reaches the driver alone.
#![allow(unsafe_code)]

use crate::Error;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::io::PipeReader;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};

/// In a worker's environment: the file descriptor of its control stream.
pub(crate) const WORKER_VARIABLE: &str = "MOBULA_WORKER_FD";
/// In a worker's environment: the process id of its driver.
pub(crate) const DRIVER_VARIABLE: &str = "MOBULA_DRIVER_PID";

/// Whether mimalloc, if the program has it, may ask for transparent huge pages.
const HUGE_PAGES_VARIABLE: &str = "MIMALLOC_ALLOW_THP";

/// A process that has just been started.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) child: Child,
    /// The driver's end of the control stream.
    pub(crate) control: UnixStream,
    /// Everything the worker prints, stdout and stderr in their order.
    pub(crate) output: PipeReader,
}

type Request = SyncSender<Result<Started, Error>>;

/// The one thread that starts processes. `PR_SET_PDEATHSIG` fires when the *thread* that started
/// a child ends, so that thread must live as long as the program.
#[derive(Clone, Debug)]
pub(crate) struct Spawner {
    requests: SyncSender<Request>,
}

impl Spawner {
    pub(crate) fn start() -> Result<Self, Error> {
        let (requests, inbox) = sync_channel::<Request>(16);
        let thread = std::thread::Builder::new().name("mobula-spawner".to_owned());
        let spawned = thread.spawn(move || {
            for reply in inbox {
                // Whoever asked may have given up; then the child is dropped and ends with its
                // control stream.
                let _ = reply.send(spawn());
            }
        });
        spawned.map_err(|source| Error::system("starting the spawner thread", source))?;
        Ok(Self { requests })
    }

    /// A new process, which waits for its [`Assignment`](super::wire::Assignment).
    pub(crate) fn spawn(&self) -> Result<Started, Error> {
        let (reply, answer) = sync_channel(1);
        let gone = || Error::Internal("the spawner thread has ended".to_owned());
        self.requests.send(reply).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}

fn spawn() -> Result<Started, Error> {
    let (control, worker_end) =
        UnixStream::pair().map_err(|e| Error::system("creating a socket pair", e))?;
    let (output, input) = std::io::pipe().map_err(|e| Error::system("creating a pipe", e))?;
    let stderr = input.try_clone().map_err(|e| Error::system("duplicating a pipe", e))?;
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = std::env::args_os().next() {
        command.arg0(name);
    }
    command
        .args(std::env::args_os().skip(1))
        .env(WORKER_VARIABLE, worker_end.as_raw_fd().to_string())
        .env(DRIVER_VARIABLE, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(input)
        .stderr(stderr)
        .process_group(0);
    if std::env::var_os(HUGE_PAGES_VARIABLE).is_none() {
        // With huge pages every process holds several MiB of memory that it does not use, and
        // training is no faster with them.
        command.env(HUGE_PAGES_VARIABLE, "0");
    }
    prepare(&mut command, worker_end.as_raw_fd());
    let child = command.spawn().map_err(|e| Error::system("starting a worker process", e))?;
    Ok(Started { child, control, output })
}

/// Has the child, between fork and exec, ask to die with its parent and keep its control stream.
fn prepare(command: &mut Command, control: RawFd) {
    let in_child = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // SAFETY: `control` was open in the parent at the fork (its owner, `worker_end`, outlives
        // `Command::spawn`), so it is open in this copy of the descriptor table.
        let control = unsafe { BorrowedFd::borrow_raw(control) };
        fcntl_setfd(control, FdFlags::empty())?;
        Ok(())
    };
    // SAFETY: `in_child` makes two raw system calls and nothing else: no allocation, no lock, so
    // it is sound between fork and exec in a process with threads.
    unsafe { command.pre_exec(in_child) };
}

/// Whether this process was started as a worker: it has the variable, and the descriptor. A
/// program that a worker starts inherits only the variable, and is a driver of its own.
pub(crate) fn is_worker() -> bool {
    worker_fd().is_some()
}

fn worker_fd() -> Option<RawFd> {
    let fd: RawFd = std::env::var(WORKER_VARIABLE).ok()?.parse().ok().filter(|fd| *fd > 2)?;
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    target.to_string_lossy().starts_with("socket:").then_some(fd)
}

/// Takes over the control stream that the driver left open for this process, if it is a worker.
/// To be called once.
pub(crate) fn inherited_control() -> Result<Option<UnixStream>, Error> {
    let Some(fd) = worker_fd() else {
        return Ok(None);
    };
    // SAFETY: `init()` calls this once, which it checks; the descriptor is open, and the number in
    // the environment is the one that the driver left to this process for this purpose, so
    // nothing else in the process owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let failed = |e| Error::system("taking over the control stream", e);
    fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(failed)?;
    Ok(Some(UnixStream::from(fd)))
}

/// Sets environment variables of this process, before its first thread.
pub(crate) fn set_environment(variables: &[(String, String)]) {
    for (name, value) in variables {
        // SAFETY: `init()` calls this as the first thing in a worker's `main`, when the process
        // has no second thread that could read the environment.
        unsafe { std::env::set_var(name, value) };
    }
}
