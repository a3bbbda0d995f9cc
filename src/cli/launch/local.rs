//! Copies of a program on this machine.

use super::Options;
use super::gang::{self, Event, Gang};
use super::guard::Guard;
use super::output::Outputs;
use crate::cli::signals;
use anyhow::Context;
use mobula::World;
use mobula::world::{SECRET_VARIABLE, free_port};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long output may come after the last copy has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

pub(super) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let (events, inbox) = channel();
    let signalled = events.clone();
    signals::listen(move |signal| signalled.send(Event::Signalled(signal)).is_ok())?;
    let size = options.workers.get() as usize;
    let launch = Launch {
        size,
        command: options.command.clone(),
        secret: secret()?,
        guard: Arc::new(Mutex::new(Guard::start()?)),
        outputs: Outputs::new(),
        events,
        running: BTreeMap::new(),
    };
    let gang = Gang::new(size, options.max_restarts, Duration::from_secs(options.grace));
    launch.run(gang, &inbox)
}

/// The copies that run.
struct Launch {
    size: usize,
    command: Vec<OsString>,
    secret: String,
    guard: Arc<Mutex<Guard>>,
    outputs: Outputs,
    events: Sender<Event>,
    /// Process groups by rank.
    running: BTreeMap<usize, Pid>,
}

impl Launch {
    /// Does what the gang decides until it is over.
    fn run(mut self, mut gang: Gang, inbox: &Receiver<Event>) -> anyhow::Result<ExitCode> {
        let mut commands = gang.start();
        loop {
            for command in commands {
                match command {
                    gang::Command::StartAll { restart_count } => self.start_all(restart_count)?,
                    gang::Command::Signal { rank, signal } => self.signal(rank, signal),
                    gang::Command::Finish { code } => {
                        self.outputs.finish(LAST_OUTPUT);
                        lock(&self.guard).finish();
                        return Ok(ExitCode::from(code));
                    }
                }
            }
            let event = next(inbox, gang.wake_at());
            if let Event::Exited { rank, code } = event {
                self.running.remove(&rank);
                if code != 0 && !gang.is_ending() {
                    mobula::console::note(format!("rank {rank} failed with exit code {code}"));
                }
            }
            commands = gang.step(event, Instant::now());
        }
    }

    /// On an error, the copies that were started end as this process does.
    fn start_all(&mut self, restart_count: u32) -> anyhow::Result<()> {
        if restart_count > 0 {
            mobula::console::note(format!("starting all copies again (restart {restart_count})"));
        }
        let port = free_port().context("looking for a port for rank 0")?;
        for rank in 0..self.size {
            let child = self.start(rank, port, restart_count)?;
            self.watch(rank, child);
        }
        Ok(())
    }

    /// The program, by way of `mobula launch-child`. This is the main thread, which lives as long
    /// as the process: the kernel ends a child with the *thread* that has started it.
    fn start(&self, rank: usize, port: u16, restart_count: u32) -> anyhow::Result<Child> {
        let mut command = Command::new("/proc/self/exe");
        command.args(["launch-child", &std::process::id().to_string(), "--"]).args(&self.command);
        // Ctrl-C reaches the launcher alone, which passes it on.
        command.process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        World::remove_from(&mut command);
        let (rank, size) = (rank.to_string(), self.size.to_string());
        let (port, restart_count) = (port.to_string(), restart_count.to_string());
        command.envs([
            ("RANK", rank.as_str()),
            ("WORLD_SIZE", &size),
            ("LOCAL_RANK", &rank),
            ("LOCAL_WORLD_SIZE", &size),
            ("GROUP_RANK", "0"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", &port),
            ("RESTART_COUNT", &restart_count),
            ("TORCHELASTIC_RESTART_COUNT", &restart_count),
            (SECRET_VARIABLE, &self.secret),
        ]);
        command.spawn().with_context(|| format!("starting rank {rank}"))
    }

    fn watch(&mut self, rank: usize, mut child: Child) {
        let group = Pid::from_child(&child);
        self.running.insert(rank, group);
        lock(&self.guard).add(group);
        if let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) {
            self.outputs.copy(rank, stdout, std::io::stdout());
            self.outputs.copy(rank, stderr, std::io::stderr());
        }
        let (events, guard) = (self.events.clone(), Arc::clone(&self.guard));
        std::thread::spawn(move || {
            // Not reaped yet, so that the number of the group is still its own.
            let _ = waitid(WaitId::Pid(group), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            let _ = kill_process_group(group, Signal::KILL);
            lock(&guard).remove(group);
            let code = child.wait().map_or(1, exit_code);
            // Nobody listens any more once the launch is over.
            let _ = events.send(Event::Exited { rank, code });
        });
    }

    fn signal(&self, rank: usize, signal: Signal) {
        if let Some(group) = self.running.get(&rank) {
            // It may have ended just now.
            let _ = kill_process_group(*group, signal);
        }
    }
}

fn lock(guard: &Mutex<Guard>) -> std::sync::MutexGuard<'_, Guard> {
    guard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next event, or a tick when it is time.
fn next(inbox: &Receiver<Event>, wake_at: Option<Instant>) -> Event {
    let patience = wake_at.map(|at| at.saturating_duration_since(Instant::now()));
    let event = match patience {
        Some(patience) => inbox.recv_timeout(patience),
        None => inbox.recv().map_err(RecvTimeoutError::from),
    };
    event.unwrap_or(Event::Tick)
}

/// As a shell tells it: 128 + n for signal n.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// What ranks show each other to be let in: the one given, or a new one.
fn secret() -> anyhow::Result<String> {
    if let Some(given) = std::env::var(SECRET_VARIABLE).ok().filter(|given| !given.is_empty()) {
        return Ok(given);
    }
    let mut bytes = [0; 32];
    let path = "/dev/urandom";
    let mut random = std::fs::File::open(path).with_context(|| format!("opening {path}"))?;
    random.read_exact(&mut bytes).with_context(|| format!("reading {path}"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
