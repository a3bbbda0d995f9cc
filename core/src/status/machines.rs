//! The machines of a program, and the processes on each: what the driver knows, and what the others
//! say when they are asked.

use super::{ActorStatus, NodeStatus, ObjectCounts, Sighting, WorkerStatus};
use crate::nodes::{self, NodeView};
use crate::process::{ProcessId, resident_bytes};
use crate::scheduler::NodeId;
use crate::{Runtime, parcel};
use std::collections::HashMap;

pub(super) struct Machines {
    pub(super) nodes: Vec<NodeStatus>,
    /// The same machines.
    ids: Vec<NodeId>,
    views: Vec<NodeView>,
}

impl Machines {
    /// Asks the other machines of the runtime, if it has any.
    pub(super) fn look(runtime: &Runtime) -> Self {
        let infos = runtime.nodes();
        let ids: Vec<NodeId> = infos.iter().map(|info| info.node.0).collect();
        let is_alone = ids.iter().all(|id| *id == NodeId::HERE);
        let mut views = if is_alone { Vec::new() } else { nodes::look_around() };
        // One that has joined in this moment is seen the next time.
        views.retain(|view| ids.contains(&view.node));
        let nodes = infos.into_iter().map(|info| {
            let id = info.node.0;
            let objects = match id {
                NodeId::HERE => Some(parcel::object_counts()),
                there => views.iter().find(|view| view.node == there).and_then(|view| view.objects),
            };
            let (silent, objects) = (objects.is_none(), objects.unwrap_or_default());
            NodeStatus { silent, objects, ..NodeStatus::from(info) }
        });
        Self { nodes: nodes.collect(), ids, views }
    }

    pub(super) fn objects_here(&self) -> ObjectCounts {
        self.nodes.first().map(|node| node.objects).unwrap_or_default()
    }

    pub(super) fn actor(&self, actor: Sighting) -> ActorStatus {
        let pid = actor.process.map(|process| process.pid);
        let node = actor.process.map(|process| self.name(process.node));
        ActorStatus { pid, node, ..actor.status }
    }

    /// The worker processes of all machines.
    pub(super) fn workers(&self, runtime: &Runtime, actors: &[Sighting]) -> Vec<WorkerStatus> {
        let Ok(host) = runtime.host() else { return Vec::new() };
        let pooled = host.pool().workers();
        let in_use = |actor: &Sighting| Some((actor.process?, actor.status.pending > 0));
        let actors: HashMap<ProcessId, bool> = actors.iter().filter_map(in_use).collect();
        let status = |process: ProcessId, name: String, resident_bytes: u64| WorkerStatus {
            node: self.name(process.node),
            pid: process.pid,
            name,
            // Those of neither are members of groups.
            busy: *pooled.get(&process).or(actors.get(&process)).unwrap_or(&true),
            resident_bytes,
        };
        let here = host.workers().into_iter().map(|worker| {
            let resident = resident_bytes(worker.process.pid).unwrap_or(0);
            status(worker.process, worker.name, resident)
        });
        let far = self.views.iter().flat_map(|view| &view.workers);
        let far = far.map(|worker| status(worker.process, worker.name.clone(), worker.resident));
        here.chain(far).collect()
    }

    fn name(&self, node: NodeId) -> String {
        let known = self.ids.iter().position(|id| *id == node).and_then(|at| self.nodes.get(at));
        // An actor may be on a machine that has joined, or gone, in this moment.
        known.map_or_else(|| format!("node {}", node.0), |known| known.name.clone())
    }
}
