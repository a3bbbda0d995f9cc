//! The threads that run an actor's calls: one, and more when calls can run at the same time.

use super::lanes::{Class, Lanes};
use super::stage::{Shared, Stage};
use crate::Error;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A helper that nobody needed for so long leaves.
const IDLE: Duration = Duration::from_secs(10);

/// An actor's calls and who runs them.
pub(crate) struct Crew<W> {
    inner: Mutex<Inner<W>>,
    more: Condvar,
    place: Box<dyn Place<W>>,
}

/// Where calls run.
pub(crate) trait Place<W>: Send + Sync + 'static {
    /// Runs one call.
    fn run(&self, stage: &mut Stage, class: Class, work: W);

    /// Runs `help` on a thread like the first one.
    fn spawn(&self, help: Box<dyn FnOnce() + Send>) -> Result<(), Error>;
}

struct Inner<W> {
    lanes: Lanes<W>,
    /// The state, if helpers can work on it.
    shared: Option<Arc<Shared>>,
    threads: usize,
    idle: usize,
    /// No more calls will come.
    is_closed: bool,
}

impl<W: Send + 'static> Crew<W> {
    pub(crate) fn new(limits: &[usize], place: impl Place<W>) -> Arc<Self> {
        let lanes = Lanes::new(limits);
        let inner = Inner { lanes, shared: None, threads: 0, idle: 0, is_closed: false };
        Arc::new(Self { inner: Mutex::new(inner), more: Condvar::new(), place: Box::new(place) })
    }

    /// Queues a call. Gives it back if none can come any more, or if its group does not exist.
    pub(crate) fn add(self: &Arc<Self>, class: Class, work: W) -> Result<(), W> {
        let mut inner = self.inner();
        if inner.is_closed {
            return Err(work);
        }
        inner.lanes.add(class, work)?;
        self.find_hands(&mut inner);
        Ok(())
    }

    /// Runs calls on this thread, on the state that was built on it, until no more can come.
    pub(crate) fn serve(self: &Arc<Self>, stage: &mut Stage) {
        let mut inner = self.inner();
        inner.shared = stage.shared();
        inner.threads = 1;
        drop(inner);
        self.work(stage, None);
        self.more.notify_all();
    }

    pub(crate) fn close(&self) {
        self.inner().is_closed = true;
        self.more.notify_all();
    }

    /// Runs calls until there will be no more, or until there was none for so long.
    fn work(self: &Arc<Self>, stage: &mut Stage, patience: Option<Duration>) {
        let mut inner = self.inner();
        loop {
            if let Some((ticket, class, work)) = inner.lanes.start() {
                self.find_hands(&mut inner);
                drop(inner);
                self.place.run(stage, class, work);
                inner = self.inner();
                inner.lanes.end(ticket);
                continue;
            }
            if inner.is_closed && inner.lanes.is_empty() {
                break;
            }
            inner.idle += 1;
            let is_late;
            (inner, is_late) = self.wait(inner, patience);
            inner.idle -= 1;
            // One that was called in this very moment stays.
            if is_late && !inner.lanes.can_start() {
                break;
            }
        }
        inner.threads -= 1;
        drop(inner);
        // Who waits for the end as well.
        self.more.notify_all();
    }

    fn wait<'a>(
        &self,
        inner: MutexGuard<'a, Inner<W>>,
        patience: Option<Duration>,
    ) -> (MutexGuard<'a, Inner<W>>, bool) {
        let Some(patience) = patience else {
            return (self.more.wait(inner).unwrap_or_else(PoisonError::into_inner), false);
        };
        let waited = self.more.wait_timeout(inner, patience);
        let (inner, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        (inner, waited.timed_out())
    }

    /// Sees to it that a call that can start does.
    fn find_hands(self: &Arc<Self>, inner: &mut Inner<W>) {
        if !inner.lanes.can_start() {
            return;
        }
        if inner.idle > 0 {
            return self.more.notify_one();
        }
        let Some(shared) = inner.shared.clone() else { return };
        if inner.threads >= inner.lanes.most_running() {
            return;
        }
        let crew = Arc::clone(self);
        let help = move || crew.work(&mut Stage::on(shared), Some(IDLE));
        match self.place.spawn(Box::new(help)) {
            Ok(()) => inner.threads += 1,
            // Those that there are do it later.
            Err(error) => tracing::warn!(%error, "no thread for a concurrent call"),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner<W>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
