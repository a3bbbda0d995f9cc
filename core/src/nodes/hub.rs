//! The driver's side: who has joined, and who is gone.

use super::far::{FarLink, FarWorker};
use super::lines::Lines;
use super::link::Credentials;
use super::look::Looks;
use super::role::Door;
use super::secret::{Secret, SecretFile};
use super::server::{Guest, listen, serve};
use super::silence::Heard;
use super::transfer;
use super::wire::{FromNode, Hello, Machine, ToNode};
use crate::process::{Environment, LogTarget, Sink, check_build};
use crate::runtime::WeakRuntime;
use crate::scheduler::NodeId;
use crate::store::ObjectId;
use crate::world::World;
use crate::{Error, Runtime, console, interrupt};
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tonic::codec::Streaming;

/// Who says nothing for so long is lost; agents send a beat every second.
const SILENCE: Duration = Duration::from_secs(4);
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const BEAT_INTERVAL: Duration = Duration::from_secs(1);
/// After this, who waits for the others says so.
const WAITING_NOTE: Duration = Duration::from_secs(5);
/// How long the other copies may take to hear that all is done.
const GOODBYE: Duration = Duration::from_secs(1);

static HUB: OnceLock<Arc<Hub>> = OnceLock::new();

/// The other machines of this driver.
pub(crate) fn hub() -> Result<&'static Arc<Hub>, Error> {
    HUB.get().ok_or_else(|| Error::Internal("this process has no other nodes".to_owned()))
}

/// Tells the other copies that the program has ended, and waits a moment until they have heard it.
pub(crate) fn say_goodbye() {
    if let Ok(hub) = hub() {
        hub.say_goodbye();
    }
}

pub(crate) struct Hub {
    tokio: tokio::runtime::Handle,
    runtime: WeakRuntime,
    members: Mutex<Members>,
    changed: Condvar,
    workers: AtomicU64,
    lines: Lines,
    /// Where the others have found this machine.
    master: SocketAddr,
    /// Gone when the driver is.
    secret_file: Mutex<Option<SecretFile>>,
}

#[derive(Default)]
struct Members {
    nodes: BTreeMap<NodeId, Arc<NodeLink>>,
    last_node: u64,
    /// Copies whose stream is open, those that only wait included.
    here: HashMap<u64, mpsc::UnboundedSender<ToNode>>,
    /// Copies that have ever joined.
    ever: u64,
    is_closing: bool,
}

/// A machine that has joined.
#[derive(Debug)]
pub(crate) struct NodeLink {
    id: NodeId,
    name: String,
    /// Not bounded: what goes out is bounded by who sends it, and control must get through.
    frames: mpsc::UnboundedSender<ToNode>,
    tokio: tokio::runtime::Handle,
    workers: Mutex<Workers>,
    objects: SocketAddr,
    looks: Looks,
    lines: Lines,
}

#[derive(Debug, Default)]
struct Workers {
    by_number: HashMap<u64, Arc<FarWorker>>,
    /// Why there are none any more.
    lost: Option<String>,
}

/// Opens the door, and waits until all copies of the launch have come in.
pub(super) fn open(door: Door, runtime: &Runtime) -> Result<(), Error> {
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("mobula-nodes")
        .enable_all()
        .build()
        .map_err(|error| Error::system("starting the threads for other nodes", error))?;
    let handle = tokio.handle().clone();
    // It serves until the process ends.
    std::mem::forget(tokio);
    let master = door.world.master()?;
    let anywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), master.port());
    let (listener, _) = handle.block_on(listen(&[master, anywhere]))?;
    // Not before the port is ours: the file belongs to whoever listens there.
    let (secret, file) = Secret::of_driver(&door.world)?;
    let credentials = Credentials::new(&secret)?;
    transfer::set_up(handle.clone(), credentials.clone(), None);
    let hub = Arc::new(Hub {
        tokio: handle.clone(),
        runtime: runtime.downgrade(),
        members: Mutex::default(),
        changed: Condvar::new(),
        workers: AtomicU64::new(0),
        lines: Lines::start()?,
        master,
        secret_file: Mutex::new(file),
    });
    let hub = HUB.get_or_init(|| hub);
    let (guests, arrivals) = mpsc::channel(64);
    handle.spawn(serve(listener, credentials, NodeId::HERE, Some(guests)));
    handle.spawn(Arc::clone(hub).receive(arrivals));
    handle.spawn(Arc::clone(hub).beat());
    hub.wait_for_all(&door.world, door.patience);
    Ok(())
}

impl Hub {
    /// Waits for the other copies of the launch. Without those that do not come it goes on.
    fn wait_for_all(&self, world: &World, patience: Duration) {
        let others = world.world_size as u64 - 1;
        let start = Instant::now();
        for until in [WAITING_NOTE.min(patience), patience] {
            let left = until.saturating_sub(start.elapsed());
            let few = |members: &mut Members| members.ever < others;
            let waited = self.changed.wait_timeout_while(self.members(), left, few);
            let joined = waited.unwrap_or_else(PoisonError::into_inner).0.ever;
            if joined >= others {
                return;
            }
            let goes_on = if until == patience { "going on without the rest" } else { "waiting" };
            console::note(format!("{joined} of {others} other copies have joined; {goes_on}"));
        }
    }

    async fn receive(self: Arc<Self>, mut arrivals: mpsc::Receiver<Guest>) {
        while let Some((inbound, heard, frames)) = arrivals.recv().await {
            self.tokio.spawn(Arc::clone(&self).entertain(inbound, heard, frames));
        }
    }

    /// The session of one copy.
    async fn entertain(
        self: Arc<Self>,
        mut inbound: Streaming<FromNode>,
        heard: Heard,
        frames: mpsc::UnboundedSender<ToNode>,
    ) {
        let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message()).await;
        let Ok(Ok(Some(FromNode::Hello(hello)))) = first else { return };
        if let Err(error) = check_build(&hello.build) {
            drop(frames.send(ToNode::Refused { reason: error.to_string() }));
            return;
        }
        let (copy, node) = self.admit(hello, frames);
        let reason = self.listen(&mut inbound, &heard, node.as_deref()).await;
        if let Some(node) = node {
            self.lose(&node, &reason);
        }
        self.members().here.remove(&copy);
        self.changed.notify_all();
    }

    fn admit(
        &self,
        hello: Hello,
        frames: mpsc::UnboundedSender<ToNode>,
    ) -> (u64, Option<Arc<NodeLink>>) {
        let mut members = self.members();
        members.ever += 1;
        let copy = members.ever;
        members.here.insert(copy, frames.clone());
        if members.is_closing {
            drop(frames.send(ToNode::Shutdown));
        }
        let Some(Machine { total, objects }) = hello.machine else {
            drop(frames.send(ToNode::Welcome { node: NodeId::HERE }));
            drop(members);
            self.changed.notify_all();
            return (copy, None);
        };
        members.last_node += 1;
        let id = NodeId(members.last_node);
        let (name, tokio) = (hello.host, self.tokio.clone());
        let workers = Mutex::default();
        let lines = self.lines.clone();
        let looks = Looks::default();
        let node = Arc::new(NodeLink { id, name, frames, tokio, workers, objects, looks, lines });
        node.send(ToNode::Welcome { node: id });
        members.nodes.insert(id, Arc::clone(&node));
        drop(members);
        tracing::info!(node = id.0, host = %node.name, %total, "a node has joined");
        if let Some(runtime) = self.runtime.upgrade() {
            runtime.add_node(id, node.name.clone(), &total);
        }
        self.changed.notify_all();
        (copy, Some(node))
    }

    /// Hears what a copy says until it ends; why it has.
    async fn listen(
        &self,
        inbound: &mut Streaming<FromNode>,
        heard: &Heard,
        node: Option<&NodeLink>,
    ) -> String {
        loop {
            let Some(frame) = heard.message(inbound, SILENCE).await else {
                return format!("it sent no heartbeat for {SILENCE:?}");
            };
            match (frame, node) {
                (Ok(Some(frame)), Some(node)) => node.hear(frame),
                (Ok(Some(_)), None) => {}
                (Ok(None), _) => return "its agent has ended".to_owned(),
                (Err(status), _) => {
                    tracing::debug!(%status, "the stream of a node broke");
                    return "its connection broke".to_owned();
                }
            }
        }
    }

    /// NODE-2.
    fn lose(&self, node: &NodeLink, reason: &str) {
        self.members().nodes.remove(&node.id);
        if let Some(runtime) = self.runtime.upgrade() {
            runtime.lose_node(node.id);
        }
        let reason = format!("node {} ({}) was lost: {reason}", node.id.0, node.name);
        if !self.members().is_closing && !interrupt::is_under_way() {
            console::note(&reason);
        }
        transfer::lost(node.id, node.objects);
        for other in self.nodes() {
            other.send(ToNode::Lost { node: node.id, objects: node.objects });
        }
        node.lose_workers(&reason);
        // Should it only have been stopped for a while, it ends when it goes on.
        node.send(ToNode::Shutdown);
    }

    /// Starts a worker process on another machine.
    pub(crate) fn start(
        &self,
        environment: Environment,
        log: LogTarget,
        sink: Sink,
    ) -> Result<FarLink, Error> {
        let node = environment.node;
        let link = self.members().nodes.get(&node).cloned();
        let gone = || Error::WorkerLost {
            task: "a new worker process".to_owned(),
            reason: format!("node {} is gone", node.0),
        };
        let link = link.ok_or_else(gone)?;
        let number = self.workers.fetch_add(1, Ordering::Relaxed);
        let worker = FarLink::new(&link, number, &log, sink);
        link.add(number, Arc::clone(worker.worker()));
        link.send(ToNode::Start { worker: number, environment });
        Ok(worker)
    }

    pub(super) fn has(&self, node: NodeId) -> bool {
        self.members().nodes.contains_key(&node)
    }

    /// Where other machines get values of this one.
    pub(crate) fn objects_of(&self, node: NodeId) -> Option<SocketAddr> {
        self.members().nodes.get(&node).map(|node| node.objects)
    }

    /// By which machines reach each other.
    pub(super) fn address_of(&self, node: NodeId) -> Option<IpAddr> {
        match node {
            NodeId::HERE => Some(self.master.ip()),
            node => self.objects_of(node).map(|address| address.ip()),
        }
    }

    /// Those that have joined and are not lost, the first one first.
    pub(super) fn nodes(&self) -> Vec<Arc<NodeLink>> {
        self.members().nodes.values().cloned().collect()
    }

    pub(super) fn forget(&self, holder: NodeId, id: ObjectId) {
        for node in self.nodes() {
            node.send(ToNode::Forget { holder, id });
        }
    }

    async fn beat(self: Arc<Self>) {
        let mut interval = tokio::time::interval(BEAT_INTERVAL);
        loop {
            interval.tick().await;
            self.members().here.values().for_each(|copy| drop(copy.send(ToNode::Beat)));
        }
    }

    fn say_goodbye(&self) {
        let file = self.secret_file.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(file);
        let mut members = self.members();
        members.is_closing = true;
        members.here.values().for_each(|copy| drop(copy.send(ToNode::Shutdown)));
        let some = |members: &mut Members| !members.here.is_empty();
        drop(self.changed.wait_timeout_while(members, GOODBYE, some));
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NodeLink {
    pub(super) fn id(&self) -> NodeId {
        self.id
    }

    pub(super) fn tokio(&self) -> &tokio::runtime::Handle {
        &self.tokio
    }

    /// `false` when the machine is gone.
    pub(super) fn send(&self, frame: ToNode) -> bool {
        self.frames.send(frame).is_ok()
    }

    fn add(&self, number: u64, worker: Arc<FarWorker>) {
        let mut workers = self.workers();
        if let Some(reason) = workers.lost.clone() {
            drop(workers);
            return worker.lost(&reason);
        }
        workers.by_number.insert(number, worker);
    }

    fn hear(&self, frame: FromNode) {
        match frame {
            FromNode::Started { worker, pid } => {
                self.worker(worker).iter().for_each(|worker| worker.started(pid, &self.name));
            }
            FromNode::Event { worker: number, event } => {
                let is_end = matches!(event, crate::process::WorkerEvent::Ended(_));
                let worker = match is_end {
                    true => self.workers().by_number.remove(&number),
                    false => self.worker(number),
                };
                if let Some(worker) = worker {
                    if is_end {
                        self.lines.end(&worker, &self.tokio);
                    }
                    worker.hear(event);
                }
            }
            FromNode::Line { worker, line } => {
                if let Some(worker) = self.worker(worker) {
                    self.lines.print(&worker, line);
                }
            }
            FromNode::Seen { look, view } => self.looks.answered(look, view),
            FromNode::Beat | FromNode::Hello(_) => {}
        }
    }

    pub(super) fn looks(&self) -> &Looks {
        &self.looks
    }

    /// The worker processes that have been started, the oldest first, and what they are for.
    pub(super) fn processes(&self) -> Vec<(u32, String)> {
        let mut workers: Vec<(u64, Arc<FarWorker>)> = {
            let workers = self.workers();
            workers.by_number.iter().map(|(n, worker)| (*n, Arc::clone(worker))).collect()
        };
        workers.sort_unstable_by_key(|(number, _)| *number);
        let process =
            |(_, worker): (u64, Arc<FarWorker>)| Some((worker.pid()?, worker.name().to_owned()));
        workers.into_iter().filter_map(process).collect()
    }

    fn worker(&self, number: u64) -> Option<Arc<FarWorker>> {
        self.workers().by_number.get(&number).cloned()
    }

    fn lose_workers(&self, reason: &str) {
        let lost = {
            let mut workers = self.workers();
            workers.lost = Some(reason.to_owned());
            std::mem::take(&mut workers.by_number)
        };
        for worker in lost.values() {
            self.lines.end(worker, &self.tokio);
            worker.lost(reason);
        }
    }

    fn workers(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
