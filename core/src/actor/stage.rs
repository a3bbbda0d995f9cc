//! Where an actor's state is made and worked on, whatever the place.

use crate::parcel::Outgoing;
use crate::remote::RemoteFn;
use crate::value::Encoded;
use crate::{BoxError, Error, panics};
use std::any::Any;
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
    made_by: OnceLock<(String, Vec<Encoded>)>,
    state: Mutex<Option<SharedState>>,
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

    /// Makes the state; the same again after a panic.
    pub(crate) fn build(&mut self, constructor: &str, args: Vec<Encoded>) -> Result<(), Error> {
        let _ = self.shared.made_by.set((constructor.to_owned(), args));
        let shared = Arc::clone(&self.shared);
        let mut slot = shared.state();
        self.rebuild(&mut slot)
    }

    fn rebuild(&mut self, slot: &mut Option<SharedState>) -> Result<(), Error> {
        let Some((constructor, args)) = self.shared.made_by.get() else { return Ok(()) };
        let built = panics::catch(constructor, || RemoteFn::find(constructor)?.build(args))?;
        match built {
            State::Local(state) => self.local = Some(state),
            State::Shared(state) => *slot = Some(state),
        }
        Ok(())
    }

    /// Runs a method. A state that a panic has left behind cannot be trusted: it is made anew
    /// before the next call.
    pub(crate) fn invoke(&mut self, method: &str, args: &[Encoded]) -> Result<Outgoing, Error> {
        let state = self.state()?;
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
        }
        result
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

impl Shared {
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
