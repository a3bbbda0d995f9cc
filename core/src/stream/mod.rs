//! Tasks that give many values, taken as they come.
//!
//! The producer is at most a buffer's length ahead of its consumer: then it waits, and keeps its
//! CPU while it does.

mod channel;
mod outbox;
mod window;

pub(crate) use channel::{Intake, Tell};
pub(crate) use outbox::Outbox;

use crate::parcel::{Outgoing, open_all};
use crate::remote::{Arguments, RemoteCall, RemoteFn, Value};
use crate::task::{Body, Placement, Task, TaskOptions};
use crate::{BoxError, Error, ObjectRef, Resources, Runtime};
use channel::{Attempt, Channel, End, FarValues, Next};
use serde::de::DeserializeOwned;
use std::any::Any;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Values that may wait for their consumer, unless the task says otherwise.
const BUFFER: usize = 64;

/// Where a task puts the values of its stream: the last parameter of a `#[mobula::remote]`
/// function, or what the closure of [`Task::stream`] is given.
pub struct Yield<T> {
    port: Port<T>,
}

enum Port<T> {
    /// Gone when the producer has returned.
    Here(Weak<Attempt<T>>),
    Far(Arc<Outbox>, fn(&T) -> Result<Outgoing, Error>),
}

impl<T> std::fmt::Debug for Yield<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Yield").finish_non_exhaustive()
    }
}

impl<T> Yield<T> {
    /// Gives a value, once the consumer is less than the buffer's length behind. A producer that
    /// waits here keeps its CPU.
    ///
    /// Errors when nobody wants more values, with [`Error::Cancelled`]: the producer should return.
    /// Also when the value cannot be encoded for another process.
    pub fn send(&self, value: T) -> Result<(), Error> {
        match &self.port {
            Port::Far(outbox, encode) => outbox.send(|| encode(&value)),
            Port::Here(attempt) => match attempt.upgrade() {
                Some(attempt) => attempt.send(value),
                None => Err(Error::Cancelled { task: "a producer that has returned".to_owned() }),
            },
        }
    }
}

/// Where the values of a registered function go.
#[doc(hidden)]
#[derive(Clone, Debug)]
pub struct Outlet(To);

#[derive(Clone, Debug)]
enum To {
    /// An [`Attempt`] of the right type.
    Here(Arc<dyn Any + Send + Sync>),
    Far(Arc<Outbox>),
}

impl Outlet {
    pub(crate) fn far(outbox: &Arc<Outbox>) -> Self {
        Self(To::Far(Arc::clone(outbox)))
    }

    pub(crate) fn open<T: Value>(self) -> Result<Yield<T>, Error> {
        let encode = |value: &T| Outgoing::new("a value of a stream", value);
        let port = match self.0 {
            To::Far(outbox) => Port::Far(outbox, encode),
            To::Here(attempt) => {
                let attempt = attempt.downcast::<Attempt<T>>();
                let wrong = |_| Error::Internal("a stream of another type".to_owned());
                Port::Here(Arc::downgrade(&attempt.map_err(wrong)?))
            }
        };
        Ok(Yield { port })
    }
}

/// A piece of work that gives many `T`, for [`Runtime::submit_stream`].
pub struct StreamTask<T> {
    name: Arc<str>,
    options: TaskOptions,
    buffer: usize,
    body: Producer<T>,
}

enum Producer<T> {
    Closure(Box<dyn FnMut(Yield<T>) -> Result<(), BoxError> + Send>),
    Remote(RemoteCall<T>),
}

impl<T> std::fmt::Debug for StreamTask<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamTask").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<T> StreamTask<T> {
    fn new(name: Arc<str>, body: Producer<T>) -> Self {
        Self { name, options: TaskOptions::default(), buffer: BUFFER, body }
    }

    /// The same task under another name.
    pub fn named(self, name: impl Into<Arc<str>>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// The same task with these options. One with retries is run again from its beginning, and
    /// must give the same values again: those that were delivered are skipped.
    pub fn with_options(self, options: TaskOptions) -> Self {
        Self { options, ..self }
    }

    /// The same task holding these resources.
    pub fn with_resources(mut self, resources: Resources) -> Self {
        self.options.resources = resources;
        self
    }

    /// The same task placed there. A closure placed in a process is refused when submitted.
    pub fn on(mut self, placement: Placement) -> Self {
        self.options.placement = placement;
        self
    }

    /// The same task with so many values (at least 1) that may wait for the consumer. Default: 64.
    pub fn with_buffer(self, buffer: usize) -> Self {
        Self { buffer: buffer.max(1), ..self }
    }
}

impl<T: Send + Sync + 'static> StreamTask<T> {
    /// The task without its values, which go into the channel.
    fn into_task(self, channel: &Arc<Channel<T>>) -> Task<()> {
        let channel = Arc::clone(channel);
        let mut inputs = Vec::new();
        let body = match self.body {
            Producer::Closure(mut body) => Body::Repeatable(Box::new(move || {
                let attempt = Attempt::new(&channel);
                body(Yield { port: Port::Here(Arc::downgrade(&attempt)) })
            })),
            Producer::Remote(mut call) => {
                inputs = std::mem::take(&mut call.inputs).0;
                match self.options.placement {
                    Placement::Thread => Body::Repeatable(Box::new(move || {
                        let outlet = Outlet(To::Here(Attempt::new(&channel)));
                        let args = open_all(&(call.encode)()?)?;
                        RemoteFn::find(call.name)?.yields(outlet.clone(), &args)
                    })),
                    Placement::Process => Body::Remote(call.streamed(channel)),
                }
            }
        };
        Task { name: self.name, options: self.options, inputs, body }
    }
}

impl<T: Send + Sync + 'static> RemoteCall<T> {
    /// The same call, whose values go into the channel.
    fn streamed(self, channel: Arc<Channel<T>>) -> RemoteCall<()> {
        let values = FarValues { channel, decode: self.decode };
        RemoteCall {
            name: self.name,
            inputs: self.inputs,
            decode: |_| Ok(()),
            encode: self.encode,
            values: Some(Arc::new(values)),
        }
    }
}

impl<T: Send + Sync + 'static> Task<T> {
    /// A closure that gives many values, taken as they come. Runs on a thread; runs again, from
    /// its beginning, if the task has retries.
    ///
    /// ```
    /// use mobula_core::{Error, Resources, Runtime, Task};
    ///
    /// let runtime = Runtime::local(Resources::cpus(1.0))?;
    /// let squares = Task::stream("squares", |out| (0..5).try_for_each(|i| out.send(i * i)));
    /// let values: Result<Vec<_>, Error> = runtime.submit_stream(squares).collect();
    /// assert_eq!(values?.iter().map(|square| **square).sum::<i32>(), 30);
    /// # Ok::<(), mobula_core::Error>(())
    /// ```
    pub fn stream<E: Into<BoxError>>(
        name: impl Into<Arc<str>>,
        mut body: impl FnMut(Yield<T>) -> Result<(), E> + Send + 'static,
    ) -> StreamTask<T> {
        let body = move |out| body(out).map_err(Into::into);
        StreamTask::new(name.into(), Producer::Closure(Box::new(body)))
    }
}

/// Describes a call of the function registered as `name`, which yields `T`s.
#[doc(hidden)]
pub fn stream_task<A: Arguments, T: DeserializeOwned>(
    name: &'static str,
    args: A::Described,
) -> StreamTask<T> {
    StreamTask::new(name.into(), Producer::Remote(RemoteCall::new::<A>(name, args)))
}

impl Runtime {
    /// Queues a task that gives many values, as [`Runtime::submit`] does one that gives one.
    pub fn submit_stream<T: Send + Sync + 'static>(&self, task: StreamTask<T>) -> ObjectStream<T> {
        let channel = Channel::new(Arc::clone(&task.name), task.buffer);
        let end = self.submit(task.into_task(&channel));
        let waker = Waker::from(Arc::new(End(Arc::downgrade(&channel))));
        if end.object().subscribe(waker.clone()).is_none() {
            waker.wake();
        }
        ObjectStream { channel, end, is_over: false }
    }
}

/// The values of a [`StreamTask`], in the order in which it gave them.
///
/// As an iterator it waits for the next one; a task that waits lends its CPUs meanwhile. It ends
/// with `None` when the task has returned `Ok`, and with one `Err`, after all values that came
/// before, when the task failed, panicked, was lost or took too long. Dropping it cancels the task.
#[must_use = "dropping it cancels the task"]
pub struct ObjectStream<T: Send + Sync + 'static> {
    channel: Arc<Channel<T>>,
    end: ObjectRef<()>,
    is_over: bool,
}

impl<T: Send + Sync + 'static> std::fmt::Debug for ObjectStream<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ObjectStream").field("task", &self.task()).finish_non_exhaustive()
    }
}

impl<T: Send + Sync + 'static> Drop for ObjectStream<T> {
    fn drop(&mut self) {
        self.cancel();
        self.channel.abandon();
    }
}

impl<T: Send + Sync + 'static> Iterator for ObjectStream<T> {
    type Item = Result<Arc<T>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let next = self.channel.next(None);
        self.found(next)
    }
}

impl<T: Send + Sync + 'static> std::iter::FusedIterator for ObjectStream<T> {}

impl<T: Send + Sync + 'static> ObjectStream<T> {
    /// The next value, waiting at most so long: then [`Error::Timeout`], which does not end the
    /// stream.
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<Result<Arc<T>, Error>> {
        if self.is_over {
            return None;
        }
        // Later than there are times is never.
        match self.channel.next(Instant::now().checked_add(timeout)) {
            Next::Late => {
                let what = self.end.task().to_owned();
                Some(Err(Error::Timeout { what, after: timeout }))
            }
            next => self.found(next),
        }
    }

    /// The next value, without blocking, as `futures::Stream` has it:
    /// `futures::stream::poll_fn(move |context| stream.poll_next(context))` is one.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Arc<T>, Error>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        self.channel.poll(context).map(|next| self.found(next))
    }

    /// Cancels the task, as [`ObjectRef::cancel`] does. What has come already can still be taken.
    pub fn cancel(&self) {
        if !self.end.is_ready() {
            self.end.cancel();
        }
    }

    /// The name of the task.
    pub fn task(&self) -> &str {
        self.end.task()
    }

    fn found(&mut self, next: Next<T>) -> Option<Result<Arc<T>, Error>> {
        let result = match next {
            Next::Value(value) => Some(value),
            Next::Closed => self.end.value().and_then(Result::err).map(Err),
            Next::Late => Some(Err(Error::Internal("woken without a value".to_owned()))),
        };
        if !matches!(result, Some(Ok(_))) {
            self.is_over = true;
            self.cancel();
        }
        result
    }
}
