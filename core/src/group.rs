//! Groups: gangs of ranked workers that run one function together, placed all or nothing.

use crate::object::block_until_ready;
use crate::parcel::{Packed, Parcel, open_all, pack_all};
use crate::process::wire::{FromWorker, MemberSpec, Outcome, ToWorker};
use crate::process::{
    EVENTS, Environment, LogTarget, Sink, WorkerEvent, WorkerLink, check_build, child, into_result,
    lost,
};
use crate::remote::{Inputs, decode, encode};
use crate::runtime::{Lease, Request, Runtime};
use crate::task::Placement;
use crate::{Error, Node, PlacementStrategy, Resources, store, threads};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long the processes of a finished group may take to leave.
const GOODBYE: Duration = Duration::from_secs(1);

/// How a group is placed. Every default is here.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// Its name in errors and logs.
    pub name: String,
    /// Members. Default: 1.
    pub size: usize,
    /// What each member holds. Default: 1 CPU.
    pub resources: Resources,
    /// Where the members run. Default: each in a process of its own.
    pub placement: Placement,
    /// How the members are laid out over the nodes. Default: pack.
    pub strategy: PlacementStrategy,
    /// Bytes of resident memory beyond which a member's process is killed. Default: none.
    pub memory_limit: Option<u64>,
    /// How long to wait for resources that others hold. Default: 10 minutes.
    pub placement_timeout: Duration,
    /// Which incarnation this is; a restart counts it up. Default: 0.
    pub generation: u64,
    /// What [`Member::context`] gives to every member: the business of the layer that makes the
    /// group, beside the arguments that the user gives. Default: nothing.
    pub context: Bytes,
    /// Folder for `rank-<r>.log`, if the output of worker processes is to be kept. Default: none.
    pub log_dir: Option<PathBuf>,
    /// Whether what workers print is shown on the driver's stderr, behind `[rank r]`.
    /// Default: yes.
    pub show_logs: bool,
}

impl GroupOptions {
    /// The same with this context.
    pub fn with_context(mut self, context: &impl Serialize) -> Result<Self, Error> {
        self.context = encode("the context of a group", context)?;
        Ok(self)
    }

    /// So many members in processes, 1 CPU each.
    pub fn new(name: impl Into<String>, size: usize) -> Self {
        Self {
            name: name.into(),
            size,
            resources: Resources::cpus(1.0),
            placement: Placement::Process,
            strategy: PlacementStrategy::default(),
            memory_limit: None,
            placement_timeout: Duration::from_secs(600),
            generation: 0,
            context: Bytes::new(),
            log_dir: None,
            show_logs: true,
        }
    }
}

/// The program of a group: what `some_function::remote(…)` gives for a `#[remote]` function whose
/// first parameter is a [`Member`].
#[derive(Clone)]
pub struct GroupTask<T> {
    function: &'static str,
    inputs: Inputs,
    encode: Arc<dyn Fn() -> Result<Vec<Parcel>, Error> + Send + Sync>,
    decode: fn(&Parcel) -> Result<T, Error>,
}

impl<T> std::fmt::Debug for GroupTask<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupTask").field("function", &self.function).finish_non_exhaustive()
    }
}

impl<T: DeserializeOwned> GroupTask<T> {
    pub(crate) fn new(
        function: &'static str,
        inputs: Inputs,
        encode: impl Fn() -> Result<Vec<Parcel>, Error> + Send + Sync + 'static,
    ) -> Self {
        let decode = |parcel: &Parcel| parcel.decode("the result of a group member");
        Self { function, inputs, encode: Arc::new(encode), decode }
    }
}

/// What a driver hears from its group.
#[derive(Debug)]
pub enum GroupEvent<T> {
    /// A member reported something, in the encoding of [`Member::report`].
    Report {
        /// Who.
        rank: usize,
        /// Decode with [`decode_report`].
        payload: Bytes,
    },
    /// A member's function returned.
    Finished {
        /// Who.
        rank: usize,
        /// Its result.
        value: T,
    },
    /// A member's function failed or panicked, or its process was lost.
    Failed {
        /// Who.
        rank: usize,
        /// How.
        error: Error,
    },
}

/// Decodes the payload of a [`GroupEvent::Report`].
pub fn decode_report<R: DeserializeOwned>(payload: &[u8]) -> Result<R, Error> {
    decode("a report", payload)
}

/// A running group. Dropping it ends all of its members.
#[derive(Debug)]
pub struct Group<T> {
    name: String,
    events: Receiver<(usize, WorkerEvent)>,
    members: Vec<Port>,
    gathering: HashMap<String, Vec<Option<Bytes>>>,
    decode: fn(&Parcel) -> Result<T, Error>,
    /// Keep the arguments where the members find them.
    _args: Vec<Parcel>,
    _leases: Vec<store::Lease>,
    lease: Arc<Lease>,
    /// The CPUs of the task that watches over the group.
    _lent: Option<crate::current::Lent>,
}

/// The driver's way to one member.
#[derive(Debug)]
struct Port {
    route: Route,
    done: bool,
}

#[derive(Debug)]
enum Route {
    Thread(Arc<Inbox>),
    Process(WorkerLink),
}

impl Route {
    fn send(&self, frame: ToWorker) {
        match (self, frame) {
            (Self::Process(link), frame) => drop(link.send(frame)),
            (Self::Thread(inbox), ToWorker::Gathered { key, values }) => {
                inbox.gathered(key, values)
            }
            (Self::Thread(inbox), ToWorker::Told { message }) => inbox.told(message),
            (Self::Thread(inbox), ToWorker::Stop) => inbox.stop(),
            (Self::Thread(inbox), ToWorker::Shutdown) => inbox.close(),
            (Self::Thread(_), _) => {}
        }
    }
}

impl Runtime {
    /// Starts a group, all members or none. Waits for its arguments and its resources; errors at once when they can
    /// never be had, or when processes are asked for in a program without `init()`.
    pub fn group<T>(&self, options: &GroupOptions, task: &GroupTask<T>) -> Result<Group<T>, Error> {
        block_until_ready(&task.inputs.0);
        let args = (task.encode)()?;
        args.iter().filter(|parcel| parcel.is_gone()).try_for_each(Parcel::bring)?;
        if options.placement == Placement::Process {
            self.host()?;
        }
        // A task that watches over a group needs no CPU of its own, and the group may need it.
        let lent = crate::current::lend();
        let lease = self.lease(options.request(), options.placement_timeout)?;
        let (sender, events) = sync_channel(EVENTS);
        let mut group = Group {
            name: options.name.clone(),
            events,
            members: Vec::with_capacity(options.size),
            gathering: HashMap::new(),
            decode: task.decode,
            _args: args.clone(),
            _leases: Vec::new(),
            lease,
            _lent: lent,
        };
        // An error half-way drops the group, which ends the members that have started.
        for rank in 0..options.size {
            let spec = options.member(rank);
            let route = match options.placement {
                Placement::Thread => {
                    let lease = Arc::clone(&group.lease);
                    self.start_thread(spec, task.function, &args, &sender, lease)?
                }
                Placement::Process => {
                    let node = group.lease.grants[rank].node;
                    let mut far = args.iter().filter(|parcel| !parcel.is_at_hand(node));
                    far.try_for_each(Parcel::bring)?;
                    let (packed, kept) = pack_all(&args, node)?;
                    group._leases.extend(kept);
                    let events = sender.clone();
                    self.start_process(options, spec, task.function, packed, events, &group.lease)?
                }
            };
            group.members.push(Port { route, done: false });
        }
        Ok(group)
    }

    fn start_thread(
        &self,
        spec: MemberSpec,
        function: &'static str,
        args: &[Parcel],
        events: &SyncSender<(usize, WorkerEvent)>,
        lease: Arc<Lease>,
    ) -> Result<Route, Error> {
        let (inbox, args, rank) = (Arc::new(Inbox::default()), args.to_vec(), spec.rank);
        let threads = spec.threads;
        let (events, reports, port) = (events.clone(), events.clone(), Arc::clone(&inbox));
        let send = move |frame| {
            let sent = reports.send((rank, WorkerEvent::Frame(frame)));
            sent.map_err(|_| lost("the driver", "it dropped the group".to_owned()))
        };
        threads::run(threads, move || {
            let member = Member::new(spec, Box::new(send), Arc::clone(&port));
            let outcome = match open_all(&args) {
                Ok(args) => {
                    let (outcome, offer) = child::run(function, &args, member);
                    // Until the group has taken it, a large result stays where it is.
                    port.offers().extend(offer);
                    outcome
                }
                Err(error) => Outcome::Failed { message: error.to_string() },
            };
            let _ = events.send((rank, WorkerEvent::Frame(FromWorker::Done(outcome))));
            // A thread cannot be killed: the CPUs stay taken until the last one has ended.
            drop(lease);
        })?;
        Ok(Route::Thread(inbox))
    }

    fn start_process(
        &self,
        options: &GroupOptions,
        spec: MemberSpec,
        function: &str,
        args: Vec<Packed>,
        events: SyncSender<(usize, WorkerEvent)>,
        lease: &Lease,
    ) -> Result<Route, Error> {
        let (sender, inbox) = mpsc::channel(EVENTS);
        let log = LogTarget {
            name: format!("{} rank {}", spec.group, spec.rank),
            prefix: options.show_logs.then(|| format!("[rank {}]", spec.rank)),
            file: options.log_dir.as_ref().map(|dir| dir.join(format!("rank-{}.log", spec.rank))),
            ..LogTarget::default()
        };
        let environment = Environment::of(&lease.grants[spec.rank]);
        let environment = environment.with_memory_limit(options.memory_limit);
        let link = self.host()?.start(environment, log, Sink::channel(sender))?;
        forward(spec.rank, inbox, events)?;
        link.send(ToWorker::Run { function: function.to_owned(), args, member: spec });
        Ok(Route::Process(link))
    }
}

/// Passes a worker's events on under its rank, until the worker or the group ends.
fn forward(
    rank: usize,
    mut inbox: mpsc::Receiver<WorkerEvent>,
    events: SyncSender<(usize, WorkerEvent)>,
) -> Result<(), Error> {
    let thread = std::thread::Builder::new().name("mobula-events".to_owned());
    let pass_on = move || {
        while let Some(event) = inbox.blocking_recv() {
            if events.send((rank, event)).is_err() {
                return;
            }
        }
    };
    let spawned = thread.spawn(pass_on);
    spawned.map(drop).map_err(|source| Error::system("starting a thread", source))
}

impl GroupOptions {
    /// One bundle a member.
    fn request(&self) -> Request {
        let bundles = vec![self.resources.clone(); self.size];
        let (strategy, node) = (self.strategy, Node::for_placement(self.placement));
        Request {
            bundles,
            strategy,
            node,
            ..Request::single(&self.name.as_str().into(), &self.resources)
        }
    }

    fn member(&self, rank: usize) -> MemberSpec {
        MemberSpec {
            group: self.name.clone(),
            rank,
            world: self.size,
            generation: self.generation,
            threads: self.resources.threads(),
            context: self.context.clone(),
        }
    }
}

impl<T> Group<T> {
    /// The next event, or `None` when none came within `timeout`. Call it often: gatherings of
    /// the members advance here.
    pub fn next_event(&mut self, timeout: Duration) -> Option<GroupEvent<T>> {
        let deadline = far_deadline(timeout);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (rank, event) = self.events.recv_timeout(left).ok()?;
            if let Some(event) = self.handle(rank, event) {
                return Some(event);
            }
        }
    }

    /// Waits until every member has returned and gives their results by rank, or the first
    /// failure. Reports are dropped.
    pub fn join(mut self, timeout: Duration) -> Result<Vec<T>, Error> {
        let deadline = far_deadline(timeout);
        let mut values: Vec<Option<T>> = self.members.iter().map(|_| None).collect();
        while values.iter().any(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next_event(left) {
                Some(GroupEvent::Finished { rank, value }) => values[rank] = Some(value),
                Some(GroupEvent::Failed { error, .. }) => return Err(error),
                Some(GroupEvent::Report { .. }) => {}
                None => {
                    let what = format!("group {}", self.name);
                    return Err(Error::Timeout { what, after: timeout });
                }
            }
        }
        Ok(values.into_iter().flatten().collect())
    }

    /// Asks every member to finish soon; they see it in [`Member::stop_requested`].
    pub fn stop(&self) {
        self.members.iter().for_each(|member| member.route.send(ToWorker::Stop));
    }

    /// Sends a message to every member, such as "checkpoint now"; they find it in
    /// [`Member::next_message`], however long the computation that they are in the middle of.
    pub fn tell(&self, message: &impl Serialize) -> Result<(), Error> {
        let message = encode("a message to a group", message)?;
        let tell = |member: &Port| member.route.send(ToWorker::Told { message: message.clone() });
        self.members.iter().for_each(tell);
        Ok(())
    }

    /// Process ids of the members that are processes, by rank.
    pub fn pids(&self) -> Vec<Option<u32>> {
        let pid = |member: &Port| match &member.route {
            Route::Process(link) => link.process().map(|process| process.pid),
            Route::Thread(_) => None,
        };
        self.members.iter().map(pid).collect()
    }

    fn handle(&mut self, rank: usize, event: WorkerEvent) -> Option<GroupEvent<T>> {
        match event {
            WorkerEvent::Frame(FromWorker::Report(payload)) => {
                Some(GroupEvent::Report { rank, payload })
            }
            WorkerEvent::Frame(FromWorker::Done(outcome)) => {
                self.members[rank].done = true;
                let value = into_result(&self.who(rank), outcome);
                Some(self.ended(rank, value.and_then(|parcel| (self.decode)(&parcel))))
            }
            WorkerEvent::Frame(FromWorker::Hello { build }) => {
                check_build(&build).err().map(|error| GroupEvent::Failed { rank, error })
            }
            WorkerEvent::Frame(FromWorker::Gather { key, value }) => {
                self.gather(rank, key, value);
                None
            }
            WorkerEvent::Frame(
                FromWorker::Beat
                | FromWorker::Reply { .. }
                | FromWorker::Yielded { .. }
                | FromWorker::Returned { .. }
                | FromWorker::Doomed { .. }
                | FromWorker::Submit { .. }
                | FromWorker::CallOff { .. }
                | FromWorker::Release { .. }
                | FromWorker::Lend
                | FromWorker::Reclaim,
            ) => None,
            WorkerEvent::Ended(_) if self.members[rank].done => None,
            WorkerEvent::Ended(end) => {
                Some(self.ended(rank, Err(lost(&self.who(rank), end.reason))))
            }
        }
    }

    fn ended(&self, rank: usize, result: Result<T, Error>) -> GroupEvent<T> {
        match result {
            Ok(value) => GroupEvent::Finished { rank, value },
            Err(error) => GroupEvent::Failed { rank, error },
        }
    }

    /// Keeps a member's part; the last one completes the gathering for everybody.
    fn gather(&mut self, rank: usize, key: String, value: Bytes) {
        let size = self.members.len();
        let parts = self.gathering.entry(key.clone()).or_insert_with(|| vec![None; size]);
        parts[rank] = Some(value);
        if parts.iter().any(Option::is_none) {
            return;
        }
        let values: Vec<Bytes> =
            self.gathering.remove(&key).into_iter().flatten().flatten().collect();
        for member in &self.members {
            member.route.send(ToWorker::Gathered { key: key.clone(), values: values.clone() });
        }
    }

    fn who(&self, rank: usize) -> String {
        format!("{} rank {rank}", self.name)
    }
}

impl<T> Drop for Group<T> {
    fn drop(&mut self) {
        for member in &self.members {
            match &member.route {
                Route::Process(link) if !member.done => link.kill(),
                route => route.send(ToWorker::Shutdown),
            }
        }
        for member in &self.members {
            if let Route::Process(link) = &member.route {
                link.wait(GOODBYE);
            }
        }
    }
}

/// A time that one can count with, however long the timeout.
fn far_deadline(timeout: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + timeout.min(YEAR)
}

/// What a group's function knows of itself, and its line to the driver and the other members.
pub struct Member {
    spec: MemberSpec,
    send: Box<dyn Fn(FromWorker) -> Result<(), Error> + Send + Sync>,
    inbox: Arc<Inbox>,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Member").field(&self.spec).finish()
    }
}

impl Member {
    pub(crate) fn new(
        spec: MemberSpec,
        send: Box<dyn Fn(FromWorker) -> Result<(), Error> + Send + Sync>,
        inbox: Arc<Inbox>,
    ) -> Self {
        Self { spec, send, inbox }
    }

    /// This member, in `0..world_size()`.
    pub fn rank(&self) -> usize {
        self.spec.rank
    }

    /// All members.
    pub fn world_size(&self) -> usize {
        self.spec.world
    }

    /// Which incarnation of the group this is: 0 at first, one more after each restart.
    pub fn generation(&self) -> u64 {
        self.spec.generation
    }

    /// What the maker of the group gave to all members.
    pub fn context<C: DeserializeOwned>(&self) -> Result<C, Error> {
        decode("the context of the group", &self.spec.context)
    }

    /// The group's name.
    pub fn group(&self) -> &str {
        &self.spec.group
    }

    /// Threads that this member may compute on.
    pub fn threads(&self) -> usize {
        self.spec.threads
    }

    /// Sends a value to the driver. Waits when the driver is far behind.
    pub fn report(&self, value: &impl Serialize) -> Result<(), Error> {
        (self.send)(FromWorker::Report(encode("a report", value)?))
    }

    /// Whether the driver asked this member to finish soon.
    pub fn stop_requested(&self) -> bool {
        self.inbox.stop.load(Ordering::Acquire)
    }

    /// The oldest message of [`Group::tell`] that has not been taken, if there is one; never waits.
    /// Errors when it is not a `T`.
    pub fn next_message<T: DeserializeOwned>(&self) -> Result<Option<T>, Error> {
        let message = self.inbox.messages().pop_front();
        message.map(|message| decode("a message to a group", &message)).transpose()
    }

    /// Gives `value` under `key` and waits for the values of all members, by rank. Each key is
    /// for one use. Errors when they are not all there within `timeout`.
    pub fn all_gather(
        &self,
        key: &str,
        value: &[u8],
        timeout: Duration,
    ) -> Result<Vec<Bytes>, Error> {
        let (key, value) = (key.to_owned(), Bytes::copy_from_slice(value));
        (self.send)(FromWorker::Gather { key: key.clone(), value })?;
        self.inbox.take(&key, timeout).ok_or_else(|| Error::Timeout {
            what: format!(
                "{} rank {} waiting for all members at {key:?}",
                self.spec.group,
                self.rank()
            ),
            after: timeout,
        })
    }
}

/// What the driver has sent to a member.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    stop: AtomicBool,
    closed: AtomicBool,
    gathered: Mutex<HashMap<String, Vec<Bytes>>>,
    messages: Mutex<VecDeque<Bytes>>,
    /// Large results of a member on a thread.
    offers: Mutex<Vec<store::Offer>>,
    arrived: Condvar,
}

impl Inbox {
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    pub(crate) fn told(&self, message: Bytes) {
        self.messages().push_back(message);
    }

    fn messages(&self) -> std::sync::MutexGuard<'_, VecDeque<Bytes>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn gathered(&self, key: String, values: Vec<Bytes>) {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner).insert(key, values);
        self.arrived.notify_all();
    }

    fn offers(&self) -> std::sync::MutexGuard<'_, Vec<store::Offer>> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody will send any more: whoever waits is woken.
    fn close(&self) {
        let _gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, Ordering::Release);
        self.stop();
        self.arrived.notify_all();
    }

    fn take(&self, key: &str, timeout: Duration) -> Option<Vec<Bytes>> {
        let gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |gathered: &mut HashMap<_, _>| {
            !gathered.contains_key(key) && !self.closed.load(Ordering::Acquire)
        };
        let waited = self.arrived.wait_timeout_while(gathered, timeout, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.remove(key)
    }
}
