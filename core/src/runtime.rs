//! The runtime: hands events to the scheduler, and performs what it commands.

mod lease;
mod request;
mod steps;

pub(crate) use lease::Lease;
pub(crate) use request::{Request, Turn};

use crate::actor::{ActorRef, WeakActor};
use crate::job::Job;
use crate::nested::{self, Nested};
use crate::object::when_ready;
use crate::process::ProcessHost;
use crate::scheduler::{Amounts, Command, Event, Grant, Id, IdMap, NodeId, Scheduler};
use crate::status::Seen;
use crate::task::Task;
use crate::{Error, Node, NodeInfo, ObjectRef, Resources, current, nodes, timeline};
use request::Waiting;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

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
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
    /// What the program holds has it; what works for the program has not.
    farewell: Option<Arc<Farewell>>,
}

/// The program has let go of its runtime, so it is about to end, and its other copies with it.
struct Farewell;

impl Drop for Farewell {
    fn drop(&mut self) {
        nodes::say_goodbye();
    }
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (total, free, waiting) = self.with_state(|state| {
            let scheduler = &state.scheduler;
            (scheduler.total(), scheduler.free(), scheduler.waiting())
        });
        f.debug_struct("Runtime")
            .field("total", &total)
            .field("free", &free)
            .field("waiting", &waiting)
            .finish()
    }
}

struct Inner {
    /// New requests. Who submits does not wait for the state: whoever has it takes them in.
    inbox: Mutex<Vec<(Event, Id, Waiting)>>,
    state: Mutex<State>,
    next_id: AtomicU64,
    /// Typed actors by type and name.
    actors: Mutex<HashMap<(String, String), WeakActor>>,
    host: Option<ProcessHost>,
    /// In a worker process, what has its driver run tasks in processes.
    nested: Option<Arc<Nested>>,
    seen: Seen,
}

#[derive(Default)]
struct State {
    scheduler: Scheduler,
    /// What to do with the grants of those who wait.
    starts: IdMap<Waiting>,
    /// Who is blocked until its CPUs are back.
    resumes: IdMap<SyncSender<()>>,
    /// Where each bundle of a placement group is.
    bundles: HashMap<NodeId, Grant>,
    bundles_so_far: u64,
    /// The names of the nodes that have joined.
    nodes: BTreeMap<NodeId, String>,
    /// Kept for its memory.
    commands: Vec<Command>,
}

/// A runtime for as long as others hold it.
#[derive(Clone)]
pub(crate) struct WeakRuntime(Weak<Inner>);

impl WeakRuntime {
    pub(crate) fn upgrade(&self) -> Option<Runtime> {
        self.0.upgrade().map(|inner| Runtime { inner, farewell: None })
    }
}

impl Runtime {
    /// A runtime over these resources that runs everything on threads of this process: for
    /// libraries and tests. Programs get theirs, which can start processes too, from
    /// [`init`](crate::init).
    pub fn local(total: Resources) -> Result<Self, Error> {
        crate::init::refuse_uninitialised_worker();
        Ok(Self::new(&total, None, None))
    }

    /// The runtime of the task, the actor or the group's member that runs on this thread: the
    /// driver's; or that of the worker process, which has its driver run what is placed in
    /// processes, and runs threads on its own CPUs. What is known of other machines is the
    /// driver's only.
    ///
    /// Errors where no such thing runs.
    ///
    /// ```
    /// use mobula_core::{Error, Resources, Runtime, Task};
    ///
    /// let runtime = Runtime::local(Resources::cpus(1.0))?;
    /// let outer = runtime.submit(Task::new("outer", || {
    ///     let inner = Runtime::current()?.submit(Task::new("inner", || Ok::<_, String>(6 * 7)));
    ///     Ok::<_, Error>(*inner.get()?)
    /// }));
    /// assert_eq!(*outer.get()?, 42);
    /// # Ok::<(), Error>(())
    /// ```
    pub fn current() -> Result<Self, Error> {
        let of_task = current::with(|task| task.lease.as_ref().map(|l| l.runtime().clone()));
        let of_process = || nested::nested().map(|nested| nested.runtime().clone());
        of_task.flatten().or_else(of_process).ok_or(Error::NoCurrentRuntime)
    }

    /// The runtime of a worker process.
    pub(crate) fn in_worker(cpus: &Resources, nested: Arc<Nested>) -> Self {
        Self::new(cpus, None, Some(nested))
    }

    /// That of a driver, which can start processes.
    pub(crate) fn with_host(total: &Resources, host: ProcessHost) -> Self {
        let mut runtime = Self::new(total, Some(host), None);
        nested::set_driver(&runtime);
        runtime.farewell = Some(Arc::new(Farewell));
        runtime
    }

    fn new(total: &Resources, host: Option<ProcessHost>, nested: Option<Arc<Nested>>) -> Self {
        let inner = Inner {
            inbox: Mutex::default(),
            state: Mutex::default(),
            next_id: AtomicU64::new(1),
            actors: Mutex::default(),
            host,
            nested,
            seen: Seen::default(),
        };
        let runtime = Self { inner: Arc::new(inner), farewell: None };
        tracing::info!(node = 0, %total, "node joined");
        runtime.step(Event::NodeJoined { node: NodeId::HERE, total: total.into() });
        runtime
    }

    /// All resources of this runtime, free or taken.
    pub fn resources(&self) -> Resources {
        (&self.with_state(|state| state.scheduler.total())).into()
    }

    /// What is free now.
    pub fn free_resources(&self) -> Resources {
        (&self.with_state(|state| state.scheduler.free())).into()
    }

    /// The machines of this runtime: the driver's own, and those that have joined it.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        self.with_state(|state| {
            let machines = state.scheduler.machines();
            let info = |(node, total, free): (NodeId, &Amounts, &Amounts)| NodeInfo {
                node: Node(node),
                host: state.nodes.get(&node).cloned().unwrap_or_else(nodes::host_name),
                total: total.into(),
                free: free.into(),
            };
            machines.map(info).collect()
        })
    }

    /// Queues the task until its inputs are there and its resources are free, then runs it. What
    /// can never fit, or cannot run where it is asked to, resolves to its error at once.
    pub fn submit<T: Send + Sync + 'static>(&self, mut task: Task<T>) -> ObjectRef<T> {
        let inputs = std::mem::take(&mut task.inputs);
        let (object, promise) = ObjectRef::pending(Arc::clone(&task.name));
        let job = Job::new(self.inside(), task, promise);
        if inputs.is_empty() {
            job.enqueue();
            return object;
        }
        when_ready(inputs, move |failure| match failure {
            None => job.enqueue(),
            Some((input, error)) => job.input_failed(&input, error),
        });
        object
    }

    /// An object that is there from the start, to be passed to many tasks.
    pub fn put<T: Send + Sync + 'static>(&self, value: T) -> ObjectRef<T> {
        ObjectRef::ready("put".into(), value)
    }

    /// Ends what is queued with [`Error::Cancelled`] and stops every worker process. Threads that
    /// run cannot be ended from outside; they are left to finish.
    pub fn shutdown(&self) {
        self.step(Event::Close);
        if let Some(host) = &self.inner.host {
            nodes::say_goodbye();
            host.shutdown();
        }
        timeline::finish();
    }

    pub(crate) fn remember_actor(&self, kind: String, actor: &ActorRef) {
        let mut actors = lock(&self.inner.actors);
        actors.retain(|_, actor| actor.is_held());
        actors.insert((kind, actor.name().to_owned()), actor.downgrade());
    }

    pub(crate) fn find_actor(&self, kind: &str, name: &str) -> Option<ActorRef> {
        let key = (kind.to_owned(), name.to_owned());
        lock(&self.inner.actors).get(&key).and_then(WeakActor::upgrade)
    }

    /// What is kept for who looks at the program.
    pub(crate) fn seen(&self) -> &Seen {
        &self.inner.seen
    }

    /// For what works for the program, and may still do so when the program ends.
    pub(crate) fn inside(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), farewell: None }
    }

    pub(crate) fn downgrade(&self) -> WeakRuntime {
        WeakRuntime(Arc::downgrade(&self.inner))
    }

    /// The host of worker processes, or why there is none.
    pub(crate) fn host(&self) -> Result<&ProcessHost, Error> {
        self.inner.host.as_ref().ok_or(Error::InitMissing)
    }

    /// Whether tasks can run in processes, or why they cannot.
    pub(crate) fn check_processes(&self) -> Result<(), Error> {
        if self.inner.nested.is_some() { Ok(()) } else { self.host().map(drop) }
    }

    pub(crate) fn nested(&self) -> Option<&Arc<Nested>> {
        self.inner.nested.as_ref()
    }

    /// The id of a request to be queued.
    pub(crate) fn next_id(&self) -> Id {
        self.inner.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes what was granted a place of its own.
    pub(crate) fn open_bundle(&self, grant: &Grant) -> NodeId {
        let node = self.with_state(|state| {
            state.bundles_so_far += 1;
            let node = NodeId::bundle(state.bundles_so_far);
            state.bundles.insert(node, grant.clone());
            node
        });
        self.step(Event::NodeJoined { node, total: grant.amounts.clone() });
        node
    }

    pub(crate) fn close_bundle(&self, node: NodeId) {
        let forget = |state: &mut State| drop(state.bundles.remove(&node));
        self.step_with(Event::NodeLost { node }, forget);
    }

    /// Accounts for a machine that has joined.
    pub(crate) fn add_node(&self, node: NodeId, name: String, total: &Resources) {
        let event = Event::NodeJoined { node, total: total.into() };
        self.step_with(event, |state| drop(state.nodes.insert(node, name)));
    }

    /// Nothing is placed on this machine any more, nor on the bundles that are pieces of it.
    pub(crate) fn lose_node(&self, node: NodeId) {
        let bundles: Vec<NodeId> = self.with_state(|state| {
            state.nodes.remove(&node);
            let there = state.bundles.iter().filter(|(_, grant)| grant.node == node);
            there.map(|(bundle, _)| *bundle).collect()
        });
        self.step(Event::NodeLost { node });
        bundles.into_iter().for_each(|bundle| self.close_bundle(bundle));
    }

    /// Whether this machine is still there.
    pub(crate) fn has_node(&self, node: NodeId) -> bool {
        node == NodeId::HERE || self.with_state(|state| state.nodes.contains_key(&node))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
