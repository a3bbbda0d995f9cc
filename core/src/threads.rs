//! Threads that run user code: kept warm, each inside a rayon pool of the width it was asked for.
//!
//! Such a thread is itself the first of its pool, so a task of one CPU never changes threads. Its
//! pool is its own for good, which is why threads are kept by width.

use crate::{Error, panics};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Backward passes recurse over the graph: threads that run user code get a deep stack. It is
/// address space, not memory, until it is used.
pub(crate) const STACK_BYTES: usize = 256 << 20;

/// A thread that nobody needed for so long ends.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

static PARKED: LazyLock<Mutex<HashMap<usize, Vec<Arc<Seat>>>>> = LazyLock::new(Mutex::default);

/// Where a parked thread waits for its next job.
#[derive(Default)]
struct Seat {
    job: Mutex<Option<Job>>,
    called: Condvar,
}

thread_local! {
    /// Set on the threads of this module.
    static OWN: RefCell<Option<Own>> = const { RefCell::new(None) };
}

struct Own {
    width: usize,
    /// Whether the current job is at its end, so that the thread takes the next one.
    winding_up: bool,
    next: Option<Job>,
}

/// Runs `job` on a thread whose rayon pool has `width` threads: this one, if it is about to be
/// free and fits, else one that is parked, else a new one.
pub(crate) fn run(width: usize, job: impl FnOnce() + Send + 'static) -> Result<(), Refused> {
    let Some(job) = keep_for_this_thread(width, Box::new(job)) else { return Ok(()) };
    let seat = lock(&PARKED).entry(width).or_default().pop();
    match seat {
        Some(seat) => {
            *lock(&seat.job) = Some(job);
            seat.called.notify_one();
            Ok(())
        }
        None => start(width, job),
    }
}

/// Runs the end of a job: the first job of the same width that it causes goes to this thread.
pub(crate) fn winding_up(end: impl FnOnce()) {
    set_winding_up(true);
    end();
    set_winding_up(false);
}

fn set_winding_up(yes: bool) {
    OWN.with_borrow_mut(|own| own.iter_mut().for_each(|own| own.winding_up = yes));
}

fn keep_for_this_thread(width: usize, job: Job) -> Option<Job> {
    OWN.with_borrow_mut(|own| match own {
        Some(own) if own.winding_up && own.width == width && own.next.is_none() => {
            own.next = Some(job);
            None
        }
        _ => Some(job),
    })
}

/// A job that found no thread, and why. Its owner may say so before it drops the job.
pub(crate) struct Refused {
    pub(crate) error: Error,
    _job: Option<Job>,
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        refused.error
    }
}

fn start(width: usize, job: Job) -> Result<(), Refused> {
    let thread = std::thread::Builder::new().name("mobula-task".to_owned()).stack_size(STACK_BYTES);
    let slot = Arc::new(Mutex::new(Some(job)));
    let copy = Arc::clone(&slot);
    let spawned = thread.spawn(move || {
        let job = lock(&copy).take();
        if let Some(job) = job {
            serve(width, job);
        }
    });
    spawned.map(drop).map_err(|source| {
        let error = Error::system("starting a thread", source);
        Refused { error, _job: lock(&slot).take() }
    })
}

/// Makes this thread the first of a pool of its own, for as long as the pool lives: what it hands
/// to rayon then never waits for another thread to wake up. `None` where the system has no more
/// threads; then it works with rayon's global pool, slower but right.
pub(crate) fn own_pool(width: usize) -> Option<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(width)
        .use_current_thread()
        .stack_size(STACK_BYTES)
        .start_handler(|_| panics::keep_quiet_here())
        .build();
    pool.inspect_err(|error| tracing::warn!(%error, width, "no thread pool for a task")).ok()
}

fn serve(width: usize, first: Job) {
    let _pool = own_pool(width);
    OWN.with_borrow_mut(|own| *own = Some(Own { width, winding_up: false, next: None }));
    let mut job = Some(first);
    while let Some(work) = job {
        work();
        let next = OWN.with_borrow_mut(|own| own.as_mut().and_then(|own| own.next.take()));
        job = next.or_else(|| wait(width));
    }
}

/// Waits to be called, for a while.
fn wait(width: usize) -> Option<Job> {
    let seat = Arc::new(Seat::default());
    lock(&PARKED).entry(width).or_default().push(Arc::clone(&seat));
    let waited = seat.called.wait_timeout_while(lock(&seat.job), IDLE, |job| job.is_none());
    if let Some(job) = waited.unwrap_or_else(PoisonError::into_inner).0.take() {
        return Some(job);
    }
    // Whoever took the seat from the list meanwhile is about to call.
    let mut parked = lock(&PARKED);
    let seats = parked.entry(width).or_default();
    let before = seats.len();
    seats.retain(|other| !Arc::ptr_eq(other, &seat));
    let is_called = seats.len() == before;
    drop(parked);
    is_called.then(|| {
        let called = seat.called.wait_while(lock(&seat.job), |job| job.is_none());
        called.unwrap_or_else(PoisonError::into_inner).take()
    })?
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_job_has_a_pool_of_its_width() {
        let (sender, widths) = channel();
        for width in [1, 3] {
            let sender = sender.clone();
            run(width, move || {
                let _ = sender.send(rayon::current_num_threads());
            })
            .map_err(Error::from)
            .expect("thread");
            assert_eq!(widths.recv().expect("the job ran"), width);
        }
    }

    #[test]
    fn the_job_that_an_end_causes_runs_on_the_same_thread() {
        let (sender, ids) = channel();
        let second = sender.clone();
        let id = || std::thread::current().id();
        run(1, move || {
            let _ = sender.send(id());
            winding_up(|| {
                run(1, move || {
                    let _ = second.send(id());
                })
                .map_err(Error::from)
                .expect("thread")
            });
        })
        .map_err(Error::from)
        .expect("thread");
        let (first, second) = (ids.recv().expect("first"), ids.recv().expect("second"));
        assert_eq!(first, second);
    }
}
