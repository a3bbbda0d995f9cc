//! The driver's side of actors that workers have handles of.

use super::door::Door;
use crate::actor::lanes::Class;
use crate::actor::{ActorRef, Blueprint};
use crate::current::{self, Current};
use crate::parcel::Parcel;
use crate::remote::RemoteFn;
use crate::runtime::{Lease, Runtime};
use crate::{Error, ObjectRef, threads};
use std::sync::{Arc, OnceLock};

/// A handle that is held for a worker.
#[derive(Default)]
pub(super) struct Held {
    /// Once it is built.
    actor: OnceLock<ActorRef>,
    /// For the worker's calls.
    door: Arc<Door>,
}

impl Held {
    /// Starts an actor, and lends what its asker holds meanwhile.
    pub(super) fn start(
        self: &Arc<Self>,
        runtime: Runtime,
        plan: Blueprint,
        args: Vec<Parcel>,
        asker: Option<Arc<Lease>>,
    ) -> Result<ObjectRef<Parcel>, Error> {
        let (object, promise) = ObjectRef::pending(plan.options.name.as_str().into());
        let held = Arc::clone(self);
        let current = Current { object: None, lease: asker, call: None };
        // It waits for resources and for the constructor: not on the thread that serves the others.
        threads::run(1, move || {
            let is_wanted = || !promise.is_settled();
            let made = current::run(current, || runtime.start_actor(plan, args, &is_wanted));
            promise.resolve(made.and_then(|actor| held.hold(actor)));
        })?;
        Ok(object)
    }

    /// The actor of this type and name.
    pub(super) fn find(
        &self,
        runtime: &Runtime,
        kind: &str,
        name: &str,
    ) -> Result<ObjectRef<Parcel>, Error> {
        let none = || Error::NoSuchActor { name: name.to_owned() };
        let actor = runtime.find_actor(kind, name).ok_or_else(none)?;
        Ok(ObjectRef::ready(name.into(), self.hold(actor)?))
    }

    /// Keeps the actor, and says what a sender has to know.
    fn hold(&self, actor: ActorRef) -> Result<Parcel, Error> {
        let mailbox = actor.mailbox();
        // There is one only.
        let _ = self.actor.set(actor);
        Parcel::new("an actor's mailbox", &mailbox)
    }

    /// Sends a call, after those that have come before.
    pub(super) fn call(
        self: &Arc<Self>,
        method: &str,
        class: Class,
        args: Vec<Parcel>,
    ) -> Result<ObjectRef<Parcel>, Error> {
        let (method, actor) = (RemoteFn::find(method)?.name(), self.actor()?);
        let (object, promise) = ObjectRef::pending(method.into());
        let takes_long = args.iter().any(|parcel| actor.must_bring(parcel));
        let held = Arc::clone(self);
        self.door.pass(takes_long, move || match held.actor() {
            Ok(actor) => actor.pass_on((method, class), args, promise),
            Err(error) => promise.error(error),
        });
        Ok(object)
    }

    pub(super) fn condition(&self) -> Result<ObjectRef<Parcel>, Error> {
        let parcel = Parcel::new("an actor's condition", &self.actor()?.condition())?;
        Ok(ObjectRef::ready("an actor's condition".into(), parcel))
    }

    pub(super) fn kill(&self) {
        self.actor.get().into_iter().for_each(ActorRef::kill);
    }

    /// Its worker is gone, with so many calls under way. If nobody else waits for it, it need not do
    /// them.
    pub(super) fn let_go(&self, calls: usize) {
        self.actor
            .get()
            .into_iter()
            .filter(|actor| actor.is_held_for(calls))
            .for_each(ActorRef::kill);
    }

    fn actor(&self) -> Result<&ActorRef, Error> {
        self.actor.get().ok_or_else(|| Error::Internal("an actor was called too early".to_owned()))
    }
}
