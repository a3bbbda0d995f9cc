//! Starting members: where they run, and the driver's way to each.

use super::member::{Inbox, Member};
use super::reform::Reform;
use super::{Group, GroupOptions, GroupTask, Notice, Phase};
use crate::object::block_until_ready;
use crate::parcel::{Parcel, open_all, pack_all};
use crate::process::wire::{FromWorker, MemberSpec, Outcome, ToWorker};
use crate::process::{EVENTS, Environment, LogTarget, Sink, WorkerEvent, WorkerLink, child, lost};
use crate::runtime::{Lease, Request, Runtime};
use crate::scheduler::{Grant, NodeId};
use crate::task::Placement;
use crate::{Error, Node, PlacementStrategy, store, threads};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long the processes of a finished group, or of members that are replaced, may take to leave.
const GOODBYE: Duration = Duration::from_secs(1);

/// What a member holds: a grant of a lease.
#[derive(Clone, Debug)]
pub(super) struct Place {
    lease: Arc<Lease>,
    at: usize,
}

impl Place {
    /// One for each grant.
    fn all(lease: &Arc<Lease>) -> impl Iterator<Item = Self> {
        (0..lease.grants.len()).map(|at| Self { lease: Arc::clone(lease), at })
    }

    fn grant(&self) -> &Grant {
        &self.lease.grants[self.at]
    }
}

/// New places of members whose machine is gone.
pub(super) type Placed = Vec<(usize, Place)>;

/// The driver's way to one member.
#[derive(Debug)]
pub(super) struct Port {
    route: Route,
    /// The generation in which it was given its process.
    process: u64,
    state: PortState,
    place: Option<Place>,
    /// Keep the arguments where the member finds them.
    _args: Vec<store::Lease>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PortState {
    Running,
    /// Its function has ended, or its process has.
    Done,
    /// Its process is to end, and another one takes its place.
    Doomed,
}

#[derive(Debug)]
enum Route {
    Thread(Arc<Inbox>),
    Process(WorkerLink),
}

impl Port {
    pub(super) fn send(&self, frame: ToWorker) {
        match (&self.route, frame) {
            (Route::Process(link), frame) => drop(link.send(frame)),
            (Route::Thread(inbox), ToWorker::Gathered { key, values }) => {
                inbox.gathered(key, values)
            }
            (Route::Thread(inbox), ToWorker::Told { message }) => inbox.told(message),
            (Route::Thread(inbox), ToWorker::Stop) => inbox.stop(),
            (Route::Thread(inbox), ToWorker::Shutdown) => inbox.close(),
            (Route::Thread(_), _) => {}
        }
    }

    pub(super) fn pid(&self) -> Option<u32> {
        match &self.route {
            Route::Process(link) => link.process().map(|process| process.pid),
            Route::Thread(_) => None,
        }
    }

    /// Whether this is still the member's process.
    pub(super) fn is(&self, process: u64) -> bool {
        self.process == process && self.state != PortState::Doomed
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == PortState::Done
    }

    pub(super) fn set_done(&mut self) {
        self.state = PortState::Done;
    }

    /// Another process takes its place.
    pub(super) fn doom(&mut self) {
        self.state = PortState::Doomed;
        if let Route::Process(link) = &self.route {
            link.kill();
        }
    }

    /// Has it take part in a new generation, where it is.
    pub(super) fn go_on(&mut self, member: MemberSpec) {
        self.state = PortState::Running;
        self.send(ToWorker::Reformed { member });
    }

    fn end(&self) {
        match &self.route {
            Route::Process(link) if self.state != PortState::Done => link.kill(),
            _ => self.send(ToWorker::Shutdown),
        }
    }

    fn wait(&self, timeout: Duration) {
        if let Route::Process(link) = &self.route {
            link.wait(timeout);
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
        let lease = self.lease(options.request(options.size), options.placement_timeout)?;
        let (notify, notices) = sync_channel(EVENTS);
        let (on_loss, restart) = (options.on_loss, options.restart);
        let mut group = Group {
            runtime: self.inside(),
            options: options.clone(),
            task: task.clone(),
            args,
            notices,
            notify,
            members: Vec::with_capacity(options.size),
            gathering: HashMap::new(),
            reform: Reform::new(on_loss, restart, options.generation, options.size),
            phase: Phase::Running,
            cause: None,
            is_stopping: false,
            _lent: lent,
        };
        // An error half-way drops the group, which ends the members that have started.
        for (rank, place) in Place::all(&lease).enumerate() {
            let port = group.start(rank, place)?;
            group.members.push(port);
        }
        Ok(group)
    }
}

impl GroupOptions {
    /// One bundle a member.
    fn request(&self, members: usize) -> Request {
        let bundles = vec![self.resources.clone(); members];
        let (strategy, node) = (self.strategy, Node::for_placement(self.placement));
        Request {
            bundles,
            strategy,
            node,
            ..Request::single(&self.name.as_str().into(), &self.resources)
        }
    }
}

impl<T> Group<T> {
    /// Who the member is in the newest generation.
    pub(super) fn spec(&self, rank: usize) -> MemberSpec {
        MemberSpec {
            group: self.options.name.clone(),
            rank,
            world: self.options.size,
            generation: self.reform.generation(),
            born: self.reform.born().to_vec(),
            threads: self.options.resources.threads(),
            context: self.options.context.clone(),
        }
    }

    /// Whether the machine of a lost member is gone, and no other one will do for it alone.
    pub(super) fn must_move(&self) -> bool {
        use PlacementStrategy::{StrictPack, StrictSpread};
        matches!(self.options.strategy, StrictPack | StrictSpread)
            && self.members.iter().any(|port| self.is_homeless(port))
    }

    fn is_homeless(&self, port: &Port) -> bool {
        port.place.as_ref().is_none_or(|place| !self.runtime.has_node(place.grant().node))
    }

    /// Finds room for the new members, if their old one is gone with its machine, and brings the
    /// arguments there; in the background, since both may take long.
    pub(super) fn find_room(&mut self, replaced: &[usize]) -> Result<(), Error> {
        let is_homeless = |rank: &&usize| self.is_homeless(&self.members[**rank]);
        let mut homeless: Vec<usize> = replaced.iter().filter(is_homeless).copied().collect();
        if !homeless.is_empty() && replaced.len() == self.members.len() {
            // All of them anew: laid out as at first.
            homeless = replaced.to_vec();
        }
        homeless.iter().for_each(|rank| self.members[*rank].place = None);
        let nodes: Vec<NodeId> = replaced
            .iter()
            .filter_map(|rank| self.members[*rank].place.as_ref())
            .map(|place| place.grant().node)
            .collect();
        let (runtime, args, notify) =
            (self.runtime.clone(), self.args.clone(), self.notify.clone());
        let (request, patience) =
            (self.options.request(homeless.len()), self.options.placement_timeout);
        let find = move || {
            let lease = match homeless.is_empty() {
                true => None,
                false => Some(runtime.lease(request, patience)?),
            };
            let places = lease.iter().flat_map(Place::all);
            let placed: Placed = homeless.into_iter().zip(places).collect();
            let new = placed.iter().map(|(_, place)| place.grant().node);
            nodes.into_iter().chain(new).try_for_each(|node| bring(&args, node))?;
            Ok(placed)
        };
        Ok(threads::run(1, move || drop(notify.send(Notice::Placed(find()))))?)
    }

    /// Starts the new processes of these members.
    pub(super) fn begin(&mut self, replaced: &[usize], placed: Placed) -> Result<(), Error> {
        for (rank, place) in placed {
            self.members[rank].place = Some(place);
        }
        let deadline = Instant::now() + GOODBYE;
        for rank in replaced {
            // What they hold of a GPU is to be free first.
            self.members[*rank].wait(deadline.saturating_duration_since(Instant::now()));
            let homeless = || Error::Internal(format!("rank {rank} has no place"));
            let place = self.members[*rank].place.take().ok_or_else(homeless)?;
            self.members[*rank] = self.start(*rank, place)?;
        }
        Ok(())
    }

    fn start(&self, rank: usize, place: Place) -> Result<Port, Error> {
        let spec = self.spec(rank);
        let process = spec.generation;
        let (route, args) = match self.options.placement {
            Placement::Thread => (self.start_thread(spec, &place)?, Vec::new()),
            Placement::Process => self.start_process(spec, place.grant())?,
        };
        let place = Some(place);
        Ok(Port { route, process, state: PortState::Running, place, _args: args })
    }

    fn start_thread(&self, spec: MemberSpec, place: &Place) -> Result<Route, Error> {
        let (inbox, args, function) =
            (Arc::new(Inbox::default()), self.args.clone(), self.task.function);
        let (rank, generation, threads) = (spec.rank, spec.generation, spec.threads);
        let (port, lease) = (Arc::clone(&inbox), Arc::clone(&place.lease));
        let notify = self.notify.clone();
        let send = move |frame| {
            let event = WorkerEvent::Frame(frame);
            let sent = notify.send(Notice::Member { rank, process: generation, event });
            sent.map_err(|_| lost("the driver", "it dropped the group".to_owned()))
        };
        let line: super::member::Line = Arc::new(send);
        threads::run(threads, move || {
            let member = Member::new(spec, Arc::clone(&line), Arc::clone(&port));
            let outcome = match open_all(&args) {
                Ok(args) => {
                    let (outcome, offer) = child::run(function, &args, member);
                    // Until the group has taken it, a large result stays where it is.
                    port.offers().extend(offer);
                    outcome
                }
                Err(error) => Outcome::Failed { message: error.to_string() },
            };
            let _ = line(FromWorker::Done { generation, outcome });
            // A thread cannot be killed: the CPUs stay taken until the last one has ended.
            drop(lease);
        })?;
        Ok(Route::Thread(inbox))
    }

    fn start_process(
        &self,
        spec: MemberSpec,
        grant: &Grant,
    ) -> Result<(Route, Vec<store::Lease>), Error> {
        let (sender, inbox) = mpsc::channel(EVENTS);
        let (options, rank, process) = (&self.options, spec.rank, spec.generation);
        bring(&self.args, grant.node)?;
        let (args, kept) = pack_all(&self.args, grant.node)?;
        let log = LogTarget {
            name: format!("{} rank {rank}", spec.group),
            prefix: options.show_logs.then(|| format!("[rank {rank}]")),
            file: options.log_dir.as_ref().map(|dir| dir.join(format!("rank-{rank}.log"))),
            ..LogTarget::default()
        };
        let environment = Environment::of(grant).with_memory_limit(options.memory_limit);
        let link = self.runtime.host()?.start(environment, log, Sink::channel(sender))?;
        forward(rank, process, inbox, self.notify.clone())?;
        link.send(ToWorker::Run { function: self.task.function.to_owned(), args, member: spec });
        Ok((Route::Process(link), kept))
    }
}

impl<T> Drop for Group<T> {
    fn drop(&mut self) {
        self.members.iter().for_each(Port::end);
        self.members.iter().for_each(|member| member.wait(GOODBYE));
    }
}

/// Waits until the arguments can be packed for this machine.
fn bring(args: &[Parcel], node: NodeId) -> Result<(), Error> {
    args.iter().filter(|parcel| !parcel.is_at_hand(node)).try_for_each(Parcel::bring)
}

/// Passes a worker's events on as those of the member, until the worker or the group ends.
fn forward(
    rank: usize,
    process: u64,
    mut inbox: mpsc::Receiver<WorkerEvent>,
    notify: SyncSender<Notice>,
) -> Result<(), Error> {
    let thread = std::thread::Builder::new().name("mobula-events".to_owned());
    let pass_on = move || {
        while let Some(event) = inbox.blocking_recv() {
            if notify.send(Notice::Member { rank, process, event }).is_err() {
                return;
            }
        }
    };
    let spawned = thread.spawn(pass_on);
    spawned.map(drop).map_err(|source| Error::system("starting a thread", source))
}
