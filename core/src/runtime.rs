//! The runtime: hands events to the scheduler, and performs what it commands.

mod lease;

pub(crate) use lease::Lease;

use crate::actor::{ActorRef, WeakActor};
use crate::job::Job;
use crate::nested::{self, Nested};
use crate::object::when_ready;
use crate::process::ProcessHost;
use crate::process::pool::Worker;
use crate::scheduler::{
    Amounts, Command, Event, Grant, Id, IdMap, NodeId, PlacementStrategy, Refusal, Scheduler, Shape,
};
use crate::status::Seen;
use crate::task::Task;
use crate::{
    Bundle, Error, Node, NodeInfo, ObjectRef, Resources, console, current, nodes, timeline,
};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

/// After this, who waits for resources that others hold is told so.
const PLACEMENT_NOTE: Duration = Duration::from_secs(5);

/// How often who waits for resources looks whether they are still wanted.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

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

/// A request before its grant.
pub(crate) struct Request {
    pub(crate) name: Arc<str>,
    pub(crate) bundles: Vec<Resources>,
    pub(crate) strategy: PlacementStrategy,
    /// The only place where it may go.
    pub(crate) bundle: Option<Bundle>,
    /// The same for a whole machine.
    pub(crate) node: Option<Node>,
    /// Whether it may share the worker process, and the grant, of another one of its shape.
    pub(crate) is_pooled: bool,
    /// Whether it keeps what it gets.
    pub(crate) is_lasting: bool,
}

struct Waiting {
    request: Request,
    start: Start,
}

/// What to do with a turn, or with the reason why there is none.
pub(crate) type Start = Box<dyn FnOnce(Result<Turn, Error>) + Send>;

/// A request's turn has come.
pub(crate) enum Turn {
    /// It has resources of its own.
    Granted(Arc<Lease>),
    /// It is the next to run in a process that has them.
    Joined(Arc<Worker>),
}

impl Turn {
    /// The machine that it is to run on.
    pub(crate) fn node(&self) -> NodeId {
        match self {
            Self::Granted(lease) => lease.node(),
            Self::Joined(worker) => worker.node(),
        }
    }

    pub(crate) fn lease(self) -> Result<Arc<Lease>, Error> {
        match self {
            Self::Granted(lease) => Ok(lease),
            Self::Joined(_) => Err(Error::Internal("joined without asking to".to_owned())),
        }
    }
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

    /// Queues a request.
    pub(crate) fn enqueue(&self, id: Id, request: Request, start: Start) {
        let asked = request.bundles.iter().find(|bundle| !bundle.is_valid());
        if let Some(asked) = asked {
            return start(Err(Error::InvalidResources { asked: Box::new(asked.clone()) }));
        }
        let event = Event::Submit { id, shape: request.shape() };
        lock(&self.inner.inbox).push((event, id, Waiting { request, start }));
        self.take_in();
    }

    /// A request whose turn in a worker process did not come goes back to the head of its queue.
    pub(crate) fn enqueue_again(&self, id: Id, request: Request, start: Start) {
        let event = Event::Return { id, shape: request.shape() };
        self.step_with(event, |state| drop(state.starts.insert(id, Waiting { request, start })));
    }

    /// Takes a request back that has not had its turn. Says whether it has not.
    pub(crate) fn cancel(&self, id: Id) -> bool {
        let mut waiting = None;
        self.step_with(Event::Cancel { id }, |state| waiting = state.starts.remove(&id));
        // What it holds is dropped outside of the lock.
        waiting.is_some()
    }

    /// Waits for resources on behalf of an actor or a group.
    pub(crate) fn lease(&self, request: Request, timeout: Duration) -> Result<Arc<Lease>, Error> {
        self.lease_while(request, timeout, &|| true)
    }

    /// The same, as long as they are wanted.
    pub(crate) fn lease_while(
        &self,
        request: Request,
        timeout: Duration,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Arc<Lease>, Error> {
        let (name, resources) = (Arc::clone(&request.name), request.total());
        let (sender, receiver) = sync_channel(1);
        let start = move |turn: Result<Turn, Error>| drop(sender.send(turn.and_then(Turn::lease)));
        let (id, begun) = (self.next_id(), Instant::now());
        self.enqueue(id, request, Box::new(start));
        let mut is_noted = false;
        loop {
            let left = timeout.saturating_sub(begun.elapsed());
            match receiver.recv_timeout(left.min(LOOK_AGAIN)) {
                Ok(lease) => return lease,
                Err(RecvTimeoutError::Disconnected) => return Err(closed(&name)),
                Err(RecvTimeoutError::Timeout) if left <= LOOK_AGAIN || !is_wanted() => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if !is_noted && begun.elapsed() >= PLACEMENT_NOTE {
                is_noted = true;
                let free = self.free_resources();
                console::note(format!("{name} waits for {resources}; free now: {free}"));
            }
        }
        // It may have had its turn in this very moment; then what it got is on its way.
        if !self.cancel(id)
            && let Ok(lease) = receiver.recv()
        {
            return lease;
        }
        Err(Error::NotPlaced {
            name: name.to_string(),
            asked: Box::new(resources),
            free: Box::new(self.free_resources()),
            after: timeout,
        })
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

    fn share(&self, holder: Id, worker: &Arc<Worker>, max: usize) {
        self.take_steps(Event::Join { holder, max }, |_| {}, Some(worker));
    }

    /// Tells the scheduler what happened, and does what it says.
    fn step(&self, event: Event) {
        self.step_with(event, |_| {});
    }

    /// The same, after a change of the state under the same lock.
    fn step_with(&self, event: Event, change: impl FnOnce(&mut State)) {
        self.take_steps(event, change, None);
    }

    fn take_steps(
        &self,
        event: Event,
        change: impl FnOnce(&mut State),
        joined: Option<&Arc<Worker>>,
    ) {
        let mut steps = Vec::new();
        {
            let mut state = lock(&self.inner.state);
            // First what came first.
            self.empty_inbox(&mut state, &mut steps);
            change(&mut state);
            self.decide(&mut state, event, joined, &mut steps);
        }
        // Who submitted meanwhile relies on this look.
        self.take_in();
        steps.into_iter().for_each(Step::take);
    }

    /// Takes in what is new. If another thread has the state, it looks here when it has done.
    fn take_in(&self) {
        while !lock(&self.inner.inbox).is_empty() {
            let mut state = match self.inner.state.try_lock() {
                Ok(state) => state,
                Err(TryLockError::Poisoned(state)) => state.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            let mut steps = Vec::new();
            self.empty_inbox(&mut state, &mut steps);
            drop(state);
            if !steps.is_empty() {
                self.take_in();
            }
            steps.into_iter().for_each(Step::take);
        }
    }

    fn empty_inbox(&self, state: &mut State, steps: &mut Vec<Step>) {
        let inbox = std::mem::take(&mut *lock(&self.inner.inbox));
        for (event, id, waiting) in inbox {
            state.starts.insert(id, waiting);
            self.decide(state, event, None, steps);
        }
    }

    fn decide(
        &self,
        state: &mut State,
        event: Event,
        joined: Option<&Arc<Worker>>,
        steps: &mut Vec<Step>,
    ) {
        let mut commands = std::mem::take(&mut state.commands);
        state.scheduler.step(event, &mut commands);
        commands.drain(..).for_each(|command| self.perform(state, command, joined, steps));
        state.commands = commands;
    }

    fn perform(
        &self,
        state: &mut State,
        command: Command,
        joined: Option<&Arc<Worker>>,
        steps: &mut Vec<Step>,
    ) {
        match command {
            Command::Start { id, mut grants } => {
                grants.iter_mut().for_each(|grant| state.locate(grant));
                let runtime = self.inside();
                let lease = Arc::new(Lease::new(runtime, id, grants));
                let start = state.starts.remove(&id).map(|waiting| waiting.start);
                steps.push(Step { start, turn: Ok(Turn::Granted(lease)) });
            }
            Command::Joined { ids, .. } => {
                for waiting in ids.iter().filter_map(|id| state.starts.remove(id)) {
                    let Some(worker) = joined.cloned() else { continue };
                    let turn = Ok(Turn::Joined(worker));
                    steps.push(Step { start: Some(waiting.start), turn });
                }
            }
            Command::Resume { id } => {
                if let Some(back) = state.resumes.remove(&id) {
                    let _ = back.send(());
                }
            }
            Command::Refuse { id, refusal } => {
                let Some(waiting) = state.starts.remove(&id) else { return };
                let error = waiting.request.refused(refusal, &state.scheduler.total());
                steps.push(Step { start: Some(waiting.start), turn: Err(error) });
            }
            Command::Lost { id } => drop(state.resumes.remove(&id)),
        }
    }

    /// Looks at the state, after all that was submitted.
    fn with_state<R>(&self, look: impl FnOnce(&mut State) -> R) -> R {
        self.take_in();
        let result = look(&mut lock(&self.inner.state));
        // Who submitted meanwhile relies on this look.
        self.take_in();
        result
    }
}

impl State {
    /// A bundle is a piece of a machine, and counts its GPUs from 0: which machine, which GPUs.
    fn locate(&self, grant: &mut Grant) {
        if let Some(bundle) = self.bundles.get(&grant.node) {
            grant.node = bundle.node;
            grant.gpus.iter_mut().for_each(|gpu| *gpu = bundle.gpus[*gpu]);
        }
    }
}

/// A request whose turn has come, to be told so outside of the lock.
struct Step {
    start: Option<Start>,
    turn: Result<Turn, Error>,
}

impl Step {
    fn take(self) {
        match self.start {
            Some(start) => start(self.turn),
            // Cancelled in this moment: what it was granted goes back.
            None => drop(self.turn),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Request {
    /// One bundle, on a thread or in a process of its own.
    pub(crate) fn single(name: &Arc<str>, resources: &Resources) -> Self {
        Self {
            name: Arc::clone(name),
            bundles: vec![resources.clone()],
            strategy: PlacementStrategy::default(),
            bundle: None,
            node: None,
            is_pooled: false,
            is_lasting: false,
        }
    }

    fn shape(&self) -> Shape {
        Shape {
            bundles: self.bundles.iter().map(Amounts::from).collect(),
            strategy: self.strategy,
            node: self.bundle.map(|bundle| bundle.0).or(self.node.map(|node| node.0)),
            is_pooled: self.is_pooled,
            is_lasting: self.is_lasting,
        }
    }

    fn total(&self) -> Resources {
        let mut sum = Amounts::default();
        self.bundles.iter().for_each(|bundle| sum.add(&bundle.into()));
        (&sum).into()
    }

    fn refused(&self, refusal: Refusal, total: &Amounts) -> Error {
        match refusal {
            Refusal::Closed => closed(&self.name),
            Refusal::NodeGone if self.bundle.is_none() => {
                Error::NodeGone { name: self.name.to_string() }
            }
            Refusal::NodeGone => Error::BundleGone { name: self.name.to_string() },
            Refusal::NeverFits => {
                Error::Unplaceable { asked: Box::new(self.total()), total: Box::new(total.into()) }
            }
        }
    }
}

fn closed(name: &str) -> Error {
    Error::Cancelled { task: format!("{name} (the runtime is shutting down)") }
}
