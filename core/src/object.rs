//! References to results that may not be there yet.
//!
//! A result wakes whoever waits for it: a blocked thread, an async task, or a task that has it as
//! an input. Wake-ups never nest, so a chain of a hundred thousand tasks needs no deep stack.

use crate::parcel::Parcel;
use crate::status::Ending;
use crate::{Error, current};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, IntoFuture};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// A future result. Clones refer to the same one.
///
/// It can be waited for ([`get`](Self::get), `.await`, [`wait`]), and it can be passed where a task
/// takes a `T`: the task then starts when the result is there.
pub struct ObjectRef<T> {
    slot: Arc<Slot<T>>,
}

impl<T> Clone for ObjectRef<T> {
    fn clone(&self) -> Self {
        Self { slot: Arc::clone(&self.slot) }
    }
}

impl<T> std::fmt::Debug for ObjectRef<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = match self.slot.outcome.get() {
            None => "pending",
            Some(Ok(_)) => "ready",
            Some(Err(_)) => "failed",
        };
        f.debug_struct("ObjectRef").field("task", &self.slot.name).field("state", &state).finish()
    }
}

struct Slot<T> {
    /// The task that gives the result.
    name: Arc<str>,
    outcome: OnceLock<Result<Payload<T>, Error>>,
    waiters: Mutex<Waiters>,
    cancelled: AtomicBool,
    /// What the task has submitted itself.
    children: Mutex<Vec<Weak<dyn AnyObject>>>,
    /// What ends the task from outside, where that can be done.
    kill: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

#[derive(Default)]
struct Waiters {
    next: u64,
    wakers: Vec<(u64, Waker)>,
}

/// A result as a thread gave it, or as it came from another process: that one is decoded when it
/// is first asked for, by who asks.
enum Payload<T> {
    Value {
        value: Arc<T>,
        encoded: OnceLock<Parcel>,
    },
    Encoded {
        parcel: Parcel,
        decode: fn(&Parcel) -> Result<T, Error>,
        value: Mutex<Option<Arc<T>>>,
    },
}

impl<T> Payload<T> {
    fn value(&self) -> Result<Arc<T>, Error> {
        match self {
            Self::Value { value, .. } => Ok(Arc::clone(value)),
            Self::Encoded { parcel, decode, value } => {
                let mut value = value.lock().unwrap_or_else(PoisonError::into_inner);
                // An error is not kept: a value that is lost with its machine may be made again.
                if let Some(value) = &*value {
                    return Ok(Arc::clone(value));
                }
                Ok(Arc::clone(value.insert(Arc::new(decode(parcel)?))))
            }
        }
    }
}

/// What a task gives its result to. One that is dropped without gives an error, so that nobody
/// waits for ever.
pub(crate) struct Promise<T: Send + Sync + 'static> {
    slot: Arc<Slot<T>>,
}

impl<T: Send + Sync + 'static> Drop for Promise<T> {
    fn drop(&mut self) {
        if self.slot.outcome.get().is_none() {
            self.slot.settle(Err(Error::Cancelled { task: self.slot.name.to_string() }));
        }
    }
}

impl<T: Send + Sync + 'static> Promise<T> {
    pub(crate) fn value(&self, value: T) {
        self.slot.settle(Ok(Payload::Value { value: Arc::new(value), encoded: OnceLock::new() }));
    }

    pub(crate) fn error(&self, error: Error) {
        self.slot.settle(Err(error));
    }

    pub(crate) fn resolve(&self, result: Result<T, Error>) {
        match result {
            Ok(value) => self.value(value),
            Err(error) => self.error(error),
        }
    }

    pub(crate) fn object(&self) -> Arc<dyn AnyObject> {
        Arc::clone(&self.slot) as Arc<dyn AnyObject>
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.slot.name
    }

    /// How the task ended. One that gives no result is cancelled by that.
    pub(crate) fn ending(&self) -> Ending {
        match self.slot.outcome.get() {
            Some(Ok(_)) => Ending::Finished,
            None | Some(Err(Error::Cancelled { .. })) => Ending::Cancelled,
            Some(Err(_)) => Ending::Failed,
        }
    }

    /// Whether there is a result, or the task was cancelled, which is one too.
    pub(crate) fn is_settled(&self) -> bool {
        self.slot.outcome.get().is_some()
    }
}

impl<T: DeserializeOwned + Send + Sync + 'static> Promise<T> {
    /// A result in the encoding of [`remote`](crate::remote).
    pub(crate) fn encoded(&self, parcel: Parcel) {
        self.encoded_with(parcel, |parcel| parcel.decode("the result"));
    }
}

impl<T: Send + Sync + 'static> Promise<T> {
    pub(crate) fn encoded_with(&self, parcel: Parcel, decode: fn(&Parcel) -> Result<T, Error>) {
        self.slot.settle(Ok(Payload::Encoded { parcel, decode, value: Mutex::default() }));
    }
}

/// An object of whatever type.
pub(crate) trait AnyObject: Send + Sync {
    fn name(&self) -> &Arc<str>;
    fn is_ready(&self) -> bool;
    fn error(&self) -> Option<Error>;
    /// Wakes once, when the result is there. `None` if it is there already.
    fn subscribe(&self, waker: Waker) -> Option<u64>;
    fn unsubscribe(&self, key: u64);
    fn is_cancelled(&self) -> bool;
    fn cancel(&self);
    /// Its task took too long: it is told to stop, and whoever waits gets the error.
    fn expire(&self, after: Duration);
    fn fail(&self, error: Error);
    /// Remembers what this object's task has submitted.
    fn adopt(&self, child: Weak<dyn AnyObject>);
    /// What [`AnyObject::cancel`] is to do as well; at once if it was cancelled already.
    fn on_cancel(&self, kill: Box<dyn FnOnce() + Send>);
}

impl<T> Slot<T> {
    fn settle(&self, outcome: Result<Payload<T>, Error>) {
        if self.outcome.set(outcome).is_ok() {
            drop(lock(&self.kill).take());
            self.wake();
        }
    }

    /// Settles it with an error before its task is told to stop: one that then gives a result after
    /// all is too late.
    fn call_off(&self, error: Error) {
        let is_new = self.outcome.set(Err(error)).is_ok();
        self.cancelled.store(true, Ordering::Release);
        if is_new {
            self.wake();
        }
    }

    fn wake(&self) {
        let waiters = std::mem::take(&mut lock(&self.waiters).wakers);
        wake_all(waiters.into_iter().map(|(_, waker)| waker));
    }
}

impl<T: Send + Sync> AnyObject for Slot<T> {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn is_ready(&self) -> bool {
        self.outcome.get().is_some()
    }

    fn error(&self) -> Option<Error> {
        self.outcome.get().and_then(|outcome| outcome.as_ref().err().cloned())
    }

    fn subscribe(&self, waker: Waker) -> Option<u64> {
        let mut waiters = lock(&self.waiters);
        if self.is_ready() {
            return None;
        }
        waiters.next += 1;
        let key = waiters.next;
        waiters.wakers.push((key, waker));
        Some(key)
    }

    fn unsubscribe(&self, key: u64) {
        lock(&self.waiters).wakers.retain(|(other, _)| *other != key);
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    fn cancel(&self) {
        self.call_off(Error::Cancelled { task: self.name.to_string() });
        let kill = lock(&self.kill).take();
        if let Some(kill) = kill {
            kill();
        }
        let children = std::mem::take(&mut *lock(&self.children));
        children.iter().filter_map(Weak::upgrade).for_each(|child| child.cancel());
    }

    fn expire(&self, after: Duration) {
        if !self.is_ready() {
            self.call_off(Error::Timeout { what: self.name.to_string(), after });
            drop(lock(&self.kill).take());
        }
    }

    fn fail(&self, error: Error) {
        self.settle(Err(error));
    }

    fn adopt(&self, child: Weak<dyn AnyObject>) {
        let mut children = lock(&self.children);
        if children.len() >= 64 && children.len().is_power_of_two() {
            children.retain(|child| child.upgrade().is_some_and(|child| !child.is_ready()));
        }
        children.push(child);
        drop(children);
        // One that was submitted after the cancellation.
        if self.is_cancelled() {
            let late = std::mem::take(&mut *lock(&self.children));
            late.iter().filter_map(Weak::upgrade).for_each(|child| child.cancel());
        }
    }

    fn on_cancel(&self, kill: Box<dyn FnOnce() + Send>) {
        let mut slot = lock(&self.kill);
        if !self.is_cancelled() {
            *slot = Some(kill);
            return;
        }
        drop(slot);
        kill();
    }
}

impl<T: Send + Sync + 'static> ObjectRef<T> {
    /// A result that is yet to come, and where to put it. It is a child of the task that runs on
    /// this thread, if any.
    pub(crate) fn pending(name: Arc<str>) -> (Self, Promise<T>) {
        let slot = Arc::new(Slot {
            name,
            outcome: OnceLock::new(),
            waiters: Mutex::default(),
            cancelled: AtomicBool::new(false),
            children: Mutex::default(),
            kill: Mutex::default(),
        });
        let child = Arc::downgrade(&slot);
        current::with(|task| task.object.as_ref().map(|parent| parent.adopt(child)));
        (Self { slot: Arc::clone(&slot) }, Promise { slot })
    }

    /// An error that is there.
    pub(crate) fn failed(name: Arc<str>, error: Error) -> Self {
        let (object, promise) = Self::pending(name);
        promise.error(error);
        object
    }

    /// A result that is there.
    pub(crate) fn ready(name: Arc<str>, value: T) -> Self {
        let (object, promise) = Self::pending(name);
        promise.value(value);
        object
    }

    /// Waits for the result. A task that waits for another one lends its CPUs meanwhile.
    pub fn get(&self) -> Result<Arc<T>, Error> {
        if self.slot.outcome.get().is_none() {
            let _lent = current::lend();
            block_on_objects(&[self], 1, None);
        }
        self.value().unwrap_or_else(|| Err(Error::Internal("woken without a result".to_owned())))
    }

    /// Waits for the result, at most so long.
    pub fn get_timeout(&self, timeout: Duration) -> Result<Arc<T>, Error> {
        if self.slot.outcome.get().is_none() {
            let _lent = current::lend();
            block_on_objects(&[self], 1, Some(timeout));
        }
        let late = || Error::Timeout { what: self.slot.name.to_string(), after: timeout };
        self.value().unwrap_or_else(|| Err(late()))
    }

    /// Whether the result is there.
    pub fn is_ready(&self) -> bool {
        self.slot.is_ready()
    }

    /// Cancels the task and what it has submitted: at once where it is queued, by force in a
    /// worker process. One that runs on a thread may ask [`cancelled`](crate::task::cancelled) and
    /// stop by itself; its result, if it gives one, is discarded.
    pub fn cancel(&self) {
        self.slot.cancel();
    }

    /// The name of the task that gives the result.
    pub fn task(&self) -> &str {
        &self.slot.name
    }

    pub(crate) fn object(&self) -> Arc<dyn AnyObject> {
        Arc::clone(&self.slot) as Arc<dyn AnyObject>
    }

    /// The result, if it is there.
    pub(crate) fn value(&self) -> Option<Result<Arc<T>, Error>> {
        self.slot.outcome.get().map(|outcome| match outcome {
            Ok(payload) => payload.value(),
            Err(error) => Err(error.clone()),
        })
    }

    /// The result in the encoding of [`remote`](crate::remote), if it is there.
    pub(crate) fn parcel(&self) -> Option<Result<Parcel, Error>>
    where
        T: Serialize,
    {
        let encode = |value: &Arc<T>| Parcel::new(&self.slot.name, &**value);
        self.slot.outcome.get().map(|outcome| match outcome {
            Err(error) => Err(error.clone()),
            Ok(Payload::Encoded { parcel, .. }) => Ok(parcel.clone()),
            Ok(Payload::Value { value, encoded }) => match encoded.get() {
                Some(parcel) => Ok(parcel.clone()),
                None => encode(value).map(|parcel| encoded.get_or_init(|| parcel).clone()),
            },
        })
    }
}

impl<T: Send + Sync + 'static> IntoFuture for ObjectRef<T> {
    type Output = Result<Arc<T>, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(Wait { object: self, key: None })
    }
}

struct Wait<T: Send + Sync + 'static> {
    object: ObjectRef<T>,
    key: Option<u64>,
}

impl<T: Send + Sync + 'static> Future for Wait<T> {
    type Output = Result<Arc<T>, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(key) = self.key.take() {
            self.object.slot.unsubscribe(key);
        }
        self.key = self.object.slot.subscribe(context.waker().clone());
        match self.object.value() {
            Some(value) => Poll::Ready(value),
            None => Poll::Pending,
        }
    }
}

impl<T: Send + Sync + 'static> Drop for Wait<T> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.object.slot.unsubscribe(key);
        }
    }
}

/// Waits until `count` of the objects are there, failed ones included, or the timeout is over.
/// Gives those that are there and those that are not, each in the order given: as Ray's `wait`.
///
/// ```
/// use mobula_core::{Resources, Runtime, Task, wait};
///
/// let runtime = Runtime::local(Resources::cpus(2.0))?;
/// let task = |i| Task::new(format!("task {i}"), move || Ok::<_, String>(i));
/// let mut pending: Vec<_> = (0..4).map(|i| runtime.submit(task(i))).collect();
/// while !pending.is_empty() {
///     let (ready, rest) = wait(pending, 1, None);
///     ready.iter().for_each(|object| println!("{:?}", object.get()));
///     pending = rest;
/// }
/// # Ok::<(), mobula_core::Error>(())
/// ```
pub fn wait<T: Send + Sync + 'static>(
    objects: Vec<ObjectRef<T>>,
    count: usize,
    timeout: Option<Duration>,
) -> (Vec<ObjectRef<T>>, Vec<ObjectRef<T>>) {
    let all: Vec<&ObjectRef<T>> = objects.iter().collect();
    if all.iter().filter(|object| object.is_ready()).count() < count.min(all.len()) {
        let _lent = current::lend();
        block_on_objects(&all, count, timeout);
    }
    objects.into_iter().partition(ObjectRef::is_ready)
}

/// Waits for all results, in the order given; the first error in that order otherwise.
pub fn collect<T: Send + Sync + 'static>(objects: &[ObjectRef<T>]) -> Result<Vec<Arc<T>>, Error> {
    let pending: Vec<&ObjectRef<T>> = objects.iter().filter(|object| !object.is_ready()).collect();
    if !pending.is_empty() {
        let _lent = current::lend();
        block_on_objects(&pending, pending.len(), None);
    }
    objects.iter().map(ObjectRef::get).collect()
}

/// Wakes a thread when enough objects are there.
struct Countdown {
    left: AtomicUsize,
    thread: Thread,
}

impl Wake for Countdown {
    fn wake(self: Arc<Self>) {
        let before = self
            .left
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| Some(left.saturating_sub(1)));
        if before == Ok(1) {
            self.thread.unpark();
        }
    }
}

/// Blocks this thread until `count` of the objects are there, or it is too late.
fn block_on_objects<T: Send + Sync + 'static>(
    objects: &[&ObjectRef<T>],
    count: usize,
    timeout: Option<Duration>,
) {
    // Later than there are times is never.
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let left = AtomicUsize::new(count.min(objects.len()));
    let countdown = Arc::new(Countdown { left, thread: std::thread::current() });
    let waker = Waker::from(Arc::clone(&countdown));
    let mut keys = Vec::new();
    for object in objects {
        match object.slot.subscribe(waker.clone()) {
            Some(key) => keys.push((object, key)),
            None => waker.wake_by_ref(),
        }
    }
    while countdown.left.load(Ordering::Acquire) > 0 {
        let Some(deadline) = deadline else {
            std::thread::park();
            continue;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        std::thread::park_timeout(left);
    }
    keys.into_iter().filter(|(object, _)| !object.is_ready()).for_each(|(object, key)| {
        object.slot.unsubscribe(key);
    });
}

/// Blocks this thread until all objects are there.
pub(crate) fn block_until_ready(objects: &[Arc<dyn AnyObject>]) {
    if objects.iter().all(|object| object.is_ready()) {
        return;
    }
    let _lent = current::lend();
    let left = AtomicUsize::new(objects.len());
    let countdown = Arc::new(Countdown { left, thread: std::thread::current() });
    let waker = Waker::from(Arc::clone(&countdown));
    for object in objects {
        if object.subscribe(waker.clone()).is_none() {
            waker.wake_by_ref();
        }
    }
    while countdown.left.load(Ordering::Acquire) > 0 {
        std::thread::park();
    }
}

/// Runs `launch` once: when all objects are there, with `None`, or as soon as one has failed, with
/// its name and error.
pub(crate) fn when_ready(
    objects: Vec<Arc<dyn AnyObject>>,
    launch: impl FnOnce(Option<(Arc<str>, Error)>) + Send + 'static,
) {
    let left = AtomicUsize::new(objects.len() + 1);
    let gate = Arc::new(Gate { left, launch: Mutex::new(Some(Box::new(launch))) });
    for object in objects {
        let input = Arc::new(Input { gate: Arc::clone(&gate), object: Arc::clone(&object) });
        let waker = Waker::from(input);
        if object.subscribe(waker.clone()).is_none() {
            waker.wake();
        }
    }
    gate.one_less();
}

type Launch = Box<dyn FnOnce(Option<(Arc<str>, Error)>) + Send>;

/// What starts when its inputs are there.
struct Gate {
    left: AtomicUsize,
    launch: Mutex<Option<Launch>>,
}

impl Gate {
    fn one_less(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.open(None);
        }
    }

    fn open(&self, failure: Option<(Arc<str>, Error)>) {
        let launch = lock(&self.launch).take();
        if let Some(launch) = launch {
            launch(failure);
        }
    }
}

struct Input {
    gate: Arc<Gate>,
    object: Arc<dyn AnyObject>,
}

impl Wake for Input {
    fn wake(self: Arc<Self>) {
        match self.object.error() {
            Some(error) => self.gate.open(Some((Arc::clone(self.object.name()), error))),
            None => self.gate.one_less(),
        }
    }
}

thread_local! {
    static WAKING: RefCell<Option<VecDeque<Waker>>> = const { RefCell::new(None) };
}

/// Wakes one after the other. What a wake-up settles is woken after it, not inside it.
fn wake_all(wakers: impl Iterator<Item = Waker>) {
    let is_nested = WAKING.with_borrow_mut(|queue| match queue {
        Some(_) => true,
        None => {
            *queue = Some(VecDeque::new());
            false
        }
    });
    WAKING.with_borrow_mut(|queue| queue.get_or_insert_default().extend(wakers));
    if is_nested {
        return;
    }
    while let Some(waker) = WAKING.with_borrow_mut(|queue| queue.as_mut()?.pop_front()) {
        // A panic of somebody's waker must not keep the others asleep.
        let woken = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        if woken.is_err() {
            tracing::error!("a waker panicked");
        }
    }
    WAKING.with_borrow_mut(|queue| *queue = None);
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
