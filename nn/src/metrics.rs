//! How good predictions are.

use crate::loss::checked_labels;
use crate::{Error, Result};
use candle_core::{D, Tensor};

/// How many rows of `logits [rows, .., classes]` have their largest value (the first of equals) at
/// their label in `labels [rows, ..]`. Sums over batches and workers without rounding.
pub fn correct(logits: &Tensor, labels: &Tensor) -> Result<usize> {
    let labels = checked_labels(logits, labels)?;
    if labels.is_empty() {
        return Ok(0);
    }
    let predicted: Vec<u32> = logits.argmax(D::Minus1)?.flatten_all()?.to_vec1()?;
    Ok(predicted.iter().zip(&labels).filter(|(p, l)| p == l).count())
}

/// The fraction of rows that [`correct`] counts. Errors for 0 rows, where it is undefined.
pub fn accuracy(logits: &Tensor, labels: &Tensor) -> Result<f64> {
    let correct = correct(logits, labels)?;
    match labels.elem_count() {
        0 => Err(Error::EmptyBatch { what: "the accuracy" }),
        rows => Ok(correct as f64 / rows as f64),
    }
}
