//! One task on its way: queued, run where it belongs, run again if asked, settled.

use crate::current::{self, Current};
use crate::nested::{Nested, Submission, Wanted};
use crate::nodes::Recipe;
use crate::object::{Promise, when_ready};
use crate::parcel::{Parcel, open_all, pack_all};
use crate::process::pool::{Ended, PoolCall};
use crate::remote::{RemoteCall, RemoteFn};
use crate::runtime::{Lease, Request, Runtime, Turn};
use crate::scheduler::{Id, NodeId};
use crate::task::{Body, Placement, Task, TaskOptions};
use crate::timeline::Attempt;
use crate::{BoxError, Error, Node, ObjectRef, drops, panics, threads, timer};
use std::sync::{Arc, Weak};
use std::time::Duration;

pub(crate) struct Job<T: Send + Sync + 'static> {
    runtime: Runtime,
    options: TaskOptions,
    body: Option<Body<T>>,
    /// Encoded arguments, for a process.
    args: Vec<Parcel>,
    promise: Promise<T>,
    /// Of the current attempt.
    id: Id,
    failed: u32,
    /// How often an argument was lost on its way, before it ran.
    losses: u32,
    is_running: bool,
}

/// However it ends, it ends here.
impl<T: Send + Sync + 'static> Drop for Job<T> {
    fn drop(&mut self) {
        self.runtime.seen().counts.ended(self.promise.ending(), self.is_running);
    }
}

/// Then the way is at fault.
const MOST_LOSSES: u32 = 12;
const LOOK_AGAIN: Duration = Duration::from_millis(500);

impl<T: Send + Sync + 'static> Job<T> {
    /// Boxed, since it is handed on from thread to thread.
    pub(crate) fn new(runtime: Runtime, task: Task<T>, promise: Promise<T>) -> Box<Self> {
        let (options, body) = (task.options, Some(task.body));
        runtime.seen().counts.submitted();
        Box::new(Self {
            id: runtime.next_id(),
            runtime,
            options,
            body,
            args: Vec::new(),
            promise,
            failed: 0,
            losses: 0,
            is_running: false,
        })
    }

    /// An input came to nothing, so this task will not run.
    pub(crate) fn input_failed(&self, input: &Arc<str>, error: Error) {
        self.promise.error(Error::input_failed(self.promise.name(), input, error));
    }

    /// Waits for resources, then runs.
    pub(crate) fn enqueue(mut self: Box<Self>) {
        if self.promise.is_settled() {
            return;
        }
        if let Err(error) = self.prepare() {
            return self.promise.error(error);
        }
        if self.options.placement == Placement::Process
            && let Some(nested) = self.runtime.nested().cloned()
        {
            return self.have_driver_run(&nested);
        }
        self.can_be_cancelled_in_queue();
        let (runtime, id, request) = (self.runtime.clone(), self.id, self.request());
        let object = self.promise.object();
        runtime.enqueue(id, request, Box::new(move |turn| self.start(turn)));
        // Cancelled just before it was in the queue, where it would hold up others.
        if object.is_cancelled() {
            runtime.cancel(id);
        }
    }

    fn count_start(&mut self) {
        self.is_running = true;
        self.runtime.seen().counts.started();
    }

    fn count_wait(&mut self) {
        self.is_running = false;
        self.runtime.seen().counts.put_back();
    }

    /// Its turn in a worker process did not come: it is the next again.
    fn enqueue_again(mut self: Box<Self>) {
        if self.promise.is_settled() {
            return;
        }
        self.count_wait();
        // The old id may still be that of the grant which its worker holds.
        self.id = self.runtime.next_id();
        self.can_be_cancelled_in_queue();
        let (runtime, id, request) = (self.runtime.clone(), self.id, self.request());
        let object = self.promise.object();
        runtime.enqueue_again(id, request, Box::new(move |turn| self.start(turn)));
        if object.is_cancelled() {
            runtime.cancel(id);
        }
    }

    /// In a worker process: its driver places it, and retries it if need be.
    fn have_driver_run(self: Box<Self>, nested: &Arc<Nested>) {
        let Some(Body::Remote(call)) = &self.body else { return };
        let (function, decode, values) = (call.name.to_owned(), call.decode, call.values.clone());
        let (args, kept) = match pack_all(&self.args, NodeId::HERE) {
            Ok(packed) => packed,
            Err(error) => return self.promise.error(error),
        };
        let (object, name) = (self.promise.object(), self.promise.name().to_string());
        let options = self.options.clone();
        let wanted = match &values {
            None => Wanted::Task { function, options },
            Some(values) => Wanted::Stream { function, options, granted: values.begin().1 },
        };
        let submission = Submission { by: current::call(), name, args, wanted };
        let done = Box::new(move |result| {
            drop(kept);
            match result {
                Ok(parcel) => self.promise.encoded_with(parcel, decode),
                Err(error) => self.promise.error(error),
            }
        });
        let ticket = match values {
            None => nested.submit(submission, done),
            Some(values) => nested.submit_stream(submission, values, done),
        };
        let nested = Arc::clone(nested);
        object.on_cancel(Box::new(move || nested.call_off(ticket)));
    }

    fn can_be_cancelled_in_queue(&self) {
        let (runtime, id) = (self.runtime.clone(), self.id);
        let cancel = move || {
            runtime.cancel(id);
        };
        self.promise.object().on_cancel(Box::new(cancel));
    }

    fn request(&self) -> Request {
        Request {
            strategy: self.options.strategy,
            bundle: self.options.bundle,
            node: self.options.node.or(Node::for_placement(self.options.placement)),
            // One with a limit of its own has a worker of its own kind.
            is_pooled: self.options.placement == Placement::Process
                && self.options.memory_limit.is_none(),
            ..Request::single(self.promise.name(), &self.options.resources)
        }
    }

    /// Encodes the arguments on the thread that submits, not on the one that serves all workers.
    fn prepare(&mut self) -> Result<(), Error> {
        match (&self.body, self.options.placement) {
            (Some(Body::Remote(call)), placement) => {
                if placement == Placement::Process {
                    self.runtime.check_processes()?;
                }
                self.args = (call.encode)()?;
                Ok(())
            }
            (_, Placement::Thread) => Ok(()),
            (_, Placement::Process) => Err(Error::NotRegistered {
                name: format!(
                    "{} (a closure: only #[mobula::remote] functions leave the process)",
                    self.promise.name()
                ),
                registered: crate::remote::names(),
            }),
        }
    }

    fn start(self: Box<Self>, turn: Result<Turn, Error>) {
        match (turn, self.options.placement) {
            (Err(error), _) => self.promise.error(error),
            (Ok(_), _) if self.promise.is_settled() => {}
            (Ok(turn), Placement::Thread) => match self.lease_here(turn) {
                Ok(lease) => self.start_thread(lease),
                Err(error) => self.promise.error(error),
            },
            (Ok(turn), Placement::Process) => self.start_when_at_hand(turn),
        }
    }

    fn lease_here(&self, turn: Turn) -> Result<Arc<Lease>, Error> {
        let lease = turn.lease()?;
        lease.check_here(self.promise.name())?;
        Ok(lease)
    }

    fn start_thread(mut self: Box<Self>, lease: Arc<Lease>) {
        let object = Arc::downgrade(&self.promise.object());
        let spawned = threads::run(self.options.resources.threads(), move || {
            let limit = self.watch_time();
            self.count_start();
            let current = Current {
                object: Some(self.promise.object()),
                lease: Some(Arc::clone(&lease)),
                call: None,
            };
            let attempt = Attempt::begin();
            let result = current::run(current, || self.run_here());
            attempt.end(self.promise.name(), result.as_ref().err());
            drop(limit);
            threads::winding_up(|| {
                // The resources are free before the result is seen: who waits may submit more.
                drop(lease);
                self.finish(result);
            });
        });
        if let (Err(refused), Some(object)) = (spawned, object.upgrade()) {
            // Before its promise is dropped, which would only say that it was cancelled.
            object.fail(refused.error.clone());
        }
    }

    /// On a thread: once its time is over it is only told so.
    fn watch_time(&self) -> Option<timer::Later> {
        let timeout = self.options.timeout?;
        let object = Arc::downgrade(&self.promise.object());
        Some(timer::after(timeout, move || {
            if let Some(object) = Weak::upgrade(&object) {
                object.expire(timeout);
            }
        }))
    }

    fn run_here(&mut self) -> Result<T, Error> {
        let name = Arc::clone(self.promise.name());
        let body: Box<dyn FnOnce() -> Result<T, BoxError> + '_> = match &mut self.body {
            Some(Body::Repeatable(body)) => Box::new(body),
            Some(Body::Remote(call)) => {
                let (function, decode, args) = (call.name, call.decode, &self.args);
                Box::new(move || {
                    let result = RemoteFn::find(function)?.run(None, &open_all(args)?)?;
                    Ok(decode(&Parcel::Inline(result.into_encoded()?))?)
                })
            }
            once => match once.take() {
                Some(Body::Once(body)) => body,
                _ => return Err(Error::Internal(format!("{name} has nothing to run"))),
            },
        };
        panics::catch(&name, body)
    }

    /// Its arguments may be on other machines, or be lost with one.
    fn start_when_at_hand(mut self: Box<Self>, turn: Turn) {
        let again: Result<Vec<_>, Error> =
            self.args.iter_mut().filter_map(|parcel| parcel.remake().transpose()).collect();
        match again {
            Err(error) => self.promise.error(error),
            Ok(again) if !again.is_empty() => {
                // Those who make them may need what this would hold. Who gets it may find the same.
                drops::in_turn(turn);
                let objects = again.iter().map(ObjectRef::object).collect();
                when_ready(objects, move |failure| match failure {
                    None => self.enqueue_again(),
                    Some((input, error)) => self.input_failed(&input, error),
                });
            }
            Ok(_) if self.args.iter().all(|parcel| parcel.is_at_hand(turn.node())) => {
                self.start_in_process(turn);
            }
            Ok(_) => self.fetch_and_start(turn),
        }
    }

    /// Waits for its arguments on a thread of its own.
    fn fetch_and_start(self: Box<Self>, turn: Turn) {
        let object = self.promise.object();
        let spawned = threads::run(1, move || {
            let far = self.args.iter().filter(|parcel| !parcel.is_at_hand(turn.node()));
            match far.map(Parcel::fetch).collect::<Result<Vec<_>, _>>() {
                // One whose machine went away meanwhile is made again, without this turn.
                Err(_) if self.args.iter().any(Parcel::is_gone) => self.start_when_at_hand(turn),
                // What could not be fetched is found out again when it is packed.
                _ => self.start_in_process(turn),
            }
        });
        if let Err(refused) = spawned {
            object.fail(refused.error.clone());
        }
    }

    /// How to make the result again, if its machine is lost. That is a retry like any other, and who
    /// makes it has one less: however often it is lost, it is run `max_retries + 1` times at most.
    fn recipe(&self, function: &'static str) -> Option<Recipe> {
        let max_retries = self.options.max_retries.checked_sub(self.failed + 1)?;
        let options = TaskOptions { max_retries, ..self.options.clone() };
        let (runtime, name) = (self.runtime.downgrade(), Arc::clone(self.promise.name()));
        Some(Recipe::new(self.args.clone(), move |args| {
            tracing::info!(task = %name, "its result was lost; running it again");
            let call = RemoteCall::raw(function, args.to_vec());
            let task = Task::remote(Arc::clone(&name), call).with_options(options.clone());
            Some(runtime.upgrade()?.submit(task))
        }))
    }

    fn start_in_process(mut self: Box<Self>, turn: Turn) {
        self.count_start();
        let host = match self.runtime.host() {
            Ok(host) => host.clone(),
            Err(error) => return self.promise.error(error),
        };
        let Some(Body::Remote(call)) = &self.body else { return };
        let (function, args, values) = (call.name, self.args.clone(), call.values.clone());
        let (name, object) = (Arc::clone(self.promise.name()), self.promise.object());
        let (timeout, memory_limit) = (self.options.timeout, self.options.memory_limit);
        let finish = Box::new(move |ended| self.process_ended(ended));
        host.pool().begin(
            turn,
            PoolCall { task: name, function, args, values, timeout, memory_limit, object, finish },
        );
    }

    fn process_ended(mut self: Box<Self>, ended: Ended) {
        let (function, decode) = match &self.body {
            Some(Body::Remote(call)) => (call.name, call.decode),
            _ => return,
        };
        match ended {
            Ended::Value(parcel) => {
                parcel.remember(|| self.recipe(function));
                self.promise.encoded_with(parcel, decode);
            }
            Ended::Error(Error::ObjectLost { .. }) if self.losses < MOST_LOSSES => {
                self.losses += 1;
                // That a machine is lost is known only after a while.
                timer::after(LOOK_AGAIN, move || self.enqueue_again()).detach();
            }
            Ended::Error(error) => self.finish(Err(error)),
            Ended::NotStarted => self.enqueue_again(),
        }
    }

    fn finish(mut self: Box<Self>, result: Result<T, Error>) {
        match result {
            Err(error) if self.can_retry(&error) => {
                self.failed += 1;
                self.count_wait();
                self.id = self.runtime.next_id();
                let delay = self.options.backoff.delay(self.failed);
                tracing::info!(task = %self.promise.name(), %error, ?delay, "trying again");
                timer::after(delay.max(Duration::from_millis(1)), move || self.enqueue()).detach();
            }
            result => self.promise.resolve(result),
        }
    }

    fn can_retry(&self, error: &Error) -> bool {
        self.body.is_some()
            && !self.promise.is_settled()
            && self.options.retries(error, self.failed + 1)
    }
}
