//! Typed actors, as `#[mobula::remote] impl` describes them: a constructor and methods that are
//! registered by name, so that the state can live in another process.

use super::handle::{ActorRef, RemoteActor};
use super::process::ProcessActor;
use super::stage::Stage;
use super::{ActorOptions, gone};
use crate::current::{self, Current};
use crate::object::block_until_ready;
use crate::parcel::{Outgoing, Parcel, open_all};
use crate::remote::{Arguments, Call, Inputs};
use crate::runtime::{Lease, Runtime};
use crate::task::Placement;
use crate::timeline::{self, Attempt};
use crate::{BoxError, Error, Resources, threads};
use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::time::Duration;

/// The state of an actor, of whatever type.
pub type State = Box<dyn Any>;

/// How a method works on encoded arguments.
pub type MethodFn = fn(&mut State, Call<'_>) -> Result<Outgoing, BoxError>;

/// The state that a method works on.
pub fn state_of<A: 'static>(state: &mut State) -> Result<&mut A, BoxError> {
    let wrong = || Error::Internal("an actor's state is of another type".to_owned()).into();
    state.downcast_mut().ok_or_else(wrong)
}

/// A described actor: what `SomeActor::remote(…)` gives.
pub struct ActorCall<A> {
    constructor: &'static str,
    inputs: Inputs,
    encode: Box<dyn Fn() -> Result<Vec<Parcel>, Error> + Send>,
    options: ActorOptions,
    actor: PhantomData<fn() -> A>,
}

impl<A> std::fmt::Debug for ActorCall<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActorCall").field("options", &self.options).finish_non_exhaustive()
    }
}

/// Describes the actor that the constructor registered as `name` makes.
pub fn actor<P: Arguments, A: RemoteActor>(name: &'static str, args: P::Described) -> ActorCall<A> {
    let short = name.strip_suffix("::new").unwrap_or(name);
    ActorCall {
        constructor: name,
        inputs: P::inputs(&args),
        encode: Box::new(move || P::encode(&args)),
        options: ActorOptions::new(short.rsplit("::").next().unwrap_or(short)),
        actor: PhantomData,
    }
}

impl<A> ActorCall<A> {
    /// The same actor placed there.
    pub fn on(mut self, placement: Placement) -> Self {
        self.options.placement = placement;
        self
    }

    /// The same actor, if its resources are free right now.
    pub(crate) fn at_once(mut self) -> Self {
        self.options.placement_timeout = Duration::ZERO;
        self
    }

    /// The same actor under another name.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.options.name = name.into();
        self
    }

    /// The same actor holding these resources.
    pub fn with_resources(mut self, resources: Resources) -> Self {
        self.options.resources = resources;
        self
    }

    /// The same actor with these options; its name is among them.
    pub fn with_options(self, options: ActorOptions) -> Self {
        Self { options, ..self }
    }
}

impl Runtime {
    /// Starts a typed actor and waits until its constructor has run, once its resources are free.
    /// Errors when they can never be had, or when the constructor fails.
    pub fn spawn<A: RemoteActor>(&self, call: ActorCall<A>) -> Result<A::Handle, Error> {
        block_until_ready(&call.inputs.0);
        let args = (call.encode)()?;
        let lease = self.lease(call.options.request(), call.options.placement_timeout)?;
        let actor = match call.options.placement {
            Placement::Thread => start_thread(self, &call.options, call.constructor, args, lease)?,
            Placement::Process => {
                ProcessActor::start(self, &call.options, call.constructor, args, lease)?
            }
        };
        self.remember_actor::<A>(&actor);
        Ok(A::Handle::from(actor))
    }

    /// The newest actor of this type and name that still has a handle somewhere.
    ///
    /// Errors when there is none.
    pub fn named_actor<A: RemoteActor>(&self, name: &str) -> Result<A::Handle, Error> {
        let none = || Error::NoSuchActor { name: name.to_owned() };
        self.find_actor::<A>(name).map(A::Handle::from).ok_or_else(none)
    }
}

/// A message: which method, on what, and who hears of the result.
pub(super) struct Post {
    pub(super) method: &'static str,
    pub(super) args: Vec<Parcel>,
    pub(super) settle: Box<dyn FnOnce(Result<Parcel, Error>) + Send>,
    /// How often it was lost with a process.
    pub(super) lost: u32,
}

fn start_thread(
    runtime: &Runtime,
    options: &ActorOptions,
    constructor: &'static str,
    args: Vec<Parcel>,
    lease: Arc<Lease>,
) -> Result<ActorRef, Error> {
    let (sender, inbox) = channel();
    let (started, start) = sync_channel(1);
    let actor = ActorRef::on_thread(options, sender);
    runtime.seen().actors.add(actor.look_on_thread());
    threads::run(options.resources.threads(), move || {
        let mut stage = Stage::default();
        let built = open_all(&args).and_then(|args| stage.build(constructor, args));
        let is_built = built.is_ok();
        let _ = started.send(built);
        // Its calls may wait for other work, and lend its CPUs meanwhile.
        let current = Current { object: None, lease: Some(lease) };
        if is_built {
            current::run(current, || work(&mut stage, &inbox));
        }
    })?;
    start.recv().unwrap_or_else(|_| Err(gone(&options.name)))?;
    actor.is_built();
    timeline::actor_started(&options.name, None);
    Ok(actor)
}

/// The mailbox is bounded by the credits of those who send.
fn work(stage: &mut Stage, inbox: &Receiver<Post>) {
    for post in inbox {
        let attempt = Attempt::begin();
        let result = open_all(&post.args).and_then(|args| stage.invoke(post.method, &args));
        let result = result.and_then(Outgoing::into_encoded);
        attempt.end(post.method, result.as_ref().err());
        (post.settle)(result.map(Parcel::Inline));
    }
}
