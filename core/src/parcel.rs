//! Encoded values on their way to and from processes: small ones in the message, large ones in
//! shared memory, where every process of this host reads the same copy.

use crate::nested::Up;
use crate::nodes::{self, Far, FarPlace, Owned, Recipe};
use crate::scheduler::NodeId;
use crate::status::ObjectCounts;
use crate::store::{
    Lease, Location, ObjectId, Offer, Place, Reader, Store, default_budget, memory_budget,
};
use crate::value::{Draft, Encoded, decode};
use crate::{Error, ObjectRef};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

/// Below this, a value travels in the message.
const INLINE_BELOW: usize = 64 << 10;

/// Bytes of objects that a worker keeps mapped in case they come again.
const KEEP_MAPPED: u64 = 64 << 20;

/// An encoded value that this process holds.
#[derive(Clone, Debug)]
#[doc(hidden)]
pub enum Parcel {
    Inline(Encoded),
    Stored(Arc<Stored>),
    /// On another machine.
    Far(Arc<Far>),
    /// In a worker process: its driver has it.
    Up(Arc<Up>),
}

/// An object in this process's store, until dropped.
#[derive(Debug)]
#[doc(hidden)]
pub struct Stored {
    store: Arc<Store>,
    id: ObjectId,
    /// Whether other machines have been told of it, and may have copies.
    is_known_elsewhere: AtomicBool,
}

impl Drop for Stored {
    fn drop(&mut self) {
        self.store.release(self.id);
        if self.is_known_elsewhere.load(Ordering::Relaxed) {
            nodes::forget_everywhere(NodeId::HERE, self.id);
        }
    }
}

impl Stored {
    fn new(store: Arc<Store>, id: ObjectId) -> Self {
        Self { store, id, is_known_elsewhere: AtomicBool::new(false) }
    }

    /// Takes over what another process of this machine has made.
    pub(crate) fn adopt(location: Location) -> Result<Self, Error> {
        let store = store()?;
        let id = store.adopt(&Place::Shared(location))?;
        Ok(Self::new(store, id))
    }

    /// Takes in so many bytes that come from another machine, in pieces.
    pub(crate) fn receive(bytes: u64, pieces: mpsc::Receiver<Bytes>) -> Result<Self, Error> {
        let store = store()?;
        let id = store.receive(bytes, pieces)?;
        Ok(Self::new(store, id))
    }

    pub(crate) fn id(&self) -> ObjectId {
        self.id
    }

    /// For a message to a process of this machine.
    pub(crate) fn pack(&self) -> Result<(Packed, Option<Lease>), Error> {
        match self.store.share(self.id)? {
            (Place::Shared(location), lease) => {
                Ok((Packed::Shared { id: self.id, location }, Some(lease)))
            }
            (Place::Inline(flat), _) => {
                Ok((Packed::inline(Encoded::from_flat("an object", &flat)?), None))
            }
        }
    }

    /// For a message to another machine, which fetches it from here.
    fn place(&self) -> FarPlace {
        self.is_known_elsewhere.store(true, Ordering::Relaxed);
        let bytes = self.store.bytes(self.id);
        FarPlace { holder: NodeId::HERE, id: self.id, bytes, address: None }
    }
}

/// An encoded value in a message.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Packed {
    Inline {
        head: Bytes,
        buffers: Vec<Bytes>,
    },
    Shared {
        id: ObjectId,
        location: Location,
    },
    /// On another machine than the one that the message is for, perhaps.
    Far(FarPlace),
    /// On the machine that the message comes from, which keeps it for the driver.
    Kept(Owned),
    /// What the driver holds for the worker that says so.
    Held {
        ticket: u64,
    },
}

/// An encoded value whose tensors have not been copied yet.
#[derive(Debug)]
#[doc(hidden)]
pub struct Outgoing(Draft);

impl Outgoing {
    pub(crate) fn new<T: Serialize>(what: &str, value: &T) -> Result<Self, Error> {
        Draft::new(what, value).map(Self)
    }

    /// For use in this process.
    pub(crate) fn into_encoded(self) -> Result<Encoded, Error> {
        self.0.snapshot()
    }

    /// For the driver of this process: what is large stays in the offer until the driver has it.
    pub(crate) fn into_packed(self) -> Result<(Packed, Option<Offer>), Error> {
        if self.0.layout()?.bytes() < INLINE_BELOW {
            return Ok((Packed::inline(self.0.snapshot()?), None));
        }
        let offer = Offer::new(self.0)?;
        match offer.place() {
            Place::Shared(location) => {
                Ok((Packed::Shared { id: ObjectId(0), location }, Some(offer)))
            }
            Place::Inline(flat) => {
                Ok((Packed::inline(Encoded::from_flat("the result", &flat)?), None))
            }
        }
    }
}

impl Packed {
    fn inline(encoded: Encoded) -> Self {
        Self::Inline { head: encoded.head, buffers: encoded.buffers }
    }

    /// Bytes that travel in the message.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Inline { head, buffers } => {
                head.len() + buffers.iter().map(Bytes::len).sum::<usize>()
            }
            Self::Shared { .. } | Self::Far(_) | Self::Kept(_) | Self::Held { .. } => 0,
        }
    }

    /// In a worker: its driver's value, mapped where it is shared.
    pub(crate) fn open(&self, reader: &Reader) -> Result<Encoded, Error> {
        match self {
            Self::Inline { head, buffers } => {
                Ok(Encoded { head: head.clone(), buffers: buffers.clone() })
            }
            Self::Shared { id, location } => reader.open(*id, location),
            Self::Far(_) | Self::Kept(_) | Self::Held { .. } => Err(misplaced()),
        }
    }

    /// In a driver: takes a worker's value over. One on another machine stays there.
    pub(crate) fn adopt(self, name: &str) -> Result<Parcel, Error> {
        match self {
            Self::Inline { head, buffers } => Ok(Parcel::Inline(Encoded { head, buffers })),
            Self::Shared { location, .. } => {
                Stored::adopt(location).map(|stored| Parcel::Stored(Arc::new(stored)))
            }
            Self::Kept(value) => Ok(Parcel::Far(Arc::new(Far::new(name.into(), value)))),
            Self::Far(_) | Self::Held { .. } => Err(misplaced()),
        }
    }
}

impl Parcel {
    /// Encodes a value. A large one waits for room in the store, if it must be made.
    pub(crate) fn new<T: Serialize + ?Sized>(what: &str, value: &T) -> Result<Self, Error> {
        let draft = Draft::new(what, value)?;
        if draft.layout()?.bytes() < INLINE_BELOW {
            return Ok(Self::Inline(draft.snapshot()?));
        }
        let store = store()?;
        let id = store.put(draft)?;
        Ok(Self::Stored(Arc::new(Stored::new(store, id))))
    }

    /// For a message to a machine; a shared object stays in memory as long as the lease is held.
    pub(crate) fn pack(&self, node: NodeId) -> Result<(Packed, Option<Lease>), Error> {
        match self {
            Self::Inline(encoded) => Ok((Packed::inline(encoded.clone()), None)),
            Self::Stored(stored) if node == NodeId::HERE => stored.pack(),
            Self::Stored(stored) => Ok((Packed::Far(stored.place()), None)),
            Self::Up(up) => Ok((up.pack(), None)),
            Self::Far(far) => far.pack(node),
        }
    }

    /// How to make it again, if its machine should be lost.
    pub(crate) fn remember(&self, recipe: impl FnOnce() -> Option<Recipe>) {
        if let Self::Far(far) = self
            && let Some(recipe) = recipe()
        {
            far.remember(recipe);
        }
    }

    /// Whether it can be packed for this machine at once.
    pub(crate) fn is_at_hand(&self, node: NodeId) -> bool {
        match self {
            Self::Inline(_) | Self::Stored(_) | Self::Up(_) => true,
            Self::Far(far) => far.is_at_hand(node),
        }
    }

    /// Waits until it has been fetched, if its machine is still there.
    pub(crate) fn fetch(&self) -> Result<(), Error> {
        match self {
            Self::Inline(_) | Self::Stored(_) | Self::Up(_) => Ok(()),
            Self::Far(far) => far.fetch(),
        }
    }

    /// Waits until it can be packed for any machine: until it has been fetched, or made again.
    pub(crate) fn bring(&self) -> Result<(), Error> {
        match self {
            Self::Inline(_) | Self::Stored(_) | Self::Up(_) => Ok(()),
            Self::Far(far) => far.bring()?.bring(),
        }
    }

    /// The same in this process's hands alone: fetched, or made again, and not needed elsewhere.
    pub(crate) fn brought(self) -> Result<Self, Error> {
        match self {
            Self::Far(far) => far.bring()?.brought(),
            here => Ok(here),
        }
    }

    /// Whether its machine is gone, and no copy is here.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self, Self::Far(far) if far.is_gone())
    }

    /// The task that makes it again, if it is lost. Once that has been done, this is what it made.
    pub(crate) fn remake(&mut self) -> Result<Option<ObjectRef<Self>>, Error> {
        while let Self::Far(far) = self
            && let Some(again) = far.remake()?
        {
            match again.value() {
                Some(made) => *self = (*made?).clone(),
                None => return Ok(Some(again)),
            }
        }
        Ok(None)
    }

    /// For use in this process; read back from disk if it was spilled.
    pub(crate) fn open(&self) -> Result<Encoded, Error> {
        match self {
            Self::Inline(encoded) => Ok(encoded.clone()),
            Self::Stored(stored) => Ok(stored.store.get(stored.id)?),
            Self::Far(far) => far.bring()?.open(),
            Self::Up(up) => up.open(),
        }
    }

    pub(crate) fn decode<T: DeserializeOwned>(&self, what: &str) -> Result<T, Error> {
        decode(what, &self.open()?)
    }
}

fn misplaced() -> Error {
    Error::Internal("a value did not come along with its message".to_owned())
}

/// Parcels for one message to a machine, and what keeps them in place.
pub(crate) fn pack_all(
    parcels: &[Parcel],
    node: NodeId,
) -> Result<(Vec<Packed>, Vec<Lease>), Error> {
    let packed = parcels.iter().map(|parcel| parcel.pack(node)).collect::<Result<Vec<_>, _>>()?;
    let (packed, leases): (Vec<_>, Vec<_>) = packed.into_iter().unzip();
    Ok((packed, leases.into_iter().flatten().collect()))
}

/// Opens the arguments of a call in this process.
pub(crate) fn open_all(parcels: &[Parcel]) -> Result<Vec<Encoded>, Error> {
    parcels.iter().map(Parcel::open).collect()
}

/// What a worker reads its driver's objects with.
pub(crate) fn reader() -> Reader {
    Reader::new(KEEP_MAPPED)
}

/// The store of this process.
static STORE: Mutex<Option<Arc<Store>>> = Mutex::new(None);

/// What the store holds, if there is one.
pub(crate) fn object_counts() -> ObjectCounts {
    let store = STORE.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let Some(store) = store else {
        return ObjectCounts {
            budget_bytes: memory_budget().unwrap_or_else(|_| default_budget()),
            ..ObjectCounts::default()
        };
    };
    let stats = store.stats();
    ObjectCounts {
        count: stats.objects as u64,
        memory_bytes: stats.bytes_in_memory,
        spilled_bytes: stats.bytes_spilled,
        budget_bytes: store.budget(),
    }
}

/// The store, made when it is first needed.
pub(crate) fn store() -> Result<Arc<Store>, Error> {
    let mut slot = STORE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(store) = &*slot {
        return Ok(Arc::clone(store));
    }
    let store = Arc::new(Store::new(memory_budget()?, &std::env::temp_dir())?);
    Ok(Arc::clone(slot.insert(store)))
}
