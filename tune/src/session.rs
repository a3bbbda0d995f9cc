//! What one run of a study holds: its running tasks and the channel they report through.

use crate::Flow;
use crate::display::Display;
use crate::trial::{Message, StopHandle};
use mobula_core::ObjectRef;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Instant;

/// A trial's task.
pub(crate) struct Running {
    pub(crate) attempt: u32,
    pub(crate) object: ObjectRef<()>,
}

/// What one run of a coordinator holds besides the study. Dropped in any way, it tells every
/// trial to stop: none is left waiting for a study that has gone.
pub(crate) struct Session {
    pub(crate) running: BTreeMap<usize, Running>,
    pub(crate) inbox: Receiver<Message>,
    pub(crate) sender: SyncSender<Message>,
    pub(crate) answers: Vec<(SyncSender<Flow>, Flow)>,
    pub(crate) display: Display,
    pub(crate) finished: Arc<AtomicUsize>,
    pub(crate) last_heard: Instant,
    pub(crate) began: bool,
    pub(crate) stop: StopHandle,
}

impl Session {
    /// What a stopped study does with a message: it records nothing more.
    pub(crate) fn dismiss(&mut self, message: Message) {
        match message {
            Message::Began => {}
            Message::Report { answer, .. } => drop(answer.send(Flow::Stop)),
            Message::Ended { number } => drop(self.running.remove(&number)),
        }
    }

    pub(crate) fn give_answers(&mut self) {
        for (answer, flow) in self.answers.drain(..) {
            // A trial that no longer waits for its answer needs none.
            let _ = answer.send(flow);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.running.is_empty() {
            self.stop.stop();
            self.running.values().for_each(|running| running.object.cancel());
        }
    }
}

/// Tells the coordinator that a task is over: returned, panicked, or dropped in the queue.
pub(crate) struct Ended {
    pub(crate) number: usize,
    pub(crate) coordinator: SyncSender<Message>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        // A coordinator that has gone need not know.
        let _ = self.coordinator.send(Message::Ended { number: self.number });
    }
}
