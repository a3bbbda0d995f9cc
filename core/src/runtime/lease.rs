//! Resources that somebody holds, and lends while it waits for other work.

use super::{Runtime, lock};
use crate::Error;
use crate::process::pool::Worker;
use crate::scheduler::{Event, Grant, Id, NodeId};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};

/// Resources taken from the scheduler until dropped.
pub(crate) struct Lease {
    runtime: Runtime,
    id: Id,
    pub(crate) grants: Vec<Grant>,
    lending: Mutex<Lending>,
}

/// Who has lent the CPUs of a lease.
#[derive(Default)]
struct Lending {
    /// How many threads have: they are lent as long as one of them waits.
    lenders: usize,
    cpus: LentCpus,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LentCpus {
    #[default]
    Held,
    Lent,
    /// Somebody waits for them to come back.
    Wanted,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("id", &self.id).field("grants", &self.grants).finish()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.runtime.step(Event::Release { id: self.id });
    }
}

impl Lease {
    pub(super) fn new(runtime: Runtime, id: Id, grants: Vec<Grant>) -> Self {
        Self { runtime, id, grants, lending: Mutex::default() }
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// One for each bundle, each to be lent and given back by itself. If a machine was lost since
    /// they were granted, some hold nothing; who uses them will find that out.
    pub(crate) fn split(&self) -> Vec<Arc<Self>> {
        let part = |grant: &Grant| (self.runtime.next_id(), grant.clone());
        let parts: Vec<(Id, Grant)> = self.grants.iter().map(part).collect();
        self.runtime.step(Event::Split { id: self.id, into: parts.clone() });
        let lease = |(id, grant)| Arc::new(Self::new(self.runtime.clone(), id, vec![grant]));
        parts.into_iter().map(lease).collect()
    }

    /// The machine of its first, and mostly only, bundle.
    pub(crate) fn node(&self) -> NodeId {
        self.grants[0].node
    }

    /// For what runs on a thread of this process.
    pub(crate) fn check_here(&self, name: &str) -> Result<(), Error> {
        if self.grants.iter().all(|grant| grant.node == NodeId::HERE) {
            return Ok(());
        }
        Err(Error::ThreadElsewhere { name: name.to_owned() })
    }

    /// Lets others have the CPUs for now. Never waits.
    pub(crate) fn lend(&self) {
        let is_first = {
            let mut lending = lock(&self.lending);
            lending.lenders += 1;
            let is_held = lending.cpus == LentCpus::Held;
            if is_held {
                lending.cpus = LentCpus::Lent;
            }
            is_held
        };
        if is_first {
            self.runtime.step(Event::Lend { id: self.id });
        }
    }

    /// Waits until the CPUs are back, before anyone else gets any; unless another thread waits that
    /// has lent them too, for what may need them.
    pub(crate) fn reclaim(&self) {
        {
            let mut lending = lock(&self.lending);
            lending.lenders -= 1;
            if lending.lenders > 0 || lending.cpus != LentCpus::Lent {
                return;
            }
            lending.cpus = LentCpus::Wanted;
        }
        let (back, is_back) = sync_channel(1);
        let event = Event::Reclaim { id: self.id };
        self.runtime.step_with(event, |state| drop(state.resumes.insert(self.id, back)));
        // The sender goes without a word when the scheduler has lost the grant: then nothing is
        // left to wait for.
        let _ = is_back.recv();
        if self.are_lent_again() {
            self.runtime.step(Event::Lend { id: self.id });
        }
    }

    /// Whether a thread has lent them while they were on their way back.
    fn are_lent_again(&self) -> bool {
        let mut lending = lock(&self.lending);
        let again = lending.lenders > 0;
        lending.cpus = if again { LentCpus::Lent } else { LentCpus::Held };
        again
    }

    /// Up to `max` waiting requests of the same shape take their turn in this worker.
    pub(crate) fn share(&self, worker: &Arc<Worker>, max: usize) {
        self.runtime.share(self.id, worker, max);
    }
}
