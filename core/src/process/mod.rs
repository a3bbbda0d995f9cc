//! Worker processes: started by one thread, talked to over one stream each, gone with the driver.

pub(crate) mod child;
mod link;
mod logs;
pub(crate) mod spawn;
pub(crate) mod wire;

pub(crate) use link::{WorkerEvent, WorkerLink};
pub(crate) use logs::LogTarget;

use crate::remote::RemoteCall;
use crate::{Error, Resources};
use spawn::Spawner;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use wire::{FromWorker, Outcome, ToWorker};

/// Events of a worker that may wait for their reader; then the worker waits too.
pub(crate) const EVENTS: usize = 1024;
const SHUTDOWN_GRACE: Duration = Duration::from_millis(500);
const CANCEL_POLL: Duration = Duration::from_millis(50);

/// Starts workers and knows all that are alive.
#[derive(Clone, Debug)]
pub(crate) struct ProcessHost {
    tokio: tokio::runtime::Handle,
    spawner: Spawner,
    alive: Arc<Mutex<Alive>>,
}

/// The processes that are to end with the driver.
#[derive(Debug, Default)]
struct Alive {
    processes: Vec<Weak<link::Process>>,
    closing: bool,
}

impl ProcessHost {
    pub(crate) fn new(tokio: tokio::runtime::Handle) -> Result<Self, Error> {
        Ok(Self { tokio, spawner: Spawner::start()?, alive: Arc::default() })
    }

    pub(crate) fn tokio(&self) -> &tokio::runtime::Handle {
        &self.tokio
    }

    /// Starts a worker with threads for these resources.
    pub(crate) fn start(
        &self,
        resources: &Resources,
        log: LogTarget,
        events: mpsc::Sender<WorkerEvent>,
    ) -> Result<WorkerLink, Error> {
        let threads = resources.threads().to_string();
        let environment = vec![("RAYON_NUM_THREADS".to_owned(), threads)];
        let started = self.spawner.spawn(environment)?;
        let link = WorkerLink::new(started, log, events, &self.tokio)?;
        let mut alive = self.alive();
        if alive.closing {
            // The link is dropped, and its process ends.
            return Err(Error::Cancelled { task: "starting a worker process".to_owned() });
        }
        alive.processes.retain(|process| process.strong_count() > 0);
        alive.processes.push(Arc::downgrade(link.process()));
        Ok(link)
    }

    /// Runs one call in a fresh worker process.
    pub(crate) fn run_task<T>(
        &self,
        task: &str,
        resources: &Resources,
        call: &RemoteCall<T>,
        cancelled: impl Fn() -> bool,
    ) -> Result<T, Error> {
        let args = call.args.clone()?;
        let (events, mut inbox) = mpsc::channel(EVENTS);
        let log = LogTarget { prefix: Some(format!("[{task}]")), file: None };
        let link = self.start(resources, log, events)?;
        let function = call.name.to_owned();
        link.send(ToWorker::Run { function, args, member: None });
        loop {
            if cancelled() {
                return Err(Error::Cancelled { task: task.to_owned() });
            }
            match self.next(&mut inbox, CANCEL_POLL) {
                None => {}
                Some(WorkerEvent::Frame(FromWorker::Hello { build })) => check_build(&build)?,
                Some(WorkerEvent::Frame(FromWorker::Done(outcome))) => {
                    link.send(ToWorker::Shutdown);
                    link.process().wait(SHUTDOWN_GRACE);
                    return (call.decode)(&into_result(task, outcome)?);
                }
                Some(WorkerEvent::Frame(_)) => {}
                Some(WorkerEvent::Ended(reason)) => return Err(lost(task, reason)),
            }
        }
    }

    /// The next of a channel's events, or `None` when none came in time.
    pub(crate) fn next<E>(&self, inbox: &mut mpsc::Receiver<E>, timeout: Duration) -> Option<E> {
        let next = async { tokio::time::timeout(timeout, inbox.recv()).await };
        self.tokio.block_on(next).ok().flatten()
    }

    /// Kills every worker, starts no more, and waits for them to be gone.
    pub(crate) fn shutdown(&self) {
        let deadline = Instant::now() + SHUTDOWN_GRACE;
        for process in self.kill_all() {
            process.wait(deadline.saturating_duration_since(Instant::now()));
        }
    }

    /// Kills every worker and starts no more.
    pub(crate) fn kill_all(&self) -> Vec<Arc<link::Process>> {
        let mut alive = self.alive();
        alive.closing = true;
        let processes: Vec<_> = alive.processes.drain(..).filter_map(|p| p.upgrade()).collect();
        processes.iter().for_each(|process| process.kill());
        processes
    }

    fn alive(&self) -> MutexGuard<'_, Alive> {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// This binary's identity: size and modification time of the executable.
pub(crate) fn build_id() -> String {
    let Ok(meta) = std::fs::metadata("/proc/self/exe") else {
        return "unknown".to_owned();
    };
    let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    format!(
        "{}-{:x}-{:x}",
        env!("CARGO_PKG_VERSION"),
        meta.len(),
        modified.unwrap_or_default().as_nanos()
    )
}

pub(crate) fn check_build(got: &str) -> Result<(), Error> {
    let expected = build_id();
    if got == expected {
        return Ok(());
    }
    Err(Error::BuildMismatch { expected, got: got.to_owned() })
}

pub(crate) fn into_result(task: &str, outcome: Outcome) -> Result<bytes::Bytes, Error> {
    let task = task.to_owned();
    match outcome {
        Outcome::Value(value) => Ok(value),
        Outcome::Failed { message } => Err(Error::TaskFailed { task, message }),
        Outcome::Panicked { message, location } => {
            Err(Error::TaskPanicked { task, message, location })
        }
    }
}

pub(crate) fn lost(task: &str, reason: String) -> Error {
    Error::WorkerLost { task: task.to_owned(), reason }
}
