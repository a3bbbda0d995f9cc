//! Worker processes that run tasks: kept warm, and kept busy.
//!
//! A worker holds the grant of the task that brought it to work. As long as tasks of the same
//! shape wait, they take their turn in it without asking for a grant of their own, and short ones
//! are sent ahead, so that the worker never waits for its driver. How many are sent ahead follows
//! from how long the function took so far: about a millisecond of work. A call that takes longer
//! than that sends back what is queued behind it.

use super::affinity::Cpus;
use super::idle::Idle;
use super::wire::{FromWorker, Outcome, ToWorker, What};
use super::{
    End, Environment, Listener, LogTarget, Owner, ProcessId, Sink, WorkerEvent, WorkerLink,
};
use super::{check_build, into_result, lost};
use crate::object::AnyObject;
use crate::parcel::{Packed, Parcel, pack_all};
use crate::runtime::{Lease, Turn};
use crate::scheduler::NodeId;
use crate::stream::{Intake, Tell};
use crate::{Error, store, threads, timeline, timer};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Microseconds of work that are sent ahead.
const AHEAD_MICROS: f64 = 1000.0;
/// Calls that may be under way to one worker.
const MOST_CALLS: usize = 128;
/// Idle workers are looked at no more often.
const SHORTEST_LOOK: Duration = Duration::from_millis(10);
/// How long the end of a process that was killed is waited for.
const GOODBYE: Duration = Duration::from_secs(1);

/// A task's call, and who hears of its end.
pub(crate) struct PoolCall {
    pub(crate) task: Arc<str>,
    pub(crate) function: &'static str,
    pub(crate) args: Vec<Parcel>,
    /// Where its values go, if it gives many.
    pub(crate) values: Option<Arc<dyn Intake>>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) memory_limit: Option<u64>,
    /// What the task gives: to be cancelled.
    pub(crate) object: Arc<dyn AnyObject>,
    pub(crate) finish: Box<dyn FnOnce(Ended) + Send>,
}

/// How a call ended.
pub(crate) enum Ended {
    Value(Parcel),
    Error(Error),
    /// It never began: it is as good as new.
    NotStarted,
}

/// Workers without work, and what is known of functions. Clones share it.
#[derive(Clone)]
pub(crate) struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    idle: Mutex<Idle<Worker>>,
    /// All of them.
    workers: Mutex<Vec<Weak<Worker>>>,
    /// The next look at how long they have idled.
    next_look: Mutex<Option<timer::Later>>,
    /// Microseconds that a call of a function takes.
    micros: Mutex<HashMap<&'static str, f64>>,
    cpus: Cpus,
}

/// A process that runs one call after the other.
pub(crate) struct Worker {
    pool: Pool,
    /// Who wants the same may have it.
    environment: Environment,
    link: OnceLock<WorkerLink>,
    state: Mutex<State>,
}

/// A call, and what keeps its arguments where the worker finds them.
struct UnderWay {
    call: PoolCall,
    /// Its time is over; the worker was told.
    is_late: bool,
    /// When it was sent, if somebody wants to know.
    sent: Option<Instant>,
    _args: Vec<store::Lease>,
    /// Watches its time.
    _limit: Option<timer::Later>,
}

#[derive(Default)]
struct State {
    /// What it works with; none while it is idle.
    lease: Option<Arc<Lease>>,
    calls: BTreeMap<u64, UnderWay>,
    last_call: u64,
    is_dead: bool,
}

impl Pool {
    pub(super) fn new(cpus: Cpus) -> Result<Self, Error> {
        let idle = Mutex::new(Idle::of_this_machine()?);
        let (workers, next_look, micros) = (Mutex::default(), Mutex::default(), Mutex::default());
        let inner = Inner { idle, workers, next_look, micros, cpus };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Runs a call whose turn has come: in the worker that it joins, or in an idle one, or in a
    /// new one.
    pub(crate) fn begin(&self, turn: Turn, call: PoolCall) {
        let lease = match turn {
            Turn::Joined(worker) => return worker.send(None, call),
            Turn::Granted(lease) => lease,
        };
        let environment = Environment::of(&lease.grants[0]).with_memory_limit(call.memory_limit);
        match self.take_idle(&environment) {
            Some(worker) => worker.begin(lease, call),
            None => self.begin_in_new(environment, lease, call),
        }
    }

    fn take_idle(&self, environment: &Environment) -> Option<Arc<Worker>> {
        lock(&self.inner.idle).take(environment)
    }

    /// Ends the idle workers that hold what a new process is to have, and waits for them to be
    /// gone, as the memory of a GPU is free only then.
    pub(super) fn make_room(&self, environment: &Environment) {
        let here = if environment.node == NodeId::HERE { environment.bound_cpus } else { 0 };
        let missing_cpus = self.inner.cpus.missing(here);
        let rivals = lock(&self.inner.idle).rivals(environment, missing_cpus);
        rivals.iter().for_each(|worker| worker.kill("others needed what it had"));
        for link in rivals.iter().filter_map(|worker| worker.link.get()) {
            link.wait(GOODBYE);
        }
    }

    /// Starting a process takes milliseconds: not on the thread that serves the others.
    fn begin_in_new(&self, environment: Environment, lease: Arc<Lease>, call: PoolCall) {
        let (pool, object) = (self.clone(), Arc::clone(&call.object));
        let spawned = threads::run(1, move || match pool.start(environment, &lease) {
            Ok(worker) => worker.begin(lease, call),
            Err(error) => {
                drop(lease);
                (call.finish)(Ended::Error(error));
            }
        });
        if let Err(refused) = spawned {
            // Before the promise is dropped, which would only say that it was cancelled.
            object.fail(refused.error.clone());
        }
    }

    fn start(&self, environment: Environment, lease: &Lease) -> Result<Arc<Worker>, Error> {
        let (pool, link, state) = (self.clone(), OnceLock::new(), Mutex::default());
        let copy = environment.clone();
        let worker = Arc::new(Worker { pool, environment: copy, link, state });
        let log = LogTarget::new("tasks".to_owned(), "[worker]".to_owned());
        let sink = Sink::listener(Arc::clone(&worker) as Arc<dyn Listener>);
        let link = lease.runtime().host()?.start(environment, log, sink)?;
        let _ = worker.link.set(link);
        let mut workers = lock(&self.inner.workers);
        workers.retain(|other| other.strong_count() > 0);
        workers.push(Arc::downgrade(&worker));
        drop(workers);
        Ok(worker)
    }

    /// All workers, wherever they are, and which of them have work.
    pub(crate) fn workers(&self) -> HashMap<ProcessId, bool> {
        let workers: Vec<Arc<Worker>> =
            lock(&self.inner.workers).iter().filter_map(Weak::upgrade).collect();
        let is_busy = |worker: &Arc<Worker>| (worker.process(), !worker.state().calls.is_empty());
        workers.iter().map(is_busy).collect()
    }

    /// Keeps a worker for later, for a while.
    fn keep(&self, worker: &Arc<Worker>) {
        let too_many = {
            let mut idle = lock(&self.inner.idle);
            idle.keep(&worker.environment, worker, Instant::now())
        };
        end_all(&too_many);
        let mut next_look = lock(&self.inner.next_look);
        if next_look.is_none() {
            *next_look = self.look_later();
        }
    }

    /// Ends those that have idled for too long.
    fn look(&self) {
        let expired = lock(&self.inner.idle).expired(Instant::now());
        end_all(&expired);
        let mut next_look = lock(&self.inner.next_look);
        *next_look = self.look_later();
    }

    fn look_later(&self) -> Option<timer::Later> {
        let delay = lock(&self.inner.idle).next_end(Instant::now())?;
        let pool = Arc::downgrade(&self.inner);
        Some(timer::after(delay.max(SHORTEST_LOOK), move || {
            if let Some(inner) = pool.upgrade() {
                Pool { inner }.look();
            }
        }))
    }

    fn forget(&self, worker: &Arc<Worker>) {
        lock(&self.inner.idle).forget(worker);
    }

    fn learn(&self, function: &'static str, micros: u32) {
        let (mut known, micros) = (lock(&self.inner.micros), f64::from(micros.max(1)));
        let average = known.entry(function).or_insert(micros);
        // Quick to notice that it got slow, slow to believe that it got fast.
        *average = if micros > *average { micros } else { 0.9 * *average + 0.1 * micros };
    }

    /// Calls of this function that are to be under way to a worker.
    fn depth(&self, function: &str) -> usize {
        let micros = lock(&self.inner.micros).get(function).copied();
        micros.map_or(1, |micros| (AHEAD_MICROS / micros) as usize).clamp(1, MOST_CALLS)
    }
}

impl Worker {
    pub(crate) fn node(&self) -> NodeId {
        self.environment.node
    }

    fn begin(self: &Arc<Self>, lease: Arc<Lease>, call: PoolCall) {
        let function = call.function;
        self.send(Some(lease), call);
        self.top_up(function);
    }

    /// Puts a call into the worker's queue, with what it is to work with if it was idle.
    fn send(self: &Arc<Self>, lease: Option<Arc<Lease>>, call: PoolCall) {
        let (args, kept) = match pack_all(&call.args, self.node()) {
            Ok(packed) => packed,
            Err(error) => {
                self.state().take(lease);
                (call.finish)(Ended::Error(error));
                return self.rest();
            }
        };
        let mut state = self.state();
        state.take(lease);
        // One that has lost its work meanwhile has no resources for this either.
        if state.is_dead || state.lease.is_none() {
            let lease = state.lease.take();
            drop(state);
            (call.finish)(Ended::NotStarted);
            return drop(lease);
        }
        state.last_call += 1;
        let number = state.last_call;
        let function = call.function.to_owned();
        let object = call.object.clone();
        let limit = call.timeout.map(|timeout| {
            let worker = Arc::downgrade(self);
            timer::after(timeout, move || call_off(&worker, number, true))
        });
        let values = call.values.clone();
        let (skip, granted) = values.as_ref().map_or((0, 0), |values| values.begin());
        let what = values.as_ref().map_or(What::Task, |_| What::Stream { skip, granted });
        timeline::sent(self.process(), &call.task);
        let sent = timeline::clock();
        let known = UnderWay { call, is_late: false, sent, _args: kept, _limit: limit };
        state.calls.insert(number, known);
        // Under the lock, so that calls arrive in the order of their numbers. If it is not taken,
        // the worker is gone, and its end will say so.
        self.tell(ToWorker::Call { call: number, what, function, args });
        drop(state);
        if let Some(values) = values {
            values.connect(granted, self.grants(number));
        }
        let worker = Arc::downgrade(self);
        object.on_cancel(Box::new(move || call_off(&worker, number, false)));
    }

    /// Tells the worker how far a call may go.
    fn grants(self: &Arc<Self>, call: u64) -> Tell {
        let worker = Arc::downgrade(self);
        Arc::new(move |below| {
            if let Some(worker) = worker.upgrade() {
                worker.tell(ToWorker::Granted { call, below });
            }
        })
    }

    fn yielded(&self, call: u64, first: u64, packed: Vec<Packed>) {
        let known = self.state().calls.get(&call).and_then(|known| known.call.values.clone());
        let below = first + packed.len() as u64;
        let has_shared = packed.iter().any(|value| matches!(value, Packed::Shared { .. }));
        // Wherever they lie, they go, if nobody wants them.
        let adopted = packed.into_iter().map(|value| value.adopt("a value of a stream"));
        match (adopted.collect::<Result<Vec<_>, _>>(), known) {
            (Ok(adopted), known) => {
                if let Some(values) = known {
                    values.take_in(first, adopted);
                }
                if has_shared {
                    self.tell(ToWorker::TakenOver { call, below });
                }
            }
            // What is missing can only come from another attempt.
            (Err(error), Some(_)) => {
                self.kill(&format!("a value could not be taken over: {error}"))
            }
            (Err(_), None) => {}
        }
    }

    fn take_in(self: &Arc<Self>, event: WorkerEvent) {
        match event {
            WorkerEvent::Frame(FromWorker::Hello { build }) => {
                if let Err(error) = check_build(&build) {
                    self.kill(&error.to_string());
                }
            }
            WorkerEvent::Frame(FromWorker::Reply { call: number, micros, outcome }) => {
                let is_shared = matches!(outcome, Outcome::Value(Packed::Shared { .. }));
                let known = self.state().calls.remove(&number);
                let Some(UnderWay { call, .. }) = known else {
                    // Wherever it lies, it goes.
                    drop(into_result("nobody's task", outcome));
                    self.tell(ToWorker::Adopted { call: number });
                    return self.rest();
                };
                let function = call.function;
                self.pool.learn(function, micros);
                let result = into_result(&call.task, outcome);
                (call.finish)(
                    match timeline::replied(self.process(), &call.task, micros, result) {
                        Ok(value) => Ended::Value(value),
                        Err(error) => Ended::Error(error),
                    },
                );
                if is_shared {
                    self.tell(ToWorker::Adopted { call: number });
                }
                self.top_up(function);
            }
            WorkerEvent::Frame(FromWorker::Yielded { call, first, values }) => {
                self.yielded(call, first, values);
            }
            WorkerEvent::Frame(FromWorker::Returned { calls }) => self.returned(&calls),
            WorkerEvent::Frame(FromWorker::Doomed { .. }) => self.kill("its task was called off"),
            WorkerEvent::Frame(_) => {}
            WorkerEvent::Ended(end) => self.ended(&end),
        }
    }

    /// Sends more calls ahead when few are left, and rests when there are none.
    fn top_up(self: &Arc<Self>, function: &str) {
        let depth = self.pool.depth(function);
        let (lease, under_way) = {
            let state = self.state();
            (state.lease.clone(), state.calls.len())
        };
        let Some(lease) = lease else { return };
        if under_way <= depth / 2 {
            lease.share(self, depth - under_way);
        }
        drop(lease);
        self.rest();
    }

    /// Gives its resources back when it has nothing to do.
    fn rest(self: &Arc<Self>) {
        let lease = {
            let mut state = self.state();
            if !state.calls.is_empty() || state.is_dead {
                return;
            }
            state.lease.take()
        };
        if lease.is_some() {
            // Before the resources: who gets them next finds a warm worker.
            self.pool.keep(self);
        }
        drop(lease);
    }

    /// Calls that were stuck behind a long one.
    fn returned(self: &Arc<Self>, numbers: &[u64]) {
        let calls: Vec<UnderWay> = {
            let mut state = self.state();
            // The newest first: each goes to the head of the queue.
            numbers.iter().rev().filter_map(|number| state.calls.remove(number)).collect()
        };
        calls.into_iter().for_each(UnderWay::not_started);
        self.rest();
    }

    fn ended(self: &Arc<Self>, end: &End) {
        let (calls, lease) = {
            let mut state = self.state();
            state.is_dead = true;
            (std::mem::take(&mut state.calls), state.lease.take())
        };
        self.pool.forget(self);
        let newest = end.begun.newest();
        // One that ended before its first call would end before it again, and so for ever.
        let first = calls.keys().next().copied().filter(|_| newest == 0);
        for (number, known) in calls.into_iter().rev() {
            if number > newest && first != Some(number) {
                known.not_started();
            } else {
                known.lost(self.process(), &end.reason);
            }
        }
        drop(lease);
    }

    fn kill(&self, reason: &str) {
        if let Some(link) = self.link.get() {
            link.kill_because(reason.to_owned());
        }
    }

    fn process(&self) -> ProcessId {
        self.link.get().and_then(WorkerLink::process).unwrap_or_default()
    }

    fn tell(&self, frame: ToWorker) -> bool {
        self.link.get().is_some_and(|link| link.send(frame))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Listener for Worker {
    fn hear(self: Arc<Self>, event: WorkerEvent) {
        self.take_in(event);
    }
}

impl Owner for Worker {
    fn lease(&self) -> Option<Arc<Lease>> {
        self.state().lease.clone()
    }

    fn object_of(&self, call: u64) -> Option<Arc<dyn AnyObject>> {
        self.state().calls.get(&call).map(|known| Arc::clone(&known.call.object))
    }
}

impl State {
    fn take(&mut self, lease: Option<Arc<Lease>>) {
        if lease.is_some() {
            self.lease = lease;
        }
    }
}

impl UnderWay {
    fn not_started(self) {
        match self.timeout() {
            Some(error) => (self.call.finish)(Ended::Error(error)),
            None => (self.call.finish)(Ended::NotStarted),
        }
    }

    fn lost(self, process: ProcessId, reason: &str) {
        let error = self.timeout().unwrap_or_else(|| lost(&self.call.task, reason.to_owned()));
        timeline::call_lost(process, &self.call.task, self.sent, &error);
        (self.call.finish)(Ended::Error(error));
    }

    fn timeout(&self) -> Option<Error> {
        let after = self.call.timeout.filter(|_| self.is_late)?;
        Some(Error::Timeout { what: self.call.task.to_string(), after })
    }
}

/// A call is cancelled, or its time is over. Only the worker knows whether it has begun: it gives
/// back what has not, ends itself with what has, and its answer is on its way otherwise.
fn call_off(worker: &Weak<Worker>, number: u64, is_late: bool) {
    let Some(worker) = worker.upgrade() else { return };
    let mut state = worker.state();
    let Some(known) = state.calls.get_mut(&number) else { return };
    known.is_late |= is_late;
    worker.tell(ToWorker::Forget { call: number });
}

fn end_all(workers: &[Arc<Worker>]) {
    for worker in workers {
        worker.tell(ToWorker::Shutdown);
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
