//! Actors: state that lives in one place, behind a bounded mailbox.
//!
//! Here are those that closures work on, on a thread of this process. [`remote`] has the typed
//! ones, which live on a thread or in a process of their own.

pub(crate) mod checkpoint;
pub(crate) mod crew;
mod ear;
mod handle;
pub(crate) mod lanes;
mod mailbox;
mod pool;
mod process;
pub mod remote;
pub(crate) mod stage;
pub(crate) mod supervisor;

pub(crate) use handle::WeakActor;
pub use handle::{ActorRef, RemoteActor};
pub(crate) use mailbox::Mailbox;
pub use pool::{ActorPool, ActorPoolOptions};
pub(crate) use remote::{Blueprint, Post};
pub use supervisor::RestartPolicy;

use crate::current::{self, Current};
use crate::runtime::{Request, Runtime};
use crate::status::{ActorState, ActorStatus, Look, Sighting};
use crate::task::Placement;
use crate::timeline::{self, Attempt};
use crate::{BoxError, Bundle, Error, Node, Resources, console, panics, threads};
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// What a channel can be made for.
const MOST_MESSAGES: usize = 1 << 30;

/// How an actor is placed. Every default is here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ActorOptions {
    /// Its name in errors and logs.
    pub name: String,
    /// What it holds as long as it lives. Default: 1 CPU.
    pub resources: Resources,
    /// Messages that may wait; a sender waits for room, or is refused. For what a worker process
    /// sends to an actor of its driver, each such process has as much room again. Default: 1024.
    pub mailbox: usize,
    /// Bytes of encoded arguments that may wait. Closures have none. Default: 64 MiB.
    pub mailbox_bytes: usize,
    /// Where it lives. Default: on a thread, the only place for an actor that takes closures.
    pub placement: Placement,
    /// Whether it is started again when its process was lost. Default: no.
    pub restart: RestartPolicy,
    /// How often a call that was running when the process was lost is sent to the next one; those
    /// that only waited always are. Default: 0.
    pub max_task_retries: u32,
    /// The state of an actor with `#[checkpoint]` is saved after each so many (at least 1) calls
    /// that may change it, before the last of them is answered. Default: 1, so that no change
    /// that was answered is lost with the process.
    pub checkpoint_every: u64,
    /// Bytes of resident memory beyond which its process, if it has one, is killed. Default: none.
    pub memory_limit: Option<u64>,
    /// The bundle of a placement group that it takes its resources from. Default: none.
    pub bundle: Option<Bundle>,
    /// The only machine that it may live on. Default: any, and for threads the driver's.
    pub node: Option<Node>,
    /// How long to wait for resources that others hold. Default: 10 minutes.
    pub placement_timeout: Duration,
}

impl ActorOptions {
    /// The defaults under this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            resources: Resources::cpus(1.0),
            mailbox: 1024,
            mailbox_bytes: 64 << 20,
            placement: Placement::Thread,
            restart: RestartPolicy::default(),
            max_task_retries: 0,
            checkpoint_every: 1,
            memory_limit: None,
            bundle: None,
            node: None,
            placement_timeout: Duration::from_secs(600),
        }
    }

    /// The same holding these resources.
    pub fn with_resources(self, resources: Resources) -> Self {
        Self { resources, ..self }
    }

    /// The same with room for so many messages (at least 1).
    pub fn with_mailbox(self, mailbox: usize) -> Self {
        Self { mailbox: mailbox.max(1), ..self }
    }
}

impl ActorOptions {
    fn request(&self) -> Request {
        let (bundle, node) = (self.bundle, self.node.or(Node::for_placement(self.placement)));
        let is_lasting = true;
        Request {
            bundle,
            node,
            is_lasting,
            ..Request::single(&self.name.as_str().into(), &self.resources)
        }
    }

    fn refuse_process(&self) -> Result<(), Error> {
        if self.placement == Placement::Thread {
            return Ok(());
        }
        Err(Error::NotRegistered {
            name: format!(
                "{} (an actor that takes closures: only #[mobula::remote] ones leave the process)",
                self.name
            ),
            registered: crate::remote::names(),
        })
    }
}

/// A message: works on the state of the actor of that name. Says whether the state can still be
/// trusted: after a panic it cannot, and is built anew.
type Message<S> = Box<dyn FnOnce(&mut S, &str) -> bool + Send>;

/// What comes back. The error is boxed, so that a reply is no larger than its value.
type Answer<R> = Result<R, Box<Error>>;

/// Sends work to an actor. Messages of one sender are handled in order. The actor ends when its
/// last handle is dropped and its mailbox is empty.
#[derive(Debug)]
pub struct ActorHandle<S> {
    name: Arc<str>,
    mailbox: mpsc::Sender<Message<S>>,
}

impl<S> Clone for ActorHandle<S> {
    fn clone(&self) -> Self {
        Self { name: Arc::clone(&self.name), mailbox: self.mailbox.clone() }
    }
}

impl<S: 'static> ActorHandle<S> {
    /// Runs `work` on the state; waits for room in the mailbox, then for the answer.
    pub async fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> R + Send + 'static,
    ) -> Result<R, Error> {
        let (message, reply) = self.message(work);
        self.mailbox.send(message).await.map_err(|_| self.gone())?;
        reply.await
    }

    /// [`ActorHandle::call`] for threads outside of async code.
    pub fn call_blocking<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> R + Send + 'static,
    ) -> Result<R, Error> {
        let (message, reply) = self.message(work);
        self.mailbox.blocking_send(message).map_err(|_| self.gone())?;
        let answer = reply.inner.blocking_recv();
        answer.unwrap_or_else(|_| Err(self.gone().into())).map_err(|error| *error)
    }

    /// Runs `work` on the state, or refuses with [`Error::MailboxFull`].
    pub fn try_call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> R + Send + 'static,
    ) -> Result<Reply<R>, Error> {
        let (message, reply) = self.message(work);
        self.mailbox.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::MailboxFull {
                actor: self.name.to_string(),
                capacity: self.mailbox.max_capacity(),
            },
            mpsc::error::TrySendError::Closed(_) => self.gone(),
        })?;
        Ok(reply)
    }

    fn message<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> R + Send + 'static,
    ) -> (Message<S>, Reply<R>) {
        let (sender, inner) = oneshot::channel();
        let message: Message<S> = Box::new(move |state, name| {
            let result = panics::catch(name, || Ok(work(state)));
            let intact = result.is_ok();
            // The caller may have gone; the work is done all the same.
            let _ = sender.send(result.map_err(Box::new));
            intact
        });
        let name = Arc::clone(&self.name);
        (message, Reply { name, inner })
    }

    fn gone(&self) -> Error {
        gone(&self.name)
    }
}

/// The answer of an actor, to be awaited.
#[derive(Debug)]
pub struct Reply<R> {
    name: Arc<str>,
    inner: oneshot::Receiver<Answer<R>>,
}

impl<R> Future for Reply<R> {
    type Output = Result<R, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = Pin::new(&mut self.inner).poll(context);
        let gone = |_| Err(gone(&self.name).into());
        answer.map(|result| result.unwrap_or_else(gone).map_err(|error| *error))
    }
}

fn gone(name: &str) -> Error {
    Error::WorkerLost { task: name.to_owned(), reason: "the actor has ended".to_owned() }
}

impl Runtime {
    /// Starts an actor whose state `build` makes, on a thread of its own inside a rayon pool of
    /// the CPUs it asks for. `build` runs there, once now and again after each panic of a
    /// message. Waits for the resources; errors when they can never be had, or when the first
    /// `build` fails.
    pub fn spawn_actor<S: 'static>(
        &self,
        options: ActorOptions,
        build: impl FnMut() -> Result<S, BoxError> + Send + 'static,
    ) -> Result<ActorHandle<S>, Error> {
        options.refuse_process()?;
        let lease = self.lease(options.request(), options.placement_timeout)?;
        lease.check_here(&options.name)?;
        let (mailbox, inbox) = mpsc::channel(options.mailbox.clamp(1, MOST_MESSAGES));
        let (started, start) = std::sync::mpsc::sync_channel(1);
        let name: Arc<str> = options.name.as_str().into();
        let actor = Running { name: Arc::clone(&name), inbox, build: Box::new(build) };
        let is_built = Arc::new(AtomicBool::new(false));
        self.seen().actors.add(look(&name, &mailbox, &is_built));
        // Its messages may wait for other work, and lend its CPUs meanwhile.
        let current = Current { object: None, lease: Some(lease), call: None };
        threads::run(options.resources.threads(), move || {
            current::run(current, || actor.run(&started));
        })?;
        start.recv().unwrap_or_else(|_| Err(gone(&name)))?;
        is_built.store(true, Ordering::Relaxed);
        timeline::actor_started(&name, None);
        Ok(ActorHandle { name, mailbox })
    }
}

/// How the actor is, as long as somebody has a handle to it.
fn look<S: 'static>(
    name: &Arc<str>,
    mailbox: &mpsc::Sender<Message<S>>,
    is_built: &Arc<AtomicBool>,
) -> Look {
    let (name, mailbox, is_built) = (Arc::clone(name), mailbox.downgrade(), Arc::clone(is_built));
    Arc::new(move || {
        let mailbox = mailbox.upgrade()?;
        Some(Sighting::on_thread(ActorStatus {
            name: name.to_string(),
            state: match (mailbox.is_closed(), is_built.load(Ordering::Relaxed)) {
                (true, _) => ActorState::Dead,
                (false, true) => ActorState::Running,
                (false, false) => ActorState::Starting,
            },
            restarts: 0,
            failed_checkpoints: 0,
            pending: (mailbox.max_capacity() - mailbox.capacity()) as u64,
            pid: None,
            node: None,
        }))
    })
}

struct Running<S> {
    name: Arc<str>,
    inbox: mpsc::Receiver<Message<S>>,
    build: Box<dyn FnMut() -> Result<S, BoxError> + Send>,
}

impl<S: 'static> Running<S> {
    fn run(mut self, started: &std::sync::mpsc::SyncSender<Result<(), Error>>) {
        let mut state = match panics::catch(&self.name, || (self.build)()) {
            Ok(state) => state,
            Err(error) => return drop(started.send(Err(error))),
        };
        let _ = started.send(Ok(()));
        // Several at a time, where that is little of what may wait.
        let most = (self.inbox.max_capacity() / 16).clamp(1, 64);
        let mut messages = Vec::with_capacity(most);
        while self.inbox.blocking_recv_many(&mut messages, most) > 0 {
            for message in messages.drain(..) {
                let attempt = Attempt::begin();
                let intact = message(&mut state, &self.name);
                attempt.end(&self.name, None);
                if intact {
                    continue;
                }
                match panics::catch(&self.name, || (self.build)()) {
                    Ok(fresh) => state = fresh,
                    Err(error) => {
                        return console::note(format!("{} cannot be rebuilt: {error}", self.name));
                    }
                }
            }
        }
    }
}
