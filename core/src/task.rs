//! Tasks and the references to what they will give.

use crate::panics;
use crate::remote::RemoteCall;
use crate::{BoxError, Error, Resources};
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Where a task or an actor runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// On a thread of this process: shares memory, starts in microseconds.
    #[default]
    Thread,
    /// In a process of its own: survives the crash of others, can be killed, has its own threads.
    Process,
}

/// Whether work that reports on itself goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "work that is told to stop should return"]
pub enum Flow {
    /// Go on.
    Continue,
    /// Wind up and return `Ok`.
    Stop,
}

impl Flow {
    /// Stop if `stop`, else go on.
    pub fn stop_if(stop: bool) -> Self {
        if stop { Self::Stop } else { Self::Continue }
    }

    /// Whether this says stop.
    pub fn is_stop(self) -> bool {
        self == Self::Stop
    }
}

/// How a task is placed and retried. Every default is here.
#[derive(Clone, Debug)]
pub struct TaskOptions {
    /// What it holds while it runs. Default: 1 CPU.
    pub resources: Resources,
    /// Where it runs. Default: a thread.
    pub placement: Placement,
    /// How often it is run again after its worker process was lost. Default: 0. Errors that the
    /// task itself returns are never retried.
    pub max_retries: u32,
}

impl Default for TaskOptions {
    fn default() -> Self {
        Self { resources: Resources::cpus(1.0), placement: Placement::Thread, max_retries: 0 }
    }
}

/// A piece of work that gives a `T`: a closure, or a call of a `#[remote]` function.
pub struct Task<T> {
    pub(crate) name: String,
    pub(crate) options: TaskOptions,
    pub(crate) body: Body<T>,
}

/// What a task runs: only a remote call can leave the process.
pub(crate) enum Body<T> {
    Closure(Box<dyn FnOnce() -> Result<T, BoxError> + Send>),
    Remote(RemoteCall<T>),
}

impl<T> Task<T> {
    /// A closure under a name that its errors will carry. Runs on a thread.
    pub fn new<E: Into<BoxError>>(
        name: impl Into<String>,
        body: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            options: TaskOptions::default(),
            body: Body::Closure(Box::new(move || body().map_err(Into::into))),
        }
    }

    pub(crate) fn remote(name: impl Into<String>, call: RemoteCall<T>) -> Self {
        Self { name: name.into(), options: TaskOptions::default(), body: Body::Remote(call) }
    }

    /// The same task with these options.
    pub fn with_options(self, options: TaskOptions) -> Self {
        Self { options, ..self }
    }

    /// The same task holding these resources.
    pub fn with_resources(mut self, resources: Resources) -> Self {
        self.options.resources = resources;
        self
    }

    /// The same task placed there. A closure placed in a process is refused when submitted.
    pub fn on(mut self, placement: Placement) -> Self {
        self.options.placement = placement;
        self
    }
}

/// A future result. Clones refer to the same one.
#[derive(Debug)]
pub struct ObjectRef<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Clone for ObjectRef<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

#[derive(Debug)]
struct Shared<T> {
    task: String,
    value: OnceLock<Result<Arc<T>, Error>>,
    lock: Mutex<()>,
    ready: Condvar,
    ready_async: tokio::sync::Notify,
    cancelled: AtomicBool,
}

impl<T> ObjectRef<T> {
    pub(crate) fn pending(task: impl Into<String>) -> Self {
        Self {
            shared: Arc::new(Shared {
                task: task.into(),
                value: OnceLock::new(),
                lock: Mutex::new(()),
                ready: Condvar::new(),
                ready_async: tokio::sync::Notify::new(),
                cancelled: AtomicBool::new(false),
            }),
        }
    }

    /// Gives the result; the first one counts.
    pub(crate) fn resolve(&self, value: Result<T, Error>) {
        let _guard = self.guard();
        let _ = self.shared.value.set(value.map(Arc::new));
        self.shared.ready.notify_all();
        self.shared.ready_async.notify_waiters();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Acquire)
    }

    /// Waits for the result.
    pub fn get(&self) -> Result<Arc<T>, Error> {
        let mut guard = self.guard();
        loop {
            if let Some(value) = self.shared.value.get() {
                return value.clone();
            }
            guard = self.shared.ready.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for the result, at most so long.
    pub fn get_timeout(&self, timeout: Duration) -> Result<Arc<T>, Error> {
        let deadline = Instant::now() + timeout;
        let mut guard = self.guard();
        loop {
            if let Some(value) = self.shared.value.get() {
                return value.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { what: self.shared.task.clone(), after: timeout });
            }
            let waited = self.shared.ready.wait_timeout(guard, left);
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether the result is there.
    pub fn is_ready(&self) -> bool {
        self.shared.value.get().is_some()
    }

    /// Cancels the task: at once while it is queued. One that runs on a thread may ask
    /// [`cancelled`] and stop by itself; its result, if it gives one, is discarded.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
        self.resolve(Err(Error::Cancelled { task: self.shared.task.clone() }));
    }

    fn guard(&self) -> MutexGuard<'_, ()> {
        self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Send + Sync + 'static> IntoFuture for ObjectRef<T> {
    type Output = Result<Arc<T>, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            loop {
                let notified = self.shared.ready_async.notified();
                if let Some(value) = self.shared.value.get() {
                    return value.clone();
                }
                notified.await;
            }
        })
    }
}

thread_local! {
    static CANCELLED: std::cell::RefCell<Option<Box<dyn Fn() -> bool>>> =
        const { std::cell::RefCell::new(None) };
}

/// Whether the task that runs on this thread was cancelled. Long tasks ask now and then.
pub fn cancelled() -> bool {
    CANCELLED.with_borrow(|ask| ask.as_ref().is_some_and(|ask| ask()))
}

/// Runs a body on this thread: its errors and panics become values that name the task.
pub(crate) fn run_here<T: 'static>(
    object: &ObjectRef<T>,
    body: Box<dyn FnOnce() -> Result<T, BoxError> + Send>,
) -> Result<T, Error> {
    let ask = object.clone();
    CANCELLED.with_borrow_mut(|slot| *slot = Some(Box::new(move || ask.is_cancelled())));
    let result = panics::catch(&object.shared.task, body);
    CANCELLED.with_borrow_mut(|slot| *slot = None);
    result
}
