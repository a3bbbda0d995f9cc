//! The driver's side: what one worker process has submitted.

use super::held::Held;
use super::relay::{Inlet, Relay, Reply};
use super::watched::Watched;
use super::wire::{Failure, Submission, Wanted};
use crate::object::when_ready;
use crate::parcel::{Packed, Parcel};
use crate::process::Owner;
use crate::process::wire::{FromWorker, MAX_FRAME_BYTES, ToWorker};
use crate::remote::{RemoteCall, RemoteFn};
use crate::runtime::{Lease, Runtime, WeakRuntime};
use crate::scheduler::NodeId;
use crate::stream::Intake;
use crate::task::{Placement, Task, TaskOptions};
use crate::{Error, ObjectRef, store, threads};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

static DRIVER: OnceLock<WeakRuntime> = OnceLock::new();

/// The runtime that workers of this process submit to.
pub(crate) fn set_driver(runtime: &Runtime) {
    // The first one is that of `init`.
    let _ = DRIVER.set(runtime.downgrade());
}

/// What a worker process has submitted, and not let go of.
pub(crate) struct Tickets {
    /// Not for longer than the program has it: with the last one, other machines are told goodbye.
    runtime: WeakRuntime,
    node: NodeId,
    reply: Reply,
    state: Mutex<State>,
}

/// A value on its way to the worker, and what keeps it in place.
type Pack = (Packed, Option<store::Lease>);

#[derive(Default)]
struct State {
    tickets: HashMap<u64, Ticket>,
    /// What the worker has lent while it waits.
    lent: Vec<Arc<Lease>>,
    is_closed: bool,
}

struct Ticket {
    object: ObjectRef<Parcel>,
    /// Keeps a large result where the worker finds it.
    lease: Option<store::Lease>,
    stands_for: Thing,
}

/// What a ticket stands for, besides its result.
enum Thing {
    Nothing,
    Actor(Arc<Held>),
    /// A call of the actor under this ticket.
    CallOf(u64),
    Stream(Arc<Relay>),
    Group(Arc<Watched>),
}

impl Ticket {
    fn new(object: ObjectRef<Parcel>, stands_for: Thing) -> Self {
        Self { object, lease: None, stands_for }
    }
}

impl Tickets {
    /// For a worker on this machine. `None` where this process is no driver.
    pub(crate) fn open(
        node: NodeId,
        reply: impl Fn(ToWorker) + Send + Sync + 'static,
    ) -> Option<Arc<Self>> {
        let runtime = DRIVER.get()?.upgrade()?.downgrade();
        Some(Arc::new(Self { runtime, node, reply: Arc::new(reply), state: Mutex::default() }))
    }

    /// Takes what is for it, and gives back what is not.
    pub(crate) fn take(
        self: &Arc<Self>,
        frame: FromWorker,
        owner: Option<&dyn Owner>,
    ) -> Option<FromWorker> {
        match frame {
            FromWorker::Submit { ticket, submission } => self.submit(ticket, *submission, owner),
            FromWorker::CallOff { ticket } => self.call_off(ticket),
            FromWorker::Release { ticket } => self.release(ticket),
            FromWorker::Grant { ticket, below } => {
                self.relay(ticket).into_iter().for_each(|relay| relay.grant(below));
            }
            FromWorker::Mapped { ticket, below } => {
                self.relay(ticket).into_iter().for_each(|relay| relay.mapped(below));
            }
            FromWorker::Lend => self.lend(owner),
            FromWorker::Reclaim => self.reclaim(),
            other => return Some(other),
        }
        None
    }

    /// The worker is gone: nobody wants what it has submitted.
    pub(crate) fn close(&self) {
        let (tickets, lent) = {
            let mut state = self.state();
            state.is_closed = true;
            (std::mem::take(&mut state.tickets), std::mem::take(&mut state.lent))
        };
        for (number, ticket) in &tickets {
            if let Thing::Group(watched) = &ticket.stands_for {
                watched.let_go();
            }
            if let Thing::Actor(held) = &ticket.stands_for {
                let is_under_way = |other: &&Ticket| {
                    matches!(other.stands_for, Thing::CallOf(actor) if actor == *number)
                        && !other.object.is_ready()
                };
                held.let_go(tickets.values().filter(is_under_way).count());
            }
        }
        tickets.values().for_each(|ticket| ticket.object.cancel());
        drop(lent);
    }

    fn submit(self: &Arc<Self>, ticket: u64, submission: Submission, owner: Option<&dyn Owner>) {
        let parent = submission.by.and_then(|call| owner?.object_of(call));
        let begun = self.begin(ticket, submission, owner);
        let begun = begun.unwrap_or_else(|error| {
            Ticket::new(ObjectRef::failed("nested".into(), error), Thing::Nothing)
        });
        let object = begun.object.clone();
        if let Some(parent) = parent {
            parent.adopt(Arc::downgrade(&object.object()));
        }
        {
            let mut state = self.state();
            if state.is_closed {
                return object.cancel();
            }
            state.tickets.insert(ticket, begun);
        }
        let (tickets, relay) = (Arc::clone(self), self.relay(ticket));
        when_ready(vec![object.object()], move |_| match relay {
            None => tickets.answer(ticket, &object),
            Some(relay) => relay.at_the_end(move || tickets.answer(ticket, &object)),
        });
    }

    /// Sets about what is wanted.
    fn begin(
        &self,
        ticket: u64,
        submission: Submission,
        owner: Option<&dyn Owner>,
    ) -> Result<Ticket, Error> {
        let Submission { by, name, args, wanted } = submission;
        let runtime = self.runtime.upgrade().ok_or(Error::NoCurrentRuntime)?;
        let args = self.arguments(&name, args)?;
        let held = Arc::new(Held::default());
        Ok(match wanted {
            Wanted::Task { function, options } => {
                let task = task(name, RemoteCall::raw(known(&function)?, args), options);
                Ticket::new(runtime.submit(task), Thing::Nothing)
            }
            Wanted::Stream { function, options, granted } => {
                let relay = Relay::new(ticket, granted, self.node, Arc::clone(&self.reply));
                let values: Option<Arc<dyn Intake>> = Some(Arc::new(Inlet(Arc::clone(&relay))));
                let call = RemoteCall { values, ..RemoteCall::raw(known(&function)?, args) };
                let object = runtime.submit(task(name, call, options));
                relay.set_object(&object.object());
                Ticket::new(object, Thing::Stream(relay))
            }
            Wanted::Actor(plan) => {
                let asker = by.and_then(|_| owner?.lease());
                let object = held.start(runtime, *plan, args, asker)?;
                Ticket::new(object, Thing::Actor(held))
            }
            Wanted::Named { kind } => {
                let object = held.find(&runtime, &kind, &name)?;
                Ticket::new(object, Thing::Actor(held))
            }
            Wanted::Call { actor, method, class } => {
                let object = self.actor(actor)?.call(&method, class, args)?;
                Ticket::new(object, Thing::CallOf(actor))
            }
            Wanted::Condition { actor } => {
                Ticket::new(self.actor(actor)?.condition()?, Thing::Nothing)
            }
            Wanted::Group { function, options } => {
                let watched = Arc::new(Watched::default());
                let object = watched.start(runtime, &function, &options, args)?;
                Ticket::new(object, Thing::Group(watched))
            }
            Wanted::Ask { group, ask } => Ticket::new(self.group(group)?.ask(ask), Thing::Nothing),
        })
    }

    fn arguments(&self, name: &str, args: Vec<Packed>) -> Result<Vec<Parcel>, Error> {
        let args = args.into_iter().map(|packed| match packed {
            Packed::Held { ticket } => self.parcel(ticket),
            other => other.adopt(name),
        });
        args.collect()
    }

    fn actor(&self, ticket: u64) -> Result<Arc<Held>, Error> {
        match self.state().tickets.get(&ticket).map(|ticket| &ticket.stands_for) {
            Some(Thing::Actor(held)) => Ok(Arc::clone(held)),
            _ => Err(Error::Internal(format!("ticket {ticket} is no actor's"))),
        }
    }

    fn group(&self, ticket: u64) -> Result<Arc<Watched>, Error> {
        match self.state().tickets.get(&ticket).map(|ticket| &ticket.stands_for) {
            Some(Thing::Group(watched)) => Ok(Arc::clone(watched)),
            _ => Err(Error::Internal(format!("ticket {ticket} is no group's"))),
        }
    }

    fn call_off(&self, ticket: u64) {
        // Not under the lock, as what ends is answered at once.
        match (self.actor(ticket), self.object(ticket)) {
            (Ok(held), _) => held.kill(),
            (Err(_), Some(object)) => object.cancel(),
            (Err(_), None) => {}
        }
    }

    fn parcel(&self, ticket: u64) -> Result<Parcel, Error> {
        let value = self.object(ticket).and_then(|object| object.value());
        let gone = || Error::Internal(format!("ticket {ticket} is not held"));
        value.unwrap_or_else(|| Err(gone())).map(|parcel| (*parcel).clone())
    }

    /// Tells the worker of the end of a call.
    fn answer(self: Arc<Self>, ticket: u64, object: &ObjectRef<Parcel>) {
        let parcel = object.value().unwrap_or_else(|| Err(Error::Internal("not there".into())));
        match parcel {
            Err(error) => self.say(ticket, Err(error)),
            Ok(parcel) if parcel.is_at_hand(self.node) => {
                let packed = parcel.pack(self.node);
                self.say(ticket, packed);
            }
            // It comes from another machine: not on the thread that serves the others.
            Ok(parcel) => {
                let tickets = Arc::clone(&self);
                let fetch = move || {
                    let packed = parcel.bring().and_then(|()| parcel.pack(tickets.node));
                    tickets.say(ticket, packed);
                };
                if let Err(refused) = threads::run(1, fetch) {
                    self.say(ticket, Err(refused.into()));
                }
            }
        }
    }

    fn say(&self, ticket: u64, packed: Result<Pack, Error>) {
        let result = packed.and_then(fitting).map(|(packed, lease)| {
            if let Some(known) = self.state().tickets.get_mut(&ticket) {
                known.lease = lease;
            }
            packed
        });
        let result = result.map_err(|error| Box::new(Failure::from(&error)));
        (self.reply)(ToWorker::Resolved { ticket, result });
    }

    fn lend(&self, owner: Option<&dyn Owner>) {
        let Some(lease) = owner.and_then(Owner::lease) else { return };
        lease.lend();
        self.state().lent.push(lease);
    }

    /// Waiting for CPUs takes as long as it takes: not on the thread that serves the others.
    fn reclaim(self: &Arc<Self>) {
        let Some(lease) = self.state().lent.pop() else { return (self.reply)(ToWorker::Resume) };
        let tickets = Arc::clone(self);
        let wait = move || {
            lease.reclaim();
            drop(lease);
            (tickets.reply)(ToWorker::Resume);
        };
        if threads::run(1, wait).is_err() {
            (self.reply)(ToWorker::Resume);
        }
    }

    fn object(&self, ticket: u64) -> Option<ObjectRef<Parcel>> {
        self.state().tickets.get(&ticket).map(|ticket| ticket.object.clone())
    }

    fn relay(&self, ticket: u64) -> Option<Arc<Relay>> {
        match self.state().tickets.get(&ticket).map(|ticket| &ticket.stands_for) {
            Some(Thing::Stream(relay)) => Some(Arc::clone(relay)),
            _ => None,
        }
    }

    /// What the worker does not even wait for is not needed at all.
    fn release(&self, ticket: u64) {
        let known = self.state().tickets.remove(&ticket);
        if let Some(Thing::Group(watched)) = known.as_ref().map(|ticket| &ticket.stands_for) {
            watched.let_go();
        }
        let unwanted = known.filter(|ticket| !ticket.object.is_ready());
        unwanted.into_iter().for_each(|ticket| ticket.object.cancel());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn task(name: String, call: RemoteCall<Parcel>, options: TaskOptions) -> Task<Parcel> {
    let options = TaskOptions { placement: Placement::Process, ..options };
    Task::remote(name, call).with_options(options)
}

/// A function by its registered name.
fn known(function: &str) -> Result<&'static str, Error> {
    RemoteFn::find(function).map(RemoteFn::name)
}

/// What an actor on a thread gives has never been in a frame.
fn fitting(packed: Pack) -> Result<Pack, Error> {
    let bytes = packed.0.bytes();
    if bytes < MAX_FRAME_BYTES {
        return Ok(packed);
    }
    let message = format!("its result has {bytes} bytes, at most {MAX_FRAME_BYTES} fit");
    Err(Error::TaskFailed { task: "a call".to_owned(), message })
}
