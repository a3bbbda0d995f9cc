//! The driver's way to one worker process on another machine.

use super::hub::NodeLink;
use super::lines::LeftOut;
use super::wire::{CREDITS, ToNode};
use crate::process::wire::ToWorker;
use crate::process::{End, LogTarget, ProcessId, Sink, WorkerEvent};
use crate::scheduler::NodeId;
use crate::{console, timeline};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// What an agent is told to acknowledge at a time.
const ACKNOWLEDGE_EVERY: usize = CREDITS / 8;

/// A worker process on another machine. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct FarLink {
    node: Arc<NodeLink>,
    worker: Arc<FarWorker>,
}

/// What the session of its machine needs to know of it.
#[derive(Debug)]
pub(super) struct FarWorker {
    number: u64,
    node: NodeId,
    /// What it is for.
    name: String,
    /// 0 until it has been started.
    pid: AtomicU32,
    /// Bounded by the credits of its agent.
    events: mpsc::Sender<WorkerEvent>,
    log: Mutex<Log>,
    left_out: LeftOut,
    has_ended: Mutex<bool>,
    ended: Condvar,
}

#[derive(Debug)]
struct Log {
    prefix: Option<String>,
    file: Option<File>,
}

impl FarLink {
    /// Passes the worker's events on to `sink`.
    pub(super) fn new(node: &Arc<NodeLink>, number: u64, log: &LogTarget, sink: Sink) -> Self {
        // Its end needs room too, and that of its machine.
        let (events, inbox) = mpsc::channel(CREDITS + 2);
        let worker = Arc::new(FarWorker {
            number,
            node: node.id(),
            name: log.name.clone(),
            pid: AtomicU32::new(0),
            events,
            log: Mutex::new(Log::open(log)),
            left_out: LeftOut::default(),
            has_ended: Mutex::new(false),
            ended: Condvar::new(),
        });
        let link = Self { node: Arc::clone(node), worker };
        let (replies, id) = (Arc::downgrade(node), node.id());
        let sink = sink.with_tickets(id, move |frame| {
            replies.upgrade().map(|node| node.send(ToNode::Frame { worker: number, frame }));
        });
        link.node.tokio().spawn(pass_on(Arc::downgrade(&link.node), number, inbox, sink));
        link
    }

    pub(super) fn worker(&self) -> &Arc<FarWorker> {
        &self.worker
    }

    pub(crate) fn send(&self, frame: ToWorker) -> bool {
        self.node.send(ToNode::Frame { worker: self.worker.number, frame })
    }

    pub(crate) fn process(&self) -> Option<ProcessId> {
        self.worker.process()
    }

    pub(crate) fn kill(&self, reason: Option<String>) {
        self.node.send(ToNode::Kill { worker: self.worker.number, reason });
    }

    pub(crate) fn wait(&self, timeout: Duration) {
        let has_ended = self.worker.has_ended.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.worker.ended.wait_timeout_while(has_ended, timeout, |ended| !*ended);
        drop(waited);
    }
}

impl Drop for FarLink {
    fn drop(&mut self) {
        self.kill(None);
    }
}

impl FarWorker {
    pub(super) fn started(&self, pid: u32, host: &str) {
        self.pid.store(pid, Ordering::Relaxed);
        if let Some(process) = self.process() {
            timeline::process_started(process, &format!("{} on {host}", self.name));
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid > 0)
    }

    fn process(&self) -> Option<ProcessId> {
        Some(ProcessId { node: self.node, pid: self.pid()? })
    }

    pub(super) fn hear(&self, event: WorkerEvent) {
        let is_end = matches!(event, WorkerEvent::Ended(_));
        if let (WorkerEvent::Ended(end), Some(process)) = (&event, self.process()) {
            timeline::process_ended(process, &self.name, &end.reason);
        }
        if self.events.try_send(event).is_err() {
            // Who listened is gone, or the agent does not keep to its credits.
            tracing::debug!(worker = self.number, "an event of a worker was dropped");
        }
        if is_end {
            *self.has_ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
            self.ended.notify_all();
        }
    }

    /// Its machine is gone.
    pub(super) fn lost(&self, reason: &str) {
        self.hear(WorkerEvent::Ended(End::unknown(reason.to_owned())));
    }

    pub(super) fn left_out(&self) -> &LeftOut {
        &self.left_out
    }

    pub(super) fn line(&self, line: &str) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).line(line);
    }
}

/// The agent may send more when these have been taken.
async fn pass_on(
    node: std::sync::Weak<NodeLink>,
    worker: u64,
    mut inbox: mpsc::Receiver<WorkerEvent>,
    sink: Sink,
) {
    let mut taken = 0;
    while let Some(event) = inbox.recv().await {
        let is_end = matches!(event, WorkerEvent::Ended(_));
        // Nobody may be listening any more.
        let _ = sink.send(event).await;
        if is_end {
            return;
        }
        taken += 1;
        if taken == ACKNOWLEDGE_EVERY
            && let Some(node) = node.upgrade()
        {
            node.send(ToNode::Taken { worker, events: taken });
            taken = 0;
        }
    }
}

impl Log {
    fn open(target: &LogTarget) -> Self {
        let open = |path: &std::path::PathBuf| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let failed =
                |error| console::note(format!("cannot log to {}: {error}", path.display()));
            file.map_err(failed).ok()
        };
        Self { prefix: target.prefix.clone(), file: target.file.as_ref().and_then(open) }
    }

    /// Never fails: a full disk is no reason to lose a worker.
    fn line(&mut self, line: &str) {
        if let Some(file) = &mut self.file {
            let _ = writeln!(file, "{line}");
        }
        if let Some(prefix) = &self.prefix {
            console::note(format!("{prefix} {line}"));
        }
    }
}
