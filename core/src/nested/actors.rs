//! The worker's side of actors that its driver has.

use super::wire::{Condition, Submission, Wanted};
use super::worker::{Nested, Up};
use crate::actor::{ActorRef, Blueprint, Mailbox, Post};
use crate::parcel::{Parcel, pack_all};
use crate::scheduler::NodeId;
use crate::value::decode;
use crate::{Error, current};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

impl Nested {
    /// Has the driver start an actor, and waits until it is built. Meanwhile the driver lends what
    /// this process works with.
    pub(crate) fn spawn(&self, plan: Blueprint, args: &[Parcel]) -> Result<ActorRef, Error> {
        let (name, mailbox) = (plan.options.name.clone(), Mailbox::of(&plan.options));
        let up = self.ask(&name, args, Wanted::Actor(Box::new(plan)))?;
        Ok(ActorRef::of_driver(&name, mailbox, up))
    }

    /// The newest actor of the driver that has this type and name.
    pub(crate) fn named(&self, kind: &str, name: &str) -> Result<ActorRef, Error> {
        let up = self.ask(name, &[], Wanted::Named { kind: kind.to_owned() })?;
        let mailbox = decode("an actor's mailbox", &up.open()?)?;
        Ok(ActorRef::of_driver(name, mailbox, up))
    }

    /// Waits for the driver's answer, which comes however long it takes, or this process ends with
    /// its driver.
    pub(super) fn ask(
        &self,
        name: &str,
        args: &[Parcel],
        wanted: Wanted,
    ) -> Result<Arc<Up>, Error> {
        let (args, kept) = pack_all(args, NodeId::HERE)?;
        let (answer, is_there) = sync_channel(1);
        let submission = Submission { by: current::call(), name: name.to_owned(), args, wanted };
        self.submit(submission, Box::new(move |result| drop(answer.send(result))));
        let answer = is_there.recv();
        drop(kept);
        match answer {
            Ok(Ok(Parcel::Up(up))) => Ok(up),
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) | Err(_) => Err(Error::Internal(format!("nobody has answered for {name}"))),
        }
    }
}

/// Of an actor.
impl Up {
    /// Sends a call, in the order of this process's calls.
    pub(crate) fn post(self: &Arc<Self>, post: Post) {
        let (args, kept) = match pack_all(&post.args, NodeId::HERE) {
            Ok(packed) => packed,
            Err(error) => return (post.settle)(Err(error)),
        };
        let (method, class) = (post.method.to_owned(), post.class);
        let wanted = Wanted::Call { actor: self.ticket, method: method.clone(), class };
        let submission = Submission { by: current::call(), name: method, args, wanted };
        let done = move |result| {
            drop((kept, post.args));
            (post.settle)(result);
        };
        self.nested.submit(submission, Box::new(done));
    }

    /// How the driver sees it now.
    pub(crate) fn condition(&self) -> Condition {
        let asked = self.nested.ask("an actor", &[], Wanted::Condition { actor: self.ticket });
        let condition = asked.and_then(|up| decode("an actor's condition", &up.open()?));
        condition.unwrap_or_default()
    }

    /// It is killed.
    pub(crate) fn call_off(&self) {
        self.nested.call_off(self.ticket);
    }
}
