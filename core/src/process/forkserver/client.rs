//! The driver's side: it asks for workers, and one thread hears how they end.

use super::super::ending;
use super::super::handle::{Process, is_readable};
use super::{Report, Request, receive, send};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::collections::HashMap;
use std::io::{Error, Result};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// One that has not reached `init()` by then never will.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// One that has not answered by then never will.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Then it is listened to once more: this process may have been stopped itself (Ctrl-Z).
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// One that has nobody to serve has killed all that is left by then, and ended.
const END_TIMEOUT: Duration = Duration::from_secs(6);
/// How often a process without a descriptor is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// A running fork server.
#[derive(Debug)]
pub(crate) struct ForkServer {
    line: Arc<Line>,
    answers: Receiver<Answer>,
    timeout: Duration,
}

/// What it is talked to over.
#[derive(Debug)]
struct Line {
    socket: OwnedFd,
    /// It did not answer, and is ended for that.
    is_silent: AtomicBool,
}

#[derive(Debug)]
enum Answer {
    Ready,
    Unfit(String),
    Forked(Arc<Process>),
    NotForked(Error),
    /// The last one: how the process ended.
    Ended(String),
}

/// Why there is no fork server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotStarted {
    /// This program never has one.
    #[error("{0}")]
    Unfit(String),
    #[error(
        "process {pid}, which was started as one, did not call `mobula::init()` within {after:?}"
    )]
    Slow { pid: u32, after: Duration },
    /// Not this time.
    #[error("process {pid}, which was started as one, {how} before it served")]
    Ended { pid: u32, how: String },
    /// Nor here.
    #[error(transparent)]
    System(#[from] Error),
}

/// Why there is no new worker.
#[derive(Debug)]
pub(crate) enum NotForked {
    /// The fork server has ended; another one may do better.
    Gone,
    /// The system refuses.
    Refused(Error),
}

impl ForkServer {
    /// Starts one with this command line, which gets the other end of the socket, and waits until
    /// it serves.
    pub(crate) fn start(
        spawn: impl FnOnce(&OwnedFd) -> Result<Child>,
    ) -> std::result::Result<Self, NotStarted> {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, kind, flags, None).map_err(Error::from)?;
        let child = spawn(&theirs)?;
        drop(theirs);
        let line = Arc::new(Line { socket, is_silent: AtomicBool::new(false) });
        let (to_spawner, answers) = sync_channel(1);
        let pid = child.id();
        let hearing = Hearing { line: Arc::clone(&line), child, workers: HashMap::new() };
        let thread = std::thread::Builder::new().name("mobula-forks".to_owned());
        thread.spawn(move || hearing.hear(&to_spawner))?;
        let server = Self { line, answers, timeout: ANSWER_TIMEOUT };
        match server.answer(READY_TIMEOUT) {
            Some(Answer::Ready) => Ok(server),
            Some(Answer::Unfit(reason)) => Err(NotStarted::Unfit(reason)),
            Some(Answer::Ended(how)) => Err(NotStarted::Ended { pid, how }),
            _ => Err(NotStarted::Slow { pid, after: READY_TIMEOUT }),
        }
    }

    /// A new worker that has these: its control stream, the pipe for its output, and the folder
    /// that it starts in.
    pub(crate) fn fork(
        &self,
        fds: &[BorrowedFd<'_>],
    ) -> std::result::Result<Arc<Process>, NotForked> {
        if send(&self.line.socket, &Request::Fork, fds).is_err() {
            return Err(NotForked::Gone);
        }
        match self.answer(self.timeout) {
            Some(Answer::Forked(process)) => Ok(process),
            Some(Answer::NotForked(error)) => Err(NotForked::Refused(error)),
            None => {
                self.line.is_silent.store(true, Ordering::Relaxed);
                Err(NotForked::Gone)
            }
            Some(_) => Err(NotForked::Gone),
        }
    }

    /// Ends it, and all that is left of its workers; waits for that.
    pub(crate) fn end(self) {
        let _ = shutdown(&self.line.socket, Shutdown::Both);
        // The last answer says that it has ended.
        let _ = self.answers.recv_timeout(END_TIMEOUT + SECOND_LOOK);
    }

    fn answer(&self, timeout: Duration) -> Option<Answer> {
        let answer = self.answers.recv_timeout(timeout);
        answer.or_else(|_| self.answers.recv_timeout(SECOND_LOOK)).ok()
    }
}

impl Drop for ForkServer {
    /// Ends it, and its workers with it.
    fn drop(&mut self) {
        let _ = shutdown(&self.line.socket, Shutdown::Both);
    }
}

/// What the thread that hears it knows.
struct Hearing {
    line: Arc<Line>,
    child: Child,
    /// Those that have not been reaped.
    workers: HashMap<i32, Arc<Process>>,
}

impl Hearing {
    fn hear(mut self, answers: &SyncSender<Answer>) {
        while let Ok(Some((report, fds))) = receive(&self.line.socket) {
            let answer = match report {
                Report::Ready => Answer::Ready,
                Report::Unfit { reason } => Answer::Unfit(reason),
                Report::NotForked { errno } => Answer::NotForked(Error::from_raw_os_error(errno)),
                Report::Forked { pid } => match self.begun(pid, fds) {
                    Some(process) => Answer::Forked(process),
                    // This process has no room for its descriptor. The worker ends with its control
                    // stream.
                    None => Answer::NotForked(Errno::MFILE.into()),
                },
                Report::Ended { pid, status, peak } => {
                    if let Some(process) = self.workers.remove(&pid) {
                        process.reaped(ExitStatus::from_raw(status), peak);
                    }
                    continue;
                }
            };
            // Whoever asked may have given up, and ends the server.
            if answers.try_send(answer).is_err() {
                break;
            }
        }
        self.ended(answers);
    }

    fn begun(&mut self, pid: i32, fds: Vec<OwnedFd>) -> Option<Arc<Process>> {
        let process = Process::forked(Pid::from_raw(pid)?, fds.into_iter().next()?);
        let process = Arc::new(process);
        self.workers.insert(pid, Arc::clone(&process));
        Some(process)
    }

    /// It has ended, or does so now, as it has nobody to serve any more.
    fn ended(mut self, answers: &SyncSender<Answer>) {
        let _ = shutdown(&self.line.socket, Shutdown::Both);
        if !has_ended(&mut self.child, END_TIMEOUT) {
            let _ = self.child.kill();
        }
        let mut how = self.child.wait().map(ending::how).unwrap_or_default();
        if self.line.is_silent.load(Ordering::Relaxed) {
            // It ended in whatever way as it was told to.
            how = format!("did not answer for {ANSWER_TIMEOUT:?}");
        }
        if !self.workers.is_empty() {
            tracing::warn!(%how, workers = self.workers.len(), "lost the fork server of this machine");
        }
        for process in self.workers.into_values() {
            process.orphaned(format!("the fork server that its process came from {how}"));
        }
        // Whoever has an answer to take in learns of it later.
        let _ = answers.try_send(Answer::Ended(how));
    }
}

fn has_ended(child: &mut Child, timeout: Duration) -> bool {
    // Not reaped yet, so that the number is its own.
    if let Ok(pidfd) = pidfd_open(Pid::from_child(child), PidfdFlags::empty()) {
        return is_readable(&pidfd, timeout);
    }
    let deadline = Instant::now() + timeout;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}

#[cfg(test)]
mod tests;
