//! Who asks for resources, and waits for them.

use super::{Lease, Runtime, lock};
use crate::process::pool::Worker;
use crate::scheduler::{Amounts, Event, Id, NodeId, PlacementStrategy, Refusal, Shape};
use crate::{Bundle, Error, Node, Resources, console};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// After this, who waits for resources that others hold is told so.
const PLACEMENT_NOTE: Duration = Duration::from_secs(5);

/// How often who waits for resources looks whether they are still wanted.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A request before its grant.
pub(crate) struct Request {
    pub(crate) name: Arc<str>,
    pub(crate) bundles: Vec<Resources>,
    pub(crate) strategy: PlacementStrategy,
    /// The only place where it may go.
    pub(crate) bundle: Option<Bundle>,
    /// The same for a whole machine.
    pub(crate) node: Option<Node>,
    /// Whether it may share the worker process, and the grant, of another one of its shape.
    pub(crate) is_pooled: bool,
    /// Whether it keeps what it gets.
    pub(crate) is_lasting: bool,
}

pub(super) struct Waiting {
    pub(super) request: Request,
    pub(super) start: Start,
}

/// What to do with a turn, or with the reason why there is none.
pub(crate) type Start = Box<dyn FnOnce(Result<Turn, Error>) + Send>;

/// A request's turn has come.
pub(crate) enum Turn {
    /// It has resources of its own.
    Granted(Arc<Lease>),
    /// It is the next to run in a process that has them.
    Joined(Arc<Worker>),
}

impl Turn {
    /// The machine that it is to run on.
    pub(crate) fn node(&self) -> NodeId {
        match self {
            Self::Granted(lease) => lease.node(),
            Self::Joined(worker) => worker.node(),
        }
    }

    pub(crate) fn lease(self) -> Result<Arc<Lease>, Error> {
        match self {
            Self::Granted(lease) => Ok(lease),
            Self::Joined(_) => Err(Error::Internal("joined without asking to".to_owned())),
        }
    }
}

impl Request {
    /// One bundle, on a thread or in a process of its own.
    pub(crate) fn single(name: &Arc<str>, resources: &Resources) -> Self {
        Self {
            name: Arc::clone(name),
            bundles: vec![resources.clone()],
            strategy: PlacementStrategy::default(),
            bundle: None,
            node: None,
            is_pooled: false,
            is_lasting: false,
        }
    }

    fn shape(&self) -> Shape {
        Shape {
            bundles: self.bundles.iter().map(Amounts::from).collect(),
            strategy: self.strategy,
            node: self.bundle.map(|bundle| bundle.0).or(self.node.map(|node| node.0)),
            is_pooled: self.is_pooled,
            is_lasting: self.is_lasting,
        }
    }

    fn total(&self) -> Resources {
        let mut sum = Amounts::default();
        self.bundles.iter().for_each(|bundle| sum.add(&bundle.into()));
        (&sum).into()
    }

    pub(super) fn refused(&self, refusal: Refusal, total: &Amounts) -> Error {
        match refusal {
            Refusal::Closed => closed(&self.name),
            Refusal::NodeGone if self.bundle.is_none() => {
                Error::NodeGone { name: self.name.to_string() }
            }
            Refusal::NodeGone => Error::BundleGone { name: self.name.to_string() },
            Refusal::NeverFits => {
                Error::Unplaceable { asked: Box::new(self.total()), total: Box::new(total.into()) }
            }
        }
    }
}

impl Runtime {
    /// Queues a request.
    pub(crate) fn enqueue(&self, id: Id, request: Request, start: Start) {
        let asked = request.bundles.iter().find(|bundle| !bundle.is_valid());
        if let Some(asked) = asked {
            return start(Err(Error::InvalidResources { asked: Box::new(asked.clone()) }));
        }
        let event = Event::Submit { id, shape: request.shape() };
        lock(&self.inner.inbox).push((event, id, Waiting { request, start }));
        self.take_in();
    }

    /// A request whose turn in a worker process did not come goes back to the head of its queue.
    pub(crate) fn enqueue_again(&self, id: Id, request: Request, start: Start) {
        let event = Event::Return { id, shape: request.shape() };
        self.step_with(event, |state| drop(state.starts.insert(id, Waiting { request, start })));
    }

    /// Takes a request back that has not had its turn. Says whether it has not.
    pub(crate) fn cancel(&self, id: Id) -> bool {
        let mut waiting = None;
        self.step_with(Event::Cancel { id }, |state| waiting = state.starts.remove(&id));
        // What it holds is dropped outside of the lock.
        waiting.is_some()
    }

    /// Waits for resources on behalf of an actor or a group.
    pub(crate) fn lease(&self, request: Request, timeout: Duration) -> Result<Arc<Lease>, Error> {
        self.lease_while(request, timeout, &|| true)
    }

    /// The same, as long as they are wanted.
    pub(crate) fn lease_while(
        &self,
        request: Request,
        timeout: Duration,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Arc<Lease>, Error> {
        let (name, resources) = (Arc::clone(&request.name), request.total());
        let (sender, receiver) = sync_channel(1);
        let start = move |turn: Result<Turn, Error>| drop(sender.send(turn.and_then(Turn::lease)));
        let (id, begun) = (self.next_id(), Instant::now());
        self.enqueue(id, request, Box::new(start));
        let mut is_noted = false;
        loop {
            let left = timeout.saturating_sub(begun.elapsed());
            match receiver.recv_timeout(left.min(LOOK_AGAIN)) {
                Ok(lease) => return lease,
                Err(RecvTimeoutError::Disconnected) => return Err(closed(&name)),
                Err(RecvTimeoutError::Timeout) if left <= LOOK_AGAIN || !is_wanted() => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if !is_noted && begun.elapsed() >= PLACEMENT_NOTE {
                is_noted = true;
                let free = self.free_resources();
                console::note(format!("{name} waits for {resources}; free now: {free}"));
            }
        }
        // It may have had its turn in this very moment; then what it got is on its way.
        if !self.cancel(id)
            && let Ok(lease) = receiver.recv()
        {
            return lease;
        }
        Err(Error::NotPlaced {
            name: name.to_string(),
            asked: Box::new(resources),
            free: Box::new(self.free_resources()),
            after: timeout,
        })
    }
}

fn closed(name: &str) -> Error {
    Error::Cancelled { task: format!("{name} (the runtime is shutting down)") }
}
