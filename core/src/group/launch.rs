//! Starting members: where they run, and the driver's way to each.

use super::gang::{Gang, Notice};
use super::member::{Inbox, Member};
use super::room::bring;
use super::{GroupOptions, GroupTask, Host};
use crate::current::{self, Current};
use crate::parcel::{Parcel, open_all, pack_all};
use crate::process::wire::{FromWorker, MemberSpec, Outcome, ToWorker};
use crate::process::{EVENTS, Environment, LogTarget, Sink, WorkerEvent, WorkerLink, child, lost};
use crate::runtime::{Lease, Request, Runtime};
use crate::scheduler::NodeId;
use crate::task::Placement;
use crate::{Error, Node, store, threads};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long the processes of a finished group, or of members that are replaced, may take to leave.
pub(super) const GOODBYE: Duration = Duration::from_secs(3);

/// The driver's way to one member.
#[derive(Debug)]
pub(super) struct Port {
    route: Route,
    /// Which of the processes of the group is its own.
    process: u64,
    state: PortState,
    pub(super) lease: Option<Arc<Lease>>,
    /// Its function has ended, and others may have its CPUs until it is called again.
    has_lent: bool,
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
    /// It has yet to be started.
    None,
    Thread(Arc<Inbox>),
    Process(WorkerLink),
}

impl Port {
    /// That of a member which has a place, and nothing more.
    pub(super) fn vacant(lease: Arc<Lease>) -> Self {
        let (route, state, lease) = (Route::None, PortState::Doomed, Some(lease));
        Self { route, process: 0, state, lease, has_lent: false, _args: Vec::new() }
    }

    pub(super) fn send(&self, frame: ToWorker) {
        match (&self.route, frame) {
            (Route::Process(link), frame) => drop(link.send(frame)),
            (Route::Thread(inbox), ToWorker::Gathered { key, values }) => {
                inbox.gathered(key, values)
            }
            (Route::Thread(inbox), ToWorker::Told { message }) => inbox.told(message),
            (Route::Thread(inbox), ToWorker::Stop) => inbox.stop(),
            (Route::Thread(inbox), ToWorker::Shutdown) => inbox.close(),
            (Route::Thread(_) | Route::None, _) => {}
        }
    }

    pub(super) fn pid(&self) -> Option<u32> {
        match &self.route {
            Route::Process(link) => link.process().map(|process| process.pid),
            Route::Thread(_) | Route::None => None,
        }
    }

    /// Whether this is still the member's process.
    pub(super) fn is(&self, process: u64) -> bool {
        self.process == process && self.state != PortState::Doomed
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == PortState::Done
    }

    pub(super) fn is_doomed(&self) -> bool {
        self.state == PortState::Doomed
    }

    pub(super) fn is_here(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.node() == NodeId::HERE)
    }

    pub(super) fn set_done(&mut self) {
        self.state = PortState::Done;
    }

    /// It waits for the others, who may wait for what needs CPUs.
    pub(super) fn lend(&mut self) {
        if let (false, Some(lease)) = (self.has_lent, &self.lease) {
            lease.lend();
            self.has_lent = true;
        }
    }

    /// What it has lent, to be claimed back before it is called again.
    pub(super) fn take_lent(&mut self) -> Option<Arc<Lease>> {
        std::mem::take(&mut self.has_lent).then(|| self.lease.clone()).flatten()
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

    pub(super) fn wait_until(&self, deadline: Instant) {
        if let Route::Process(link) = &self.route {
            link.wait(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

impl Runtime {
    /// Starts the members in this process's hands, as long as they are wanted.
    pub(crate) fn gang<T>(
        &self,
        options: &GroupOptions,
        task: &GroupTask<T>,
        args: Vec<Parcel>,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Gang<T>, Error> {
        if options.placement == Placement::Process {
            self.host()?;
        }
        options.elastic.map_or(Ok(()), |elastic| elastic.check(options))?;
        let leases = self.first_room(options, is_wanted)?;
        let mut gang = Gang::new(self.inside(), options, task, args, leases.len());
        gang.members.extend(leases.iter().cloned().map(Port::vacant));
        // An error half-way drops the gang, which ends the members that have started.
        for (rank, lease) in leases.into_iter().enumerate() {
            gang.members[rank] = gang.start(rank, lease)?;
        }
        gang.sizes.begun(Instant::now());
        Ok(gang)
    }
}

impl GroupOptions {
    /// One bundle a member.
    pub(super) fn request(&self, members: usize) -> Request {
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

impl<T> Gang<T> {
    /// Who the member is in the newest generation.
    pub(super) fn spec(&self, rank: usize, lease: Option<&Lease>) -> MemberSpec {
        let node = lease.map_or(NodeId::HERE, Lease::node);
        MemberSpec {
            group: self.options.name.clone(),
            rank,
            world: self.members.len(),
            generation: self.reform.generation(),
            threads: self.options.resources.threads(),
            host: Host { node: node.0, address: crate::nodes::address_of(node) },
            context: self.options.context.clone(),
        }
    }

    pub(super) fn start(&mut self, rank: usize, lease: Arc<Lease>) -> Result<Port, Error> {
        let spec = self.spec(rank, Some(&lease));
        self.processes += 1;
        let process = self.processes;
        let (route, args) = match self.options.placement {
            Placement::Thread => (self.start_thread(process, spec, &lease)?, Vec::new()),
            Placement::Process => self.start_process(process, spec, &lease)?,
        };
        let lease = Some(lease);
        let state = PortState::Running;
        Ok(Port { route, process, state, lease, has_lent: false, _args: args })
    }

    fn start_thread(
        &self,
        process: u64,
        spec: MemberSpec,
        lease: &Arc<Lease>,
    ) -> Result<Route, Error> {
        let (inbox, args, function) =
            (Arc::new(Inbox::default()), self.args.clone(), self.task.function);
        let (generation, threads) = (spec.generation, spec.threads);
        let port = Arc::clone(&inbox);
        let current = Current { object: None, lease: Some(Arc::clone(lease)), call: None };
        let notify = self.notify.clone();
        let send = move |frame| {
            let event = WorkerEvent::Frame(frame);
            let sent = notify.send(Notice::Member { process, event });
            sent.map_err(|_| lost("the driver", "it dropped the group".to_owned()))
        };
        let line: super::member::Line = Arc::new(send);
        threads::run(threads, move || {
            let member = Member::new(spec, Arc::clone(&line), Arc::clone(&port));
            let outcome = match open_all(&args) {
                Ok(args) => {
                    // A thread cannot be killed: it holds its CPUs until it ends.
                    let run = || child::run(function, &args, member);
                    let (outcome, offer) = current::run(current, run);
                    // Until the group has taken it, a large result stays where it is.
                    port.offers().extend(offer);
                    outcome
                }
                Err(error) => Outcome::Failed { message: error.to_string() },
            };
            let _ = line(FromWorker::Done { generation, outcome });
        })?;
        Ok(Route::Thread(inbox))
    }

    fn start_process(
        &self,
        process: u64,
        spec: MemberSpec,
        lease: &Arc<Lease>,
    ) -> Result<(Route, Vec<store::Lease>), Error> {
        let (sender, inbox) = mpsc::channel(EVENTS);
        let (options, rank) = (&self.options, spec.rank);
        bring(&self.args, lease.node())?;
        let (args, kept) = pack_all(&self.args, lease.node())?;
        let log = LogTarget {
            name: format!("{} rank {rank}", spec.group),
            prefix: options.show_logs.then(|| format!("[rank {rank}]")),
            file: options.log_dir.as_ref().map(|dir| dir.join(format!("rank-{rank}.log"))),
            ..LogTarget::default()
        };
        let sink = Sink::holding(Arc::clone(lease), sender);
        let environment = Environment::of(&lease.grants[0]).with_memory_limit(options.memory_limit);
        let link = self.runtime.host()?.start(environment, log, sink)?;
        forward(process, inbox, self.notify.clone())?;
        link.send(ToWorker::Run { function: self.task.function.to_owned(), args, member: spec });
        Ok((Route::Process(link), kept))
    }
}

impl<T> Drop for Gang<T> {
    fn drop(&mut self) {
        self.is_wanted.store(false, Ordering::Release);
        self.members.iter().for_each(Port::end);
        let deadline = Instant::now() + GOODBYE;
        self.members.iter().for_each(|member| member.wait_until(deadline));
    }
}

/// Passes a worker's events on as those of that process, until the worker or the group ends.
fn forward(
    process: u64,
    mut inbox: mpsc::Receiver<WorkerEvent>,
    notify: SyncSender<Notice>,
) -> Result<(), Error> {
    let thread = std::thread::Builder::new().name("mobula-events".to_owned());
    let pass_on = move || {
        while let Some(event) = inbox.blocking_recv() {
            if notify.send(Notice::Member { process, event }).is_err() {
                return;
            }
        }
    };
    let spawned = thread.spawn(pass_on);
    spawned.map(drop).map_err(|source| Error::system("starting a thread", source))
}
