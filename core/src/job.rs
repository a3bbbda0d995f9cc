//! One task on its way: queued, run where it belongs, run again if asked, settled.

use crate::current::{self, Current};
use crate::object::Promise;
use crate::parcel::{Parcel, open_all};
use crate::process::pool::{Ended, PoolCall};
use crate::remote::RemoteFn;
use crate::runtime::{Lease, Request, Runtime, Turn};
use crate::scheduler::Id;
use crate::task::{Body, Placement, Task, TaskOptions};
use crate::{BoxError, Error, panics, threads, timer};
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
}

impl<T: Send + Sync + 'static> Job<T> {
    pub(crate) fn new(runtime: Runtime, task: Task<T>, promise: Promise<T>) -> Self {
        let (options, body) = (task.options, Some(task.body));
        Self { id: runtime.next_id(), runtime, options, body, args: Vec::new(), promise, failed: 0 }
    }

    /// An input came to nothing, so this task will not run.
    pub(crate) fn input_failed(&self, input: &Arc<str>, error: Error) {
        self.promise.error(Error::input_failed(self.promise.name(), input, error));
    }

    /// Waits for resources, then runs.
    pub(crate) fn enqueue(mut self) {
        if self.promise.is_settled() {
            return;
        }
        if let Err(error) = self.prepare() {
            return self.promise.error(error);
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

    /// Its turn in a worker process did not come: it is the next again.
    fn enqueue_again(mut self) {
        if self.promise.is_settled() {
            return;
        }
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

    fn can_be_cancelled_in_queue(&self) {
        let (runtime, id) = (self.runtime.clone(), self.id);
        self.promise.object().on_cancel(Box::new(move || runtime.cancel(id)));
    }

    fn request(&self) -> Request {
        Request {
            strategy: self.options.strategy,
            bundle: self.options.bundle,
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
                    self.runtime.host()?;
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

    fn start(self, turn: Result<Turn, Error>) {
        match (turn, self.options.placement) {
            (Err(error), _) => self.promise.error(error),
            (Ok(_), _) if self.promise.is_settled() => {}
            (Ok(turn), Placement::Thread) => match turn.lease() {
                Ok(lease) => self.start_thread(lease),
                Err(error) => self.promise.error(error),
            },
            (Ok(turn), Placement::Process) => self.start_in_process(turn),
        }
    }

    fn start_thread(mut self, lease: Arc<Lease>) {
        let object = Arc::downgrade(&self.promise.object());
        let spawned = threads::run(self.options.resources.threads(), move || {
            let limit = self.watch_time();
            let current =
                Current { object: Some(self.promise.object()), lease: Some(Arc::clone(&lease)) };
            let result = current::run(current, || self.run_here());
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

    fn start_in_process(self, turn: Turn) {
        let host = match self.runtime.host() {
            Ok(host) => host.clone(),
            Err(error) => return self.promise.error(error),
        };
        let Some(Body::Remote(call)) = &self.body else { return };
        let (function, args) = (call.name, self.args.clone());
        let (name, object) = (Arc::clone(self.promise.name()), self.promise.object());
        let (timeout, memory_limit) = (self.options.timeout, self.options.memory_limit);
        let finish = Box::new(move |ended| self.process_ended(ended));
        host.pool().begin(
            turn,
            PoolCall { task: name, function, args, timeout, memory_limit, object, finish },
        );
    }

    fn process_ended(self, ended: Ended) {
        let decode = match &self.body {
            Some(Body::Remote(call)) => call.decode,
            _ => return,
        };
        match ended {
            Ended::Value(parcel) => self.promise.encoded_with(parcel, decode),
            Ended::Error(error) => self.finish(Err(error)),
            Ended::NotStarted => self.enqueue_again(),
        }
    }

    fn finish(mut self, result: Result<T, Error>) {
        match result {
            Err(error) if self.can_retry(&error) => {
                self.failed += 1;
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
