//! Worker processes: started by one thread, talked to over one stream each, gone with the driver.

mod affinity;
mod cgroup;
pub(crate) mod child;
mod desk;
mod ending;
pub(crate) mod forkserver;
mod handle;
mod idle;
mod link;
mod logs;
mod memory;
pub(crate) mod pool;
mod progress;
pub(crate) mod spawn;
pub(crate) mod wire;
mod worker;

pub(crate) use link::{End, Listener, Owner, Sink, WorkerEvent};
pub(crate) use logs::LogTarget;
pub(crate) use memory::resident_bytes;
pub(crate) use progress::{Begun, LANES};
pub(crate) use worker::{ProcessId, WorkerLink};

use progress::Progress;

use crate::parcel::Parcel;
use crate::scheduler::{Grant, NodeId};
use crate::{Error, nodes, timeline};
use affinity::Cpus;
use handle::Process;
use link::LocalLink;
use pool::Pool;
use serde::{Deserialize, Serialize};
use spawn::Spawner;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use wire::{Assignment, Outcome};

/// Events of a worker that may wait for their reader; then the worker waits too.
pub(crate) const EVENTS: usize = 1024;
const SHUTDOWN_GRACE: Duration = Duration::from_millis(500);

/// Starts workers and knows all that are alive.
#[derive(Clone)]
pub(crate) struct ProcessHost {
    tokio: tokio::runtime::Handle,
    spawner: Spawner,
    alive: Arc<Mutex<Alive>>,
    pool: Pool,
    cpus: Cpus,
}

/// What a worker is to have, beside what its driver has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Environment {
    /// The machine that it runs on.
    pub(crate) node: NodeId,
    threads: usize,
    /// Of its node's GPUs.
    gpus: Vec<usize>,
    /// Bytes of memory beyond which it is killed.
    memory_limit: Option<u64>,
    /// CPUs that it is bound to; 0 lets it run on all.
    bound_cpus: usize,
}

impl Environment {
    /// What was granted: threads for the CPUs, which are its own if workers are bound to CPUs and
    /// these are whole ones, and the GPUs.
    pub(crate) fn of(grant: &Grant) -> Self {
        Self {
            node: grant.node,
            threads: grant.threads(),
            gpus: grant.gpus.clone(),
            memory_limit: None,
            bound_cpus: if affinity::is_on() { grant.whole_cpus() } else { 0 },
        }
    }

    pub(crate) fn with_memory_limit(self, memory_limit: Option<u64>) -> Self {
        Self { memory_limit, ..self }
    }

    /// Whether there is a GPU that both see.
    fn shares_gpus(&self, other: &Self) -> bool {
        self.node == other.node && self.gpus.iter().any(|gpu| other.gpus.contains(gpu))
    }

    /// Tells a new process. One that has ended already is not told, and its end says why.
    fn assign(self, progress: &Progress, control: &mut UnixStream) -> Result<(), Error> {
        let mut environment = vec![
            ("RAYON_NUM_THREADS".to_owned(), self.threads.to_string()),
            (progress::PROGRESS_VARIABLE.to_owned(), progress.descriptor().to_string()),
        ];
        if crate::resources::visible_gpus() > 0 {
            environment.push(("CUDA_VISIBLE_DEVICES".to_owned(), gpu_ids(&self.gpus)));
        }
        let bytes = crate::remote::encode("an assignment", &Assignment { environment })?;
        let message = [&(bytes.len() as u32).to_le_bytes()[..], &bytes].concat();
        match control.write_all(&message) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(Error::system("assigning a worker process", error))
            }
            _ => Ok(()),
        }
    }
}

/// GPUs as CUDA is to see them: this process's own list decides what the first one is.
fn gpu_ids(granted: &[usize]) -> String {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    let names: Vec<&str> = visible.split(',').map(str::trim).collect();
    let name = |gpu: &usize| match names.get(*gpu) {
        Some(name) if !name.is_empty() => (*name).to_owned(),
        _ => gpu.to_string(),
    };
    granted.iter().map(name).collect::<Vec<_>>().join(",")
}

/// The processes that are to end with the driver.
#[derive(Default)]
struct Alive {
    /// With what they are for.
    processes: Vec<(Weak<Process>, String)>,
    closing: bool,
}

/// A worker process, as others see it.
pub(crate) struct WorkerView {
    pub(crate) process: ProcessId,
    /// What it is for.
    pub(crate) name: String,
}

impl ProcessHost {
    pub(crate) fn new(tokio: tokio::runtime::Handle) -> Result<Self, Error> {
        let cpus = Cpus::of_this_machine()?;
        let (spawner, pool) = (Spawner::start()?, Pool::new(cpus.clone())?);
        Ok(Self { tokio, spawner, alive: Arc::default(), pool, cpus })
    }

    pub(crate) fn tokio(&self) -> &tokio::runtime::Handle {
        &self.tokio
    }

    /// Starts a worker on the node that its environment names.
    pub(crate) fn start(
        &self,
        environment: Environment,
        log: LogTarget,
        sink: Sink,
    ) -> Result<WorkerLink, Error> {
        self.pool.make_room(&environment);
        if environment.node == NodeId::HERE {
            return self.start_here(environment, log, sink).map(WorkerLink::Here);
        }
        nodes::hub()?.start(environment, log, sink).map(WorkerLink::There)
    }

    /// Starts a worker on this machine, whichever node it is.
    pub(crate) fn start_here(
        &self,
        environment: Environment,
        log: LogTarget,
        sink: Sink,
    ) -> Result<LocalLink, Error> {
        let progress = Progress::create()?;
        let mut started = self.spawner.spawn()?;
        let name = log.name.clone();
        timeline::process_started(started.process.pid(), &name);
        started.process.bind(self.cpus.bind(environment.bound_cpus));
        let memory_limit = environment.memory_limit;
        if let Some(limit) = memory_limit {
            started.process.confine(limit);
        }
        environment.assign(&progress, &mut started.control)?;
        let link = LocalLink::new(started, progress, log, sink, &self.tokio)?;
        // So that there is something to say of one that ends at once.
        link.process().see_memory();
        if let Some(limit) = memory_limit {
            memory::limit(link.process(), limit);
        }
        let mut alive = self.alive();
        if alive.closing {
            // The link is dropped, and its process ends.
            return Err(Error::Cancelled { task: "starting a worker process".to_owned() });
        }
        alive.processes.retain(|(process, _)| process.strong_count() > 0);
        alive.processes.push((Arc::downgrade(link.process()), name));
        Ok(link)
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Those of this machine that are alive, the oldest first.
    pub(crate) fn workers(&self) -> Vec<WorkerView> {
        let processes: Vec<(Arc<Process>, String)> = {
            let alive = self.alive();
            let processes = alive.processes.iter();
            processes
                .filter_map(|(process, name)| Some((process.upgrade()?, name.clone())))
                .collect()
        };
        let lives =
            processes.into_iter().filter(|(process, _)| process.wait(Duration::ZERO).is_none());
        let view = |(process, name): (Arc<Process>, String)| WorkerView {
            process: process.pid().into(),
            name,
        };
        lives.map(view).collect()
    }

    /// Kills every worker and what they have started, starts no more, and waits for them to be gone.
    pub(crate) fn shutdown(&self) {
        let deadline = Instant::now() + SHUTDOWN_GRACE;
        for process in self.kill_all() {
            process.wait(deadline.saturating_duration_since(Instant::now()));
        }
        self.spawner.close(deadline.saturating_duration_since(Instant::now()));
    }

    /// Kills every worker and starts no more.
    pub(crate) fn kill_all(&self) -> Vec<Arc<Process>> {
        let mut alive = self.alive();
        alive.closing = true;
        let processes: Vec<_> =
            alive.processes.drain(..).filter_map(|(p, _)| p.upgrade()).collect();
        processes.iter().for_each(|process| process.kill());
        processes
    }

    fn alive(&self) -> MutexGuard<'_, Alive> {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// This binary's identity: size and modification time of the executable.
pub(crate) fn build_id() -> String {
    let Ok(meta) = std::fs::metadata("/proc/self/exe") else {
        return "unknown".to_owned();
    };
    let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    format!(
        "{}-{:x}-{:x}",
        env!("CARGO_PKG_VERSION"),
        meta.len(),
        modified.unwrap_or_default().as_nanos()
    )
}

pub(crate) fn check_build(got: &str) -> Result<(), Error> {
    let expected = build_id();
    if got == expected {
        return Ok(());
    }
    Err(Error::BuildMismatch { expected, got: got.to_owned() })
}

pub(crate) fn into_result(task: &str, outcome: Outcome) -> Result<Parcel, Error> {
    let task = task.to_owned();
    match outcome {
        // A worker that is gone has taken its large results with it.
        Outcome::Value(packed) => packed.adopt(&task).map_err(|error| {
            lost(&task, format!("it has ended, and its result went with its process: {error}"))
        }),
        Outcome::Failed { message } => Err(Error::TaskFailed { task, message }),
        Outcome::Panicked { message, location } => {
            Err(Error::TaskPanicked { task, message, location })
        }
        Outcome::InputLost { reason } => {
            Err(Error::ObjectLost { object: format!("an argument of {task}"), reason })
        }
    }
}

pub(crate) fn lost(task: &str, reason: String) -> Error {
    Error::WorkerLost { task: task.to_owned(), reason }
}
