//! Named `f32` tensors in memory, and in safetensors files without a further copy.

use crate::Result;
use safetensors::{Dtype, View};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

/// A tensor that lies somewhere in row-major order.
#[derive(Clone, Copy)]
pub(crate) struct Slice<'a> {
    pub(crate) shape: &'a [usize],
    pub(crate) values: &'a [f32],
}

impl View for Slice<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(bytemuck::cast_slice(self.values))
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// Writes tensors by name, as Python's safetensors reads them.
pub(crate) fn write<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Slice<'a>)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    safetensors::serialize_to_file(tensors, metadata, path).map_err(|error| {
        mobula_core::Error::codec("encode", path.display().to_string(), error).into()
    })
}
