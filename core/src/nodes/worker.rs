//! One worker process of an agent: what is for it and what it says, with the values on their way.

use super::object::{FarPlace, Owned};
use super::transfer::Copies;
use super::wire::{CREDITS, FromNode};
use crate::Error;
use crate::nested::Failure;
use crate::parcel::{Packed, Stored};
use crate::process::wire::{FromWorker, Outcome, ToWorker};
use crate::process::{
    Begun, End, Environment, LogTarget, ProcessHost, Sink, WorkerEvent, WorkerLink,
};
use crate::scheduler::NodeId;
use crate::store::Lease;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Semaphore, mpsc};

/// Where a worker is to live.
#[derive(Clone)]
pub(super) struct Home {
    pub(super) node: NodeId,
    pub(super) host: ProcessHost,
    pub(super) out: mpsc::Sender<FromNode>,
    pub(super) copies: Arc<Copies>,
}

/// The driver's orders for one worker.
pub(super) struct Orders {
    frames: mpsc::UnboundedSender<ToWorker>,
    kills: mpsc::UnboundedSender<Option<String>>,
    credits: Arc<Semaphore>,
}

impl Orders {
    pub(super) fn frame(&self, frame: ToWorker) {
        // One that is gone has said so.
        let _ = self.frames.send(frame);
    }

    pub(super) fn kill(&self, reason: Option<String>) {
        let _ = self.kills.send(reason);
    }

    pub(super) fn taken(&self, events: usize) {
        self.credits.add_permits(events);
    }

    pub(super) fn is_over(&self) -> bool {
        self.kills.is_closed()
    }
}

/// Starts a process, and passes on what comes and goes.
pub(super) fn start(number: u64, environment: Environment, home: Home) -> Orders {
    let (frames, inbox) = mpsc::unbounded_channel();
    let (kills, killed) = mpsc::unbounded_channel();
    let credits = Arc::new(Semaphore::new(CREDITS));
    let worker = Worker { number, home, credits: Arc::clone(&credits), shelf: Arc::default() };
    tokio::spawn(worker.live(environment, inbox, killed));
    Orders { frames, kills, credits }
}

/// Values that the worker refers to.
type Kept = Vec<(Arc<Stored>, Lease)>;

/// What is kept for a worker.
#[derive(Default)]
struct Shelf {
    /// By the calls that it has, and the tickets that it has submitted under.
    calls: HashMap<u64, Kept>,
    /// By ticket: values of streams, under the number of the last of them.
    streams: HashMap<u64, VecDeque<(u64, Kept)>>,
}

impl Shelf {
    fn keep(&mut self, frame: &ToWorker, kept: Kept) {
        if let ToWorker::Values { ticket, first, values } = frame {
            let last = first + values.len() as u64 - 1;
            self.streams.entry(*ticket).or_default().push_back((last, kept));
        } else {
            self.calls.insert(key(frame), kept);
        }
    }

    /// What the worker needs no more after what it says.
    fn take(&mut self, frame: &FromWorker) -> Vec<Kept> {
        match frame {
            FromWorker::Reply { call, .. } if *call > 0 => Vec::from_iter(self.calls.remove(call)),
            // What the actor was built from is not needed again.
            FromWorker::Saved { state: Ok(_), .. } => Vec::from_iter(self.calls.remove(&0)),
            FromWorker::Returned { calls } => {
                calls.iter().filter_map(|call| self.calls.remove(call)).collect()
            }
            FromWorker::Release { ticket } => {
                let stream = self.streams.remove(ticket).unwrap_or_default();
                let result = self.calls.remove(&(TICKETS + ticket));
                stream.into_iter().map(|(_, kept)| kept).chain(result).collect()
            }
            FromWorker::Mapped { ticket, below } => {
                let Some(stream) = self.streams.get_mut(ticket) else { return Vec::new() };
                let count = stream.partition_point(|(last, _)| last < below);
                stream.drain(..count).map(|(_, kept)| kept).collect()
            }
            _ => Vec::new(),
        }
    }
}

#[derive(Clone)]
struct Worker {
    number: u64,
    home: Home,
    credits: Arc<Semaphore>,
    shelf: Arc<Mutex<Shelf>>,
}

impl Worker {
    async fn live(
        self,
        environment: Environment,
        inbox: mpsc::UnboundedReceiver<ToWorker>,
        mut killed: mpsc::UnboundedReceiver<Option<String>>,
    ) {
        let (sink, events) = mpsc::channel(CREDITS);
        let link = match self.start(environment, Sink::channel(sink)).await {
            Ok(link) => Arc::new(link),
            Err(error) => {
                let end = End { reason: error.to_string(), begun: Begun::UpTo(Vec::new()) };
                return self.say(WorkerEvent::Ended(end)).await;
            }
        };
        let pid = link.process().unwrap_or_default().pid;
        let _ = self.home.out.send(FromNode::Started { worker: self.number, pid }).await;
        let deliver = tokio::spawn(self.clone().deliver(inbox, Arc::clone(&link)));
        let speak = self.speak(events, &link);
        tokio::pin!(speak);
        loop {
            tokio::select! {
                () = &mut speak => break,
                Some(reason) = killed.recv() => match reason {
                    Some(reason) => link.kill_because(reason),
                    None => link.kill(),
                },
            }
        }
        deliver.abort();
    }

    /// Takes milliseconds: not on a thread that serves others.
    async fn start(&self, environment: Environment, sink: Sink) -> Result<WorkerLink, Error> {
        let (host, out, worker) = (self.home.host.clone(), self.home.out.clone(), self.number);
        // A driver that does not read them blocks the worker at last, as a terminal would.
        let lines = move |line| drop(out.blocking_send(FromNode::Line { worker, line }));
        let log = LogTarget::lines(lines);
        let start = move || host.start_here(environment, log, sink).map(WorkerLink::Here);
        let started = tokio::task::spawn_blocking(start).await;
        started.map_err(|error| Error::Internal(error.to_string()))?
    }

    /// What the driver has for the worker, in its order.
    async fn deliver(self, mut inbox: mpsc::UnboundedReceiver<ToWorker>, link: Arc<WorkerLink>) {
        while let Some(mut frame) = inbox.recv().await {
            match self.localise(&mut frame).await {
                Ok(kept) if kept.is_empty() => {}
                Ok(kept) => self.shelf().keep(&frame, kept),
                Err(error) => {
                    self.refuse(&frame, &error, &link).await;
                    continue;
                }
            }
            link.send(frame);
        }
    }

    /// Brings the values that the frame refers to onto this machine.
    async fn localise(&self, frame: &mut ToWorker) -> Result<Kept, Error> {
        let mut kept = Vec::new();
        for packed in frame.packed_mut() {
            let Packed::Far(place) = packed else { continue };
            let stored = self.home.copies.bring(*place).await?;
            let here = Arc::clone(&stored);
            let shared = tokio::task::spawn_blocking(move || here.pack()).await;
            let (local, lease) = shared.map_err(|e| Error::Internal(e.to_string()))??;
            *packed = local;
            kept.extend(lease.map(|lease| (stored, lease)));
        }
        Ok(kept)
    }

    /// A call whose values are not to be had is not run.
    async fn refuse(&self, frame: &ToWorker, error: &Error, link: &WorkerLink) {
        let outcome = Outcome::InputLost { reason: error.to_string() };
        let answer = match frame {
            ToWorker::Call { call, .. } => FromWorker::Reply { call: *call, micros: 0, outcome },
            ToWorker::Resolved { ticket, .. } | ToWorker::Values { ticket, .. } => {
                let failure = Box::new(Failure::from(error));
                link.send(ToWorker::Resolved { ticket: *ticket, result: Err(failure) });
                return;
            }
            ToWorker::Run { member, .. } => {
                FromWorker::Done { generation: member.generation, outcome }
            }
            // Nothing else carries values.
            _ => return,
        };
        self.say_within_credits(WorkerEvent::Frame(answer)).await;
    }

    /// What the worker says, until its end.
    async fn speak(&self, mut events: mpsc::Receiver<WorkerEvent>, link: &WorkerLink) {
        while let Some(event) = events.recv().await {
            match event {
                WorkerEvent::Frame(frame) => {
                    let frame = self.take_over(frame, link).await;
                    self.say_within_credits(WorkerEvent::Frame(frame)).await;
                }
                end => {
                    self.say(end).await;
                    return;
                }
            }
        }
    }

    /// Keeps the values that the worker has made, and lets go of what it needs no more.
    async fn take_over(&self, mut frame: FromWorker, link: &WorkerLink) -> FromWorker {
        let not_needed = self.shelf().take(&frame);
        drop(not_needed);
        let has_large = frame.packed_mut().iter().any(|p| matches!(p, Packed::Shared { .. }));
        let taken = match &frame {
            _ if !has_large => None,
            FromWorker::Reply { call, .. } => Some(ToWorker::Adopted { call: *call }),
            FromWorker::Saved { call, .. } => Some(ToWorker::SavedAdopted { call: *call }),
            FromWorker::Yielded { call, first, values } => {
                Some(ToWorker::TakenOver { call: *call, below: first + values.len() as u64 })
            }
            _ => None,
        };
        for packed in frame.packed_mut() {
            self.adopt(packed).await;
        }
        if let Some(taken) = taken {
            link.send(taken);
        }
        frame
    }

    /// Takes over a value of the worker, if it is a large one.
    async fn adopt(&self, packed: &mut Packed) {
        let Packed::Shared { location, .. } = *packed else { return };
        let adopted = tokio::task::spawn_blocking(move || Stored::adopt(location)).await;
        match adopted.map_err(|error| Error::Internal(error.to_string())).and_then(|a| a) {
            Ok(stored) => {
                let (holder, id) = (self.home.node, stored.id());
                let bytes = location.bytes;
                self.home.copies.keep(holder, Arc::new(stored));
                let place = FarPlace { holder, id, bytes, address: None };
                *packed = Packed::Kept(Owned::by_driver(place));
            }
            // The driver takes this for the loss that it is.
            Err(error) => {
                tracing::warn!(%error, "a result could not be taken over");
                *packed = Packed::Held { ticket: 0 };
            }
        }
    }

    async fn say_within_credits(&self, event: WorkerEvent) {
        if let Ok(credit) = self.credits.acquire().await {
            credit.forget();
        }
        self.say(event).await;
    }

    async fn say(&self, event: WorkerEvent) {
        let _ = self.home.out.send(FromNode::Event { worker: self.number, event }).await;
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Results for the worker are kept beside the arguments of its calls.
const TICKETS: u64 = 1 << 63;

/// A member's arguments are kept until its process ends, an actor's too.
fn key(frame: &ToWorker) -> u64 {
    match frame {
        ToWorker::Call { call, .. } => *call,
        ToWorker::Resolved { ticket, .. } => TICKETS + ticket,
        _ => u64::MAX,
    }
}
