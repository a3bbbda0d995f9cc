//! Bytes that travel beside the head of an encoded value instead of inside it.
//!
//! Serde has no channel for that, so the payloads go through a slot of the thread that encodes or
//! decodes. Each `encode` and `decode` has a slot of its own for as long as it runs: one inside
//! another does not mix with it, and an error or panic leaves the outer one as it was.

use super::tensor;
use crate::Error;
use bytes::Bytes;
use candle_core::Tensor;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::cell::RefCell;
use std::fmt;
use std::thread::LocalKey;

/// Shorter payloads stay in the head: a reference and an alignment gap cost as much.
const INLINE_BELOW: usize = 4096;

/// What starts a reference in the head; the index of the payload follows, as 8 bytes, least
/// significant first. Bytes that only look like a reference are sent beside the head.
const REFERENCE: [u8; 8] = *b"\x00mobula\xff";

/// Bytes that are not copied on their way into an encoding, nor out of it.
///
/// As an argument or result of a remote function, a blob of 4 KiB or more travels beside the
/// encoded value, and what arrives points into the shared memory that it arrived in. In any other
/// serde format it is plain bytes.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Blob(pub Bytes);

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}

impl AsRef<[u8]> for Blob {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl<T: Into<Bytes>> From<T> for Blob {
    fn from(bytes: T) -> Self {
        Self(bytes.into())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Payload::Bytes(self.0.clone()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_byte_buf(BlobVisitor).map(Self)
    }
}

/// A payload on its way out.
#[derive(Clone, Debug)]
pub(super) enum Payload {
    Bytes(Bytes),
    /// A contiguous tensor on the CPU, whose storage others may share.
    Tensor(Tensor),
}

impl Payload {
    pub(super) fn len(&self) -> Result<usize, Error> {
        self.with_bytes(<[u8]>::len)
    }

    /// Lends the bytes; a tensor is locked against changes in place meanwhile.
    pub(super) fn with_bytes<R>(&self, run: impl FnOnce(&[u8]) -> R) -> Result<R, Error> {
        match self {
            Self::Bytes(bytes) => Ok(run(bytes)),
            Self::Tensor(tensor) => Ok(tensor::with_bytes(tensor, run)?),
        }
    }

    pub(super) fn into_bytes(self) -> Result<Bytes, Error> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Tensor(_) => self.with_bytes(Bytes::copy_from_slice),
        }
    }

    /// As a reference when an `encode` of this thread collects payloads, else as bytes.
    pub(super) fn serialize<S: Serializer>(self, serializer: S) -> Result<S::Ok, S::Error> {
        // A text format inside of an `encode` gets its bytes: references are for our own head.
        let readable = serializer.is_human_readable();
        let stays = self.with_bytes(|bytes| readable || is_inline(bytes));
        if !stays.map_err(serde::ser::Error::custom)?
            && let Some(index) = hand_over(&self)
        {
            return serializer.serialize_bytes(&reference(index));
        }
        self.with_bytes(|bytes| serializer.serialize_bytes(bytes))
            .map_err(serde::ser::Error::custom)?
    }
}

fn is_inline(bytes: &[u8]) -> bool {
    bytes.len() < INLINE_BELOW && referenced(bytes).is_none()
}

fn reference(index: usize) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&REFERENCE);
    bytes[8..].copy_from_slice(&(index as u64).to_le_bytes());
    bytes
}

fn referenced(bytes: &[u8]) -> Option<usize> {
    let index = bytes.strip_prefix(&REFERENCE)?;
    usize::try_from(u64::from_le_bytes(index.try_into().ok()?)).ok()
}

struct BlobVisitor;

impl BlobVisitor {
    fn resolve<E: de::Error>(bytes: &[u8]) -> Option<Result<Bytes, E>> {
        let index = referenced(bytes)?;
        INCOMING.with_borrow(|incoming| {
            let buffers = incoming.as_deref()?;
            let missing = || format!("payload {index} of {} is missing", buffers.len());
            Some(buffers.get(index).cloned().ok_or_else(|| E::custom(missing())))
        })
    }
}

impl<'de> Visitor<'de> for BlobVisitor {
    type Value = Bytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes")
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
        Self::resolve(bytes).unwrap_or_else(|| Ok(Bytes::copy_from_slice(bytes)))
    }

    fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
        Self::resolve(&bytes).unwrap_or_else(|| Ok(bytes.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Bytes, A::Error> {
        // Formats without bytes, such as JSON, write numbers. The hint is not to be trusted.
        let mut bytes = Vec::with_capacity(seq.size_hint().unwrap_or(0).min(INLINE_BELOW));
        while let Some(byte) = seq.next_element()? {
            bytes.push(byte);
        }
        Ok(bytes.into())
    }
}

thread_local! {
    static OUTGOING: RefCell<Option<Vec<Payload>>> = const { RefCell::new(None) };
    static INCOMING: RefCell<Option<Vec<Bytes>>> = const { RefCell::new(None) };
}

/// Gives a payload to the `encode` that runs on this thread, if one does; its index there.
fn hand_over(payload: &Payload) -> Option<usize> {
    OUTGOING.with_borrow_mut(|outgoing| {
        let payloads = outgoing.as_mut()?;
        payloads.push(payload.clone());
        Some(payloads.len() - 1)
    })
}

/// Runs an encoder; its result, and the payloads that were handed over meanwhile.
pub(super) fn collect<R>(run: impl FnOnce() -> R) -> (R, Vec<Payload>) {
    let (result, payloads) = scoped(&OUTGOING, Vec::new(), run);
    (result, payloads.unwrap_or_default())
}

/// Runs a decoder that may refer to these payloads.
pub(super) fn supply<R>(buffers: &[Bytes], run: impl FnOnce() -> R) -> R {
    scoped(&INCOMING, buffers.to_vec(), run).0
}

fn scoped<T: 'static, R>(
    slot: &'static LocalKey<RefCell<Option<T>>>,
    value: T,
    run: impl FnOnce() -> R,
) -> (R, Option<T>) {
    let _restore = Restore { slot, outer: slot.replace(Some(value)) };
    let result = run();
    (result, slot.take())
}

/// Puts the slot of the enclosing scope back, also in a panic.
struct Restore<T: 'static> {
    slot: &'static LocalKey<RefCell<Option<T>>>,
    outer: Option<T>,
}

impl<T> Drop for Restore<T> {
    fn drop(&mut self) {
        self.slot.set(self.outer.take());
    }
}
