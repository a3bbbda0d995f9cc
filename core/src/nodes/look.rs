//! What other machines tell of themselves when somebody looks at the program.

use super::hub::{NodeLink, hub};
use super::wire::ToNode;
use crate::process::{ProcessHost, ProcessId, resident_bytes};
use crate::scheduler::NodeId;
use crate::status::ObjectCounts;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Who does not answer for so long is shown without what only it knows.
const PATIENCE: Duration = Duration::from_secs(1);

/// What an agent sees on its machine.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct View {
    /// Bytes of resident memory of its worker processes, by process id.
    resident: HashMap<u32, u64>,
    objects: ObjectCounts,
}

impl View {
    /// Reads files: not on a thread that serves others.
    pub(super) fn of(host: &ProcessHost) -> Self {
        let pids = host.workers().into_iter().map(|worker| worker.process.pid);
        let resident = pids.filter_map(|pid| Some((pid, resident_bytes(pid)?))).collect();
        Self { resident, objects: crate::parcel::object_counts() }
    }
}

/// A machine as its agent and the driver see it.
pub(crate) struct NodeView {
    pub(crate) node: NodeId,
    /// Its worker processes, the oldest first.
    pub(crate) workers: Vec<FarView>,
    /// `None`: its agent did not answer in time.
    pub(crate) objects: Option<ObjectCounts>,
}

/// A worker process on another machine.
pub(crate) struct FarView {
    pub(crate) process: ProcessId,
    pub(crate) name: String,
    /// Bytes; 0 if it has just ended, or nobody said.
    pub(crate) resident: u64,
}

/// Asks all other machines at once. Takes no longer than the slowest that answers within a second.
pub(crate) fn look_around() -> Vec<NodeView> {
    let Ok(hub) = hub() else { return Vec::new() };
    let asked: Vec<_> = hub.nodes().into_iter().map(|node| (node.ask(), node)).collect();
    let deadline = Instant::now() + PATIENCE;
    asked.into_iter().map(|(look, node)| node.seen(&look, deadline)).collect()
}

/// Answers of one machine that are on their way.
#[derive(Debug, Default)]
pub(super) struct Looks(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    last: u64,
    answers: HashMap<u64, SyncSender<View>>,
}

struct Asked {
    number: u64,
    answer: Receiver<View>,
}

impl Looks {
    pub(super) fn answered(&self, number: u64, view: View) {
        // Who asked may have given up.
        let answer = self.lock().answers.remove(&number);
        answer.map(|answer| answer.try_send(view));
    }

    fn begin(&self) -> Asked {
        let (sender, answer) = sync_channel(1);
        let mut waiting = self.lock();
        waiting.last += 1;
        let number = waiting.last;
        waiting.answers.insert(number, sender);
        Asked { number, answer }
    }

    fn end(&self, asked: &Asked, deadline: Instant) -> Option<View> {
        let left = deadline.saturating_duration_since(Instant::now());
        let view = asked.answer.recv_timeout(left).ok();
        self.lock().answers.remove(&asked.number);
        view
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NodeLink {
    fn ask(self: &Arc<Self>) -> Asked {
        let asked = self.looks().begin();
        self.send(ToNode::Look { look: asked.number });
        asked
    }

    fn seen(&self, asked: &Asked, deadline: Instant) -> NodeView {
        let view = self.looks().end(asked, deadline);
        let resident = |pid| view.as_ref()?.resident.get(&pid).copied();
        let workers = self.processes().into_iter().map(|(pid, name)| FarView {
            process: ProcessId { node: self.id(), pid },
            name,
            resident: resident(pid).unwrap_or(0),
        });
        let (node, workers) = (self.id(), workers.collect());
        NodeView { node, workers, objects: view.map(|view| view.objects) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        View { resident: HashMap::new(), objects: ObjectCounts::default() }
    }

    #[test]
    fn an_answer_is_for_who_asked_and_a_late_one_for_nobody() {
        let looks = Looks::default();
        let (first, second) = (looks.begin(), looks.begin());
        looks.answered(second.number, view());
        assert!(looks.end(&first, Instant::now()).is_none(), "it did not answer");
        assert!(looks.end(&second, Instant::now()).is_some());
        looks.answered(first.number, view());
        assert!(looks.lock().answers.is_empty());
    }
}
