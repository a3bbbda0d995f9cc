//! The actors of a runtime, as long as they live.

use super::ActorStatus;
use crate::process::ProcessId;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How an actor is, where its process and machine are yet to be named.
pub(crate) struct Sighting {
    pub(crate) status: ActorStatus,
    pub(crate) process: Option<ProcessId>,
}

impl Sighting {
    pub(crate) fn on_thread(status: ActorStatus) -> Self {
        Self { status, process: None }
    }
}

/// How an actor is; `None` once it is gone for everybody.
pub(crate) type Look = Arc<dyn Fn() -> Option<Sighting> + Send + Sync>;

/// How each of the actors can be looked at.
#[derive(Default)]
pub(crate) struct Roster {
    looks: Mutex<Vec<Look>>,
}

impl Roster {
    pub(crate) fn add(&self, look: Look) {
        let mut looks = self.lock();
        // Those that are gone are forgotten as their number doubles, however many come and go.
        if looks.len() >= 64 && looks.len().is_power_of_two() {
            looks.retain(|look| look().is_some());
        }
        looks.push(look);
    }

    /// Without the lock: an actor that is being started keeps who looks at it waiting.
    pub(crate) fn look(&self) -> Vec<Sighting> {
        let looks = self.lock().clone();
        looks.iter().filter_map(|look| look()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Look>> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
