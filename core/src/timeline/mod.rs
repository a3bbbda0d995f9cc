//! What happens to tasks, actors and worker processes: as `tracing` events, and in a timeline file
//! where the environment asks for one.
//!
//! The file is in Chrome's trace event format, which <https://ui.perfetto.dev> opens: one slice a
//! task attempt and actor call, on the track of the thread or process that it ran in. One thread
//! writes it, from a bounded queue: when that is full an event is left out, and counted.

mod encoder;
mod writer;

use crate::process::ProcessId;
use crate::scheduler::NodeId;
use crate::{Error, Node, console};
use encoder::{Event, Slice, Track};
use std::fs::TryLockError;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// The file to write a timeline into.
const VARIABLE: &str = "MOBULA_TIMELINE";

/// Events that may wait for the writer: some MiB.
const QUEUE: usize = 1 << 16;
/// How long the end of a program waits for the last events to be written.
const PATIENCE: Duration = Duration::from_secs(1);

static TIMELINE: OnceLock<Timeline> = OnceLock::new();

struct Timeline {
    begun: Instant,
    events: SyncSender<Event>,
    dropped: AtomicU64,
    path: PathBuf,
}

/// Begins a timeline if the environment names a file.
pub(crate) fn open() -> Result<(), Error> {
    let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let (file, path) = create(Path::new(&path))?;
    let (events, queue) = sync_channel(QUEUE);
    writer::start(file, queue)?;
    let new = Timeline { begun: Instant::now(), events, dropped: AtomicU64::new(0), path };
    if TIMELINE.set(new).is_ok() {
        let pid = std::process::id();
        send(Event::Process { pid, name: label(pid.into(), "driver") });
    }
    Ok(())
}

/// A program that was started by another one has its environment, too: when the file is being
/// written, it takes one of its own beside it.
fn create(path: &Path) -> Result<(std::fs::File, PathBuf), Error> {
    let at = |source, path: &Path| Error::Io {
        action: "write a timeline to",
        path: path.to_owned(),
        source: Arc::new(source),
    };
    let open = |path: &Path| {
        std::fs::OpenOptions::new()
            .create(true)
            .append(false)
            .write(true)
            .truncate(false)
            .open(path)
    };
    let file = open(path).map_err(|error| at(error, path))?;
    let (file, path) = match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            let own = path.with_extension(format!("{}.json", std::process::id()));
            (open(&own).map_err(|error| at(error, &own))?, own)
        }
        // A file system without locks has no second writer that could be told from the first.
        _ => (file, path.to_owned()),
    };
    file.set_len(0).map_err(|error| at(error, &path))?;
    Ok((file, path))
}

/// Waits until what has happened is in the file, and says what is not.
pub(crate) fn finish() {
    let Some(timeline) = TIMELINE.get() else { return };
    let deadline = Instant::now() + PATIENCE;
    let (written, is_written) = sync_channel(1);
    let mut mark = Event::Mark(written);
    while let Err(TrySendError::Full(back)) = timeline.events.try_send(mark) {
        if Instant::now() > deadline {
            return;
        }
        mark = back;
        std::thread::sleep(Duration::from_millis(1));
    }
    let _ = is_written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    let dropped = timeline.dropped.swap(0, Ordering::Relaxed);
    if dropped > 0 {
        let path = timeline.path.display();
        console::note(format!("{dropped} events are missing in {path}: they came too fast"));
    }
}

fn send(event: Event) {
    let Some(timeline) = TIMELINE.get() else { return };
    if timeline.events.try_send(event).is_err() {
        timeline.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// Microseconds on the timeline's clock.
fn now() -> Option<f64> {
    TIMELINE.get().map(|timeline| micros(timeline.begun.elapsed()))
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

static THREADS: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static THREAD: u64 = THREADS.fetch_add(1, Ordering::Relaxed);
}

/// Something that runs on this thread. Nothing is measured unless somebody looks.
pub(crate) struct Attempt {
    begun: Option<Instant>,
}

impl Attempt {
    pub(crate) fn begin() -> Self {
        let is_seen = TIMELINE.get().is_some() || tracing::enabled!(tracing::Level::DEBUG);
        Self { begun: is_seen.then(Instant::now) }
    }

    pub(crate) fn end(self, name: &str, error: Option<&Error>) {
        let Some(begun) = self.begun else { return };
        let duration = begun.elapsed();
        told(name, None, duration, error);
        let Some(end) = now() else { return };
        let track = Track::Thread(THREAD.try_with(|thread| *thread).unwrap_or(0));
        send(slice(track, name, end, duration, error));
    }
}

/// The time, where somebody will want to know how long a call took that came to nothing.
pub(crate) fn clock() -> Option<Instant> {
    TIMELINE.get().map(|_| Instant::now())
}

/// A call in a worker process has ended, which took so many microseconds there; gives its result.
pub(crate) fn replied<T>(
    process: ProcessId,
    name: &str,
    took: u32,
    result: Result<T, Error>,
) -> Result<T, Error> {
    let error = result.as_ref().err();
    let duration = Duration::from_micros(took.into());
    told(name, Some(process.pid), duration, error);
    if let Some(end) = now() {
        send(slice(Track::Process(number(process)), name, end, duration, error));
    }
    result
}

/// A call was lost with the worker process that it had been sent to at that time.
pub(crate) fn call_lost(process: ProcessId, name: &str, sent: Option<Instant>, error: &Error) {
    let duration = sent.map(|sent| sent.elapsed()).unwrap_or_default();
    told(name, Some(process.pid), duration, Some(error));
    if let Some(end) = now() {
        send(slice(Track::Lost(number(process)), name, end, duration, Some(error)));
    }
}

fn told(task: &str, pid: Option<u32>, duration: Duration, error: Option<&Error>) {
    match error {
        None => tracing::debug!(task, pid, ?duration, "task ended"),
        Some(error) => tracing::debug!(task, pid, ?duration, %error, "task ended"),
    }
}

fn slice(track: Track, name: &str, end: f64, duration: Duration, error: Option<&Error>) -> Event {
    let outcome = match error {
        None => "finished",
        Some(Error::Cancelled { .. }) => "cancelled",
        Some(Error::WorkerLost { .. }) => "lost",
        Some(Error::Timeout { .. }) => "late",
        Some(_) => "failed",
    };
    let (name, error) = (name.into(), error.map(ToString::to_string));
    Event::Slice(Slice { track, name, end, micros: micros(duration), outcome, error })
}

/// A call is on its way to a worker process.
pub(crate) fn sent(process: ProcessId, name: &str) {
    tracing::debug!(task = name, pid = process.pid, "task sent to a worker process");
}

pub(crate) fn process_started(process: impl Into<ProcessId>, name: &str) {
    let process = process.into();
    tracing::debug!(node = process.node.0, pid = process.pid, name, "worker process started");
    if TIMELINE.get().is_some() {
        send(Event::Process { pid: number(process), name: label(process, name) });
        instant(number(process), "process started", name);
    }
}

pub(crate) fn process_ended(process: impl Into<ProcessId>, name: &str, reason: &str) {
    let process = process.into();
    tracing::info!(node = process.node.0, pid = process.pid, name, reason, "worker process ended");
    instant(number(process), "process ended", reason);
}

/// Linux has no process ids beyond.
const PID_BITS: u32 = 22;

/// A process in the file, which knows one machine and numbers of 32 bits: those of the first 1023
/// other machines differ, and those of this one are as they are.
fn number(process: ProcessId) -> u32 {
    ((process.node.0 as u32) << PID_BITS) | process.pid
}

fn label(process: ProcessId, name: &str) -> String {
    match process {
        ProcessId { node: NodeId::HERE, pid } => format!("{name} ({pid})"),
        ProcessId { node, pid } => format!("{name} ({pid}, {})", Node(node)),
    }
}

pub(crate) fn actor_started(actor: &str, pid: Option<u32>) {
    tracing::debug!(actor, pid, "actor started");
}

/// The process of an actor is gone, and another one will be started.
pub(crate) fn actor_restarts(actor: &str, pid: Option<u32>, reason: &str) {
    tracing::info!(actor, pid, reason, "actor lost, starting it again");
    instant(std::process::id(), "actor restarts", &format!("{actor}: {reason}"));
}

/// An actor is gone for good; by itself, or because nobody wants it any more.
pub(crate) fn actor_ended(actor: &str, reason: &Error, is_wanted: bool) {
    if is_wanted {
        tracing::info!(actor, %reason, "actor lost");
        instant(std::process::id(), "actor lost", &format!("{actor}: {reason}"));
    } else {
        tracing::debug!(actor, "actor ended");
    }
}

fn instant(pid: u32, name: &'static str, detail: &str) {
    if let Some(at) = now() {
        send(Event::Instant { pid, name, at, detail: detail.to_owned() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_two_machines_are_two() {
        let process = |node, pid| ProcessId { node: NodeId(node), pid };
        let most = (1 << PID_BITS) - 1;
        assert_eq!(number(process(0, most)), most);
        let all = [process(0, 7), process(1, 7), process(2, 7), process(1, 8), process(1023, most)];
        let numbers: std::collections::HashSet<u32> = all.into_iter().map(number).collect();
        assert_eq!(numbers.len(), all.len());
        assert_eq!(label(process(0, 7), "tasks"), "tasks (7)");
        assert_eq!(label(process(2, 7), "tasks on far"), "tasks on far (7, node 2)");
    }
}
