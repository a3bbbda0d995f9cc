//! Panics as values: message and place are kept, and no trace is printed over the program's own
//! output.

use crate::error::chain;
use crate::{BoxError, Error};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::Once;

/// Message and location of the last panic on this thread, while [`catch`] is running.
struct Caught {
    message: String,
    location: String,
}

thread_local! {
    static CATCHING: RefCell<Option<Option<Caught>>> = const { RefCell::new(None) };
}

/// Runs `body`; an error becomes [`Error::TaskFailed`], a panic [`Error::TaskPanicked`].
pub(crate) fn catch<T>(task: &str, body: impl FnOnce() -> Result<T, BoxError>) -> Result<T, Error> {
    install_hook();
    CATCHING.with_borrow_mut(|slot| *slot = Some(None));
    let outcome = catch_unwind(AssertUnwindSafe(body));
    let caught = CATCHING.with_borrow_mut(Option::take).flatten();
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(failed(task, error)),
        Err(_) => Err(panicked(task, caught)),
    }
}

/// The error of a task; one that already is a task's error keeps its own words.
fn failed(task: &str, error: BoxError) -> Error {
    Error::TaskFailed { task: task.to_owned(), message: chain(&*error) }
}

fn panicked(task: &str, caught: Option<Caught>) -> Error {
    let caught = caught.unwrap_or_else(|| Caught {
        message: "unknown panic".to_owned(),
        location: "an unknown place".to_owned(),
    });
    Error::TaskPanicked {
        task: task.to_owned(),
        message: caught.message,
        location: caught.location,
    }
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

/// Keeps the panic if this thread is inside [`catch`].
fn record(info: &PanicHookInfo<'_>) -> bool {
    CATCHING.with_borrow_mut(|slot| match slot {
        Some(caught) => {
            *caught = Some(Caught {
                message: message(info),
                location: info.location().map_or_else(String::new, ToString::to_string),
            });
            true
        }
        None => false,
    })
}

fn message(info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a value that is not text".to_owned())
}
