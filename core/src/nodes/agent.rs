//! The other machines' side: joins the driver, tells what the machine has, and starts workers.

use super::knock::{OUTBOUND, Session, knock};
use super::look::View;
use super::role::Join;
use super::server::{listen, serve as serve_values};
use super::silence::Heard;
use super::transfer::{self, Copies};
use super::wire::{CREDITS, FromNode, Hello, Machine, ToNode};
use super::worker::{self, Orders};
use crate::process::{ProcessHost, build_id};
use crate::scheduler::NodeId;
use crate::{BoxError, Error, Resources, interrupt};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tonic::Status;
use tonic::codec::Streaming;

const BEAT_INTERVAL: Duration = Duration::from_secs(1);
/// A driver that is silent for so long is gone. It may only have been stopped for a while.
const SILENCE: Duration = Duration::from_secs(60);
/// How long the driver may take to say goodbye after a signal that all copies get.
const LAST_WORDS: Duration = Duration::from_secs(5);

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
    let mut session = knock(join).await?;
    let listener = match join.is_agent {
        true => Some(listen(&[SocketAddr::new(session.local.ip(), 0)]).await?),
        false => None,
    };
    let machine = listener.as_ref().map(|(_, at)| Machine { total: total.clone(), objects: *at });
    let node = introduce(&mut session, machine).await?;
    if let Some((listener, _)) = listener {
        let tokio = tokio::runtime::Handle::current();
        tokio.spawn(serve_values(listener, session.credentials.clone(), node, None));
        transfer::set_up(tokio, session.credentials, Some(session.driver));
    }
    let out = session.out;
    let agent = Agent { node, host, out, workers: HashMap::new(), copies: Arc::default() };
    agent.serve(join, session.inbound, &session.heard).await
}

fn not_let_in(reason: &str) -> BoxError {
    let action = "join the driver".to_owned();
    Error::Join { action, reason: reason.to_owned() }.into()
}

/// Tells who this is and what the machine has; gives what the driver calls it.
async fn introduce(session: &mut Session, machine: Option<Machine>) -> Result<NodeId, BoxError> {
    let hello = Hello { build: build_id(), host: super::host_name(), machine };
    session.out.send(FromNode::Hello(hello)).await?;
    let answer = session.heard.message(&mut session.inbound, SILENCE).await;
    let answer = answer.ok_or_else(|| not_let_in(&format!("it was silent for {SILENCE:?}")))?;
    match answer.map_err(|status| not_let_in(status.message()))? {
        Some(ToNode::Welcome { node }) => Ok(node),
        Some(ToNode::Refused { reason }) => Err(not_let_in(&reason)),
        _ => Err(not_let_in("it closed the stream")),
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
            ToNode::Lost { node, objects } => transfer::lost(node, objects),
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
