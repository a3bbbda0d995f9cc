//! Starting worker processes: from the fork server, or by themselves where there is none.
//!
//! Both are this same binary, started through `/proc/self/exe` so that a rebuild under a
//! running program changes nothing. A worker has one end of a socket pair, dies with its driver,
//! and is no part of the terminal's foreground group, so that Ctrl-C reaches the driver alone.
#![allow(unsafe_code)]

use super::forkserver::{ForkServer, NotForked, NotStarted};
use super::handle::Process;
use crate::allocator::{PURGE_DELAY, PURGE_DELAY_VARIABLE};
use crate::{Error, console};
use rustix::fs::{Mode, OFlags};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, set_parent_process_death_signal};
use std::io::{PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// In the environment of a worker that was not forked: the file descriptor of its control stream.
pub(crate) const WORKER_VARIABLE: &str = "MOBULA_WORKER_FD";
/// In a fork server's environment: the file descriptor of its socket.
pub(crate) const FORK_SERVER_VARIABLE: &str = "MOBULA_FORK_SERVER_FD";
/// In the environment of both: the process id of the driver.
pub(crate) const DRIVER_VARIABLE: &str = "MOBULA_DRIVER_PID";

/// A fork server that does not answer is replaced; if the new one does not either, then for once a
/// worker starts without.
const FORK_SERVERS: usize = 2;
/// A program that comes so late to `init()` so often in a row is not waited for any more.
const SLOW_STARTS: u32 = 2;
/// What a start may take, with those that wait before it.
const SPAWN_TIMEOUT: Duration = Duration::from_secs(180);
/// How often a full queue is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(2);

/// What mimalloc, if the program has it, does in workers, unless the user says otherwise.
const ALLOCATOR: [(&str, &str); 2] = [
    // With huge pages every process holds several MiB of memory that it does not use, and training
    // is no faster with them.
    ("MIMALLOC_ALLOW_THP", "0"),
    (PURGE_DELAY_VARIABLE, PURGE_DELAY),
];

/// A process that has just been started.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) process: Arc<Process>,
    /// The driver's end of the control stream.
    pub(crate) control: UnixStream,
    /// Everything the worker prints, stdout and stderr in their order.
    pub(crate) output: PipeReader,
}

enum Request {
    Start { reply: SyncSender<Result<Started, Error>> },
    Close { done: SyncSender<()> },
}

/// The one thread that starts processes. `PR_SET_PDEATHSIG` fires when the *thread* that started
/// a child ends, so that thread must live as long as the program.
#[derive(Clone, Debug)]
pub(crate) struct Spawner {
    requests: SyncSender<Request>,
    /// No more processes are to be started, whatever waits.
    is_closed: Arc<AtomicBool>,
}

impl Spawner {
    pub(crate) fn start() -> Result<Self, Error> {
        let (requests, inbox) = sync_channel::<Request>(16);
        let thread = std::thread::Builder::new().name("mobula-spawner".to_owned());
        let is_closed = Arc::new(AtomicBool::new(false));
        let mut source = Source { is_closed: Arc::clone(&is_closed), ..Source::default() };
        let spawned = thread.spawn(move || {
            for request in inbox {
                // Whoever asked may have given up; a worker then ends with its control stream.
                match request {
                    Request::Start { reply } => drop(reply.send(source.start())),
                    Request::Close { done } => {
                        source.close();
                        let _ = done.send(());
                    }
                }
            }
        });
        spawned.map_err(|source| Error::system("starting the spawner thread", source))?;
        Ok(Self { requests, is_closed })
    }

    /// A new process, which waits for its [`Assignment`](super::wire::Assignment).
    pub(crate) fn spawn(&self) -> Result<Started, Error> {
        let (reply, answer) = sync_channel(1);
        let deadline = Instant::now() + SPAWN_TIMEOUT;
        self.ask(Request::Start { reply }, deadline)?;
        let left = deadline.saturating_duration_since(Instant::now());
        answer.recv_timeout(left).map_err(|error| match error {
            RecvTimeoutError::Timeout => late(),
            RecvTimeoutError::Disconnected => gone(),
        })?
    }

    /// Puts a request into the queue, as soon as there is room.
    fn ask(&self, mut request: Request, deadline: Instant) -> Result<(), Error> {
        loop {
            request = match self.requests.try_send(request) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(request)) if Instant::now() < deadline => request,
                Err(TrySendError::Full(_)) => return Err(late()),
                Err(TrySendError::Disconnected(_)) => return Err(gone()),
            };
            std::thread::sleep(TRY_AGAIN);
        }
    }

    /// Starts no more processes, ends the fork server, and with it all that workers have left
    /// behind. Waits at most so long.
    pub(crate) fn close(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        self.is_closed.store(true, Ordering::Relaxed);
        let (done, answer) = sync_channel(1);
        if self.ask(Request::Close { done }, deadline).is_ok() {
            let _ = answer.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

fn late() -> Error {
    Error::Timeout { what: "starting a worker process".to_owned(), after: SPAWN_TIMEOUT }
}

fn gone() -> Error {
    Error::Internal("the spawner thread has ended".to_owned())
}

/// Where workers come from.
#[derive(Debug, Default)]
struct Source {
    fork_server: Option<ForkServer>,
    /// This program cannot be forked: each worker is started from the beginning.
    is_unfit: bool,
    /// In a row.
    slow_starts: u32,
    /// The user knows that a worker was started from the beginning.
    is_told: bool,
    is_closed: Arc<AtomicBool>,
}

impl Source {
    fn start(&mut self) -> Result<Started, Error> {
        if self.is_closed.load(Ordering::Relaxed) {
            return Err(Error::Cancelled { task: "starting a worker process".to_owned() });
        }
        let (control, worker_end) =
            UnixStream::pair().map_err(|e| Error::system("creating a socket pair", e))?;
        let (output, input) = std::io::pipe().map_err(|e| Error::system("creating a pipe", e))?;
        let process = match self.fork(&worker_end, &input)? {
            Some(process) => process,
            None => Arc::new(Process::own(exec(&worker_end, input)?)),
        };
        Ok(Started { process, control, output })
    }

    fn close(&mut self) {
        if let Some(server) = self.fork_server.take() {
            server.end();
        }
    }

    /// `None` if there is no fork server.
    fn fork(
        &mut self,
        control: &UnixStream,
        output: &PipeWriter,
    ) -> Result<Option<Arc<Process>>, Error> {
        for _ in 0..FORK_SERVERS {
            let Some(server) = self.fork_server() else { return Ok(None) };
            let folder = rustix::fs::open(".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| Error::system("opening the current folder", e))?;
            match server.fork(&[control.as_fd(), output.as_fd(), folder.as_fd()]) {
                Ok(process) => return Ok(Some(process)),
                Err(NotForked::Refused(e)) => {
                    return Err(Error::system("forking a worker process", e));
                }
                Err(NotForked::Gone) => self.fork_server = None,
            }
        }
        Ok(None)
    }

    fn fork_server(&mut self) -> Option<&ForkServer> {
        if self.fork_server.is_none() && !self.is_unfit {
            match ForkServer::start(exec_fork_server) {
                Ok(server) => {
                    self.fork_server = Some(server);
                    self.slow_starts = 0;
                }
                Err(error) => self.not_started(&error),
            }
        }
        self.fork_server.as_ref()
    }

    /// One that was killed, or had no memory, may start next time.
    fn not_started(&mut self, error: &NotStarted) {
        self.slow_starts += u32::from(matches!(error, NotStarted::Slow { .. }));
        self.is_unfit = matches!(error, NotStarted::Unfit(_)) || self.slow_starts == SLOW_STARTS;
        tracing::warn!(%error, for_good = self.is_unfit, "no fork server");
        if !std::mem::replace(&mut self.is_told, true) {
            let which = if self.is_unfit { "each worker process" } else { "a worker process" };
            console::note(format!(
                "no fork server: {which} starts by itself, and what it leaves behind may stay: {error}"
            ));
        }
    }
}

/// Starts a worker from the beginning.
fn exec(control: &UnixStream, output: PipeWriter) -> Result<Child, Error> {
    let stderr = output.try_clone().map_err(|e| Error::system("duplicating a pipe", e))?;
    let mut command = this_program(WORKER_VARIABLE, control.as_raw_fd());
    command.env_remove(FORK_SERVER_VARIABLE).stdout(output).stderr(stderr);
    prepare(&mut command, control.as_raw_fd(), true);
    command.spawn().map_err(|e| Error::system("starting a worker process", e))
}

/// Until it serves, it complains to the user; what the program prints is printed by the driver.
fn exec_fork_server(socket: &OwnedFd) -> std::io::Result<Child> {
    let mut command = this_program(FORK_SERVER_VARIABLE, socket.as_raw_fd());
    command.env_remove(WORKER_VARIABLE).stdout(Stdio::null());
    prepare(&mut command, socket.as_raw_fd(), false);
    command.spawn()
}

/// This program again, with its arguments, and with that descriptor under that name.
fn this_program(variable: &str, fd: RawFd) -> Command {
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = std::env::args_os().next() {
        command.arg0(name);
    }
    command
        .args(std::env::args_os().skip(1))
        .env(variable, fd.to_string())
        .env(DRIVER_VARIABLE, std::process::id().to_string())
        .stdin(Stdio::null())
        .process_group(0);
    for (variable, value) in ALLOCATOR {
        if std::env::var_os(variable).is_none() {
            command.env(variable, value);
        }
    }
    command
}

/// Has the child, between fork and exec, keep its descriptor, and ask to die with its parent.
fn prepare(command: &mut Command, fd: RawFd, dies_with_parent: bool) {
    let in_child = move || {
        if dies_with_parent {
            set_parent_process_death_signal(Some(Signal::KILL))?;
        }
        // SAFETY: `fd` was open in the parent at the fork (its owner is borrowed until after
        // `Command::spawn`), so it is open in this copy of the descriptor table.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl_setfd(fd, FdFlags::empty())?;
        Ok(())
    };
    // SAFETY: `in_child` makes two raw system calls and nothing else: no allocation, no lock, so
    // it is sound between fork and exec in a process with threads.
    unsafe { command.pre_exec(in_child) };
}

/// What this process was started as by a driver.
pub(crate) enum Inherited {
    /// A worker, with its control stream.
    Worker(UnixStream),
    /// The fork server, with its socket.
    ForkServer(OwnedFd),
}

/// Whether this process was started as a worker or as a fork server: it has the variable, and the
/// descriptor. A program that a worker starts inherits only the variable, and is a driver of its
/// own.
pub(crate) fn is_worker() -> bool {
    [WORKER_VARIABLE, FORK_SERVER_VARIABLE].into_iter().any(|name| inherited_fd(name).is_some())
}

fn inherited_fd(variable: &str) -> Option<RawFd> {
    let fd: RawFd = std::env::var(variable).ok()?.parse().ok().filter(|fd| *fd > 2)?;
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    target.to_string_lossy().starts_with("socket:").then_some(fd)
}

/// Takes over the socket that the driver left open for this process, if one did. To be called once.
pub(crate) fn inherited() -> Result<Option<Inherited>, Error> {
    if let Some(fd) = inherited_fd(FORK_SERVER_VARIABLE) {
        return Ok(Some(Inherited::ForkServer(take_over(fd)?)));
    }
    let Some(fd) = inherited_fd(WORKER_VARIABLE) else {
        return Ok(None);
    };
    if driver() != rustix::process::getppid() {
        eprintln!("worker {}: its driver ended before it began", std::process::id());
        std::process::exit(1);
    }
    Ok(Some(Inherited::Worker(take_over(fd)?.into())))
}

fn take_over(fd: RawFd) -> Result<OwnedFd, Error> {
    // SAFETY: `init()` comes here once, which it checks; the descriptor is open, and the number in
    // the environment is the one that the driver left to this process for this purpose, so
    // nothing else in the process owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let failed = |e| Error::system("taking over the control stream", e);
    fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(failed)?;
    Ok(fd)
}

/// The driver that has started this process, or its fork server.
pub(crate) fn driver() -> Option<Pid> {
    Pid::from_raw(std::env::var(DRIVER_VARIABLE).ok()?.parse().ok()?)
}

/// This process is a worker now: what it starts is no fork server either.
pub(super) fn forget_fork_server() {
    // SAFETY: a fork server calls this in the worker that it has just forked, which has one thread.
    unsafe { std::env::remove_var(FORK_SERVER_VARIABLE) };
}

/// Sets environment variables of this process, before its first thread.
pub(crate) fn set_environment(variables: &[(String, String)]) {
    for (name, value) in variables {
        // SAFETY: `init()` calls this as the first thing in a worker's `main`, when the process
        // has no second thread that could read the environment.
        unsafe { std::env::set_var(name, value) };
    }
}

#[cfg(test)]
mod tests;
