//! The driver's side of one worker process: its control stream, its output, its end.

use super::ending;
use super::handle::Process;
use super::logs::{LogTarget, pump};
use super::progress::{Begun, Progress};
use super::spawn::Started;
use super::wire::{Frames, FromWorker, MAX_FRAME_BYTES, ToWorker};
use crate::nested::Tickets;
use crate::object::AnyObject;
use crate::runtime::Lease;
use crate::scheduler::NodeId;
use crate::{Error, console, interrupt, timeline};
use futures::stream::{self, StreamExt};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::codec::Streaming;
use tonic::{Request, Response, Status};

/// In the driver's environment: after how many seconds a worker that says nothing is taken for dead,
/// and killed.
const HEARTBEAT_VARIABLE: &str = "MOBULA_HEARTBEAT_SECONDS";
static HEARTBEAT_TIMEOUT: LazyLock<Duration> = LazyLock::new(heartbeat_timeout);
/// After so long it is looked at whether it is stopped: then it is not heard of again.
const LOOK: Duration = Duration::from_secs(3);
/// Then it is listened to once more.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// A worker that has not said hello by then never will.
const HELLO_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the output of a process that has ended is waited for.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What the driver hears of a worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WorkerEvent {
    Frame(FromWorker),
    /// The last one: the process is gone.
    Ended(End),
}

/// How a worker ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct End {
    pub(crate) reason: String,
    pub(crate) begun: Begun,
}

impl End {
    /// A worker of which nobody knows how far it had come.
    pub(crate) fn unknown(reason: String) -> Self {
        Self { reason, begun: Begun::Unknown }
    }
}

/// Who hears of a worker.
pub(crate) struct Sink {
    to: To,
    /// What the worker submits is not for who hears of it.
    tickets: Option<Arc<Tickets>>,
}

enum To {
    /// Who reads when it can; until then the worker waits. With what the worker holds, if that is
    /// to be lent.
    Channel(mpsc::Sender<WorkerEvent>, Option<Arc<Lease>>),
    /// Who never waits.
    Listener(Arc<dyn Listener>),
}

/// Takes in what a worker says, at once.
pub(crate) trait Listener: Owner {
    fn hear(self: Arc<Self>, event: WorkerEvent);
}

/// Whose work a worker does.
pub(crate) trait Owner: Send + Sync {
    /// What the worker works with now, to be lent while it waits.
    fn lease(&self) -> Option<Arc<Lease>>;

    /// What this call of the worker's queue is to give.
    fn object_of(&self, call: u64) -> Option<Arc<dyn AnyObject>>;
}

/// What a member of a group submits goes on whatever becomes of the member's function.
impl Owner for Arc<Lease> {
    fn lease(&self) -> Option<Arc<Lease>> {
        Some(Self::clone(self))
    }

    fn object_of(&self, _: u64) -> Option<Arc<dyn AnyObject>> {
        None
    }
}

impl Sink {
    pub(crate) fn channel(channel: mpsc::Sender<WorkerEvent>) -> Self {
        Self { to: To::Channel(channel, None), tickets: None }
    }

    /// The same for a worker that holds this, and lends it while it waits.
    pub(crate) fn holding(lease: Arc<Lease>, channel: mpsc::Sender<WorkerEvent>) -> Self {
        Self { to: To::Channel(channel, Some(lease)), tickets: None }
    }

    pub(crate) fn listener(listener: Arc<dyn Listener>) -> Self {
        Self { to: To::Listener(listener), tickets: None }
    }

    /// Lets the worker submit tasks, if this process is a driver.
    pub(crate) fn with_tickets(
        self,
        node: NodeId,
        reply: impl Fn(ToWorker) + Send + Sync + 'static,
    ) -> Self {
        Self { tickets: Tickets::open(node, reply), ..self }
    }

    /// `false` when nobody listens any more.
    pub(crate) async fn send(&self, event: WorkerEvent) -> bool {
        match self.hold_back(event) {
            Some(event) => self.pass_on(event).await,
            None => true,
        }
    }

    fn hold_back(&self, event: WorkerEvent) -> Option<WorkerEvent> {
        let Some(tickets) = &self.tickets else { return Some(event) };
        let owner: Option<&dyn Owner> = match &self.to {
            To::Listener(listener) => Some(&**listener),
            To::Channel(_, lease) => lease.as_ref().map(|lease| lease as &dyn Owner),
        };
        match event {
            WorkerEvent::Frame(frame) => tickets.take(frame, owner).map(WorkerEvent::Frame),
            end => {
                tickets.close();
                Some(end)
            }
        }
    }

    async fn pass_on(&self, event: WorkerEvent) -> bool {
        match &self.to {
            To::Channel(channel, _) => channel.send(event).await.is_ok(),
            To::Listener(listener) => {
                Arc::clone(listener).hear(event);
                true
            }
        }
    }
}

/// A running worker process of this machine. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct LocalLink {
    /// Not bounded here: calls are, by their senders, and a control frame must always get through.
    frames: mpsc::UnboundedSender<ToWorker>,
    process: Arc<Process>,
}

impl LocalLink {
    /// Serves the control stream of a process that was just started; its frames and its end go to
    /// `sink`.
    pub(crate) fn new(
        started: Started,
        progress: Progress,
        log: LogTarget,
        sink: Sink,
        tokio: &tokio::runtime::Handle,
    ) -> Result<Self, Error> {
        let (frames, outbound) = mpsc::unbounded_channel();
        let process = started.process;
        let replies = frames.downgrade();
        let sink = sink.with_tickets(NodeId::HERE, move |frame| {
            // A link that was dropped has killed its process.
            if let Some(frames) = replies.upgrade() {
                let _ = frames.send(frame);
            }
        });
        let drained = watch(&process, started.output, log.clone())?;
        let _entered = tokio.enter();
        started
            .control
            .set_nonblocking(true)
            .map_err(|e| Error::system("opening a control stream", e))?;
        let control = UnixStream::from_std(started.control)
            .map_err(|e| Error::system("opening a control stream", e))?;
        let session = Session { sink, process: Arc::clone(&process), progress, drained, log };
        tokio.spawn(session.serve(control, outbound));
        Ok(Self { frames, process })
    }

    /// Sends a frame; `false` when the worker is gone.
    pub(crate) fn send(&self, frame: ToWorker) -> bool {
        self.frames.send(frame).is_ok()
    }

    pub(crate) fn process(&self) -> &Arc<Process> {
        &self.process
    }
}

impl Drop for LocalLink {
    fn drop(&mut self) {
        self.process.kill();
    }
}

/// One thread copies the output, and says when that is done; another waits for the end, if the fork
/// server does not.
fn watch(
    process: &Arc<Process>,
    output: std::io::PipeReader,
    log: LogTarget,
) -> Result<oneshot::Receiver<()>, Error> {
    let process = Arc::clone(process);
    let (done, drained) = oneshot::channel();
    let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
    let failed = |source| Error::system("starting a thread", source);
    let copy = move || {
        pump(output, &log);
        // Nobody may be waiting for it.
        let _ = done.send(());
    };
    thread("mobula-log").spawn(copy).map_err(failed)?;
    if process.is_own() {
        thread("mobula-wait").spawn(move || process.reap()).map_err(failed)?;
    }
    Ok(drained)
}

/// The gRPC session of one worker.
struct Session {
    sink: Sink,
    process: Arc<Process>,
    /// Kept open for the worker.
    progress: Progress,
    drained: oneshot::Receiver<()>,
    log: LogTarget,
}

impl Session {
    async fn serve(self, control: UnixStream, outbound: mpsc::UnboundedReceiver<ToWorker>) {
        let (opened, mut inbound) = mpsc::channel(1);
        let service = Connect { outbound: Arc::new(Mutex::new(Some(outbound))), opened };
        let incoming = stream::once(async { Ok::<_, Infallible>(control) });
        // The incoming "listener" never ends by itself, or the server would stop accepting.
        let incoming = incoming.chain(stream::pending());
        let server = tonic::transport::Server::builder().serve_with_incoming(service, incoming);
        let session = async {
            tokio::select! {
                biased;
                Some(frames) = inbound.recv() => self.forward(frames).await,
                () = self.process.ended() => {}
                () = tokio::time::sleep(HELLO_TIMEOUT) => self.process.kill_because(no_hello()),
            }
        };
        tokio::select! {
            _ = server => {}
            () = session => {}
        }
        self.process.kill();
        if interrupt::is_under_way() {
            // The program is about to end; to its main thread nothing has happened.
            return std::future::pending().await;
        }
        // Its last words come before the news of its end.
        let _ = tokio::time::timeout(LAST_WORDS, self.drained).await;
        let (process, log) = (self.process, self.log);
        let end = tokio::task::spawn_blocking(move || {
            let end = process.describe_end(&log);
            timeline::process_ended(process.pid(), &log.name, &end);
            end
        });
        let reason = end.await.unwrap_or_default();
        let end = End { reason, begun: self.progress.begun() };
        self.sink.send(WorkerEvent::Ended(end)).await;
    }

    /// Passes frames on until the stream closes, breaks or falls silent.
    async fn forward(&self, mut frames: Streaming<FromWorker>) {
        loop {
            let Some(frame) = self.next(&mut frames).await else {
                return;
            };
            match frame {
                Ok(Some(FromWorker::Beat)) => {
                    self.process.see_memory();
                }
                Ok(Some(frame)) => {
                    if !self.sink.send(WorkerEvent::Frame(frame)).await {
                        return;
                    }
                }
                Ok(None) => return self.leave_to_end("its control stream closed").await,
                Err(status) => {
                    let reason = format!("its control stream broke: {}", status.message());
                    return self.leave_to_end(&reason).await;
                }
            }
        }
    }

    /// What comes next. Kills a process that is stopped, or from which nothing has come for too long.
    async fn next(&self, frames: &mut Streaming<FromWorker>) -> Option<Next> {
        let mut silent = Duration::ZERO;
        loop {
            let look = LOOK.min(HEARTBEAT_TIMEOUT.saturating_sub(silent));
            // A driver that was stopped itself (Ctrl-Z) has beats to read before it judges.
            for look in [look, SECOND_LOOK] {
                if let Ok(frame) = tokio::time::timeout(look, frames.message()).await {
                    return Some(frame);
                }
            }
            silent += look + SECOND_LOOK;
            let why = match self.process.is_stopped() {
                true => format!("its process is stopped, sent {}", without_heartbeat(silent)),
                false if silent >= *HEARTBEAT_TIMEOUT => {
                    format!("its process sent {}", without_heartbeat(silent))
                }
                false => continue,
            };
            self.process.kill_because(ending::with_peak(why, self.process.peak()));
            return None;
        }
    }

    /// The stream ended first: give the process a moment to say by its exit code why.
    async fn leave_to_end(&self, reason: &str) {
        let process = Arc::clone(&self.process);
        let wait = move || process.wait(Duration::from_secs(2)).is_some();
        if !tokio::task::spawn_blocking(wait).await.unwrap_or(false) {
            self.process.kill_because(reason.to_owned());
        }
    }
}

fn no_hello() -> String {
    format!(
        "its process did not connect within {HELLO_TIMEOUT:?}; \
         is `mobula::init()` the first line of main()?"
    )
}

fn without_heartbeat(silent: Duration) -> String {
    format!("no heartbeat for {silent:?} and was killed")
}

/// Default: 15 s, as a machine may be busy.
fn heartbeat_timeout() -> Duration {
    const DEFAULT: Duration = Duration::from_secs(15);
    let Ok(value) = std::env::var(HEARTBEAT_VARIABLE) else {
        return DEFAULT;
    };
    let seconds = value.parse().ok().filter(|seconds: &f64| *seconds >= 1.0);
    match seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
        Some(timeout) => timeout,
        None => {
            console::note(format!(
                "{HEARTBEAT_VARIABLE} is {value:?}, expected a number of seconds, at least 1: it is {DEFAULT:?}"
            ));
            DEFAULT
        }
    }
}

/// What a worker says, or how its stream ends.
type Next = Result<Option<FromWorker>, Status>;

/// The one-method gRPC service of a control stream.
#[derive(Clone)]
struct Connect {
    outbound: Arc<Mutex<Option<mpsc::UnboundedReceiver<ToWorker>>>>,
    opened: mpsc::Sender<Streaming<FromWorker>>,
}

type BoxFuture<T, E> = futures::future::BoxFuture<'static, Result<T, E>>;

impl tower_service::Service<http::Request<tonic::body::Body>> for Connect {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let method = Method(self.clone());
        Box::pin(async move {
            let codec = Frames::<ToWorker, FromWorker>::default();
            let mut grpc = tonic::server::Grpc::new(codec)
                .apply_max_message_size_config(Some(MAX_FRAME_BYTES), Some(MAX_FRAME_BYTES));
            Ok(grpc.streaming(method, request).await)
        })
    }
}

struct Method(Connect);

impl tower_service::Service<Request<Streaming<FromWorker>>> for Method {
    type Response = Response<futures::stream::BoxStream<'static, Result<ToWorker, Status>>>;
    type Error = Status;
    type Future = BoxFuture<Self::Response, Status>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<FromWorker>>) -> Self::Future {
        let outbound = lock(&self.0.outbound).take();
        let opened = self.0.opened.clone();
        Box::pin(async move {
            let outbound = outbound.ok_or_else(|| Status::already_exists("one stream a worker"))?;
            let gone = |_| Status::unavailable("the driver is shutting down");
            opened.send(request.into_inner()).await.map_err(gone)?;
            Ok(Response::new(UnboundedReceiverStream::new(outbound).map(Ok).boxed()))
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
