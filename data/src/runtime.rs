//! The crate's own async runtime, hidden behind a synchronous interface.

use crate::error::{Error, Result};
use datafusion::common::Result as EngineResult;
use datafusion::common::runtime::SpawnedTask;
use datafusion::execution::TaskContext;
use futures::{Stream, StreamExt, stream};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, mpsc};
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Semaphore;
use tokio::task::JoinError;

thread_local! {
    static OURS: Cell<bool> = const { Cell::new(false) };
}

static RUNTIME: LazyLock<std::io::Result<Runtime>> = LazyLock::new(|| {
    Builder::new_multi_thread()
        .worker_threads(threads())
        .thread_name("mobula-data")
        .on_thread_start(|| OURS.set(true))
        // Clients of stores and servers live on it.
        .enable_all()
        .build()
});

/// Blocks that are worked on at the same time.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Runs what may wait for others of the crate's threads: another goes on in the place of this one.
pub(crate) fn meanwhile<T>(run: impl FnOnce() -> T) -> T {
    if OURS.get() { tokio::task::block_in_place(run) } else { run() }
}

/// What a task of the crate's threads gave.
pub(crate) fn joined<T>(result: Result<Result<T>, JoinError>) -> Result<T> {
    result.unwrap_or_else(|error| {
        let Ok(panic) = error.try_into_panic() else {
            return Err(Error::Internal("a task was cancelled".to_owned()));
        };
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Error::Panicked { message: text.unwrap_or("(no message)").to_owned() })
    })
}

/// How many parts of a plan, for each thread, may wait for those before them to end.
const AHEAD: usize = 4;

/// The tasks of a query.
#[derive(Debug, Default)]
pub(crate) struct Tasks(AtomicUsize);

/// One of them, until this is dropped.
struct Task(Arc<Tasks>);

impl Task {
    fn of(context: &TaskContext) -> Self {
        let all = context.session_config().get_extension::<Tasks>().unwrap_or_default();
        all.0.fetch_add(1, Ordering::Relaxed);
        Self(all)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Tasks {
    /// Waits until those that were told to end have ended, and what they held is free; not for ever, as
    /// one may be in a function that takes long.
    pub(crate) async fn ended(&self) {
        let deadline = Instant::now() + LONGEST_END;
        while self.0.load(Ordering::Relaxed) > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

const LONGEST_END: Duration = Duration::from_secs(10);

/// Runs the parts of a plan as tasks, as many at a time as there are threads, and gives what they made in
/// their order. They end with whoever waits for them.
pub(crate) fn in_turn<T: Send + 'static, F: Future<Output = EngineResult<T>> + Send + 'static>(
    parts: usize,
    context: Arc<TaskContext>,
    run: impl Fn(usize) -> F,
) -> impl Stream<Item = EngineResult<T>> {
    let free = Arc::new(Semaphore::new(threads()));
    let start = move |part| {
        let (free, run, task) = (free.clone(), run(part), Task::of(&context));
        async move {
            let begin = async move {
                let _task = task;
                // It is never closed.
                let _one = free.acquire().await;
                run.await
            };
            match SpawnedTask::spawn(begin).join().await {
                Ok(result) => result,
                Err(error) => Ok(joined(Err(error))?),
            }
        }
    };
    stream::iter(0..parts).map(start).buffered(threads() * AHEAD)
}

/// What runs on the crate's own threads.
#[derive(Debug)]
pub(crate) struct Pending<T>(mpsc::Receiver<Result<T>>);

impl<T> Pending<T> {
    pub(crate) fn wait(self) -> Result<T> {
        let wait = || self.0.recv();
        // One of the threads that it may wait for goes on as another.
        let result = if OURS.get() { tokio::task::block_in_place(wait) } else { wait() };
        result.unwrap_or_else(|_| Err(Error::Internal("the data layer has ended".to_owned())))
    }
}

/// Runs `future` on the crate's own threads.
pub(crate) fn spawn<T: Send + 'static>(
    future: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<Pending<T>> {
    let runtime = RUNTIME.as_ref().map_err(|error| Error::Internal(error.to_string()))?;
    let (sender, receiver) = mpsc::sync_channel(1);
    let task = runtime.spawn(future);
    runtime.spawn(async move {
        // The receiver is gone only if nobody waits any more.
        let _ = sender.send(joined(task.await));
    });
    Ok(Pending(receiver))
}

/// Runs what may wait on the crate's own threads, for who is on others that must not.
#[cfg(feature = "backend")]
pub(crate) async fn on_our_threads<T: Send + 'static>(
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let runtime = RUNTIME.as_ref().map_err(|error| Error::Internal(error.to_string()))?;
    joined(runtime.spawn(async move { meanwhile(run) }).await)
}

/// Runs `future` on the crate's own threads and waits for it.
///
/// The caller may be a thread of another tokio runtime, where `Runtime::block_on` would panic:
/// the wait is on a plain channel. It may also be one of the crate's own, in a batch function or for
/// a block that is made of others; that thread's other work goes to another thread meanwhile.
pub(crate) fn block_on<T: Send + 'static>(
    future: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    if OURS.get() {
        return meanwhile(|| Handle::current().block_on(future));
    }
    spawn(future)?.wait()
}
