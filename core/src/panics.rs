//! Panics as values: message and place are kept, and no trace is printed over the program's own
//! output.

use crate::error::chain;
use crate::{BoxError, Error};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::{Mutex, Once, PoisonError};

/// Message and location of the last panic on this thread, while [`catch`] is running.
struct Caught {
    message: String,
    location: String,
}

/// The last panic on a thread of a pool.
static IN_POOL: Mutex<Option<Caught>> = Mutex::new(None);

thread_local! {
    static POOL_THREAD: Cell<bool> = const { Cell::new(false) };
    static CATCHING: RefCell<Option<Option<Caught>>> = const { RefCell::new(None) };
}

/// Runs `body` in a `tracing` span of the task; an error becomes [`Error::TaskFailed`], a panic
/// [`Error::TaskPanicked`].
pub(crate) fn catch<T>(task: &str, body: impl FnOnce() -> Result<T, BoxError>) -> Result<T, Error> {
    install_hook();
    let _span = tracing::info_span!("task", name = task).entered();
    CATCHING.with_borrow_mut(|slot| *slot = Some(None));
    let outcome = catch_unwind(AssertUnwindSafe(body));
    let caught = CATCHING.with_borrow_mut(Option::take).flatten();
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(failed(task, error)),
        Err(payload) => Err(panicked(task, caught, &*payload)),
    }
}

fn failed(task: &str, error: BoxError) -> Error {
    Error::TaskFailed { task: task.to_owned(), message: chain(&*error) }
}

/// What was caught on this thread; else, for a panic that a thread of the pool handed on, what
/// was last caught there, if it is the same.
fn panicked(task: &str, caught: Option<Caught>, payload: &(dyn Any + Send)) -> Error {
    let message = text(payload);
    let elsewhere = || IN_POOL.lock().unwrap_or_else(PoisonError::into_inner).take();
    let caught = caught.or_else(|| elsewhere().filter(|caught| caught.message == message));
    let location = caught.map_or_else(|| "an unknown place".to_owned(), |c| c.location);
    Error::TaskPanicked { task: task.to_owned(), message, location }
}

/// Marks this thread as one of a pool that works for tasks: a panic on it is theirs to report.
pub(crate) fn keep_quiet_here() {
    POOL_THREAD.set(true);
}

fn install_hook() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !record(info) {
                previous(info);
            }
        }));
    });
}

/// Keeps the panic if this thread is inside [`catch`], or works for one that is.
fn record(info: &PanicHookInfo<'_>) -> bool {
    let caught = || Caught {
        message: text(info.payload()),
        location: info.location().map_or_else(String::new, ToString::to_string),
    };
    let here = CATCHING.with_borrow_mut(|slot| match slot {
        Some(slot) => {
            *slot = Some(caught());
            true
        }
        None => false,
    });
    if !here && POOL_THREAD.get() {
        *IN_POOL.lock().unwrap_or_else(PoisonError::into_inner) = Some(caught());
    }
    here || POOL_THREAD.get()
}

fn text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a value that is not text".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_task_logs_says_which_task() {
        let lines = Lines::default();
        let copy = lines.clone();
        let writer = move || copy.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish();
        tracing::subscriber::with_default(subscriber, || {
            let said = || {
                tracing::info!("inside");
                Ok(())
            };
            catch("sum", said).expect("runs");
        });
        let text = String::from_utf8(lines.0.lock().expect("no panic").clone()).expect("text");
        assert!(text.contains("task{name=\"sum\"}") && text.contains("inside"), "{text}");
    }
}
