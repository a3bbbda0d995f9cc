//! What the CPU kernels of this crate share.

use candle_core::{Error, Layout, Result};

/// Elements that are worth a task of their own: below this, starting one costs more than it saves.
pub(crate) const TASK_ELEMENTS: usize = 1 << 14;

/// The elements of a contiguous tensor. Callers make theirs contiguous first.
pub(crate) fn elements<'a, T>(data: &'a [T], layout: &Layout, op: &'static str) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => Err(Error::RequiresContiguous { op }.bt()),
    }
}
