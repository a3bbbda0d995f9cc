//! An actor in a process of its own: its calls under way, its restarts, its end.

use super::checkpoint::{Arrival, Failures, Newest, Saves};
use super::ear::Ear;
use super::handle::ActorRef;
use super::lanes::MOST_GROUPS;
use super::remote::Post;
use super::supervisor::Supervisor;
use super::{ActorOptions, gone};
use crate::parcel::{Packed, Parcel, pack_all};
use crate::process::wire::{FromWorker, Outcome, ToWorker, What};
use crate::process::{
    Begun, End, Environment, LANES, LogTarget, ProcessId, Sink, WorkerEvent, WorkerLink,
    check_build, into_result, lost,
};
use crate::remote::RemoteFn;
use crate::runtime::{Lease, Runtime};
use crate::scheduler::NodeId;
use crate::status::{ActorState, ActorStatus, Sighting};
use crate::{Error, console, store, threads, timeline, timer};
use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const _: () = assert!(2 * (MOST_GROUPS + 1) <= LANES, "each lane has its number on the page");

/// How long a constructor may take.
const BUILD_TIMEOUT: Duration = Duration::from_secs(600);

/// How often who waits for one looks whether the actor is still wanted.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(super) struct ProcessActor {
    pub(super) runtime: Runtime,
    pub(super) options: ActorOptions,
    /// How many calls of each group may run.
    limits: Vec<usize>,
    constructor: &'static str,
    args: Vec<Parcel>,
    state: Mutex<State>,
    pub(super) failures: Failures,
    /// Held by who brings saved states from another machine.
    pub(super) bringing: Mutex<()>,
}

pub(super) struct State {
    pub(super) phase: Phase,
    /// Calls that the process has, by number.
    pub(super) under_way: BTreeMap<u64, UnderWay>,
    /// Answers that wait for a saved state to be brought.
    pub(super) arrivals: VecDeque<Arrival>,
    /// What the next process is made of, if there is one.
    pub(super) newest: Newest,
    /// How many processes it has had, with the one that it has now.
    pub(super) lives: u64,
    /// A state that the process has saved is lost: so is whatever it did since, and its end is near.
    pub(super) has_lost_saved: bool,
    /// Calls that wait for a process.
    queue: VecDeque<Post>,
    last_call: u64,
    supervisor: Supervisor,
    /// Who waits for the first construction.
    first: Option<SyncSender<Result<(), Error>>>,
    /// No more calls will come.
    is_closing: bool,
    /// It is to end, whatever waits.
    is_killed: bool,
    /// Its constructor has run in the process that it has now.
    is_built: bool,
    /// All of them, in and out of the window.
    restarts: u64,
    lease: Option<Arc<Lease>>,
}

pub(super) enum Phase {
    /// A process is being started.
    Starting,
    Running(Arc<Life>),
    Dead(Error),
}

/// A call, and what keeps its arguments where the process finds them.
pub(super) struct UnderWay {
    pub(super) post: Post,
    /// The state after it, as far as it was saved.
    saved: Option<Parcel>,
    /// When it was sent, if somebody wants to know.
    sent: Option<Instant>,
    _args: Vec<store::Lease>,
}

/// One process of the actor.
pub(super) struct Life {
    link: WorkerLink,
    node: NodeId,
    /// Keep the constructor's arguments, which a panic needs again.
    _args: Vec<store::Lease>,
}

impl ProcessActor {
    pub(super) fn start(
        runtime: &Runtime,
        options: &ActorOptions,
        limits: Vec<usize>,
        (constructor, args, lease): (&'static str, Vec<Parcel>, Arc<Lease>),
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<ActorRef, Error> {
        let (first, is_built) = sync_channel(1);
        let state = State {
            phase: Phase::Starting,
            under_way: BTreeMap::new(),
            arrivals: VecDeque::new(),
            newest: Newest::default(),
            lives: 0,
            has_lost_saved: false,
            queue: VecDeque::new(),
            last_call: 0,
            supervisor: Supervisor::new(options.restart),
            first: Some(first),
            is_closing: false,
            is_killed: false,
            is_built: false,
            restarts: 0,
            lease: Some(lease),
        };
        let actor = Arc::new(Self {
            runtime: runtime.inside(),
            options: options.clone(),
            limits,
            constructor,
            args,
            state: Mutex::new(state),
            failures: Failures::default(),
            bringing: Mutex::new(()),
        });
        let seen = Arc::downgrade(&actor);
        runtime.seen().actors.add(Arc::new(move || seen.upgrade().map(|actor| actor.look())));
        // From here on its end is seen to by the handle.
        let handle = ActorRef::in_process(options, Arc::clone(&actor));
        actor.begin_life()?;
        let begun = Instant::now();
        loop {
            match is_built.recv_timeout(LOOK_AGAIN) {
                Ok(built) => return built.map(|()| handle),
                Err(RecvTimeoutError::Timeout)
                    if begun.elapsed() < BUILD_TIMEOUT && is_wanted() => {}
                Err(_) => {
                    let (what, after) = (options.name.clone(), BUILD_TIMEOUT);
                    return Err(Error::Timeout { what, after });
                }
            }
        }
    }

    /// Starts a process and has it build the actor.
    fn begin_life(self: &Arc<Self>) -> Result<(), Error> {
        let Some(lease) = self.lease()? else { return Ok(()) };
        let environment = Environment::of(&lease.grants[0]);
        let environment = environment.with_memory_limit(self.options.memory_limit);
        let name = &self.options.name;
        let log = LogTarget::new(name.clone(), format!("[{name}]"));
        self.bring_saved();
        self.bring_arguments(lease.node())?;
        if !self.is_alive() {
            return Ok(());
        }
        // To start it may take as long as the program takes to its `init()`: not locked.
        let (node, ear) = (lease.grants[0].node, Arc::new(Ear::new(Arc::clone(self))));
        let link = self.runtime.host()?.start(environment, log, Sink::listener(ear.clone()))?;
        self.let_build(link, node)?;
        // Now that it is the actor's own, even if it has ended meanwhile.
        ear.open();
        Ok(())
    }

    /// Takes a new process for its own, unless it is dead, and has it build the actor.
    fn let_build(&self, link: WorkerLink, node: NodeId) -> Result<(), Error> {
        let mut state = self.state();
        if matches!(state.phase, Phase::Dead(_)) {
            return Ok(());
        }
        let (constructor, parcels) = self.made_by(&state)?;
        let (args, kept) = pack_all(&parcels, node)?;
        let function = constructor.to_owned();
        let build = ToWorker::Call { call: 0, what: What::Build, function, args };
        link.send(ToWorker::Actor { limits: self.limits.clone(), saves: self.saves() });
        link.send(build);
        // They are not kept for longer than they are of use.
        let kept = match &state.newest.state {
            Some(_) => std::mem::replace(&mut state.newest.lease, kept),
            None => kept,
        };
        state.lives += 1;
        state.has_lost_saved = false;
        state.phase = Phase::Running(Arc::new(Life { link, node, _args: kept }));
        let failed = state.send_queued();
        drop(state);
        settle_all(failed);
        Ok(())
    }

    /// What makes the state, and of what.
    fn made_by(&self, state: &State) -> Result<(&'static str, Vec<Parcel>), Error> {
        let checkpoint = RemoteFn::find(self.constructor)?.checkpoint();
        Ok(match (checkpoint, &state.newest.state) {
            (Some(checkpoint), Some(saved)) => (checkpoint.load, vec![saved.clone()]),
            _ => (self.constructor, self.args.clone()),
        })
    }

    /// One that is not started again needs its state only after a panic.
    fn saves(&self) -> Saves {
        let are_sent = self.options.restart.max_restarts > 0;
        Saves { every: self.options.checkpoint_every, are_sent }
    }

    /// Waits for what the constructor and the waiting calls need, while nobody is held up. What is
    /// lost for good fails its call when that is sent.
    fn bring_arguments(&self, node: NodeId) -> Result<(), Error> {
        let (needed, waiting): (Vec<Parcel>, Vec<Parcel>) = {
            let state = self.state();
            let waiting = state.queue.iter().flat_map(|post| post.args.iter().cloned());
            (self.made_by(&state)?.1, waiting.collect())
        };
        let far = |parcel: &&Parcel| !parcel.is_at_hand(node);
        needed.iter().filter(far).try_for_each(Parcel::bring)?;
        waiting.iter().filter(far).for_each(|parcel| drop(parcel.bring()));
        Ok(())
    }

    /// What it lives on now.
    pub(super) fn held(&self) -> Option<Arc<Lease>> {
        self.state().lease.clone()
    }

    /// What it has to live on: somewhere else, if its machine is gone. `None` when it is to end.
    fn lease(&self) -> Result<Option<Arc<Lease>>, Error> {
        let lease = self.state().lease.clone();
        let Some(lease) = lease.filter(|lease| !self.runtime.has_node(lease.node())) else {
            return Ok(self.state().lease.clone());
        };
        // The GPUs and bundles of the lost machine are gone with it.
        drop(lease);
        drop(self.state().lease.take());
        let lease = self.runtime.lease(self.options.request(), self.options.placement_timeout)?;
        let mut state = self.state();
        if !matches!(state.phase, Phase::Dead(_)) {
            state.lease = Some(lease);
        }
        Ok(state.lease.clone())
    }

    /// The machine that it lives on, while it has a process.
    pub(super) fn node(&self) -> Option<NodeId> {
        match &self.state().phase {
            Phase::Running(life) => Some(life.node),
            _ => None,
        }
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.state().process().map(|process| process.pid)
    }

    fn look(&self) -> Sighting {
        let state = self.state();
        let status = ActorStatus {
            name: self.options.name.clone(),
            state: match state.phase {
                Phase::Dead(_) => ActorState::Dead,
                Phase::Running(_) if state.is_built => ActorState::Running,
                _ => ActorState::Starting,
            },
            restarts: state.restarts,
            failed_checkpoints: self.failures.count(),
            pending: (state.under_way.len() + state.arrivals.len() + state.queue.len()) as u64,
            pid: None,
            node: None,
        };
        Sighting { status, process: state.process() }
    }

    pub(super) fn is_alive(&self) -> bool {
        let state = self.state();
        !state.is_killed && !matches!(state.phase, Phase::Dead(_))
    }

    pub(super) fn kill(&self) {
        const REASON: &str = "it was killed by its owner";
        let is_running = {
            let mut state = self.state();
            state.is_killed = true;
            matches!(state.phase, Phase::Running(_))
        };
        if is_running {
            self.end_process(REASON);
        } else {
            // Between two processes there is nothing to wait for.
            self.die(&lost(&self.options.name, REASON.to_owned()));
        }
    }

    fn end_process(&self, reason: &str) {
        if let Phase::Running(life) = &self.state().phase {
            life.end(reason.to_owned());
        }
    }

    /// No more calls will come.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.is_closing = true;
        state.leave_if_done();
    }

    pub(super) fn post(&self, post: Post) {
        let mut state = self.state();
        if let Phase::Dead(error) = &state.phase {
            let error = error.clone();
            drop(state);
            return (post.settle)(Err(error));
        }
        state.queue.push_back(post);
        let failed = state.send_queued();
        drop(state);
        settle_all(failed);
    }

    pub(super) fn take_in(self: &Arc<Self>, event: WorkerEvent) {
        match event {
            WorkerEvent::Frame(FromWorker::Hello { build }) => {
                if let Err(error) = check_build(&build) {
                    self.end_process(&error.to_string());
                }
            }
            WorkerEvent::Frame(FromWorker::Reply { call: 0, outcome, .. }) => {
                self.built(into_result(&self.options.name, outcome).map(drop));
            }
            WorkerEvent::Frame(FromWorker::Reply { call, outcome, micros }) => {
                self.replied(call, outcome, micros);
            }
            WorkerEvent::Frame(FromWorker::Saved { call, state: Ok(packed) }) => {
                self.saved(call, packed);
            }
            WorkerEvent::Frame(FromWorker::Saved { state: Err(reason), .. }) => {
                self.failures.add(&self.options.name, &reason);
            }
            WorkerEvent::Frame(_) => {}
            WorkerEvent::Ended(end) => self.lost(&end),
        }
    }

    fn replied(self: &Arc<Self>, call: u64, outcome: Outcome, micros: u32) {
        let is_shared = matches!(outcome, Outcome::Value(Packed::Shared { .. }));
        let (under_way, process, must_wait, life) = {
            let mut state = self.state();
            if state.has_lost_saved {
                // Its end says what becomes of the call.
                return;
            }
            let process = state.process().unwrap_or_default();
            let must_wait = !state.arrivals.is_empty();
            (state.under_way.remove(&call), process, must_wait, state.lives)
        };
        let name = under_way.as_ref().map_or("nobody's", |call| call.post.method);
        let result = into_result(name, outcome);
        if let Some(under_way) = under_way {
            let result = timeline::replied(process, name, micros, result);
            self.answer((life, call), under_way, result, must_wait);
        }
        let mut state = self.state();
        if is_shared {
            state.tell(ToWorker::Adopted { call });
        }
        state.leave_if_done();
    }

    /// Gives the caller its result, after the state that was saved has become the newest one.
    fn answer(
        self: &Arc<Self>,
        (life, call): (u64, u64),
        mut under_way: UnderWay,
        result: Result<Parcel, Error>,
        must_wait: bool,
    ) {
        let saved = under_way.saved.take();
        if must_wait || matches!(saved, Some(Parcel::Far(_))) {
            return self.hold_back(Arrival { life, call, under_way, result, saved });
        }
        if let Some(saved) = saved {
            let before = std::mem::replace(&mut self.state().newest, saved.into());
            drop(before);
        }
        (under_way.post.settle)(result);
    }

    /// The state after a call, which counts from the call's reply on.
    fn saved(&self, call: u64, packed: Packed) {
        let is_shared = matches!(packed, Packed::Shared { .. });
        let saved = packed.adopt(&self.options.name);
        if let Err(error) = &saved {
            // Most likely the process is gone, and the call that it ran is lost.
            self.end_process(&format!("the state that it had saved was lost: {error}"));
        }
        let mut state = self.state();
        match (saved, state.under_way.get_mut(&call)) {
            (Ok(saved), Some(under_way)) => under_way.saved = Some(saved),
            (Ok(_), None) => {}
            (Err(_), _) => state.has_lost_saved = true,
        }
        if is_shared {
            state.tell(ToWorker::SavedAdopted { call });
        }
    }

    fn built(self: &Arc<Self>, result: Result<(), Error>) {
        let first = {
            let mut state = self.state();
            state.is_built = result.is_ok();
            timeline::actor_started(&self.options.name, state.process().map(|process| process.pid));
            state.first.take()
        };
        match (result, first) {
            (Ok(()), Some(first)) => drop(first.send(Ok(()))),
            (Ok(()), None) => {}
            (Err(error), first) => {
                self.die(&error);
                drop(first.map(|first| first.send(Err(error))));
            }
        }
        self.state().leave_if_done();
    }

    /// The process is gone: what had not begun waits for the next one, and what had begun is lost,
    /// or waits too if that was asked for.
    fn lost(self: &Arc<Self>, end: &End) {
        let reason = &end.reason;
        let (failed, next) = {
            let mut state = self.state();
            let process = state.process();
            state.tell_lost(&end.begun, process.unwrap_or_default(), reason);
            let failed = state.take_lost(&end.begun, self.options.max_task_retries);
            let is_done = state.is_killed
                || matches!(state.phase, Phase::Dead(_))
                || (state.is_closing && state.queue.is_empty() && state.arrivals.is_empty());
            let next = if is_done { None } else { state.supervisor.lost(Instant::now()) };
            if next.is_some() {
                state.phase = Phase::Starting;
                state.is_built = false;
                state.restarts += 1;
                let pid = process.map(|process| process.pid);
                timeline::actor_restarts(&self.options.name, pid, reason);
            }
            (failed, next)
        };
        let error = || lost(&self.options.name, reason.clone());
        match next {
            Some(delay) => self.restart_after(delay, reason),
            None => {
                self.die(&error());
                let first = self.state().first.take();
                drop(first.map(|first| first.send(Err(error()))));
            }
        }
        // After that, so that who hears of the loss finds the actor as it is now.
        failed.into_iter().for_each(|post| (post.settle)(Err(error())));
    }

    fn restart_after(self: &Arc<Self>, delay: Duration, reason: &str) {
        console::note(format!("{} was lost: {reason}; starting it again", self.options.name));
        let actor = Arc::clone(self);
        timer::after(delay, move || {
            // Starting a process takes milliseconds: not on the timer's thread.
            let copy = Arc::clone(&actor);
            let spawned = threads::run(1, move || {
                if let Err(error) = copy.begin_life() {
                    copy.die(&error);
                }
            });
            if let Err(refused) = spawned {
                actor.die(&refused.error);
            }
        })
        .detach();
    }

    /// Whoever waits, and whoever comes, gets the error.
    fn die(&self, error: &Error) {
        let (posts, life, newest, lease) = {
            let mut state = self.state();
            if matches!(state.phase, Phase::Dead(_)) {
                return;
            }
            timeline::actor_ended(&self.options.name, error, !state.is_closing);
            let queue = std::mem::take(&mut state.queue);
            let under_way = std::mem::take(&mut state.under_way);
            let under_way = under_way.into_values().map(|call| call.post);
            let posts: Vec<Post> = under_way.chain(queue).collect();
            let dead = Phase::Dead(gone_because(&self.options.name, error));
            let life = std::mem::replace(&mut state.phase, dead);
            (posts, life, std::mem::take(&mut state.newest), state.lease.take())
        };
        // Dropping its link kills the process.
        drop(life);
        drop(newest);
        drop(lease);
        let settle = |post: Post| (post.settle)(Err(gone_because(&self.options.name, error)));
        posts.into_iter().for_each(settle);
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Life {
    pub(super) fn end(&self, reason: String) {
        self.link.kill_because(reason);
    }
}

impl State {
    /// Sends what waits to the process, if there is one. Gives what cannot be sent, to be settled
    /// outside of the lock.
    #[must_use]
    pub(super) fn send_queued(&mut self) -> Vec<(Post, Error)> {
        let mut failed = Vec::new();
        let Phase::Running(life) = &self.phase else { return failed };
        let life = Arc::clone(life);
        while let Some(post) = self.queue.pop_front() {
            let (args, kept) = match pack_all(&post.args, life.node) {
                Ok(packed) => packed,
                Err(error) => {
                    failed.push((post, error));
                    continue;
                }
            };
            self.last_call += 1;
            let what = What::Method(post.class);
            let (call, function) = (self.last_call, post.method.to_owned());
            let frame = ToWorker::Call { call, what, function, args };
            let sent = timeline::clock();
            self.under_way.insert(call, UnderWay { post, saved: None, sent, _args: kept });
            // If it is not taken, the process is gone, and its end will say so.
            life.link.send(frame);
        }
        failed
    }

    /// What the lost process had: the failed ones; the others go back to the queue, in order.
    fn take_lost(&mut self, begun: &Begun, max_retries: u32) -> Vec<Post> {
        let calls = std::mem::take(&mut self.under_way);
        self.last_call = 0;
        self.take_back(calls, begun, max_retries)
    }

    /// The same of these calls, by number.
    pub(super) fn take_back(
        &mut self,
        calls: BTreeMap<u64, UnderWay>,
        begun: &Begun,
        max_retries: u32,
    ) -> Vec<Post> {
        let mut failed = Vec::new();
        let mut again = VecDeque::new();
        for (call, UnderWay { mut post, .. }) in calls {
            post.lost += u32::from(call <= begun.newest_in(post.class.lane()));
            if post.lost > max_retries { failed.push(post) } else { again.push_back(post) }
        }
        again.append(&mut self.queue);
        self.queue = again;
        failed
    }

    fn process(&self) -> Option<ProcessId> {
        match &self.phase {
            Phase::Running(life) => life.link.process(),
            _ => None,
        }
    }

    /// Calls that had begun when the process was lost.
    fn tell_lost(&self, begun: &Begun, process: ProcessId, reason: &str) {
        let had_begun =
            |call: &(&u64, &UnderWay)| *call.0 <= begun.newest_in(call.1.post.class.lane());
        for (_, call) in self.under_way.iter().filter(had_begun) {
            let error = lost(call.post.method, reason.to_owned());
            timeline::call_lost(process, call.post.method, call.sent, &error);
        }
    }

    fn tell(&self, frame: ToWorker) {
        if let Phase::Running(life) = &self.phase {
            life.link.send(frame);
        }
    }

    pub(super) fn leave_if_done(&mut self) {
        let is_idle =
            self.under_way.is_empty() && self.arrivals.is_empty() && self.queue.is_empty();
        if !self.is_closing || !is_idle {
            return;
        }
        self.tell(ToWorker::Shutdown);
    }
}

pub(super) fn settle_all(failed: Vec<(Post, Error)>) {
    failed.into_iter().for_each(|(post, error)| (post.settle)(Err(error)));
}

fn gone_because(name: &str, error: &Error) -> Error {
    match error {
        Error::WorkerLost { .. } => error.clone(),
        _ => gone(name),
    }
}
