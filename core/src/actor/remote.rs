//! Typed actors, as `#[mobula::remote] impl` describes them: a constructor and methods that are
//! registered by name, so that the state can live in another process.

use super::checkpoint::Failures;
use super::crew::{Crew, Place};
use super::handle::{ActorRef, RemoteActor};
use super::lanes::Class;
use super::process::ProcessActor;
use super::stage::{Done, Stage, State};
use super::{ActorOptions, gone};
use crate::current::{self, Current};
use crate::object::block_until_ready;
use crate::parcel::{Outgoing, Parcel, open_all};
use crate::remote::{Arguments, Call, Inputs, RemoteFn};
use crate::runtime::{Lease, Runtime};
use crate::task::Placement;
use crate::timeline::{self, Attempt};
use crate::{BoxError, Error, Resources, threads};
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::marker::PhantomData;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, RwLock};
use std::time::Duration;

/// How a method that takes `&self` works on encoded arguments.
pub type LookFn = fn(&dyn Any, Call<'_>) -> Result<Outgoing, BoxError>;

/// How a method that takes `&mut self` works on encoded arguments.
pub type ChangeFn = fn(&mut dyn Any, Call<'_>) -> Result<Outgoing, BoxError>;

/// The state that a method looks at.
pub fn state_of<A: 'static>(state: &dyn Any) -> Result<&A, BoxError> {
    state.downcast_ref().ok_or_else(wrong_state)
}

/// The state that a method works on.
pub fn state_of_mut<A: 'static>(state: &mut dyn Any) -> Result<&mut A, BoxError> {
    state.downcast_mut().ok_or_else(wrong_state)
}

fn wrong_state() -> BoxError {
    Error::Internal("an actor's state is of another type".to_owned()).into()
}

/// Decides at compile time whether threads may share an `A`: `(&Keep::<A>::new()).keep()` is
/// [`KeepShared::keep`] if they may, since the compiler tries the method that needs no further
/// reference first, and [`KeepLocal::keep`] otherwise. So an actor need not be `Send` unless its
/// calls are to run at the same time.
#[derive(Debug)]
pub struct Keep<A>(PhantomData<fn() -> A>);

impl<A> Keep<A> {
    /// For actors of this type.
    #[expect(clippy::new_without_default, reason = "for the attribute only")]
    pub fn new() -> Self {
        Self(PhantomData)
    }
}

/// For states that threads may share.
pub trait KeepShared<A> {
    /// How a new state is kept.
    fn keep(&self) -> fn(A) -> State;
}

impl<A: Send + Sync + 'static> KeepShared<A> for Keep<A> {
    fn keep(&self) -> fn(A) -> State {
        |state| State::Shared(Arc::new(RwLock::new(Box::new(state))))
    }
}

/// For any state.
pub trait KeepLocal<A> {
    /// How a new state is kept.
    fn keep(&self) -> fn(A) -> State;
}

impl<A: 'static> KeepLocal<A> for &Keep<A> {
    fn keep(&self) -> fn(A) -> State {
        |state| State::Local(Box::new(state))
    }
}

/// A method as its actor's handle knows it.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    pub(super) name: &'static str,
    pub(super) group: usize,
    pub(super) is_exclusive: bool,
}

impl Method {
    /// Its registered name, its group (0 is the nameless one, others follow in the order of
    /// [`RemoteActor::GROUPS`]), and whether it takes `&mut self`.
    pub const fn new(name: &'static str, group: usize, is_exclusive: bool) -> Self {
        Self { name, group, is_exclusive }
    }
}

/// A described actor: what `SomeActor::remote(…)` gives.
pub struct ActorCall<A> {
    constructor: &'static str,
    inputs: Inputs,
    encode: Box<dyn Fn() -> Result<Vec<Parcel>, Error> + Send>,
    options: ActorOptions,
    /// How many calls of a group may run, where more than one may. The nameless group is "".
    limits: Vec<(String, usize)>,
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
        limits: Vec::new(),
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

impl<A: Send + Sync> ActorCall<A> {
    /// The same actor, of whose calls so many (at least 1) may run at the same time, each on a
    /// thread. Methods that take `&mut self` still run alone. Default: 1. Methods in a group
    /// (`#[group("name")]`) are not counted here.
    pub fn with_concurrency(self, calls: usize) -> Self {
        self.with_group("", calls)
    }

    /// The same actor, of whose calls to methods in this group so many (at least 1) may run at the
    /// same time. Default: 1. An unknown group is refused when the actor is spawned.
    pub fn with_group(mut self, group: impl Into<String>, calls: usize) -> Self {
        self.limits.push((group.into(), calls));
        self
    }
}

impl<A: RemoteActor> ActorCall<A> {
    /// How many calls of each group may run, the nameless one first.
    fn limits(&self) -> Result<Vec<usize>, Error> {
        let mut limits = vec![1; A::GROUPS.len() + 1];
        for (group, calls) in &self.limits {
            let at = std::iter::once("").chain(A::GROUPS.iter().copied()).position(|g| g == group);
            let none = || Error::NoSuchGroup {
                actor: self.options.name.clone(),
                group: group.clone(),
                groups: A::GROUPS.iter().map(|group| (*group).to_owned()).collect(),
            };
            limits[at.ok_or_else(none)?] = (*calls).max(1);
        }
        Ok(limits)
    }
}

/// What an actor is made of, its arguments apart: so it can be asked for from another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Blueprint {
    /// The name of its type.
    pub(crate) kind: String,
    pub(crate) constructor: String,
    pub(crate) options: ActorOptions,
    /// How many calls of each group may run, the nameless one first.
    pub(crate) limits: Vec<usize>,
}

impl Runtime {
    /// Starts a typed actor and waits until its constructor has run, once its resources are free.
    /// Errors when they can never be had, or when the constructor fails. A task that waits for this
    /// lends its CPUs to other tasks; not to the actor, which would keep them. One for which there is
    /// no room beside its task is refused when [`ActorOptions::placement_timeout`] is over.
    pub fn spawn<A: RemoteActor>(&self, call: ActorCall<A>) -> Result<A::Handle, Error> {
        let limits = call.limits()?;
        block_until_ready(&call.inputs.0);
        let args = (call.encode)()?;
        let (kind, constructor) = (kind_of::<A>().to_owned(), call.constructor.to_owned());
        let plan = Blueprint { kind, constructor, options: call.options, limits };
        let actor = match self.nested() {
            Some(nested) if plan.options.placement == Placement::Process => {
                nested.spawn(plan, &args)?
            }
            _ => self.start_actor(plan, args, &|| true)?,
        };
        Ok(A::Handle::from(actor))
    }

    /// Starts an actor, as long as it is wanted.
    pub(crate) fn start_actor(
        &self,
        plan: Blueprint,
        args: Vec<Parcel>,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<ActorRef, Error> {
        let Blueprint { kind, constructor, options, limits } = plan;
        let constructor = RemoteFn::find(&constructor)?.name();
        let timeout = options.placement_timeout;
        // Who does not wait has nothing to lend.
        let _lent = if timeout.is_zero() { None } else { current::lend() };
        let lease = self.lease_while(options.request(), timeout, is_wanted)?;
        let actor = match options.placement {
            Placement::Thread => start_thread(self, &options, &limits, constructor, args, lease)?,
            Placement::Process => {
                let parts = (constructor, args, lease);
                ProcessActor::start(self, &options, limits, parts, is_wanted)?
            }
        };
        self.remember_actor(kind, &actor);
        Ok(actor)
    }

    /// The newest actor of this type and name that still has a handle somewhere; in a worker
    /// process, one on its own threads, or else the driver's.
    ///
    /// Errors when there is none.
    pub fn named_actor<A: RemoteActor>(&self, name: &str) -> Result<A::Handle, Error> {
        let actor = match (self.find_actor(kind_of::<A>(), name), self.nested()) {
            (Some(actor), _) => actor,
            (None, Some(nested)) => nested.named(kind_of::<A>(), name)?,
            (None, None) => return Err(Error::NoSuchActor { name: name.to_owned() }),
        };
        Ok(A::Handle::from(actor))
    }
}

/// An actor's type, as all processes of one build call it.
fn kind_of<A>() -> &'static str {
    std::any::type_name::<A>()
}

/// Hears of a call's result.
pub(crate) type Settle = Box<dyn FnOnce(Result<Parcel, Error>) + Send>;

/// A message: which method, on what, and who hears of the result.
pub(crate) struct Post {
    pub(crate) method: &'static str,
    pub(crate) class: Class,
    pub(crate) args: Vec<Parcel>,
    pub(crate) settle: Settle,
    /// How often it was lost with a process.
    pub(super) lost: u32,
}

fn start_thread(
    runtime: &Runtime,
    options: &ActorOptions,
    limits: &[usize],
    constructor: &'static str,
    args: Vec<Parcel>,
    lease: Arc<Lease>,
) -> Result<ActorRef, Error> {
    lease.check_here(&options.name)?;
    let (name, failures) = (options.name.clone(), Arc::new(Failures::default()));
    let threads = options.resources.threads();
    let here = Here { threads, lease, name, failures: Arc::clone(&failures) };
    let current = here.current();
    let crew = Crew::new(limits, here);
    let copy = Arc::clone(&crew);
    let (started, start) = sync_channel(1);
    let actor = ActorRef::on_thread(options, crew, failures);
    let every = options.checkpoint_every;
    runtime.seen().actors.add(actor.look_on_thread());
    threads::run(threads, move || {
        let mut stage = Stage::default();
        let built = open_all(&args).and_then(|args| stage.build(constructor, args, every));
        let is_built = built.is_ok();
        let _ = started.send(built);
        if is_built {
            current::run(current, || copy.serve(&mut stage));
        }
    })?;
    start.recv().unwrap_or_else(|_| Err(gone(&options.name)))?;
    actor.is_built();
    timeline::actor_started(&options.name, None);
    Ok(actor)
}

/// Threads of this process, for as long as the actor lives.
struct Here {
    threads: usize,
    lease: Arc<Lease>,
    name: String,
    failures: Arc<Failures>,
}

impl Here {
    /// Its calls may wait for other work, and lend its CPUs meanwhile.
    fn current(&self) -> Current {
        Current { object: None, lease: Some(Arc::clone(&self.lease)), call: None }
    }

    /// For the next panic.
    fn save(&self, stage: &Stage, saved: Result<Outgoing, Error>) {
        match saved.and_then(Outgoing::into_encoded) {
            Ok(saved) => stage.keep(saved),
            Err(error) => self.failures.add(&self.name, &error.to_string()),
        }
    }
}

impl Place<Post> for Here {
    fn run(&self, stage: &mut Stage, _: Class, post: Post) {
        let attempt = Attempt::begin();
        let args = open_all(&post.args);
        let done = args.map_or_else(Done::failed, |args| stage.invoke(post.method, &args));
        let result = done.result.and_then(Outgoing::into_encoded);
        if let Some(saved) = done.saved {
            self.save(stage, saved);
        }
        attempt.end(post.method, result.as_ref().err());
        (post.settle)(result.map(Parcel::Inline));
    }

    fn spawn(&self, help: Box<dyn FnOnce() + Send>) -> Result<(), Error> {
        let current = self.current();
        Ok(threads::run(self.threads, move || current::run(current, help))?)
    }
}
