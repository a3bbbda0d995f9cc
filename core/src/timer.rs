//! What is to happen later: one thread, which starts when it is first needed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Action = Box<dyn FnOnce() + Send>;

struct Entry {
    at: Instant,
    order: u64,
    action: Action,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Entry {}

#[derive(Default)]
struct Timer {
    entries: Mutex<Entries>,
    changed: Condvar,
}

#[derive(Default)]
struct Entries {
    heap: BinaryHeap<Reverse<Entry>>,
    count: u64,
    is_running: bool,
}

static TIMER: LazyLock<Timer> = LazyLock::new(Timer::default);

/// Runs `action` on the timer's thread after `delay`; it must be short.
pub(crate) fn after(delay: Duration, action: impl FnOnce() + Send + 'static) {
    // Later than there are times is never.
    let Some(at) = Instant::now().checked_add(delay) else { return };
    let mut entries = TIMER.entries();
    entries.count += 1;
    let entry = Entry { at, order: entries.count, action: Box::new(action) };
    entries.heap.push(Reverse(entry));
    if !entries.is_running {
        let thread = std::thread::Builder::new().name("mobula-timer".to_owned());
        entries.is_running = thread.spawn(|| TIMER.run()).is_ok();
    }
    TIMER.changed.notify_one();
}

impl Timer {
    fn run(&self) {
        let mut entries = self.entries();
        loop {
            let now = Instant::now();
            let due = entries.heap.peek().map(|Reverse(entry)| entry.at);
            entries = match due {
                None => self.changed.wait(entries).unwrap_or_else(PoisonError::into_inner),
                Some(at) if at > now => {
                    let waited = self.changed.wait_timeout(entries, at - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    let entry = entries.heap.pop();
                    drop(entries);
                    if let Some(Reverse(entry)) = entry
                        && catch_unwind(AssertUnwindSafe(entry.action)).is_err()
                    {
                        tracing::error!("what was to happen later panicked");
                    }
                    self.entries()
                }
            };
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
