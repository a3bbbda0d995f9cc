//! Where an actor's state is made and worked on, whatever the place.

use crate::parcel::Outgoing;
use crate::remote::{Checkpoint, RemoteFn};
use crate::value::Encoded;
use crate::{BoxError, Error, panics};
use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

/// The state of an actor, of whatever type.
#[derive(Debug)]
#[doc(hidden)]
pub enum State {
    /// It stays on the thread that made it.
    Local(Box<dyn Any>),
    /// Several threads may work on it.
    Shared(SharedState),
}

type SharedState = Arc<RwLock<Box<dyn Any + Send + Sync>>>;

/// A thread's access to the state of one actor.
#[derive(Default)]
pub(crate) struct Stage {
    local: Option<Box<dyn Any>>,
    shared: Arc<Shared>,
}

/// How a state was made, and the state itself, if threads may share it.
#[derive(Default)]
pub(crate) struct Shared {
    /// A constructor and its arguments; once the state was saved, what makes it of that.
    made_by: Mutex<Option<(String, Vec<Encoded>)>>,
    state: Mutex<Option<SharedState>>,
    /// If it is an actor whose state is saved.
    saves: OnceLock<Saves>,
}

struct Saves {
    checkpoint: Checkpoint,
    /// After so many changes.
    every: u64,
    /// Since the last time. Only a call that runs alone counts.
    changes: AtomicU64,
}

/// What a call gave, and the state after it, if it was to be saved.
pub(crate) struct Done {
    pub(crate) result: Result<Outgoing, Error>,
    pub(crate) saved: Option<Result<Outgoing, Error>>,
}

impl Done {
    /// It was not run.
    pub(crate) fn failed(error: Error) -> Self {
        Self { result: Err(error), saved: None }
    }
}

impl Stage {
    /// For another thread.
    pub(crate) fn on(shared: Arc<Shared>) -> Self {
        Self { local: None, shared }
    }

    /// What another thread needs to work on the state too, if it may.
    pub(crate) fn shared(&self) -> Option<Arc<Shared>> {
        self.local.is_none().then(|| Arc::clone(&self.shared))
    }

    /// Makes the state; the same again after a panic, unless it was saved meanwhile. That is due
    /// after `every` calls that may change it, if the actor can be saved.
    pub(crate) fn build(
        &mut self,
        constructor: &str,
        args: Vec<Encoded>,
        every: u64,
    ) -> Result<(), Error> {
        *self.shared.made_by() = Some((constructor.to_owned(), args));
        let shared = Arc::clone(&self.shared);
        if let Some(checkpoint) = RemoteFn::find(constructor).ok().and_then(RemoteFn::checkpoint) {
            shared.saves.get_or_init(|| Saves { checkpoint, every, changes: AtomicU64::new(0) });
        }
        let mut slot = shared.state();
        self.rebuild(&mut slot)
    }

    fn rebuild(&mut self, slot: &mut Option<SharedState>) -> Result<(), Error> {
        let Some((constructor, args)) = self.shared.made_by().clone() else { return Ok(()) };
        let built = panics::catch(&constructor, || RemoteFn::find(&constructor)?.build(&args))?;
        self.shared.saved_now();
        match built {
            State::Local(state) => self.local = Some(state),
            State::Shared(state) => *slot = Some(state),
        }
        Ok(())
    }

    /// Runs a method. A state that a panic has left behind cannot be trusted: it is made anew
    /// before the next call.
    pub(crate) fn invoke(&mut self, method: &str, args: &[Encoded]) -> Done {
        let state = match self.state() {
            Ok(state) => state,
            Err(error) => return Done::failed(error),
        };
        let result = panics::catch(method, || {
            let method = RemoteFn::find(method)?;
            match (&state, &mut self.local) {
                (Some(state), _) => invoke_shared(method, state, args),
                (None, Some(state)) => method.change(&mut **state, args),
                (None, None) => Err(Error::Internal("an actor was not built".to_owned()).into()),
            }
        });
        if matches!(result, Err(Error::TaskPanicked { .. })) {
            self.discard(state.as_ref());
            return Done { result, saved: None };
        }
        let saved = self.save_if_due(method, state.as_ref());
        Done { result, saved }
    }

    /// The state after a method that may have changed it. The same call still keeps others out.
    fn save_if_due(
        &self,
        method: &str,
        state: Option<&SharedState>,
    ) -> Option<Result<Outgoing, Error>> {
        let saves = self.shared.saves.get()?;
        if !RemoteFn::find(method).is_ok_and(RemoteFn::is_exclusive) || !saves.are_due() {
            return None;
        }
        let save = saves.checkpoint.save;
        Some(panics::catch(save, || {
            let save = RemoteFn::find(save)?;
            match (state, &self.local) {
                (Some(state), _) => invoke_shared(save, state, &[]),
                (None, Some(state)) => save.look(&**state, &[]),
                (None, None) => Err(Error::Internal("an actor was not built".to_owned()).into()),
            }
        }))
    }

    /// From now on the state is made of what was saved.
    pub(crate) fn keep(&self, saved: Encoded) {
        let Some(saves) = self.shared.saves.get() else { return };
        let made_by = Some((saves.checkpoint.load.to_owned(), vec![saved]));
        let before = std::mem::replace(&mut *self.shared.made_by(), made_by);
        drop(before);
        self.shared.saved_now();
    }

    /// The shared state, if that is what there is; made anew if there is none.
    fn state(&mut self) -> Result<Option<SharedState>, Error> {
        if self.local.is_some() {
            return Ok(None);
        }
        let shared = Arc::clone(&self.shared);
        let mut slot = shared.state();
        if slot.is_none() {
            self.rebuild(&mut slot)?;
        }
        Ok(slot.clone())
    }

    /// Calls that run beside the one that panicked end on the old state.
    fn discard(&mut self, state: Option<&SharedState>) {
        self.local = None;
        let mut slot = self.shared.state();
        let is_current = |now: &mut SharedState| state.is_some_and(|old| Arc::ptr_eq(old, now));
        let old = slot.take_if(is_current);
        drop(slot);
        drop(old);
    }
}

impl Saves {
    /// One more change. One whose save fails is due again after the next.
    fn are_due(&self) -> bool {
        self.changes.fetch_add(1, Ordering::Relaxed) + 1 >= self.every
    }
}

impl Shared {
    fn saved_now(&self) {
        if let Some(saves) = self.saves.get() {
            saves.changes.store(0, Ordering::Relaxed);
        }
    }

    fn made_by(&self) -> MutexGuard<'_, Option<(String, Vec<Encoded>)>> {
        self.made_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, Option<SharedState>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nobody waits here for long: which calls run together was decided before.
fn invoke_shared(
    method: &RemoteFn,
    state: &SharedState,
    args: &[Encoded],
) -> Result<Outgoing, BoxError> {
    if method.is_exclusive() {
        let mut state = state.write().unwrap_or_else(PoisonError::into_inner);
        method.change(&mut **state, args)
    } else {
        let state = state.read().unwrap_or_else(PoisonError::into_inner);
        method.look(&**state, args)
    }
}
