//! The server: loads deployments, listens, and shuts down without losing a request.

use crate::batcher::Event;
use crate::dispatcher::Dispatcher;
use crate::http::{self, App};
use crate::metrics::ModelStats;
use crate::replica::{self, Replica};
use crate::{Deployment, Error};
use axum::serve::ListenerExt;
use mobula_core::Runtime;
use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Deployments that are loaded and about to be served.
pub struct Server {
    runtime: Runtime,
    loaded: Vec<(Deployment, Vec<Replica>)>,
    max_body_bytes: usize,
    body_timeout: Duration,
    http_threads: usize,
    handle: Option<Handle>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.loaded.iter().map(|(deployment, _)| &deployment.metadata.name);
        f.debug_list().entries(names).finish()
    }
}

impl Server {
    /// A server whose replicas are placed by `runtime`. Nothing starts yet.
    pub fn new(runtime: &Runtime) -> Self {
        Self {
            runtime: runtime.clone(),
            loaded: Vec::new(),
            max_body_bytes: 64 << 20,
            body_timeout: Duration::from_secs(30),
            http_threads: 1,
            handle: None,
        }
    }

    /// The same with another limit on the bytes of a request's body. Default 64 MiB.
    pub fn with_max_body_bytes(self, max_body_bytes: usize) -> Self {
        Self { max_body_bytes, ..self }
    }

    /// The same with another limit on the time that a request's body may take to arrive. Default
    /// 30 s.
    pub fn with_body_timeout(self, body_timeout: Duration) -> Self {
        Self { body_timeout, ..self }
    }

    /// The same with so many threads for HTTP and JSON, at least 1, which is the default: one
    /// thread keeps up with tens of thousands of small requests a second.
    pub fn with_http_threads(self, http_threads: usize) -> Self {
        Self { http_threads, ..self }
    }

    /// The same on the caller's tokio runtime instead of threads of its own.
    pub fn with_handle(self, handle: Handle) -> Self {
        Self { handle: Some(handle), ..self }
    }

    /// Loads every replica of `deployment`, and waits for them. Errors when the machine has not
    /// the resources for all of them.
    pub fn deploy(mut self, deployment: Deployment) -> Result<Self, Error> {
        deployment.check()?;
        let model = &deployment.metadata.name;
        if self.loaded.iter().any(|(other, _)| other.metadata.name == *model) {
            return Err(Error::DuplicateModel { model: model.clone() });
        }
        let (asked, total) =
            (deployment.resources.times(deployment.replicas), self.runtime.resources());
        if !asked.fits(&total) {
            let (asked, total) = (Box::new(asked), Box::new(total));
            return Err(mobula_core::Error::Unplaceable { asked, total }.into());
        }
        let replicas = (0..deployment.replicas)
            .map(|index| replica::start(&self.runtime, &deployment, index))
            .collect::<Result<_, _>>()?;
        self.loaded.push((deployment, replicas));
        Ok(self)
    }

    /// [`Server::deploy`] for each of them.
    pub fn deploy_all(
        self,
        deployments: impl IntoIterator<Item = Deployment>,
    ) -> Result<Self, Error> {
        deployments.into_iter().try_fold(self, Self::deploy)
    }

    /// Listens on `addr`, `HOST:PORT`, and starts to serve. Port 0 takes a free one.
    pub fn bind(self, addr: &str) -> Result<RunningServer, Error> {
        let listener = listen(addr)?;
        let bound = listener.local_addr().map_err(|source| bind_error(addr, source))?;
        let own = match self.handle {
            Some(_) => None,
            None => Some(own_runtime(self.http_threads)?),
        };
        let handle = match (&own, &self.handle) {
            (Some(own), _) => own.handle().clone(),
            (None, handle) => handle.clone().unwrap_or_else(Handle::current),
        };
        let mut tasks = Vec::new();
        let mut models = BTreeMap::new();
        for (deployment, replicas) in self.loaded {
            let name = deployment.metadata.name.clone();
            models.insert(name, start(deployment, replicas, &handle, &mut tasks));
        }
        let app = Arc::new(App {
            models,
            draining: AtomicBool::new(false),
            max_body_bytes: self.max_body_bytes,
            body_timeout: self.body_timeout,
        });
        let (stop, stopped) = watch::channel(false);
        let (done_tx, done) = mpsc::channel();
        let listener = {
            let _context = handle.enter();
            tokio::net::TcpListener::from_std(listener).map_err(|e| bind_error(addr, e))?
        };
        let serving = handle.spawn(accept(listener, app.clone(), stopped, done_tx));
        tasks.push(serving.abort_handle());
        Ok(RunningServer { addr: bound, app, stop, done, tasks, own })
    }
}

fn listen(addr: &str) -> Result<TcpListener, Error> {
    let listen = || {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    listen().map_err(|source| bind_error(addr, source))
}

fn bind_error(addr: &str, source: std::io::Error) -> Error {
    let addr = addr.to_owned();
    match source.kind() {
        ErrorKind::AddrInUse => Error::AddressInUse { addr },
        _ => Error::Bind { addr, source },
    }
}

fn own_runtime(threads: usize) -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads.max(1))
        .thread_name("mobula-http")
        .enable_all()
        .build()
        .map_err(|source| Error::Threads { source })
}

/// Starts the timer of a deployment and the drivers of its replicas.
fn start(
    deployment: Deployment,
    replicas: Vec<Replica>,
    handle: &Handle,
    tasks: &mut Vec<AbortHandle>,
) -> Arc<Dispatcher> {
    let Deployment { metadata, batching, .. } = deployment;
    let (dispatcher, flights) = Dispatcher::new(metadata, batching, replicas.len());
    tasks.push(handle.spawn(dispatcher.clone().keep_time()).abort_handle());
    for (replica, flights) in replicas.into_iter().zip(flights) {
        let driver = replica::drive(dispatcher.clone(), replica, flights);
        tasks.push(handle.spawn(driver).abort_handle());
    }
    dispatcher
}

async fn accept(
    listener: tokio::net::TcpListener,
    app: Arc<App>,
    mut stopped: watch::Receiver<bool>,
    done: mpsc::Sender<()>,
) {
    // Small answers must not wait for the acknowledgement of the one before.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let router = http::router(app.clone());
    // Until the last answer new connections are taken, and told 503: a balancer that still sends
    // requests here learns why.
    let drained = async move {
        let _ = stopped.wait_for(|stop| *stop).await;
        for model in app.models.values() {
            model.drained().await;
        }
    };
    let served = axum::serve(listener, router).with_graceful_shutdown(drained).await;
    if let Err(error) = served {
        tracing::error!(%error, "the HTTP server has stopped");
    }
    let _ = done.send(());
}

/// A server that answers requests until it is shut down or dropped.
pub struct RunningServer {
    addr: SocketAddr,
    app: Arc<App>,
    stop: watch::Sender<bool>,
    done: mpsc::Receiver<()>,
    tasks: Vec<AbortHandle>,
    own: Option<tokio::runtime::Runtime>,
}

impl fmt::Debug for RunningServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let models: Vec<_> = self.app.models.keys().collect();
        f.debug_struct("RunningServer")
            .field("addr", &self.addr)
            .field("models", &models)
            .finish_non_exhaustive()
    }
}

/// How long an interrupted server goes on; core ends the process soon after.
const DRAIN: Duration = Duration::from_millis(800);

/// How long connections get to write out their last answers after the hard deadline.
const LAST_WORDS: Duration = Duration::from_millis(500);

impl RunningServer {
    /// The address that it listens on, with the port that it got.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The figures of a model since the start.
    pub fn stats(&self, model: &str) -> Result<ModelStats, Error> {
        Ok(self.app.model(model)?.stats())
    }

    /// Serves until the program is interrupted, then answers what is under way and returns. It
    /// has less than two seconds for that, as everything in a program has after Ctrl-C.
    ///
    /// For programs that began with `mobula::init()`, which listens for signals. In others Ctrl-C
    /// ends the process as it always does.
    pub fn run_until_interrupted(self) -> Result<(), Error> {
        let (interrupt, interrupted) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let _hook = mobula_core::on_interrupt(move || {
            let _ = interrupt.send(());
            // The process exits after the last hook.
            let _ = ended.recv_timeout(DRAIN + LAST_WORDS);
            None
        });
        let _ = interrupted.recv();
        let result = self.shutdown(DRAIN);
        drop(end);
        result
    }

    /// Ends the server: readiness turns to 503 and new requests are refused at once, those that
    /// were accepted are answered. Those without an answer at the `deadline` get 503, which is
    /// then this call's error.
    pub fn shutdown(self, deadline: Duration) -> Result<(), Error> {
        self.app.draining.store(true, Ordering::Relaxed);
        self.tell(&Event::Drain);
        let _ = self.stop.send(true);
        if self.done.recv_timeout(deadline).is_ok() {
            return Ok(());
        }
        let unanswered = self.app.models.values().map(|m| m.gauges().unanswered).sum();
        self.tell(&Event::Stop);
        let _ = self.done.recv_timeout(LAST_WORDS);
        match unanswered {
            0 => Ok(()),
            _ => Err(Error::ShutdownDeadline { unanswered, after: deadline }),
        }
    }

    fn tell(&self, event: &Event) {
        self.app.models.values().for_each(|model| model.step(event.clone()));
    }
}

impl Drop for RunningServer {
    /// Stops at once, without answering what is under way.
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
        if let Some(own) = self.own.take() {
            // Dropping it would wait for its threads, which is a panic in async code.
            own.shutdown_background();
        }
    }
}
