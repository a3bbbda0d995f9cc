//! How values travel: a small head that describes them, and large payloads beside it.
//!
//! A value is encoded as MessagePack with field names, so `flatten`, `untagged` and skipped fields
//! work. Large payloads do not go through that encoder. A [`Blob`] and a candle tensor leave only a
//! reference in the head, and their bytes travel beside it, as with protocol 5 of Python's pickle
//! (PEP 574): into shared memory with one copy, and out of it with none (a tensor: with one, since
//! candle's CPU storage is a `Vec`).
//!
//! ```
//! use mobula_core::value::Blob;
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct Update {
//!     step: u64,
//!     #[serde(with = "mobula_core::value::tensor")]
//!     weights: candle_core::Tensor,
//!     log: Blob,
//! }
//! ```
//!
//! # Other kinds of payload
//!
//! A layer adds its own kind on top of [`Blob`], without a change here: a newtype that serialises a
//! description and its buffers as blobs. Arrow record batches, for example, are the schema (as an
//! IPC message) and, for each array, its length, its null count and its buffers: an Arrow `Buffer`
//! becomes `Blob(Bytes::from_owner(buffer))`, and on the other side `Buffer::from(blob.0)`, both
//! without a copy. Blobs in shared memory are aligned to 64 bytes, as Arrow wants them.

mod blob;
mod flat;
pub mod tensor;

pub use blob::Blob;
pub(crate) use flat::Layout;
pub use tensor::TensorValue;

use crate::Error;
use blob::Payload;
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// An encoded value: its head, and the payloads that the head refers to by their index.
#[derive(Clone, Debug, Default)]
#[doc(hidden)]
pub struct Encoded {
    pub(crate) head: Bytes,
    pub(crate) buffers: Vec<Bytes>,
}

impl Encoded {
    /// Bytes of the head and of all payloads.
    pub(crate) fn bytes(&self) -> usize {
        self.head.len() + self.buffers.iter().map(Bytes::len).sum::<usize>()
    }
}

/// An encoded value whose tensors have not been copied yet: they are read when it is written, so
/// it must be written, or turned into an [`Encoded`], before anyone may change them again.
#[derive(Debug)]
pub(crate) struct Draft {
    head: Bytes,
    payloads: Vec<Payload>,
}

impl Draft {
    pub(crate) fn new<T: Serialize + ?Sized>(what: &str, value: &T) -> Result<Self, Error> {
        let (head, payloads) = blob::collect(|| rmp_serde::to_vec_named(value));
        let head = head.map_err(|error| Error::codec("encode", what, error))?;
        Ok(Self { head: head.into(), payloads })
    }

    /// Copies the tensors, so that later changes to them are not seen.
    pub(crate) fn snapshot(self) -> Result<Encoded, Error> {
        let buffers = self.payloads.into_iter().map(Payload::into_bytes);
        Ok(Encoded { head: self.head, buffers: buffers.collect::<Result<_, _>>()? })
    }
}

impl From<Encoded> for Draft {
    fn from(encoded: Encoded) -> Self {
        let payloads = encoded.buffers.into_iter().map(Payload::Bytes).collect();
        Self { head: encoded.head, payloads }
    }
}

/// Encodes a value. Blobs are shared, tensors are copied.
#[cfg(test)]
pub(crate) fn encode<T: Serialize + ?Sized>(what: &str, value: &T) -> Result<Encoded, Error> {
    Draft::new(what, value)?.snapshot()
}

/// Decodes a value. Its blobs share the memory of `encoded`.
pub(crate) fn decode<T: DeserializeOwned>(what: &str, encoded: &Encoded) -> Result<T, Error> {
    let decoded = blob::supply(&encoded.buffers, || rmp_serde::from_slice(&encoded.head));
    decoded.map_err(|error| Error::codec("decode", what, error))
}

#[cfg(test)]
mod tests;
