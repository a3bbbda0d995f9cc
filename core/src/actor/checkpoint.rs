//! Saved states of an actor, as whoever starts it again sees them.
//!
//! A state counts from the moment that its driver has it, and the call after which it was saved is
//! answered then: what callers know of is in the state that comes back. One that was saved on
//! another machine is brought to the driver first, and whatever else the actor answers waits too.

use super::process::{Phase, ProcessActor, UnderWay, settle_all};
use crate::parcel::Parcel;
use crate::process::{Begun, lost};
use crate::scheduler::NodeId;
use crate::store::Lease;
use crate::{Error, console, threads};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

/// How an actor's state is to be saved, if it can be.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Saves {
    /// After so many calls that may change it.
    pub(crate) every: u64,
    /// Whether the driver is to have it, or only the process itself.
    pub(crate) are_sent: bool,
}

/// Saves that failed.
#[derive(Debug, Default)]
pub(super) struct Failures(AtomicU64);

impl Failures {
    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// One more, of which the program's user is told if it is the first.
    pub(super) fn add(&self, actor: &str, reason: &str) {
        tracing::warn!(actor, reason, "the state of an actor could not be saved");
        if self.0.fetch_add(1, Ordering::Relaxed) == 0 {
            let note = "could not save its state, and keeps its older checkpoint";
            console::note(format!("{actor} {note}: {reason}"));
        }
    }
}

/// The newest saved state.
#[derive(Default)]
pub(super) struct Newest {
    pub(super) state: Option<Parcel>,
    /// Keeps it where the process that was made of it finds it.
    pub(super) lease: Vec<Lease>,
}

impl From<Parcel> for Newest {
    fn from(state: Parcel) -> Self {
        Self { state: Some(state), lease: Vec::new() }
    }
}

/// An answer that waits for a saved state to be brought.
pub(super) struct Arrival {
    pub(super) call: u64,
    pub(super) under_way: UnderWay,
    pub(super) result: Result<Parcel, Error>,
    pub(super) saved: Option<Parcel>,
    /// Where that is.
    pub(super) node: NodeId,
}

impl Arrival {
    fn settle(self) {
        (self.under_way.post.settle)(self.result);
    }
}

impl ProcessActor {
    /// Answers a call once all is here that was saved before.
    pub(super) fn hold_back(self: &Arc<Self>, arrival: Arrival) {
        let is_first = {
            let mut state = self.state();
            state.arrivals.push_back(arrival);
            state.arrivals.len() == 1
        };
        if !is_first {
            return;
        }
        // To fetch is to wait: not on the thread that hears of workers.
        let actor = Arc::clone(self);
        if let Err(refused) = threads::run(1, move || actor.bring_saved()) {
            let arrived: Vec<Arrival> = self.state().arrivals.drain(..).collect();
            self.not_brought(arrived, &refused.error);
        }
    }

    /// Brings what was saved on another machine, and answers those who wait for it, until there is
    /// nothing left. For one thread at a time: another one finds all done.
    pub(super) fn bring_saved(&self) {
        let _one = self.bringing.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((count, newest)) = self.newest_arrival() {
            let brought = newest.map(Parcel::brought).transpose();
            let mut state = self.state();
            let count = count.min(state.arrivals.len());
            let arrived: Vec<Arrival> = state.arrivals.drain(..count).collect();
            match brought {
                Ok(saved) => {
                    let saved = saved.map(Newest::from);
                    let before = saved.map(|saved| std::mem::replace(&mut state.newest, saved));
                    drop(state);
                    drop(before);
                    arrived.into_iter().for_each(Arrival::settle);
                }
                Err(error) => {
                    drop(state);
                    self.not_brought(arrived, &error);
                }
            }
            self.state().leave_if_done();
        }
    }

    /// So many can be answered when their newest saved state is here; the older ones are not
    /// needed then.
    fn newest_arrival(&self) -> Option<(usize, Option<Parcel>)> {
        let state = self.state();
        let newest = state.arrivals.iter().rev().find_map(|arrival| arrival.saved.clone());
        Some((state.arrivals.len(), newest)).filter(|(count, _)| *count > 0)
    }

    /// The state before these calls is the newest. If their machine is gone, so is what they did:
    /// they were running when it was lost.
    fn not_brought(&self, arrived: Vec<Arrival>, error: &Error) {
        let is_there = |arrival: &Arrival| self.runtime.has_node(arrival.node);
        if arrived.first().is_none_or(is_there) {
            self.failures.add(&self.options.name, &error.to_string());
            return arrived.into_iter().for_each(Arrival::settle);
        }
        let mut state = self.state();
        let arrived = arrived.into_iter().chain(std::mem::take(&mut state.arrivals));
        let calls = arrived.map(|arrival| (arrival.call, arrival.under_way));
        state.under_way.extend(calls);
        let failed = match state.phase {
            // Its end is still to be heard, and says the same of them.
            Phase::Running(_) => {
                state.has_lost_saved = true;
                Vec::new()
            }
            Phase::Starting => state.take_lost(&Begun::Unknown, self.options.max_task_retries),
            Phase::Dead(_) => state.take_lost(&Begun::Unknown, 0),
        };
        drop(state);
        let error = || lost(&self.options.name, error.to_string());
        settle_all(failed.into_iter().map(|post| (post, error())).collect());
    }
}
