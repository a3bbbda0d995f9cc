//! Who hears a process for its actor.

use super::process::ProcessActor;
use crate::object::AnyObject;
use crate::process::{Listener, Owner, WorkerEvent};
use crate::runtime::Lease;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Keeps what a process says until the actor has taken it for its own: its end is not to be noticed
/// before its beginning.
pub(super) struct Ear {
    actor: Arc<ProcessActor>,
    /// `None` from then on. These are few: a process says hello, and waits to be told what to do.
    early: Mutex<Option<Vec<WorkerEvent>>>,
}

impl Ear {
    pub(super) fn new(actor: Arc<ProcessActor>) -> Self {
        Self { actor, early: Mutex::new(Some(Vec::new())) }
    }

    /// Passes on what was kept, and from here on all at once.
    pub(super) fn open(&self) {
        // Locked meanwhile, so that nothing overtakes it.
        let mut early = self.early();
        for event in early.take().unwrap_or_default() {
            self.actor.take_in(event);
        }
    }

    fn early(&self) -> MutexGuard<'_, Option<Vec<WorkerEvent>>> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listener for Ear {
    fn hear(self: Arc<Self>, event: WorkerEvent) {
        let mut early = self.early();
        if let Some(early) = &mut *early {
            return early.push(event);
        }
        drop(early);
        self.actor.take_in(event);
    }
}

impl Owner for Ear {
    fn lease(&self) -> Option<Arc<Lease>> {
        self.actor.held()
    }

    /// A call's result may be wanted whatever becomes of its caller.
    fn object_of(&self, _: u64) -> Option<Arc<dyn AnyObject>> {
        None
    }
}
