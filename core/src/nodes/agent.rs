//! The other machines' side: joins the driver, tells what the machine has, and starts workers.

use super::look::View;
use super::role::Join;
use super::secret::Secret;
use super::server::{listen, serve as serve_values};
use super::silence::{Heard, Listened};
use super::transfer::{self, Copies, WINDOW};
use super::wire::{CREDITS, FromNode, Hello, JOIN, Machine, ToNode};
use super::worker::{self, Orders};
use crate::clock::SystemClock;
use crate::process::wire::{Frames, MAX_FRAME_BYTES};
use crate::process::{ProcessHost, build_id};
use crate::scheduler::NodeId;
use crate::{BoxError, Error, Resources, interrupt};
use hyper_util::rt::TokioIo;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::Streaming;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tower::ServiceExt;

const BEAT_INTERVAL: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(200);
/// A driver that is silent for so long is gone. It may only have been stopped for a while.
const SILENCE: Duration = Duration::from_secs(60);
/// How long the driver may take to say goodbye after a signal that all copies get.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Frames that may wait for the driver; then who has more waits too.
const OUTBOUND: usize = 1024;

/// The life of a copy that is not the driver; gives its exit code.
pub(super) fn serve(join: Join, total: &Resources) -> i32 {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("mobula-agent")
        .enable_all()
        .build();
    let end = match runtime {
        Ok(runtime) => {
            let end = runtime.block_on(live(&join, total));
            // What still blocks a thread is of no use to anybody.
            runtime.shutdown_background();
            end
        }
        Err(error) => Err(error.into()),
    };
    match end {
        Ok(code) => code,
        Err(error) => {
            join.note(&error.to_string());
            1
        }
    }
}

async fn live(join: &Join, total: &Resources) -> Result<i32, BoxError> {
    let host = ProcessHost::new(tokio::runtime::Handle::current())?;
    let (out, frames) = mpsc::channel(OUTBOUND);
    let (mut inbound, heard) = knock(join, total, &out, frames).await?;
    let node = match inbound.message().await? {
        Some(ToNode::Welcome { node }) => node,
        Some(ToNode::Refused { reason }) => return Err(not_let_in(&reason)),
        _ => return Err(not_let_in("it closed the stream")),
    };
    let agent = Agent { node, host, out, workers: HashMap::new(), copies: Arc::default() };
    agent.serve(join, inbound, &heard).await
}

fn not_let_in(reason: &str) -> BoxError {
    let action = "join the driver".to_owned();
    Error::Join { action, reason: reason.to_owned() }.into()
}

/// Tries to get in until it is too late: the driver may not be there yet.
async fn knock(
    join: &Join,
    total: &Resources,
    out: &mpsc::Sender<FromNode>,
    frames: mpsc::Receiver<FromNode>,
) -> Result<(Streaming<ToNode>, Heard), BoxError> {
    let mut frames = Some(frames);
    loop {
        let tried = match tokio::task::block_in_place(|| connect(join)) {
            Ok((channel, local, driver, secret)) => {
                let frames = frames.take().ok_or("the driver let this copy in, and out again")?;
                let machine = machine(join, total, local, driver, &secret).await?;
                let host = super::host_name();
                out.send(FromNode::Hello(Hello { build: build_id(), host, machine })).await?;
                return enter(channel, &secret, frames).await.map_err(explained);
            }
            Err(error) => error,
        };
        if join.is_late() {
            return Err(tried);
        }
        tokio::time::sleep(RETRY).await;
    }
}

type Connected = (Channel, SocketAddr, SocketAddr, Secret);

/// A connection whose secret was found right.
fn connect(join: &Join) -> Result<Connected, BoxError> {
    let (driver, secret) = (join.address()?, join.secret()?);
    let reached = tokio::runtime::Handle::current().block_on(reach(driver));
    let unreachable = |error: BoxError| {
        not_let_in(&format!("nobody listens at {driver} ({error}); is rank 0 running there?"))
    };
    let (channel, local) = reached.map_err(unreachable)?;
    Ok((channel, local, driver, secret))
}

async fn reach(driver: SocketAddr) -> Result<(Channel, SocketAddr), BoxError> {
    let local = Arc::new(Mutex::new(None));
    let seen = Arc::clone(&local);
    let connector = tower::service_fn(move |_| {
        let seen = Arc::clone(&seen);
        async move {
            let connection = TcpStream::connect(driver).await?;
            connection.set_nodelay(true)?;
            *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection.local_addr()?);
            Ok::<_, std::io::Error>(TokioIo::new(connection))
        }
    });
    let endpoint = Endpoint::from_static("http://driver")
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    let channel = endpoint.connect_with_connector(connector).await?;
    let local = local.lock().unwrap_or_else(PoisonError::into_inner).ok_or("no connection")?;
    Ok((channel, local))
}

/// What this copy brings, and where its values are to be had.
async fn machine(
    join: &Join,
    total: &Resources,
    local: SocketAddr,
    driver: SocketAddr,
    secret: &Secret,
) -> Result<Option<Machine>, BoxError> {
    if !join.is_agent {
        return Ok(None);
    }
    let (listener, objects) = listen(&[SocketAddr::new(local.ip(), 0)]).await?;
    let tokio = tokio::runtime::Handle::current();
    tokio.spawn(serve_values(listener, secret.clone(), None));
    transfer::set_up(tokio, secret.clone(), Some(driver));
    Ok(Some(Machine { total: total.clone(), objects }))
}

async fn enter(
    channel: Channel,
    secret: &Secret,
    frames: mpsc::Receiver<FromNode>,
) -> Result<(Streaming<ToNode>, Heard), Status> {
    let heard = Heard::new(SystemClock::new());
    let listened = heard.clone();
    let channel = channel.map_response(move |response: http::Response<tonic::body::Body>| {
        response.map(|body| Listened::new(body, listened.clone()))
    });
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_FRAME_BYTES);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut request = Request::new(ReceiverStream::new(frames));
    let shown = secret.show(request.metadata_mut());
    shown.map_err(|error| Status::invalid_argument(error.to_string()))?;
    let method = http::uri::PathAndQuery::from_static(JOIN);
    let codec = Frames::<FromNode, ToNode>::default();
    let stream = grpc.streaming(request, method, codec).await?;
    Ok((stream.into_inner(), heard))
}

fn explained(status: Status) -> BoxError {
    match status.code() {
        Code::Unauthenticated => not_let_in(&format!(
            "{}; set MOBULA_SECRET alike for all copies, or for none",
            status.message()
        )),
        _ => not_let_in(status.message()),
    }
}

struct Agent {
    node: NodeId,
    host: ProcessHost,
    out: mpsc::Sender<FromNode>,
    workers: HashMap<u64, Orders>,
    copies: Arc<Copies>,
}

impl Agent {
    /// Until the driver ends.
    async fn serve(
        mut self,
        join: &Join,
        inbound: Streaming<ToNode>,
        heard: &Heard,
    ) -> Result<i32, BoxError> {
        tokio::spawn(beat(self.out.clone()));
        let end = tokio::select! {
            end = self.obey(inbound, heard) => end.map(|()| 0),
            code = signalled() => Ok(code),
        };
        // NODE-3.
        tokio::task::block_in_place(|| self.host.shutdown());
        if let Err(error) = &end {
            join.note(&format!("the driver is gone: {error}"));
            return Ok(1);
        }
        end
    }

    async fn obey(
        &mut self,
        mut inbound: Streaming<ToNode>,
        heard: &Heard,
    ) -> Result<(), BoxError> {
        loop {
            let frame = heard.message(&mut inbound, SILENCE).await;
            let frame = frame.ok_or_else(|| format!("it was silent for {SILENCE:?}"))?;
            let broke = |status: Status| {
                tracing::debug!(%status, "the stream of the driver broke");
                "its connection broke"
            };
            match frame.map_err(broke)? {
                Some(ToNode::Shutdown) => return Ok(()),
                Some(frame) => self.take(frame),
                None => return Err("it ended without saying goodbye".into()),
            }
        }
    }

    fn take(&mut self, frame: ToNode) {
        match frame {
            ToNode::Start { worker, environment } => {
                let home = worker::Home {
                    node: self.node,
                    host: self.host.clone(),
                    out: self.out.clone(),
                    copies: Arc::clone(&self.copies),
                };
                // Those whose process has ended are known by their closed channel.
                self.workers.retain(|_, orders| !orders.is_over());
                self.workers.insert(worker, worker::start(worker, environment, home));
            }
            ToNode::Frame { worker, frame } => self.orders(worker, |orders| orders.frame(frame)),
            ToNode::Kill { worker, reason } => self.orders(worker, |orders| orders.kill(reason)),
            ToNode::Taken { worker, events } => self.orders(worker, |orders| orders.taken(events)),
            ToNode::Forget { holder, id } => self.copies.forget(holder, id),
            ToNode::Look { look } => self.look(look),
            ToNode::Welcome { .. } | ToNode::Refused { .. } | ToNode::Beat | ToNode::Shutdown => {}
        }
    }

    /// Reading what the system says of processes takes its time.
    fn look(&self, look: u64) {
        let (host, out) = (self.host.clone(), self.out.clone());
        tokio::spawn(async move {
            if let Ok(view) = tokio::task::spawn_blocking(move || View::of(&host)).await {
                // Who asked is gone with the driver.
                let _ = out.send(FromNode::Seen { look, view }).await;
            }
        });
    }

    fn orders(&self, worker: u64, give: impl FnOnce(&Orders)) {
        if let Some(orders) = self.workers.get(&worker) {
            give(orders);
        }
    }
}

async fn beat(out: mpsc::Sender<FromNode>) {
    let mut interval = tokio::time::interval(BEAT_INTERVAL);
    loop {
        interval.tick().await;
        // A full queue is a sign of life by itself.
        if let Err(mpsc::error::TrySendError::Closed(_)) = out.try_send(FromNode::Beat) {
            return;
        }
    }
}

/// Launchers signal all copies. The driver decides what becomes of it, if it gets to.
async fn signalled() -> i32 {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let mut waits = Vec::new();
    for kind in kinds.into_iter().filter(|kind| !interrupt::is_ignored(*kind)) {
        let Ok(mut signal) = signal(kind) else { continue };
        waits.push(Box::pin(async move {
            signal.recv().await;
            128 + kind.as_raw_value()
        }));
    }
    if waits.is_empty() {
        return std::future::pending().await;
    }
    let (code, _, _) = futures::future::select_all(waits).await;
    tokio::time::sleep(LAST_WORDS).await;
    code
}

const _: () = assert!(CREDITS <= OUTBOUND);
