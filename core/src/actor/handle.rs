//! The sender's side of a typed actor.

use super::checkpoint::Failures;
use super::crew::Crew;
use super::lanes::Class;
use super::mailbox::{Credit, Credits, Mailbox, bytes_of};
use super::process::ProcessActor;
use super::remote::{Method, Post, Settle};
use super::{ActorOptions, gone};
use crate::nested::{Condition, Up};
use crate::object::{Promise, block_until_ready};
use crate::parcel::Parcel;
use crate::remote::{Arguments, Value};
use crate::status::{ActorState, ActorStatus, Look, Sighting};
use crate::{Error, ObjectRef};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

/// A type whose `impl` carries `#[mobula::remote]`.
pub trait RemoteActor: 'static {
    /// What its messages are sent through.
    type Handle: From<ActorRef> + AsRef<ActorRef>;

    /// The groups of its methods, `#[group("name")]`, each once.
    const GROUPS: &'static [&'static str] = &[];
}

/// Sends calls to an actor, wherever it lives. Calls of one sender and one group are begun in order.
/// The actor
/// ends when its last handle is dropped and its calls are done. Programs use the handle that
/// `#[mobula::remote]` generates around this.
#[derive(Clone)]
pub struct ActorRef {
    inner: Arc<Inner>,
    is_urgent: bool,
}

struct Inner {
    name: Arc<str>,
    credits: Arc<Credits>,
    /// Of urgent calls, which do not wait for the others.
    urgent_credits: Arc<Credits>,
    route: Route,
    /// On a thread: whether its constructor has run.
    is_built: AtomicBool,
}

enum Route {
    Thread(ThreadHandle, Arc<Failures>),
    Process(ProcessHandle),
    /// In a worker process: its driver has the handle, and closes it when this is dropped.
    Driver(Arc<Up>),
}

/// Closes the actor with the last handle.
struct ThreadHandle(Arc<Crew<Post>>);

impl Drop for ThreadHandle {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Closes the actor with the last handle.
struct ProcessHandle(Arc<ProcessActor>);

impl Drop for ProcessHandle {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl std::fmt::Debug for ActorRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActorRef").field("name", &self.inner.name).finish_non_exhaustive()
    }
}

impl ActorRef {
    pub(super) fn on_thread(
        options: &ActorOptions,
        crew: Arc<Crew<Post>>,
        failures: Arc<Failures>,
    ) -> Self {
        Self::new(options, Route::Thread(ThreadHandle(crew), failures))
    }

    pub(super) fn in_process(options: &ActorOptions, actor: Arc<ProcessActor>) -> Self {
        Self::new(options, Route::Process(ProcessHandle(actor)))
    }

    /// An actor of this process's driver.
    pub(crate) fn of_driver(name: &str, mailbox: Mailbox, up: Arc<Up>) -> Self {
        Self::with_mailbox(name, mailbox, Route::Driver(up))
    }

    fn new(options: &ActorOptions, route: Route) -> Self {
        Self::with_mailbox(&options.name, Mailbox::of(options), route)
    }

    fn with_mailbox(name: &str, mailbox: Mailbox, route: Route) -> Self {
        let (name, credits) = (name.into(), Credits::new(mailbox));
        let urgent_credits = Credits::new(mailbox);
        let is_built = AtomicBool::new(false);
        let inner = Arc::new(Inner { name, credits, urgent_credits, route, is_built });
        Self { inner, is_urgent: false }
    }

    pub(super) fn is_built(&self) {
        self.inner.is_built.store(true, Ordering::Relaxed);
    }

    /// How one on a thread is, as long as somebody has a handle to it.
    pub(super) fn look_on_thread(&self) -> Look {
        let seen = Arc::downgrade(&self.inner);
        let status = |actor: Arc<Inner>| {
            Sighting::on_thread(ActorStatus {
                name: actor.name.to_string(),
                state: match actor.is_built.load(Ordering::Relaxed) {
                    true => ActorState::Running,
                    false => ActorState::Starting,
                },
                restarts: 0,
                failed_checkpoints: match &actor.route {
                    Route::Thread(_, failures) => failures.count(),
                    Route::Process(_) | Route::Driver(_) => 0,
                },
                pending: actor.credits.messages() as u64,
                pid: None,
                node: None,
            })
        };
        Arc::new(move || seen.upgrade().map(status))
    }

    pub(crate) fn downgrade(&self) -> WeakActor {
        WeakActor(Arc::downgrade(&self.inner))
    }

    /// The actor's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The same actor; calls that are sent through this one overtake all that wait in their group,
    /// other urgent ones excepted. The mailbox has as much room for them again.
    pub fn urgent(&self) -> Self {
        Self { is_urgent: true, ..self.clone() }
    }

    /// Whether calls still reach it: not when its process is gone for good.
    pub fn is_alive(&self) -> bool {
        self.condition().is_alive
    }

    /// Asks the driver, in a worker process.
    pub(crate) fn condition(&self) -> Condition {
        match &self.inner.route {
            Route::Thread(..) => Condition { is_alive: true, pid: None },
            Route::Process(actor) => Condition { is_alive: actor.0.is_alive(), pid: actor.0.pid() },
            Route::Driver(up) => up.condition(),
        }
    }

    /// Calls that were sent and have not ended; in a worker process, those that it has sent.
    pub fn pending(&self) -> usize {
        self.inner.credits.messages() + self.inner.urgent_credits.messages()
    }

    /// The process it lives in, if it has one of its own and that is running.
    pub fn pid(&self) -> Option<u32> {
        self.condition().pid
    }

    /// Ends the actor at once where it lives in a process: calls under way fail. An actor on a
    /// thread cannot be ended from outside.
    pub fn kill(&self) {
        match &self.inner.route {
            Route::Thread(..) => {}
            Route::Process(actor) => actor.0.kill(),
            Route::Driver(up) => up.call_off(),
        }
    }

    /// Sends a call; waits for room in the mailbox, and for arguments that are still to come.
    pub fn call<P: Arguments, T: Value>(&self, method: Method, args: P::Described) -> ObjectRef<T> {
        block_until_ready(&P::inputs(&args).0);
        match P::encode(&args).and_then(|args| self.bring(args)) {
            Ok(args) => {
                let credit = self.credits().take(bytes_of(&args));
                self.send(method, args, credit)
            }
            Err(error) => self.refused(method.name, error),
        }
    }

    /// Has values fetched from other machines, if need be, while the caller waits.
    fn bring(&self, args: Vec<Parcel>) -> Result<Vec<Parcel>, Error> {
        args.iter().filter(|parcel| self.must_bring(parcel)).try_for_each(Parcel::bring)?;
        Ok(args)
    }

    /// Whether this value has to be fetched before it can be sent.
    pub(crate) fn must_bring(&self, parcel: &Parcel) -> bool {
        let node = match &self.inner.route {
            Route::Thread(..) | Route::Driver(_) => None,
            Route::Process(actor) => actor.0.node(),
        };
        node.is_some_and(|node| !parcel.is_at_hand(node))
    }

    /// Passes on a call of a worker process, which keeps to its own part of the mailbox.
    pub(crate) fn pass_on(
        &self,
        (method, class): (&'static str, Class),
        args: Vec<Parcel>,
        promise: Promise<Parcel>,
    ) {
        let credits =
            if class.is_urgent { &self.inner.urgent_credits } else { &self.inner.credits };
        let credit = credits.overdraw(bytes_of(&args));
        let settle: Settle = Box::new(move |result| {
            drop(credit);
            promise.resolve(result);
        });
        match self.bring(args) {
            Ok(args) => self.post(Post { method, class, args, settle, lost: 0 }),
            Err(error) => settle(Err(error)),
        }
    }

    /// How much its mailbox holds.
    pub(crate) fn mailbox(&self) -> Mailbox {
        self.inner.credits.most
    }

    /// Whether no other handle is left, and no calls but so many.
    pub(crate) fn is_held_for(&self, calls: usize) -> bool {
        (1..=calls).contains(&self.pending()) && Arc::strong_count(&self.inner) == 1
    }

    /// Sends a call, or refuses with [`Error::MailboxFull`].
    pub fn try_call<P: Arguments, T: Value>(
        &self,
        method: Method,
        args: P::Described,
    ) -> Result<ObjectRef<T>, Error> {
        let args = self.bring(P::encode(&args)?)?;
        match self.credits().try_take(bytes_of(&args)) {
            Some(credit) => Ok(self.send(method, args, credit)),
            None => {
                let (actor, capacity) = (self.inner.name.to_string(), self.credits().most.messages);
                Err(Error::MailboxFull { actor, capacity })
            }
        }
    }

    fn credits(&self) -> &Arc<Credits> {
        if self.is_urgent { &self.inner.urgent_credits } else { &self.inner.credits }
    }

    fn send<T: Value>(&self, method: Method, args: Vec<Parcel>, credit: Credit) -> ObjectRef<T> {
        let (object, promise) = ObjectRef::pending(method.name.into());
        let settle = Box::new(move |result| {
            drop(credit);
            match result {
                Ok(parcel) => promise.encoded(parcel),
                Err(error) => promise.error(error),
            }
        });
        let Method { name, group, is_exclusive } = method;
        let class = Class { group, is_exclusive, is_urgent: self.is_urgent };
        self.post(Post { method: name, class, args, settle, lost: 0 });
        object
    }

    fn post(&self, post: Post) {
        match &self.inner.route {
            Route::Thread(crew, _) => {
                if let Err(refused) = crew.0.add(post.class, post) {
                    (refused.settle)(Err(gone(&self.inner.name)));
                }
            }
            Route::Process(actor) => actor.0.post(post),
            Route::Driver(up) => up.post(post),
        }
    }

    fn refused<T: Value>(&self, method: &'static str, error: Error) -> ObjectRef<T> {
        let (object, promise) = ObjectRef::pending(method.into());
        promise.error(error);
        object
    }
}

/// An actor for as long as others have handles to it.
pub(crate) struct WeakActor(Weak<Inner>);

impl WeakActor {
    pub(crate) fn is_held(&self) -> bool {
        self.0.strong_count() > 0
    }

    pub(crate) fn upgrade(&self) -> Option<ActorRef> {
        self.0.upgrade().map(|inner| ActorRef { inner, is_urgent: false })
    }
}
