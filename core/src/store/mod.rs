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

mod budget;
mod inner;
pub(crate) mod limits;
mod memory;
mod reader;
mod segment;
mod spill;

pub(crate) use {
    inner::Lease,
    limits::{budget as memory_budget, default_budget},
    memory::{Offer, Place},
    reader::Reader,
    segment::Location,
};

use crate::Error;
use crate::value::{Draft, Encoded};
use budget::Event;
use bytes::Bytes;
use inner::Inner;
use memory::Memory;
use reader::Shared;
use segment::{Mapping, Segment};
use serde::{Deserialize, Serialize};
use spill::Spill;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::sync::mpsc;

/// Names an object in the store that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct ObjectId(pub(crate) u64);

/// Why the store does not give or take an object.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// There is no room, and none can be made.
    #[error(
        "an object of {needed} bytes does not fit into the {budget} bytes of memory for objects: \
         the others are in use, or the disk is full; release some, or raise MOBULA_OBJECT_BYTES"
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

impl Store {
    /// A store with at most so many bytes in memory, and the rest in a private folder in `spill`.
    pub(crate) fn new(budget: u64, spill: &Path) -> Result<Self, Error> {
        limits::raise_open_files();
        let mut spill = Spill::into(spill)?;
        let inner = Arc::new(Inner::new(budget));
        let mover = std::thread::Builder::new().name("mobula-spill".to_owned());
        let mover = mover.spawn({
            let inner = Arc::clone(&inner);
            move || inner.serve(&mut spill)
        });
        let mover = mover.map_err(|source| Error::system("starting a thread", source))?;
        Ok(Self { inner, mover: Some(mover) })
    }

    /// Puts a value, with one reference. Waits for room if it must be made.
    pub(crate) fn put(&self, value: impl Into<Draft>) -> Result<ObjectId, StoreError> {
        let value = &value.into();
        let layout = value.layout()?;
        let bytes = layout.bytes() as u64;
        let id = self.inner.lock().add(bytes);
        self.inner.step(Event::Insert { id, bytes, pinned: false, adopted: false });
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
        Ok(self.take_in(Memory::of(place)?))
    }

    fn take_in(&self, memory: Memory) -> ObjectId {
        let bytes = memory.bytes();
        let mut state = self.inner.lock();
        let id = state.add(bytes);
        state.slot(id, |slot| slot.memory = Some(memory));
        drop(state);
        self.inner.step(Event::Insert { id, bytes, pinned: false, adopted: true });
        self.inner.step(Event::EndUse(id));
        id
    }

    /// Takes in an object of so many bytes, in its flat form, from another machine, in pieces.
    /// Waits for each.
    pub(crate) fn receive(
        &self,
        bytes: u64,
        pieces: mpsc::Receiver<Bytes>,
    ) -> Result<ObjectId, StoreError> {
        let memory = Memory::receive(bytes, pieces)?;
        Ok(self.take_in(memory))
    }

    /// How large an object is.
    pub(crate) fn bytes(&self, id: ObjectId) -> u64 {
        self.inner.lock().slots.get(&id).map_or(0, |slot| slot.bytes)
    }

    /// The object, mapped; read back from disk if it was spilled. It stays in memory for as long
    /// as anything lives that was decoded from it in place.
    pub(crate) fn get(&self, id: ObjectId) -> Result<Encoded, StoreError> {
        Ok(Encoded::from_flat("an object", &self.flat(id)?)?)
    }

    /// The object in its flat form, to be sent to another host, where it is [adopted](Self::adopt)
    /// as [`Place::Inline`].
    pub(crate) fn flat(&self, id: ObjectId) -> Result<Bytes, StoreError> {
        let (memory, lease) = self.bring(id)?;
        Ok(match memory {
            Memory::Inline(flat) => flat,
            Memory::Shared(segment, mapping) => {
                let mapping = match mapping.upgrade() {
                    Some(mapping) => mapping,
                    None => self.map(id, &segment)?,
                };
                Bytes::from_owner(Leased { mapping: Shared(mapping), _lease: lease })
            }
        })
    }

    /// Where other processes find the object, for as long as the lease is held.
    pub(crate) fn share(&self, id: ObjectId) -> Result<(Place, Lease), StoreError> {
        let (memory, lease) = self.bring(id)?;
        Ok((memory.place(), lease))
    }

    /// One fewer refers to the object; after the last, and when it is no longer in use, it goes.
    pub(crate) fn release(&self, id: ObjectId) {
        self.inner.lock().lost.remove(&id);
        self.inner.step(Event::Release(id));
    }

    /// Bytes that may be in memory.
    pub(crate) fn budget(&self) -> u64 {
        self.inner.lock().budget.limit()
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

/// A mapping that is in use.
struct Leased {
    mapping: Shared,
    _lease: Lease,
}

impl AsRef<[u8]> for Leased {
    fn as_ref(&self) -> &[u8] {
        self.mapping.as_ref()
    }
}

#[cfg(test)]
mod tests;
