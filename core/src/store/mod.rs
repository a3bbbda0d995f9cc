//! Objects that several processes of a host use: one copy, in sealed shared memory while there is
//! room, else on disk.
//!
//! The process that owns a [`Store`] decides where each object is ([`budget`]); a thread of its own
//! moves them to and from disk. Other processes are told where an object is ([`Place`]), map it
//! ([`Reader`]) and decode it in place. As long as one may be about to, the owner holds a [`Lease`]:
//! an object in use stays in memory. So it does in the owner's own process while a value lives
//! that was decoded from it.
//!
//! Objects below 64 KiB are plain memory, to be sent along with the message that names them: each
//! shared one costs a file descriptor and some system calls.

// Until the runtime keeps its objects here, only tests do.
#![cfg_attr(not(test), allow(dead_code))]

mod budget;
mod limits;
mod reader;
mod segment;
mod spill;

#[allow(unused_imports, reason = "for the runtime")]
pub(crate) use {
    limits::default_budget,
    reader::Reader,
    segment::{Location, Segment},
};

use crate::Error;
use crate::value::{Draft, Encoded};
use budget::{Budget, Command, Event};
use bytes::Bytes;
use reader::Shared as SharedMapping;
use segment::Mapping;
use serde::{Deserialize, Serialize};
use spill::SpillFolder;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Smaller objects are plain memory.
const SHARED_FROM: usize = 64 << 10;
/// Whoever waits for the disk waits so long at most.
const PATIENCE: Duration = Duration::from_secs(120);

/// Names an object in the store that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct ObjectId(pub(crate) u64);

/// Why the store does not give or take an object.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// There is no room, and none can be made.
    #[error(
        "an object of {needed} bytes does not fit into the {budget} bytes of memory for objects: \
         the others are pinned or in use, or the disk is full; release some, or raise the budget"
    )]
    Full { needed: u64, budget: u64 },
    /// It was released, or never there.
    #[error("object {} is not in the store", id.0)]
    Gone { id: ObjectId },
    /// It was there, and could not be read back.
    #[error("object {} was lost: {reason}", id.0)]
    Lost { id: ObjectId, reason: Error },
    /// Encoding, memory or time failed.
    #[error(transparent)]
    Failed(#[from] Error),
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Failed(error) => error,
            other => Self::layer(other),
        }
    }
}

/// An object as it is told to another process: small ones as they are, others by where they are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Place {
    /// In its flat form.
    Inline(Bytes),
    Shared(Location),
}

/// What a store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stats {
    pub(crate) objects: usize,
    pub(crate) bytes_in_memory: u64,
    pub(crate) bytes_spilled: u64,
}

/// Objects with a memory budget. Dropping it ends its thread and removes its spill folder; memory
/// in which values still live stays until they are gone.
#[derive(Debug)]
pub(crate) struct Store {
    inner: Arc<Inner>,
    mover: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// Something that somebody waits for has happened.
    changed: Condvar,
    /// There is something to move, or the store is closing.
    work: Condvar,
}

#[derive(Debug)]
struct State {
    budget: Budget,
    slots: HashMap<ObjectId, Slot>,
    /// What could not be read back, until it is released.
    lost: HashMap<ObjectId, Error>,
    /// For the mover: at most one entry an object.
    moves: VecDeque<Move>,
    next: u64,
    closing: bool,
}

#[derive(Debug, Default)]
struct Slot {
    memory: Option<Memory>,
    /// How the wait for room ended.
    admitted: Option<Result<(), StoreError>>,
    on_disk: bool,
    bytes: u64,
}

/// An object in memory, in its flat form.
#[derive(Clone, Debug)]
enum Memory {
    Inline(Bytes),
    Shared(Arc<Segment>, Weak<Mapping>),
}

#[derive(Clone, Copy, Debug)]
enum Move {
    Out(ObjectId),
    In(ObjectId),
    /// Remove the file.
    Away(ObjectId),
}

impl Store {
    /// A store with at most so many bytes in memory, and the rest in a private folder in `spill`.
    pub(crate) fn new(budget: u64, spill: &Path) -> Result<Self, Error> {
        limits::raise_open_files();
        let folder = SpillFolder::create(spill)?;
        let state = State {
            budget: Budget::new(budget),
            slots: HashMap::new(),
            lost: HashMap::new(),
            moves: VecDeque::new(),
            next: 0,
            closing: false,
        };
        let (changed, work) = (Condvar::new(), Condvar::new());
        let inner = Arc::new(Inner { state: Mutex::new(state), changed, work });
        let mover = std::thread::Builder::new().name("mobula-spill".to_owned());
        let mover = mover.spawn({
            let inner = Arc::clone(&inner);
            move || inner.serve(&folder)
        });
        let mover = mover.map_err(|source| Error::system("starting a thread", source))?;
        Ok(Self { inner, mover: Some(mover) })
    }

    /// Puts a value, with one reference. Waits for room if it must be made.
    pub(crate) fn put(&self, value: impl Into<Draft>) -> Result<ObjectId, StoreError> {
        self.insert(&value.into(), false)
    }

    /// The same, and keeps it in memory until it is released.
    pub(crate) fn put_pinned(&self, value: impl Into<Draft>) -> Result<ObjectId, StoreError> {
        self.insert(&value.into(), true)
    }

    fn insert(&self, value: &Draft, pinned: bool) -> Result<ObjectId, StoreError> {
        let layout = value.layout()?;
        let bytes = layout.bytes() as u64;
        let id = self.inner.lock().add(bytes);
        self.inner.step(Event::Insert { id, bytes, pinned, adopted: false });
        let admitted = self.inner.wait("room for an object", |state| {
            state.slots.get(&id).map_or(Some(Err(StoreError::Gone { id })), |s| s.admitted.clone())
        });
        let made = admitted.and_then(|()| Ok(Memory::write(value, &layout)?));
        match made {
            Ok(memory) => {
                self.inner.lock().slot(id, |slot| slot.memory = Some(memory));
                self.inner.step(Event::EndUse(id));
                Ok(id)
            }
            Err(error) => {
                self.inner.step(Event::Lost(id));
                self.inner.lock().slots.remove(&id);
                Err(error)
            }
        }
    }

    /// Takes over an object that another process of this user has made, with one reference. It is
    /// in memory already, so it is let in over the budget if need be, and others are spilled.
    /// After this the other process may let go of it.
    pub(crate) fn adopt(&self, place: &Place) -> Result<ObjectId, StoreError> {
        let (memory, bytes) = match place {
            Place::Inline(flat) => (Memory::Inline(flat.clone()), flat.len() as u64),
            Place::Shared(location) => {
                let segment = Arc::new(Segment::open(location)?);
                (Memory::Shared(segment, Weak::new()), location.bytes)
            }
        };
        let mut state = self.inner.lock();
        let id = state.add(bytes);
        state.slot(id, |slot| slot.memory = Some(memory));
        drop(state);
        self.inner.step(Event::Insert { id, bytes, pinned: false, adopted: true });
        self.inner.step(Event::EndUse(id));
        Ok(id)
    }

    /// The object, mapped; read back from disk if it was spilled. It stays in memory for as long
    /// as anything lives that was decoded from it in place.
    pub(crate) fn get(&self, id: ObjectId) -> Result<Encoded, StoreError> {
        let (memory, lease) = self.bring(id)?;
        let flat = match memory {
            Memory::Inline(flat) => flat,
            Memory::Shared(segment, mapping) => {
                let mapping = match mapping.upgrade() {
                    Some(mapping) => mapping,
                    None => self.map(id, &segment)?,
                };
                Bytes::from_owner(Leased { mapping: SharedMapping(mapping), _lease: lease })
            }
        };
        Ok(Encoded::from_flat("an object", &flat)?)
    }

    /// Where other processes find the object, for as long as the lease is held.
    pub(crate) fn share(&self, id: ObjectId) -> Result<(Place, Lease), StoreError> {
        let (memory, lease) = self.bring(id)?;
        let place = match memory {
            Memory::Inline(flat) => Place::Inline(flat),
            Memory::Shared(segment, _) => Place::Shared(segment.location()),
        };
        Ok((place, lease))
    }

    /// One more refers to the object.
    pub(crate) fn retain(&self, id: ObjectId) {
        self.inner.step(Event::Retain(id));
    }

    /// One fewer refers to the object; after the last, and when it is no longer in use, it goes.
    pub(crate) fn release(&self, id: ObjectId) {
        self.inner.lock().lost.remove(&id);
        self.inner.step(Event::Release(id));
    }

    /// What the store holds now.
    pub(crate) fn stats(&self) -> Stats {
        let state = self.inner.lock();
        Stats {
            objects: state.budget.objects(),
            bytes_in_memory: state.budget.used(),
            bytes_spilled: state.budget.spilled(),
        }
    }

    /// Starts a use of the object, and waits until it is in memory.
    fn bring(&self, id: ObjectId) -> Result<(Memory, Lease), StoreError> {
        let lease = Lease::new(&self.inner, id);
        let memory = self.inner.wait("an object to be read back", |state| {
            match (state.slots.get(&id), state.lost.get(&id)) {
                (Some(slot), _) => slot.memory.clone().map(Ok),
                (None, Some(reason)) => Some(Err(StoreError::Lost { id, reason: reason.clone() })),
                (None, None) => Some(Err(StoreError::Gone { id })),
            }
        })?;
        Ok((memory, lease))
    }

    fn map(&self, id: ObjectId, segment: &Segment) -> Result<Arc<Mapping>, StoreError> {
        let mapping = Arc::new(segment.map()?);
        self.inner.lock().slot(id, |slot| {
            if let Some(Memory::Shared(_, known)) = &mut slot.memory {
                *known = Arc::downgrade(&mapping);
            }
        });
        Ok(mapping)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.inner.lock().closing = true;
        self.inner.work.notify_all();
        if let Some(mover) = self.mover.take() {
            // A panic there was reported when it happened.
            let _ = mover.join();
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an event. Memory that is given back is unmapped here, after the lock.
    fn step(&self, event: Event) {
        let _freed = self.lock().step(event);
        self.changed.notify_all();
        self.work.notify_one();
    }

    fn wait<T>(
        &self,
        what: &str,
        mut ready: impl FnMut(&State) -> Option<Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            if let Some(result) = ready(&state) {
                return result;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { what: what.to_owned(), after: PATIENCE }.into());
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The mover's life.
    fn serve(&self, folder: &SpillFolder) {
        while let Some(next) = self.next_move() {
            match next {
                Move::Out(id) => self.move_out(folder, id),
                Move::In(id) => self.move_in(folder, id),
                Move::Away(id) => folder.remove(id),
            }
        }
    }

    fn next_move(&self) -> Option<Move> {
        let idle = |state: &mut State| state.moves.is_empty() && !state.closing;
        let waited = self.work.wait_while(self.lock(), idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.closing { None } else { state.moves.pop_front() }
    }

    fn move_out(&self, folder: &SpillFolder, id: ObjectId) {
        let (memory, on_disk) = match self.lock().slots.get(&id) {
            Some(slot) => (slot.memory.clone(), slot.on_disk),
            None => return,
        };
        let written = match memory {
            // From the last time.
            _ if on_disk => Ok(()),
            Some(memory) => memory.read(|bytes| folder.write(id, bytes)),
            None => Err(Error::Internal(format!("object {} is not in memory", id.0))),
        };
        if let Err(error) = &written {
            tracing::warn!(object = id.0, %error, "an object could not be spilled");
        }
        let is_there = self.lock().slot(id, |slot| slot.on_disk |= written.is_ok());
        if !is_there {
            // Dropped meanwhile.
            folder.remove(id);
        }
        self.step(if written.is_ok() { Event::SpillDone(id) } else { Event::SpillFailed(id) });
    }

    fn move_in(&self, folder: &SpillFolder, id: ObjectId) {
        let Some(bytes) = self.lock().slots.get(&id).map(|slot| slot.bytes) else { return };
        match folder.open(id).and_then(|file| Memory::read_from(file, bytes)) {
            Ok(memory) => {
                self.lock().slot(id, |slot| slot.memory = Some(memory));
                self.step(Event::LoadDone(id));
            }
            Err(reason) => {
                tracing::error!(object = id.0, %reason, "an object was lost");
                self.lock().lost.insert(id, reason);
                self.step(Event::Lost(id));
            }
        }
    }
}

impl State {
    fn add(&mut self, bytes: u64) -> ObjectId {
        self.next += 1;
        let id = ObjectId(self.next);
        self.slots.insert(id, Slot { bytes, ..Slot::default() });
        id
    }

    fn slot(&mut self, id: ObjectId, change: impl FnOnce(&mut Slot)) -> bool {
        self.slots.get_mut(&id).map(change).is_some()
    }

    fn step(&mut self, event: Event) -> Vec<Memory> {
        let commands = self.budget.step(event);
        commands.into_iter().filter_map(|command| self.perform(command)).collect()
    }

    /// Performs a command, or leaves it to the mover; what memory it frees.
    fn perform(&mut self, command: Command) -> Option<Memory> {
        match command {
            Command::Admit(id) => {
                self.slot(id, |slot| slot.admitted = Some(Ok(())));
            }
            Command::Refuse { id, needed, budget } => {
                let full = StoreError::Full { needed, budget };
                self.slot(id, |slot| slot.admitted = Some(Err(full)));
            }
            Command::Spill(id) => self.moves.push_back(Move::Out(id)),
            // Somebody waits for it.
            Command::Load(id) => self.moves.push_front(Move::In(id)),
            Command::Free(id) => return self.slots.get_mut(&id)?.memory.take(),
            Command::Drop(id) => {
                let slot = self.slots.remove(&id)?;
                if slot.on_disk {
                    self.moves.push_back(Move::Away(id));
                }
                return slot.memory;
            }
        }
        None
    }
}

impl Memory {
    fn write(value: &Draft, layout: &crate::value::Layout) -> Result<Self, Error> {
        let bytes = layout.bytes();
        if bytes >= SHARED_FROM {
            match Segment::create(bytes as u64, |out| value.write_to(layout, out)) {
                Err(error) if limits::out_of_files(&error) => {}
                made => return Ok(Self::Shared(Arc::new(made?), Weak::new())),
            }
        }
        let mut flat = Vec::with_capacity(bytes);
        let written = value.write_to(layout, &mut flat);
        written.map_err(|error| Error::system("copying an object", error))?;
        Ok(Self::Inline(flat.into()))
    }

    fn read_from(mut file: std::fs::File, bytes: u64) -> Result<Self, Error> {
        let failed = |error| Error::system("reading a spilled object", error);
        if bytes >= SHARED_FROM as u64 {
            let copy = |out: &mut dyn io::Write| io::copy(&mut file, out).map(drop);
            match Segment::create(bytes, copy) {
                Err(error) if limits::out_of_files(&error) => {}
                made => return Ok(Self::Shared(Arc::new(made?), Weak::new())),
            }
        }
        let mut flat = Vec::new();
        file.read_to_end(&mut flat).map_err(failed)?;
        Ok(Self::Inline(flat.into()))
    }

    fn read<R>(&self, run: impl FnOnce(&[u8]) -> Result<R, Error>) -> Result<R, Error> {
        match self {
            Self::Inline(flat) => run(flat),
            Self::Shared(segment, _) => run(segment.map()?.as_ref()),
        }
    }
}

/// Keeps an object in memory.
#[derive(Debug)]
pub(crate) struct Lease {
    inner: Arc<Inner>,
    id: ObjectId,
}

impl Lease {
    fn new(inner: &Arc<Inner>, id: ObjectId) -> Self {
        inner.step(Event::Use(id));
        Self { inner: Arc::clone(inner), id }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.inner.step(Event::EndUse(self.id));
    }
}

/// A mapping that is in use.
struct Leased {
    mapping: SharedMapping,
    _lease: Lease,
}

impl AsRef<[u8]> for Leased {
    fn as_ref(&self) -> &[u8] {
        self.mapping.as_ref()
    }
}

#[cfg(test)]
mod tests;
