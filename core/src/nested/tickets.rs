//! The driver's side: what one worker process has submitted.

use super::wire::{Failure, Submission};
use crate::object::when_ready;
use crate::parcel::{Packed, Parcel};
use crate::process::Owner;
use crate::process::wire::{FromWorker, ToWorker};
use crate::remote::{RemoteCall, RemoteFn};
use crate::runtime::{Lease, Runtime, WeakRuntime};
use crate::scheduler::NodeId;
use crate::task::{Placement, Task};
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
    reply: Box<dyn Fn(ToWorker) + Send + Sync>,
    state: Mutex<State>,
}

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
}

impl Tickets {
    /// For a worker on this machine. `None` where this process is no driver.
    pub(crate) fn open(
        node: NodeId,
        reply: impl Fn(ToWorker) + Send + Sync + 'static,
    ) -> Option<Arc<Self>> {
        let runtime = DRIVER.get()?.upgrade()?.downgrade();
        Some(Arc::new(Self { runtime, node, reply: Box::new(reply), state: Mutex::default() }))
    }

    /// Takes what is for it, and gives back what is not.
    pub(crate) fn take(
        self: &Arc<Self>,
        frame: FromWorker,
        owner: Option<&dyn Owner>,
    ) -> Option<FromWorker> {
        match frame {
            FromWorker::Submit { ticket, submission } => self.submit(ticket, *submission, owner),
            FromWorker::CallOff { ticket } => {
                let object = self.object(ticket);
                object.into_iter().for_each(|object| object.cancel());
            }
            FromWorker::Release { ticket } => drop(self.remove(ticket)),
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
        tickets.values().for_each(|ticket| ticket.object.cancel());
        drop(lent);
    }

    fn submit(self: &Arc<Self>, ticket: u64, submission: Submission, owner: Option<&dyn Owner>) {
        let parent = submission.by.and_then(|call| owner?.object_of(call));
        let runtime = self.runtime.upgrade().ok_or(Error::NoCurrentRuntime);
        let object = match runtime.and_then(|runtime| Ok((self.task(submission)?, runtime))) {
            Ok((task, runtime)) => runtime.submit(task),
            Err(error) => ObjectRef::failed("nested".into(), error),
        };
        if let Some(parent) = parent {
            parent.adopt(Arc::downgrade(&object.object()));
        }
        {
            let mut state = self.state();
            if state.is_closed {
                return object.cancel();
            }
            state.tickets.insert(ticket, Ticket { object: object.clone(), lease: None });
        }
        let tickets = Arc::clone(self);
        when_ready(vec![object.object()], move |_| tickets.answer(ticket, &object));
    }

    fn task(&self, submission: Submission) -> Result<Task<Parcel>, Error> {
        let Submission { name, function, args, mut options, .. } = submission;
        let function = RemoteFn::find(&function)?.name();
        options.placement = Placement::Process;
        let args = args.into_iter().map(|packed| match packed {
            Packed::Held { ticket } => self.parcel(ticket),
            other => other.adopt(&name),
        });
        let call = RemoteCall::raw(function, args.collect::<Result<_, _>>()?);
        Ok(Task::remote(name, call).with_options(options))
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

    fn say(&self, ticket: u64, packed: Result<(Packed, Option<store::Lease>), Error>) {
        let result = packed.map(|(packed, lease)| {
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

    fn remove(&self, ticket: u64) -> Option<Ticket> {
        self.state().tickets.remove(&ticket)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
