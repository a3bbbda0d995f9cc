//! The runtime: accounts for resources, queues what does not fit yet, runs what does.

use crate::process::ProcessHost;
use crate::task::{Body, ObjectRef, Placement, Task, TaskOptions, run_here};
use crate::{Error, Ledger, Resources, console, panics};
use std::collections::VecDeque;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Backward passes recurse over the graph: threads that run user code get a deep stack. It is
/// address space, not memory, until it is used.
pub(crate) const STACK_BYTES: usize = 256 << 20;

/// After this, who waits for resources that others hold is told so.
const PLACEMENT_NOTE: Duration = Duration::from_secs(5);

/// Places tasks, actors and groups on this machine. Clones share one account of resources.
///
/// ```
/// use mobula_core::{Resources, Runtime, Task};
///
/// let runtime = Runtime::local(Resources::cpus(2.0))?;
/// let answer = runtime.submit(Task::new("answer", || Ok::<_, std::fmt::Error>(6 * 7)));
/// assert_eq!(*answer.get()?, 42);
/// # Ok::<(), mobula_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Runtime {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    scheduler: Mutex<Scheduler>,
    host: Option<ProcessHost>,
}

/// The queue is strictly first come, first served, so that a large request is never starved.
struct Scheduler {
    ledger: Ledger,
    waiting: VecDeque<Waiting>,
    closed: bool,
}

struct Waiting {
    resources: Resources,
    /// Whether somebody still waits for it: what was cancelled or given up blocks nobody.
    wanted: Box<dyn Fn() -> bool + Send>,
    start: Start,
}

/// What to do with the lease, or with the reason why there is none.
type Start = Box<dyn FnOnce(Result<Lease, Error>) + Send>;

impl std::fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler")
            .field("ledger", &self.ledger)
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

/// Resources taken from the ledger until dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    runtime: Runtime,
    resources: Resources,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.runtime.scheduler().ledger.give_back(&self.resources);
        self.runtime.dispatch();
    }
}

impl Runtime {
    /// A runtime over these resources that runs everything on threads of this process: for
    /// libraries and tests. Programs get theirs, which can start processes too, from
    /// [`init`](crate::init).
    pub fn local(total: Resources) -> Result<Self, Error> {
        crate::init::refuse_uninitialised_worker();
        Ok(Self::with_host(total, None))
    }

    pub(crate) fn with_host(total: Resources, host: Option<ProcessHost>) -> Self {
        let scheduler =
            Scheduler { ledger: Ledger::new(total), waiting: VecDeque::new(), closed: false };
        Self { inner: Arc::new(Inner { scheduler: Mutex::new(scheduler), host }) }
    }

    /// All resources of this runtime, free or taken.
    pub fn resources(&self) -> Resources {
        self.scheduler().ledger.total().clone()
    }

    /// What is free now.
    pub fn free_resources(&self) -> Resources {
        self.scheduler().ledger.free().clone()
    }

    /// Queues the task until its resources are free, then runs it. What can never fit, or cannot
    /// run where it is asked to, resolves to its error at once.
    pub fn submit<T: Send + Sync + 'static>(&self, task: Task<T>) -> ObjectRef<T> {
        let object = ObjectRef::pending(&task.name);
        let (resources, runtime, promise) =
            (task.options.resources.clone(), self.clone(), object.clone());
        let queued = object.clone();
        let start = move |lease| match lease {
            Ok(lease) => runtime.start(task, promise, lease),
            Err(error) => promise.resolve(Err(error)),
        };
        self.enqueue(resources, move || !queued.is_cancelled(), start);
        object
    }

    /// Ends what is queued with [`Error::Cancelled`] and stops every worker process. Threads that
    /// run cannot be ended from outside; they are left to finish.
    pub fn shutdown(&self) {
        let waiting = {
            let mut scheduler = self.scheduler();
            scheduler.closed = true;
            std::mem::take(&mut scheduler.waiting)
        };
        for entry in waiting {
            (entry.start)(Err(closed()));
        }
        if let Some(host) = &self.inner.host {
            host.shutdown();
        }
    }

    /// The host of worker processes, or why there is none.
    pub(crate) fn host(&self) -> Result<&ProcessHost, Error> {
        self.inner.host.as_ref().ok_or(Error::InitMissing)
    }

    /// Waits for resources on behalf of an actor or a group.
    pub(crate) fn lease(
        &self,
        name: &str,
        resources: &Resources,
        timeout: Duration,
    ) -> Result<Lease, Error> {
        let (sender, receiver) = sync_channel(1);
        // Lives as long as this call: who has given up must not block the queue.
        let waiting = Arc::new(());
        let still_waits = Arc::downgrade(&waiting);
        let start = move |lease| drop(sender.send(lease));
        self.enqueue(resources.clone(), move || still_waits.strong_count() > 0, start);
        let note = timeout.min(PLACEMENT_NOTE);
        let mut answer = receiver.recv_timeout(note);
        if matches!(answer, Err(RecvTimeoutError::Timeout)) && note < timeout {
            let free = self.free_resources();
            console::note(format!("{name} waits for {resources}; free now: {free}"));
            answer = receiver.recv_timeout(timeout - note);
        }
        match answer {
            Ok(lease) => lease,
            Err(RecvTimeoutError::Disconnected) => Err(closed()),
            Err(RecvTimeoutError::Timeout) => Err(Error::NotPlaced {
                name: name.to_owned(),
                asked: Box::new(resources.clone()),
                free: Box::new(self.free_resources()),
                after: timeout,
            }),
        }
    }

    /// Runs `work` on a new thread, inside a rayon pool of so many threads.
    pub(crate) fn spawn_thread(
        &self,
        name: &str,
        threads: usize,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<(), Error> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .stack_size(STACK_BYTES)
            .start_handler(|_| panics::keep_quiet_here())
            .build()
            .map_err(Error::layer)?;
        let thread = std::thread::Builder::new().name(name.to_owned());
        let spawned = thread.spawn(move || pool.install(work));
        spawned.map(drop).map_err(|source| Error::system("starting a thread", source))
    }

    fn start<T: Send + Sync + 'static>(&self, task: Task<T>, object: ObjectRef<T>, lease: Lease) {
        let (runtime, promise) = (self.clone(), object.clone());
        let threads = match task.options.placement {
            Placement::Thread => task.options.resources.threads(),
            // The thread only waits for the process.
            Placement::Process => 1,
        };
        let name = task.name.clone();
        let spawned = self.spawn_thread(&task.name.clone(), threads, move || {
            let result = panics::catch(&name, || Ok(runtime.run(task, &promise)));
            let result = result.and_then(|result| result);
            // The resources are free before the result is seen: who waits may submit the next.
            drop(lease);
            promise.resolve(result);
        });
        if let Err(error) = spawned {
            object.resolve(Err(error));
        }
    }

    fn run<T: Send + Sync + 'static>(
        &self,
        task: Task<T>,
        object: &ObjectRef<T>,
    ) -> Result<T, Error> {
        match (task.body, task.options.placement) {
            (Body::Closure(body), Placement::Thread) => run_here(object, body),
            (Body::Remote(call), Placement::Thread) => {
                run_here(object, Box::new(move || call.run_here()))
            }
            (Body::Remote(call), Placement::Process) => {
                self.run_in_process(&task.name, &task.options, object, &call)
            }
            (Body::Closure(_), Placement::Process) => Err(Error::NotRegistered {
                name: format!(
                    "{} (a closure: only #[mobula::remote] functions leave the process)",
                    task.name
                ),
                registered: crate::remote::names(),
            }),
        }
    }

    fn run_in_process<T: Send + Sync + 'static>(
        &self,
        name: &str,
        options: &TaskOptions,
        object: &ObjectRef<T>,
        call: &crate::remote::RemoteCall<T>,
    ) -> Result<T, Error> {
        let mut attempt = 0;
        loop {
            let result =
                self.host()?.run_task(name, &options.resources, call, || object.is_cancelled());
            match result {
                Err(error) if error.is_retryable() && attempt < options.max_retries => attempt += 1,
                other => return other,
            }
        }
    }

    fn enqueue(
        &self,
        resources: Resources,
        wanted: impl Fn() -> bool + Send + 'static,
        start: impl FnOnce(Result<Lease, Error>) + Send + 'static,
    ) {
        let refusal = {
            let mut scheduler = self.scheduler();
            match scheduler.ledger.check(&resources) {
                Ok(()) if scheduler.closed => Some((closed(), start)),
                Err(error) => Some((error, start)),
                Ok(()) => {
                    let (wanted, start) = (Box::new(wanted), Box::new(start));
                    scheduler.waiting.push_back(Waiting { resources, wanted, start });
                    None
                }
            }
        };
        match refusal {
            Some((error, start)) => start(Err(error)),
            None => self.dispatch(),
        }
    }

    /// Starts from the head of the queue as long as the head fits.
    fn dispatch(&self) {
        while let Some((start, resources)) = self.next_that_fits() {
            let runtime = self.clone();
            start(Ok(Lease { runtime, resources }));
        }
    }

    fn next_that_fits(&self) -> Option<(Start, Resources)> {
        let mut scheduler = self.scheduler();
        while scheduler.waiting.front().is_some_and(|head| !(head.wanted)()) {
            scheduler.waiting.pop_front();
        }
        let asked = scheduler.waiting.front()?.resources.clone();
        if !scheduler.ledger.take(&asked) {
            return None;
        }
        let head = scheduler.waiting.pop_front()?;
        Some((head.start, head.resources))
    }

    fn scheduler(&self) -> MutexGuard<'_, Scheduler> {
        self.inner.scheduler.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> Error {
    Error::Cancelled { task: "the task (the runtime is shutting down)".to_owned() }
}
