//! Values of a task on their way through the driver to the worker that wants them.

use super::door::Door;
use crate::object::AnyObject;
use crate::parcel::{Parcel, pack_all};
use crate::process::wire::ToWorker;
use crate::scheduler::NodeId;
use crate::store;
use crate::stream::{Intake, Tell};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

pub(super) type Reply = Arc<dyn Fn(ToWorker) + Send + Sync>;

/// The driver's part of a stream whose consumer, and so whose window, is in a worker.
pub(super) struct Relay {
    ticket: u64,
    /// The worker's machine.
    node: NodeId,
    reply: Reply,
    state: Mutex<State>,
    door: Arc<Door>,
    /// What the task gives in the end.
    object: OnceLock<Weak<dyn AnyObject>>,
}

struct State {
    arrived: u64,
    granted: u64,
    /// The producer that runs now.
    producer: Option<Tell>,
    /// Large values that the worker has not mapped yet, under the number of the last of them.
    kept: VecDeque<(u64, Kept)>,
}

/// Values, and what keeps them where the worker finds them.
type Kept = (Vec<Parcel>, Vec<store::Lease>);

impl Relay {
    /// For a consumer that has room for the values below `granted`.
    pub(super) fn new(ticket: u64, granted: u64, node: NodeId, reply: Reply) -> Arc<Self> {
        let state = State { arrived: 0, granted, producer: None, kept: VecDeque::new() };
        let (state, door, object) = (Mutex::new(state), Arc::default(), OnceLock::new());
        Arc::new(Self { ticket, node, reply, state, door, object })
    }

    /// Whose values these are.
    pub(super) fn set_object(&self, object: &Arc<dyn AnyObject>) {
        // There is one only.
        let _ = self.object.set(Arc::downgrade(object));
    }

    /// The consumer has room for the values below this number.
    pub(super) fn grant(&self, below: u64) {
        let producer = {
            let mut state = self.state();
            state.granted = state.granted.max(below);
            state.producer.clone()
        };
        producer.into_iter().for_each(|tell| tell(below));
    }

    /// The worker needs nobody to keep the values below this number.
    pub(super) fn mapped(&self, below: u64) {
        let mapped: Vec<_> = {
            let mut state = self.state();
            let count = state.kept.partition_point(|(last, _)| *last < below);
            state.kept.drain(..count).collect()
        };
        drop(mapped);
    }

    /// Does this when all values have been sent.
    pub(super) fn at_the_end(&self, end: impl FnOnce() + Send + 'static) {
        self.door.pass(false, end);
    }

    /// Brings what is on other machines, and sends it on.
    fn send(&self, first: u64, values: Vec<Parcel>) {
        let mut far = values.iter().filter(|value| !value.is_at_hand(self.node));
        let packed = far.try_for_each(Parcel::bring).and_then(|()| pack_all(&values, self.node));
        match packed {
            Ok((packed, leases)) => {
                let last = first + packed.len() as u64 - 1;
                if values.iter().any(|value| !matches!(value, Parcel::Inline(_))) {
                    self.state().kept.push_back((last, (values, leases)));
                }
                (self.reply)(ToWorker::Values { ticket: self.ticket, first, values: packed });
            }
            // Without this one those that follow are of no use.
            Err(error) => {
                if let Some(object) = self.object.get().and_then(Weak::upgrade) {
                    object.fail(error);
                    object.cancel();
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the driver's task puts its values.
pub(super) struct Inlet(pub(super) Arc<Relay>);

impl Intake for Inlet {
    fn begin(&self) -> (u64, u64) {
        let state = self.0.state();
        (state.arrived, state.granted)
    }

    fn connect(&self, granted: u64, tell: Tell) {
        let now = {
            let mut state = self.0.state();
            state.producer = Some(Arc::clone(&tell));
            state.granted
        };
        if now > granted {
            tell(now);
        }
    }

    fn take_in(&self, first: u64, mut values: Vec<Parcel>) {
        let first = {
            let mut state = self.0.state();
            // An earlier attempt has sent these.
            let known = state.arrived.saturating_sub(first).min(values.len() as u64);
            values.drain(..known as usize);
            if first + known != state.arrived || values.is_empty() {
                return;
            }
            state.arrived += values.len() as u64;
            first + known
        };
        let relay = Arc::clone(&self.0);
        let takes_long = values.iter().any(|value| !value.is_at_hand(relay.node));
        self.0.door.pass(takes_long, move || relay.send(first, values));
    }
}
