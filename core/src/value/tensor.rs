//! Candle tensors as serde values, for `#[serde(with = "mobula_core::value::tensor")]`.
//!
//! Shape and element type are in the head of the encoding, the elements beside it, in row order and
//! in the machine's byte order. Views (transposed, narrowed) arrive as contiguous tensors. A tensor
//! on a GPU is moved to the CPU and arrives there; gradients and the graph that led to a tensor do
//! not travel. Tensors in a container are [`TensorValue`]s.
#![allow(unsafe_code)]

use super::Blob;
use super::blob::Payload;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};
use serde::de::{Deserializer, Error as _};
use serde::ser::{Error as _, SerializeStruct};
use serde::{Deserialize, Serialize, Serializer};

/// A candle tensor that is a serde value: see [the module](self).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TensorValue(#[serde(with = "self")] pub Tensor);

impl From<Tensor> for TensorValue {
    fn from(tensor: Tensor) -> Self {
        Self(tensor)
    }
}

/// Serialises a tensor: `{dtype, shape, data}`.
pub fn serialize<S: Serializer>(tensor: &Tensor, serializer: S) -> Result<S::Ok, S::Error> {
    let here = tensor.detach().to_device(&Device::Cpu).and_then(|tensor| tensor.contiguous());
    let here = here.map_err(S::Error::custom)?;
    let mut fields = serializer.serialize_struct("Tensor", 3)?;
    fields.serialize_field("dtype", here.dtype().as_str())?;
    fields.serialize_field("shape", here.dims())?;
    fields.serialize_field("data", &Elements(here))?;
    fields.end()
}

/// Deserialises a tensor, onto the CPU.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Tensor, D::Error> {
    let wire = Wire::deserialize(deserializer)?;
    let dtype: DType =
        wire.dtype.parse().map_err(|_| D::Error::custom(unknown_dtype(&wire.dtype)))?;
    if let Some(expected) = expected_bytes(&wire.shape, dtype)
        && expected != Some(wire.data.0.len())
    {
        return Err(D::Error::custom(format!(
            "a {} tensor of shape {:?} cannot have {} bytes",
            wire.dtype,
            wire.shape,
            wire.data.0.len()
        )));
    }
    Tensor::from_raw_buffer(&wire.data.0, dtype, &wire.shape, &Device::Cpu)
        .map_err(D::Error::custom)
}

/// The bytes that a tensor's elements take: unknown for elements smaller than a byte; no number
/// where the strides of such a shape do not fit one.
fn expected_bytes(shape: &[usize], dtype: DType) -> Option<Option<usize>> {
    let size = dtype.size_in_bytes();
    let strides = shape.iter().try_fold(size, |bytes, n| bytes.checked_mul((*n).max(1)));
    let bytes = strides.map(|bytes| if shape.contains(&0) { 0 } else { bytes });
    (size > 0).then_some(bytes)
}

fn unknown_dtype(name: &str) -> String {
    format!("no element type of a tensor is named {name:?}")
}

#[derive(Deserialize)]
struct Wire {
    dtype: String,
    shape: Vec<usize>,
    data: Blob,
}

/// The elements of a contiguous tensor on the CPU.
struct Elements(Tensor);

impl Serialize for Elements {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Payload::Tensor(self.0.clone()).serialize(serializer)
    }
}

/// Lends the elements of a contiguous tensor on the CPU as bytes.
pub(super) fn with_bytes<R>(
    tensor: &Tensor,
    run: impl FnOnce(&[u8]) -> R,
) -> candle_core::Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => Ok(run(elements(storage, start..end)?)),
        _ => candle_core::bail!("expected a contiguous tensor on the CPU, got {layout:?}"),
    }
}

fn elements(storage: &CpuStorage, range: std::ops::Range<usize>) -> candle_core::Result<&[u8]> {
    Ok(match storage {
        CpuStorage::U8(values) | CpuStorage::F8E8M0(values) => &values[range],
        CpuStorage::U32(values) => bytes_of(&values[range]),
        CpuStorage::I16(values) => bytes_of(&values[range]),
        CpuStorage::I32(values) => bytes_of(&values[range]),
        CpuStorage::I64(values) => bytes_of(&values[range]),
        CpuStorage::BF16(values) => bytes_of(&values[range]),
        CpuStorage::F16(values) => bytes_of(&values[range]),
        CpuStorage::F32(values) => bytes_of(&values[range]),
        CpuStorage::F64(values) => bytes_of(&values[range]),
        CpuStorage::F8E4M3(values) => bytes_of(&values[range]),
        // Several elements share a byte, so that a view cannot be cut out of the whole.
        CpuStorage::F6E2M3(values) | CpuStorage::F6E3M2(values) | CpuStorage::F4(values) => {
            match range.start {
                0 => values,
                _ => candle_core::bail!("a view into packed elements cannot be encoded"),
            }
        }
    })
}

fn bytes_of<T: WithDType>(values: &[T]) -> &[u8] {
    // SAFETY: called above with the element types of candle's CPU storage alone. Those are plain
    // numbers without padding, so every byte is initialised; a byte has no alignment, and the
    // bytes live as long as the borrowed values.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
