//! The sender's side of a typed actor.

use super::process::ProcessActor;
use super::remote::Post;
use super::{ActorOptions, gone};
use crate::object::block_until_ready;
use crate::parcel::Parcel;
use crate::remote::{Arguments, Value};
use crate::status::{ActorState, ActorStatus, Look};
use crate::{Error, ObjectRef};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// A type whose `impl` carries `#[mobula::remote]`.
pub trait RemoteActor: 'static {
    /// What its messages are sent through.
    type Handle: From<ActorRef> + AsRef<ActorRef>;
}

/// Sends calls to an actor, wherever it lives. Calls of one sender are handled in order. The actor
/// ends when its last handle is dropped and its calls are done. Programs use the handle that
/// `#[mobula::remote]` generates around this.
#[derive(Clone)]
pub struct ActorRef {
    inner: Arc<Inner>,
}

struct Inner {
    name: Arc<str>,
    credits: Arc<Credits>,
    route: Route,
    /// On a thread: whether its constructor has run.
    is_built: AtomicBool,
}

enum Route {
    Thread(Sender<Post>),
    Process(ProcessHandle),
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
    pub(super) fn on_thread(options: &ActorOptions, mailbox: Sender<Post>) -> Self {
        Self::new(options, Route::Thread(mailbox))
    }

    pub(super) fn in_process(options: &ActorOptions, actor: Arc<ProcessActor>) -> Self {
        Self::new(options, Route::Process(ProcessHandle(actor)))
    }

    fn new(options: &ActorOptions, route: Route) -> Self {
        let (name, credits) = (options.name.as_str().into(), Credits::new(options));
        let is_built = AtomicBool::new(false);
        Self { inner: Arc::new(Inner { name, credits, route, is_built }) }
    }

    pub(super) fn is_built(&self) {
        self.inner.is_built.store(true, Ordering::Relaxed);
    }

    /// How one on a thread is, as long as somebody has a handle to it.
    pub(super) fn look_on_thread(&self) -> Look {
        let seen = Arc::downgrade(&self.inner);
        let status = |actor: Arc<Inner>| ActorStatus {
            name: actor.name.to_string(),
            state: match actor.is_built.load(Ordering::Relaxed) {
                true => ActorState::Running,
                false => ActorState::Starting,
            },
            restarts: 0,
            pending: actor.credits.lock().messages as u64,
            pid: None,
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

    /// Whether calls still reach it: not when its process is gone for good.
    pub fn is_alive(&self) -> bool {
        match &self.inner.route {
            Route::Thread(_) => true,
            Route::Process(actor) => actor.0.is_alive(),
        }
    }

    /// Calls that were sent and have not ended.
    pub fn pending(&self) -> usize {
        self.inner.credits.lock().messages
    }

    /// The process it lives in, if it has one of its own and that is running.
    pub fn pid(&self) -> Option<u32> {
        match &self.inner.route {
            Route::Thread(_) => None,
            Route::Process(actor) => actor.0.pid(),
        }
    }

    /// Ends the actor at once where it lives in a process: calls under way fail. An actor on a
    /// thread cannot be ended from outside.
    pub fn kill(&self) {
        if let Route::Process(actor) = &self.inner.route {
            actor.0.kill();
        }
    }

    /// Sends a call; waits for room in the mailbox, and for arguments that are still to come.
    pub fn call<P: Arguments, T: Value>(
        &self,
        method: &'static str,
        args: P::Described,
    ) -> ObjectRef<T> {
        block_until_ready(&P::inputs(&args).0);
        match P::encode(&args) {
            Ok(args) => {
                self.inner.credits.take(bytes_of(&args));
                self.send(method, args)
            }
            Err(error) => self.refused(method, error),
        }
    }

    /// Sends a call, or refuses with [`Error::MailboxFull`].
    pub fn try_call<P: Arguments, T: Value>(
        &self,
        method: &'static str,
        args: P::Described,
    ) -> Result<ObjectRef<T>, Error> {
        let args = P::encode(&args)?;
        if !self.inner.credits.try_take(bytes_of(&args)) {
            let (actor, capacity) = (self.inner.name.to_string(), self.inner.credits.most_messages);
            return Err(Error::MailboxFull { actor, capacity });
        }
        Ok(self.send(method, args))
    }

    fn send<T: Value>(&self, method: &'static str, args: Vec<Parcel>) -> ObjectRef<T> {
        let (object, promise) = ObjectRef::pending(method.into());
        // Given back however the call ends.
        let credit = Credit { credits: Arc::clone(&self.inner.credits), bytes: bytes_of(&args) };
        let settle = Box::new(move |result| {
            drop(credit);
            match result {
                Ok(parcel) => promise.encoded(parcel),
                Err(error) => promise.error(error),
            }
        });
        self.post(Post { method, args, settle, lost: 0 });
        object
    }

    fn post(&self, post: Post) {
        match &self.inner.route {
            Route::Thread(mailbox) => {
                if let Err(refused) = mailbox.send(post) {
                    (refused.0.settle)(Err(gone(&self.inner.name)));
                }
            }
            Route::Process(actor) => actor.0.post(post),
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
    pub(crate) fn upgrade(&self) -> Option<ActorRef> {
        self.0.upgrade().map(|inner| ActorRef { inner })
    }
}

/// Bytes that travel in the message; shared memory is the store's to account for.
fn bytes_of(args: &[Parcel]) -> usize {
    let bytes = |parcel: &Parcel| match parcel {
        Parcel::Inline(encoded) => encoded.bytes(),
        Parcel::Stored(_) => 0,
    };
    args.iter().map(bytes).sum()
}

/// How much an actor's mailbox may hold, and holds.
struct Credits {
    most_messages: usize,
    most_bytes: usize,
    used: Mutex<Used>,
    room: Condvar,
}

/// A call's place in the mailbox.
struct Credit {
    credits: Arc<Credits>,
    bytes: usize,
}

impl Drop for Credit {
    fn drop(&mut self) {
        self.credits.give_back(self.bytes);
    }
}

#[derive(Default)]
struct Used {
    messages: usize,
    bytes: usize,
    waiting: usize,
}

impl Credits {
    fn new(options: &ActorOptions) -> Arc<Self> {
        let (most_messages, most_bytes) = (options.mailbox.max(1), options.mailbox_bytes);
        Arc::new(Self { most_messages, most_bytes, used: Mutex::default(), room: Condvar::new() })
    }

    /// Waits for room. A message larger than the whole mailbox fits when it is empty.
    fn take(&self, bytes: usize) {
        let mut used = self.lock();
        if !self.has_room(&used, bytes) {
            let _lent = crate::current::lend();
            used.waiting += 1;
            let full = |used: &mut Used| !self.has_room(used, bytes);
            used = self.room.wait_while(used, full).unwrap_or_else(PoisonError::into_inner);
            used.waiting -= 1;
        }
        used.add(bytes);
    }

    fn try_take(&self, bytes: usize) -> bool {
        let mut used = self.lock();
        let has_room = self.has_room(&used, bytes);
        if has_room {
            used.add(bytes);
        }
        has_room
    }

    fn give_back(&self, bytes: usize) {
        let mut used = self.lock();
        used.messages -= 1;
        used.bytes -= bytes;
        if used.waiting > 0 {
            self.room.notify_all();
        }
    }

    fn has_room(&self, used: &Used, bytes: usize) -> bool {
        used.messages == 0
            || used.messages < self.most_messages && used.bytes + bytes <= self.most_bytes
    }

    fn lock(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Used {
    fn add(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += bytes;
    }
}
