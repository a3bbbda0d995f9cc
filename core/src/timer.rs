//! What is to happen later: one thread, which starts when it is first needed.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Action = Box<dyn FnOnce() + Send>;

/// When, and what came first of what is due at the same time.
type Key = (Instant, u64);

#[derive(Default)]
struct Timer {
    entries: Mutex<Entries>,
    changed: Condvar,
}

#[derive(Default)]
struct Entries {
    waiting: BTreeMap<Key, Action>,
    count: u64,
    is_running: bool,
}

static TIMER: LazyLock<Timer> = LazyLock::new(Timer::default);

/// Something that is to happen, and does not once this is dropped.
#[derive(Debug)]
#[must_use = "dropped, it does not happen"]
pub(crate) struct Later {
    key: Option<Key>,
}

impl Later {
    /// It happens whatever becomes of this.
    pub(crate) fn detach(mut self) {
        self.key = None;
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let action = TIMER.entries().waiting.remove(&key);
        // What it holds may be anything: not under the lock.
        drop(action);
    }
}

/// Runs `action` on the timer's thread after `delay`; it must be short.
pub(crate) fn after(delay: Duration, action: impl FnOnce() + Send + 'static) -> Later {
    // Later than there are times is never.
    let Some(at) = Instant::now().checked_add(delay) else { return Later { key: None } };
    let mut entries = TIMER.entries();
    entries.count += 1;
    let key = (at, entries.count);
    entries.waiting.insert(key, Box::new(action));
    if !entries.is_running {
        let thread = std::thread::Builder::new().name("mobula-timer".to_owned());
        entries.is_running = thread.spawn(|| TIMER.run()).is_ok();
    }
    let is_first = entries.waiting.first_key_value().is_some_and(|(first, _)| *first == key);
    drop(entries);
    if is_first {
        TIMER.changed.notify_one();
    }
    Later { key: Some(key) }
}

impl Timer {
    fn run(&self) {
        let mut entries = self.entries();
        loop {
            let now = Instant::now();
            let due = entries.waiting.first_key_value().map(|((at, _), _)| *at);
            entries = match due {
                None => self.changed.wait(entries).unwrap_or_else(PoisonError::into_inner),
                Some(at) if at > now => {
                    let waited = self.changed.wait_timeout(entries, at - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    let entry = entries.waiting.pop_first();
                    drop(entries);
                    if let Some((_, action)) = entry
                        && catch_unwind(AssertUnwindSafe(action)).is_err()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_due_happens() {
        let (sender, happened) = channel();
        let act = move || {
            let _ = sender.send(7);
        };
        after(Duration::from_millis(1), act).detach();
        assert_eq!(happened.recv_timeout(LONG), Ok(7));
    }

    #[test]
    fn what_is_called_off_holds_nothing_and_does_not_happen() {
        let held = Arc::new(());
        let copy = Arc::clone(&held);
        let later = after(LONG, move || drop(copy));
        assert_eq!(Arc::strong_count(&held), 2);
        drop(later);
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
