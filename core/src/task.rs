//! Tasks: pieces of work that the runtime places, runs, and runs again if asked.

pub use crate::current::cancelled;
use crate::object::AnyObject;
use crate::remote::{Inputs, RemoteCall};
use crate::{BoxError, Bundle, Error, Node, ObjectRef, PlacementStrategy, Resources};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// Where a task or an actor runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// On a thread of this process: shares memory, starts in microseconds.
    #[default]
    Thread,
    /// In a process of its own: survives the crash of others, can be killed, has its own threads.
    Process,
}

/// Whether work that reports on itself goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "work that is told to stop should return"]
pub enum Flow {
    /// Go on.
    Continue,
    /// Wind up and return `Ok`.
    Stop,
}

impl Flow {
    /// Stop if `stop`, else go on.
    pub fn stop_if(stop: bool) -> Self {
        if stop { Self::Stop } else { Self::Continue }
    }

    /// Whether this says stop.
    pub fn is_stop(self) -> bool {
        self == Self::Stop
    }
}

/// How long to wait before the next attempt: `initial` after the first one, then `factor` times
/// longer each time, up to `max`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Backoff {
    /// Before the second attempt. Default: 50 ms.
    pub initial: Duration,
    /// Growth from wait to wait. Default: 2.
    pub factor: f64,
    /// No wait is longer. Default: 10 s.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { initial: Duration::from_millis(50), factor: 2.0, max: Duration::from_secs(10) }
    }
}

impl Backoff {
    /// The wait after so many failed attempts (1 or more).
    pub fn delay(&self, failed: u32) -> Duration {
        let exponent = i32::try_from(failed.saturating_sub(1)).unwrap_or(i32::MAX);
        let seconds = self.initial.as_secs_f64() * self.factor.powi(exponent);
        // Too large or not a number becomes the longest wait.
        Duration::try_from_secs_f64(seconds).map_or(self.max, |delay| delay.min(self.max))
    }
}

/// How a task is placed, retried and ended. Every default is here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TaskOptions {
    /// What it holds while it runs. Default: 1 CPU.
    pub resources: Resources,
    /// Where it runs. Default: a thread.
    pub placement: Placement,
    /// On which node it goes, where there are several. Default: pack.
    pub strategy: PlacementStrategy,
    /// The bundle of a placement group that it takes its resources from. Default: none.
    pub bundle: Option<Bundle>,
    /// The only machine that it may run on. Default: any, and for threads the driver's.
    pub node: Option<Node>,
    /// How often it is run again after its worker process was lost or too slow, or its result was
    /// lost with another machine. Default: 0.
    pub max_retries: u32,
    /// Whether errors and panics of the task itself are retried too. Default: no. A closure that
    /// can run only once is never retried.
    pub retry_errors: bool,
    /// The wait between attempts.
    pub backoff: Backoff,
    /// How long one attempt may run. In a process it is killed then. On a thread its result is
    /// [`Error::Timeout`] then, [`cancelled`] says so to it, and it is not retried. Default: none.
    pub timeout: Option<Duration>,
    /// Bytes of resident memory beyond which its worker process is killed: the task is lost, and
    /// retried if asked. Threads share one memory, so for them there is no such limit.
    /// Default: none.
    pub memory_limit: Option<u64>,
}

impl Default for TaskOptions {
    fn default() -> Self {
        Self {
            resources: Resources::cpus(1.0),
            placement: Placement::Thread,
            strategy: PlacementStrategy::default(),
            bundle: None,
            node: None,
            max_retries: 0,
            retry_errors: false,
            backoff: Backoff::default(),
            timeout: None,
            memory_limit: None,
        }
    }
}

impl TaskOptions {
    /// Whether a task that has failed `failed` times so is to be run again.
    pub(crate) fn retries(&self, error: &Error, failed: u32) -> bool {
        let kind = match error {
            Error::WorkerLost { .. } => true,
            Error::Timeout { .. } => self.placement == Placement::Process,
            Error::TaskFailed { .. } | Error::TaskPanicked { .. } => self.retry_errors,
            _ => false,
        };
        kind && failed <= self.max_retries
    }
}

/// A piece of work that gives a `T`: a closure, or a call of a `#[remote]` function.
pub struct Task<T> {
    pub(crate) name: Arc<str>,
    pub(crate) options: TaskOptions,
    pub(crate) inputs: Vec<Arc<dyn AnyObject>>,
    pub(crate) body: Body<T>,
}

/// What a task runs: only a remote call can leave the process.
pub(crate) enum Body<T> {
    Once(Box<dyn FnOnce() -> Result<T, BoxError> + Send>),
    Repeatable(Box<dyn FnMut() -> Result<T, BoxError> + Send>),
    Remote(RemoteCall<T>),
}

impl<T> std::fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<T> Task<T> {
    /// A closure under a name that its errors will carry. Runs on a thread.
    pub fn new<E: Into<BoxError>>(
        name: impl Into<Arc<str>>,
        body: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Self {
        let body = Body::Once(Box::new(move || body().map_err(Into::into)));
        Self { name: name.into(), options: TaskOptions::default(), inputs: Vec::new(), body }
    }

    /// A closure that can be run again, for tasks with retries. Runs on a thread.
    pub fn repeatable<E: Into<BoxError>>(
        name: impl Into<Arc<str>>,
        mut body: impl FnMut() -> Result<T, E> + Send + 'static,
    ) -> Self {
        let body = Body::Repeatable(Box::new(move || body().map_err(Into::into)));
        Self { name: name.into(), options: TaskOptions::default(), inputs: Vec::new(), body }
    }

    /// A closure that starts when the results of other tasks are there, and is given them: an
    /// object, a `Vec` of objects, or a tuple of these. If one of them fails, the task fails with
    /// [`Error::InputFailed`], without running.
    ///
    /// ```
    /// use mobula_core::{Resources, Runtime, Task};
    ///
    /// let runtime = Runtime::local(Resources::cpus(2.0))?;
    /// let one = runtime.submit(Task::new("one", || Ok::<_, String>(1)));
    /// let two = runtime.submit(Task::new("two", || Ok::<_, String>(2)));
    /// let sum = runtime.submit(Task::with_inputs("sum", (one, two), |(a, b)| Ok::<_, String>(*a + *b)));
    /// assert_eq!(*sum.get()?, 3);
    /// # Ok::<(), mobula_core::Error>(())
    /// ```
    pub fn with_inputs<I: TaskInputs, E: Into<BoxError>>(
        name: impl Into<Arc<str>>,
        inputs: I,
        body: impl FnOnce(I::Values) -> Result<T, E> + Send + 'static,
    ) -> Self {
        let mut waits_for = Inputs::default();
        inputs.list(&mut waits_for);
        let run = move || body(inputs.values()?).map_err(Into::into);
        Self { inputs: waits_for.0, ..Self::new::<BoxError>(name, run) }
    }

    pub(crate) fn remote(name: impl Into<Arc<str>>, mut call: RemoteCall<T>) -> Self {
        let inputs = std::mem::take(&mut call.inputs).0;
        let (name, options) = (name.into(), TaskOptions::default());
        Self { name, options, inputs, body: Body::Remote(call) }
    }

    /// The same task under another name.
    pub fn named(self, name: impl Into<Arc<str>>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// The same task with these options.
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
}

/// What [`Task::with_inputs`] waits for, and what the closure gets: `Arc<T>` for an
/// `ObjectRef<T>`, a `Vec` for a `Vec`, a tuple for a tuple.
pub trait TaskInputs: Send + 'static {
    /// What the closure gets.
    type Values;

    #[doc(hidden)]
    fn list(&self, into: &mut Inputs);

    #[doc(hidden)]
    fn values(self) -> Result<Self::Values, Error>;
}

impl<T: Send + Sync + 'static> TaskInputs for ObjectRef<T> {
    type Values = Arc<T>;

    fn list(&self, into: &mut Inputs) {
        into.0.push(self.object());
    }

    fn values(self) -> Result<Arc<T>, Error> {
        self.get()
    }
}

impl<I: TaskInputs> TaskInputs for Vec<I> {
    type Values = Vec<I::Values>;

    fn list(&self, into: &mut Inputs) {
        self.iter().for_each(|input| input.list(into));
    }

    fn values(self) -> Result<Self::Values, Error> {
        self.into_iter().map(TaskInputs::values).collect()
    }
}

macro_rules! tuple_inputs {
    ($($name:ident $position:tt),+) => {
        impl<$($name: TaskInputs),+> TaskInputs for ($($name,)+) {
            type Values = ($($name::Values,)+);

            fn list(&self, into: &mut Inputs) {
                $(self.$position.list(into);)+
            }

            fn values(self) -> Result<Self::Values, Error> {
                Ok(($(self.$position.values()?,)+))
            }
        }
    };
}

tuple_inputs!(A 0);
tuple_inputs!(A 0, B 1);
tuple_inputs!(A 0, B 1, C 2);
tuple_inputs!(A 0, B 1, C 2, D 3);
tuple_inputs!(A 0, B 1, C 2, D 3, E 4);
tuple_inputs!(A 0, B 1, C 2, D 3, E 4, F 5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_up_to_the_longest() {
        let backoff = Backoff::default();
        let delays: Vec<u128> = (1..=4).map(|n| backoff.delay(n).as_millis()).collect();
        assert_eq!(delays, [50, 100, 200, 400]);
        assert_eq!(backoff.delay(u32::MAX), backoff.max);
    }

    #[test]
    fn only_what_was_asked_for_is_retried() {
        let lost = || Error::WorkerLost { task: "t".into(), reason: "r".into() };
        let failed = || Error::TaskFailed { task: "t".into(), message: "m".into() };
        let options = TaskOptions { max_retries: 2, ..TaskOptions::default() };
        assert!(options.retries(&lost(), 2) && !options.retries(&lost(), 3));
        assert!(!options.retries(&failed(), 1));
        assert!(TaskOptions { retry_errors: true, ..options }.retries(&failed(), 1));
    }
}
