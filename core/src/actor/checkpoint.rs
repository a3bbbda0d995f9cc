//! Saved states of an actor, as whoever starts it again sees them.
//!
//! A state counts from the moment that its driver has it, and the call after which it was saved is
//! answered then: what callers know of is in the state that comes back. One that was saved on
//! another machine is brought to the driver first, and whatever else the actor answers waits too.

use super::process::{Phase, ProcessActor, State, UnderWay, settle_all};
use crate::parcel::Parcel;
use crate::process::{Begun, lost};
use crate::store::Lease;
use crate::{Error, console, threads};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};

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
    /// Of the actor's processes, the one that has answered.
    pub(super) life: u64,
    pub(super) call: u64,
    pub(super) under_way: UnderWay,
    pub(super) result: Result<Parcel, Error>,
    pub(super) saved: Option<Parcel>,
}

impl Arrival {
    /// What it was before its answer.
    fn into_call(self) -> (u64, UnderWay) {
        (self.call, self.under_way)
    }

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
            let _one = self.bringing();
            self.not_brought(self.state(), Vec::new(), &refused.error);
        }
    }

    fn bringing(&self) -> MutexGuard<'_, ()> {
        self.bringing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings what was saved on another machine, and answers those who wait for it, until there is
    /// nothing left. For one thread at a time: another one finds all done.
    pub(super) fn bring_saved(&self) {
        let _one = self.bringing();
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
                Err(error) => self.not_brought(state, arrived, &error),
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

    /// The state before these calls is the newest, and what they did is lost: they count as running
    /// when their process ended, and it ends here, if that is still to come.
    fn not_brought(&self, mut state: MutexGuard<'_, State>, arrived: Vec<Arrival>, error: &Error) {
        let reason = format!("the state that it had saved was lost: {error}");
        let arrived: Vec<_> =
            arrived.into_iter().chain(std::mem::take(&mut state.arrivals)).collect();
        let life = match &state.phase {
            Phase::Running(life) => Some(Arc::clone(life)),
            _ => None,
        };
        let lives = state.lives;
        let has_it = |arrival: &Arrival| life.is_some() && arrival.life == lives;
        let (running, ended): (Vec<_>, Vec<_>) = arrived.into_iter().partition(has_it);
        if let Some(life) = life.filter(|_| !running.is_empty()) {
            // Its end is still to be heard, and says what becomes of them.
            state.under_way.extend(running.into_iter().map(Arrival::into_call));
            state.has_lost_saved = true;
            life.end(reason.clone());
        }
        let is_dead = matches!(state.phase, Phase::Dead(_));
        let retries = if is_dead { 0 } else { self.options.max_task_retries };
        let ended: BTreeMap<_, _> = ended.into_iter().map(Arrival::into_call).collect();
        let failed = state.take_back(ended, &Begun::Unknown, retries);
        let unsent = state.send_queued();
        drop(state);
        let error = || lost(&self.options.name, reason.clone());
        settle_all(failed.into_iter().map(|post| (post, error())).chain(unsent).collect());
    }
}
