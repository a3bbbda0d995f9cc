//! Between a producer and its consumer: the values that have arrived and were not taken.

use super::window::Window;
use crate::parcel::Parcel;
use crate::{Error, current};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

pub(super) struct Channel<T> {
    name: Arc<str>,
    state: Mutex<State<T>>,
    /// For the consumer.
    ready: Condvar,
    /// For producers on threads.
    room: Condvar,
}

struct State<T> {
    window: Window,
    values: VecDeque<Item<T>>,
    /// The task has ended, or nobody wants its values.
    is_closed: bool,
    consumer: Option<Waker>,
    /// The producer, if it lives in another process.
    far: Option<Tell>,
}

/// Tells a producer below which number it may send.
pub(crate) type Tell = Arc<dyn Fn(u64) + Send + Sync>;

/// A value as a thread gave it, or as it came from another process: that one is decoded by who
/// takes it.
enum Item<T> {
    Value(Arc<T>),
    Encoded(Parcel, fn(&Parcel) -> Result<T, Error>),
}

impl<T> Item<T> {
    fn value(self) -> Result<Arc<T>, Error> {
        match self {
            Self::Value(value) => Ok(value),
            Self::Encoded(parcel, decode) => decode(&parcel).map(Arc::new),
        }
    }
}

/// What the consumer finds.
pub(super) enum Next<T> {
    Value(Result<Arc<T>, Error>),
    /// There will be no more.
    Closed,
    /// Nothing came in time.
    Late,
}

impl<T> Channel<T> {
    pub(super) fn new(name: Arc<str>, size: usize) -> Arc<Self> {
        let state = State {
            window: Window::new(size),
            values: VecDeque::new(),
            is_closed: false,
            consumer: None,
            far: None,
        };
        let (ready, room) = (Condvar::new(), Condvar::new());
        Arc::new(Self { name, state: Mutex::new(state), ready, room })
    }

    /// Waits for room, then puts value number `number` in. Skips one that is in already.
    fn put(&self, number: u64, value: T) -> Result<(), Error> {
        let mut state = self.state();
        let must_wait = |state: &mut State<T>| !state.is_closed && number >= state.window.granted();
        state = self.room.wait_while(state, must_wait).unwrap_or_else(PoisonError::into_inner);
        if state.is_closed {
            return Err(Error::Cancelled { task: self.name.to_string() });
        }
        if state.window.arrive(number) {
            state.values.push_back(Item::Value(Arc::new(value)));
            self.wake(state);
        }
        Ok(())
    }

    fn wake(&self, mut state: MutexGuard<'_, State<T>>) {
        let consumer = state.consumer.take();
        drop(state);
        self.ready.notify_one();
        if let Some(consumer) = consumer {
            consumer.wake();
        }
    }

    /// Waits for the next value, until the deadline if there is one. A task that waits lends its
    /// CPUs.
    pub(super) fn next(&self, deadline: Option<Instant>) -> Next<T> {
        if let Some(next) = self.take(self.state()) {
            return next;
        }
        let _lent = current::lend();
        let mut state = self.state();
        while state.is_waited_for() {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            state = match left {
                None => self.ready.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break,
                Some(left) => {
                    let waited = self.ready.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        self.take(state).unwrap_or(Next::Late)
    }

    pub(super) fn poll(&self, context: &Context<'_>) -> Poll<Next<T>> {
        let mut state = self.state();
        if state.is_waited_for() {
            state.consumer = Some(context.waker().clone());
            return Poll::Pending;
        }
        self.take(state).map_or(Poll::Pending, Poll::Ready)
    }

    fn take(&self, mut state: MutexGuard<'_, State<T>>) -> Option<Next<T>> {
        let Some(item) = state.values.pop_front() else {
            return state.is_closed.then_some(Next::Closed);
        };
        let grant = state.window.take();
        let far = state.far.clone();
        drop(state);
        if let Some(grant) = grant {
            self.room.notify_all();
            far.inspect(|tell| tell(grant));
        }
        Some(Next::Value(item.value()))
    }

    /// No more values are wanted: what is there is dropped.
    pub(super) fn abandon(&self) {
        let values = std::mem::take(&mut self.state().values);
        drop(values);
        self.close();
    }

    fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        state.far = None;
        self.room.notify_all();
        self.wake(state);
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        lock(&self.state)
    }
}

impl<T> State<T> {
    fn is_waited_for(&self) -> bool {
        self.values.is_empty() && !self.is_closed
    }
}

/// Closes the channel when the task has ended.
pub(super) struct End<T>(pub(super) Weak<Channel<T>>);

impl<T: Send + Sync> Wake for End<T> {
    fn wake(self: Arc<Self>) {
        if let Some(channel) = self.0.upgrade() {
            channel.close();
        }
    }
}

/// One run of a producer on a thread.
pub(super) struct Attempt<T> {
    channel: Arc<Channel<T>>,
    /// The number of its next value. Locked while that waits for room: who else sends comes after.
    next: Mutex<u64>,
}

impl<T> Attempt<T> {
    pub(super) fn new(channel: &Arc<Channel<T>>) -> Arc<Self> {
        Arc::new(Self { channel: Arc::clone(channel), next: Mutex::new(0) })
    }

    pub(super) fn send(&self, value: T) -> Result<(), Error> {
        let mut next = lock(&self.next);
        self.channel.put(*next, value)?;
        *next += 1;
        Ok(())
    }
}

/// Takes in the values of a producer in another process.
pub(crate) trait Intake: Send + Sync {
    /// An attempt begins: the values below the first number are here, and it may send those below
    /// the second.
    fn begin(&self) -> (u64, u64);

    /// The attempt that was told to send values below `granted` hears of more in this way.
    fn connect(&self, granted: u64, tell: Tell);

    /// Values that have come, the first of this number.
    fn take_in(&self, first: u64, values: Vec<Parcel>);
}

pub(super) struct FarValues<T> {
    pub(super) channel: Arc<Channel<T>>,
    pub(super) decode: fn(&Parcel) -> Result<T, Error>,
}

impl<T: Send + Sync> Intake for FarValues<T> {
    fn begin(&self) -> (u64, u64) {
        let state = self.channel.state();
        (state.window.arrived(), state.window.granted())
    }

    fn connect(&self, granted: u64, tell: Tell) {
        let mut state = self.channel.state();
        let now = state.window.granted();
        if state.is_closed {
            return;
        }
        state.far = Some(Arc::clone(&tell));
        drop(state);
        if now > granted {
            tell(now);
        }
    }

    fn take_in(&self, first: u64, values: Vec<Parcel>) {
        let mut state = self.channel.state();
        for (number, parcel) in (first..).zip(values) {
            if !state.is_closed && state.window.arrive(number) {
                state.values.push_back(Item::Encoded(parcel, self.decode));
            }
        }
        self.channel.wake(state);
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
