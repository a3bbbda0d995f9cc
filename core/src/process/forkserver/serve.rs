//! The fork server's side: one thread, which waits for requests and for the ends of its children.
#![allow(unsafe_code)]

use super::super::{cgroup, spawn};
use super::system::{self, Held, Side};
use super::{MOST_FDS, Report, Request, receive, send};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, fchdir, getpid, getppid, kill_process, kill_process_group, pidfd_open,
    set_child_subreaper, set_parent_process_death_signal, setpgid,
};
use std::fs::File;
use std::io::{Error, Read, Result, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What is left when the driver has ended is killed again and again for so long.
const LAST_STAND: Duration = Duration::from_secs(5);
/// How often.
const ROUND: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// A thread that was joined may still be listed for a moment.
const JOINED: Duration = Duration::from_millis(50);

/// Serves the driver at the other end of the socket until it has ended. Returns in the workers
/// alone, with their control streams.
pub(crate) fn serve(socket: OwnedFd) -> UnixStream {
    match Watch::begin() {
        Ok(watch) => Server { socket, watch, workers: Vec::new() }.run(),
        Err(error) => {
            let _ = send(&socket, &Report::Unfit { reason: error.to_string() }, &[]);
            std::process::exit(1);
        }
    }
}

struct Server {
    socket: OwnedFd,
    watch: Watch,
    /// Those that have not been reaped. No hash set: its seed would be that of all workers.
    workers: Vec<Pid>,
}

/// What it hears of beside requests.
struct Watch {
    /// Readable when a child has ended.
    children: File,
    /// Readable when the driver has ended.
    driver: OwnedFd,
    held: Held,
}

impl Watch {
    fn begin() -> Result<Self> {
        has_one_thread()?;
        let gone = || Error::other("its driver has ended");
        let driver = getppid().ok_or_else(gone)?;
        let pidfd = pidfd_open(driver, PidfdFlags::empty())?;
        // Looked at after the descriptor was opened, so that it is the driver's.
        if spawn::driver() != Some(driver) || getppid() != Some(driver) {
            return Err(gone());
        }
        set_child_subreaper(Some(getpid()))?;
        let (held, children) = Held::hold()?;
        // What the program has printed so far is not to be printed by each worker again.
        std::io::stdout().flush()?;
        // Whoever reads what the driver prints is not to wait for this process too.
        wire(&File::options().write(true).open("/dev/null")?)?;
        Ok(Self { children: children.into(), driver: pidfd, held })
    }

    /// Forgets that children have ended: who calls this looks for all of them.
    fn drain(&mut self) {
        let mut news = [0; 1024];
        while matches!(self.children.read(&mut news), Ok(bytes) if bytes > 0) {}
    }
}

impl Server {
    fn run(mut self) -> UnixStream {
        if send(&self.socket, &Report::Ready, &[]).is_err() {
            self.finish();
        }
        loop {
            match self.step() {
                Ok(None) => {}
                Ok(Some(control)) => return control,
                // It is the driver that cannot be reached.
                Err(_) => self.finish(),
            }
        }
    }

    /// Waits for something to do, and does it. Gives the control stream of this process if it is a
    /// worker now.
    fn step(&mut self) -> Result<Option<UnixStream>> {
        let [children, request, driver] = {
            let mut fds = [
                PollFd::new(&self.watch.children, PollFlags::IN),
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::new(&self.watch.driver, PollFlags::IN),
            ];
            rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
            fds.map(|fd| !fd.revents().is_empty())
        };
        if children {
            self.reap()?;
        }
        if driver {
            self.finish();
        }
        if !request {
            return Ok(None);
        }
        match receive(&self.socket)? {
            Some((Request::Fork, fds)) => self.fork(fds),
            None => self.finish(),
        }
    }

    /// Reaps the children that have ended, and kills what workers among them have left behind.
    fn reap(&mut self) -> Result<()> {
        self.watch.drain();
        while let Some(pid) = system::ended_child() {
            let known = self.workers.len();
            self.workers.retain(|worker| *worker != pid);
            let was_worker = self.workers.len() < known;
            if was_worker {
                // Before it is reaped: so long its id is not given to others.
                let _ = kill_process_group(pid, Signal::KILL);
            }
            let Some((status, peak)) = system::reap(pid) else { continue };
            if was_worker {
                let pid = pid.as_raw_nonzero().get();
                send(&self.socket, &Report::Ended { pid, status, peak }, &[])?;
            }
        }
        Ok(())
    }

    fn fork(&mut self, fds: Vec<OwnedFd>) -> Result<Option<UnixStream>> {
        if fds.len() < MOST_FDS {
            // This process has no room for them.
            return self.refuse(&Errno::MFILE.into()).map(|()| None);
        }
        let server = getpid();
        // SAFETY: `Watch::begin` has seen that this process has one thread, and nothing that runs
        // here starts another one.
        match unsafe { system::fork() } {
            Ok(Side::Child) => Ok(Some(self.become_worker(server, fds))),
            Ok(Side::Parent(pid)) => self.announce(pid).map(|()| None),
            Err(error) => self.refuse(&error).map(|()| None),
        }
    }

    fn announce(&mut self, pid: Pid) -> Result<()> {
        self.workers.push(pid);
        // So does the child, and either may be first.
        let _ = setpgid(Some(pid), Some(pid));
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => {
                let report = Report::Forked { pid: pid.as_raw_nonzero().get() };
                send(&self.socket, &report, &[pidfd.as_fd()])
            }
            Err(error) => {
                let _ = kill_process(pid, Signal::KILL);
                self.refuse(&error.into())
            }
        }
    }

    fn refuse(&self, error: &Error) -> Result<()> {
        let errno = error.raw_os_error().unwrap_or(Errno::AGAIN.raw_os_error());
        send(&self.socket, &Report::NotForked { errno }, &[])
    }

    /// Makes this process a worker. It ends here if it cannot be one: from here on nothing that
    /// the server does is its to do.
    fn become_worker(&self, server: Pid, fds: Vec<OwnedFd>) -> UnixStream {
        let begin = || {
            let fds = <[OwnedFd; MOST_FDS]>::try_from(fds).map_err(|_| Errno::BADF)?;
            let [control, output, folder] = fds;
            // First, so that the driver hears of what goes wrong.
            wire(&output)?;
            setpgid(None, None)?;
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if getppid() != Some(server) {
                return Err(Error::other("its fork server has ended"));
            }
            self.watch.held.release()?;
            fchdir(folder)?;
            spawn::forget_fork_server();
            Ok(UnixStream::from(control))
        };
        begin().unwrap_or_else(|error| {
            eprintln!("worker {}: {error}", std::process::id());
            std::process::exit(1)
        })
    }

    /// The driver has ended: so does all that came from it, and this process.
    fn finish(&mut self) -> ! {
        for worker in &self.workers {
            let _ = kill_process_group(*worker, Signal::KILL);
        }
        let deadline = Instant::now() + LAST_STAND;
        while Instant::now() < deadline {
            self.watch.drain();
            while system::ended_child().and_then(system::reap).is_some() {}
            let left = children();
            if left.is_empty() {
                break;
            }
            for child in left {
                let _ = kill_process(child, Signal::KILL);
            }
            let mut fds = [PollFd::new(&self.watch.children, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&ROUND));
        }
        if let Some(driver) = spawn::driver() {
            cgroup::remove_those_of(driver);
        }
        std::process::exit(0);
    }
}

/// So that it can be forked.
fn has_one_thread() -> Result<()> {
    let deadline = Instant::now() + JOINED;
    loop {
        let threads = std::fs::read_dir("/proc/self/task")?.count();
        if threads == 1 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Error::other(format!(
                "the program has {threads} threads when it calls init(), and only one with a \
                 single thread can be forked"
            )));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wire(output: &impl AsFd) -> Result<()> {
    rustix::stdio::dup2_stdout(output)?;
    Ok(rustix::stdio::dup2_stderr(output)?)
}

/// The children of this process, adopted ones too.
fn children() -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.filter(|pid| parent(*pid) == Some(getpid())).collect()
}

fn parent(pid: Pid) -> Option<Pid> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it is in brackets and may contain anything.
    Pid::from_raw(text.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()?)
}
