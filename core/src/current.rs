//! The task that runs on this thread: whether it was cancelled, and the CPUs it can lend.

use crate::nested::nested;
use crate::object::AnyObject;
use crate::runtime::Lease;
use std::cell::RefCell;
use std::sync::Arc;

/// What a thread knows of its task.
pub(crate) struct Current {
    /// What it gives; an actor gives something else with every call.
    pub(crate) object: Option<Arc<dyn AnyObject>>,
    /// What it holds while it runs; none where another process accounts for it.
    pub(crate) lease: Option<Arc<Lease>>,
    /// Its number, in a worker process.
    pub(crate) call: Option<u64>,
}

thread_local! {
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}

/// Runs `body` as this task.
pub(crate) fn run<R>(task: Current, body: impl FnOnce() -> R) -> R {
    let outer = CURRENT.replace(Some(task));
    let restore = Restore(outer);
    let result = body();
    drop(restore);
    result
}

struct Restore(Option<Current>);

impl Drop for Restore {
    fn drop(&mut self) {
        // Dropped outside of the borrow: the lease may start the next task.
        let done = CURRENT.replace(self.0.take());
        drop(done);
    }
}

pub(crate) fn with<R>(look: impl FnOnce(&Current) -> R) -> Option<R> {
    CURRENT.with_borrow(|current| current.as_ref().map(look))
}

/// Whether the task that runs on this thread was cancelled. Long tasks ask now and then.
pub fn cancelled() -> bool {
    with(|task| task.object.as_ref().is_some_and(|object| object.is_cancelled())).unwrap_or(false)
}

/// Lends the CPUs of this thread's task to others until the guard is dropped, which waits for
/// them to come back.
pub(crate) fn lend() -> Option<Lent> {
    with(|task| match (&task.lease, task.call) {
        (Some(lease), _) => {
            lease.lend();
            Some(Lent::Here(Arc::clone(lease)))
        }
        // Its driver accounts for it.
        (None, Some(_)) => nested().map(|nested| {
            nested.lend();
            Lent::ByDriver
        }),
        (None, None) => None,
    })
    .flatten()
}

/// The call that runs on this thread of a worker process.
pub(crate) fn call() -> Option<u64> {
    with(|task| task.call).flatten()
}

#[derive(Debug)]
pub(crate) enum Lent {
    Here(Arc<Lease>),
    ByDriver,
}

impl Drop for Lent {
    fn drop(&mut self) {
        match self {
            Self::Here(lease) => lease.reclaim(),
            Self::ByDriver => nested().into_iter().for_each(|nested| nested.reclaim()),
        }
    }
}
