//! Losses.

use crate::cpu::{TASK_ELEMENTS, unsupported, with_values};
use crate::kernels::{Real, output};
use crate::link::{Source, result};
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

/// The mean over the rows of [`cross_entropy_sum`]. Errors for 0 rows, where it is undefined.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let logits = Tensor::new(&[[0f32, 0.0], [0.0, 0.0]], &Device::Cpu)?;
/// let labels = Tensor::new(&[0u32, 1], &Device::Cpu)?;
/// let loss = mobula_nn::loss::cross_entropy(&logits, &labels)?.to_scalar::<f32>()?;
/// assert!((loss - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let sum = cross_entropy_sum(logits, labels)?;
    match logits.dim(0)? {
        0 => Err(Error::EmptyBatch { what: "the mean loss" }),
        rows => Ok((sum / rows as f64)?),
    }
}

/// −Σ log softmax(logits)\[row, label\] in nats, a scalar of the logits' type.
///
/// `logits` are `[rows, classes]`, `labels` integers `[rows]` in `0..classes`, which is checked
/// before anything is computed. Sums are taken in `f64`, row by row, so the bits do not depend
/// on the number of threads. The loss of 0 rows is 0. Workers with unequal shares divide the sum
/// by the rows of all of them, which gives the gradient of the global mean.
pub fn cross_entropy_sum(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let classes = checked_labels(logits, labels)?;
    if logits.device().is_cpu() {
        let logits = &logits.contiguous()?;
        return Ok(match logits.dtype() {
            DType::F32 => cross_entropy_as::<f32>(logits, classes)?,
            DType::F64 => cross_entropy_as::<f64>(logits, classes)?,
            other => return Err(unsupported(other, "cross-entropy").into()),
        });
    }
    composed(logits, &classes)
}

/// The labels as class numbers, after every check of both shapes and of every label.
pub(crate) fn checked_labels(logits: &Tensor, labels: &Tensor) -> Result<Vec<u32>> {
    let [rows, classes] = *logits.dims() else {
        return Err(Error::shape("logits", "[rows, classes]", logits.dims()));
    };
    if labels.dims() != [rows] {
        return Err(Error::shape(
            "labels",
            format!("[{rows}] as the logits have rows"),
            labels.dims(),
        ));
    }
    if !matches!(labels.dtype(), DType::U8 | DType::U32 | DType::I64) {
        let got = labels.dtype().as_str();
        return Err(Error::LabelType { got });
    }
    let labels: Vec<i64> = labels.to_dtype(DType::I64)?.to_vec1()?;
    let out_of_range = |label: &i64| !(0..classes as i64).contains(label);
    if let Some(row) = labels.iter().position(out_of_range) {
        let label = labels[row];
        return Err(Error::LabelOutOfRange { label, row, classes });
    }
    Ok(labels.into_iter().map(|label| label as u32).collect())
}

/// The same in candle's own operations, for devices that this crate has no kernel for.
fn composed(logits: &Tensor, labels: &[u32]) -> Result<Tensor> {
    let labels = Tensor::new(labels, logits.device())?.unsqueeze(1)?;
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let chosen = shifted.gather(&labels, D::Minus1)?;
    Ok((log_sum - chosen)?.sum_all()?)
}

/// Softmax and negative log-likelihood in one operation.
fn cross_entropy_as<T: Real>(logits: &Tensor, labels: Vec<u32>) -> candle_core::Result<Tensor> {
    let (_, classes) = logits.dims2()?;
    let sum = with_values([logits], |[logits]| Ok(sum::<T>(logits, &labels, classes)))?;
    let (source, logits) = (Source::of(logits), logits.detach());
    let to = source.clone();
    result(vec![T::from_f64(sum)], (), &[&source], move |gradient| {
        let scale = T::cpu_storage_as_slice(&gradient)?[0].to_f64();
        let gradient = with_values([&logits], |[x]| Ok(slopes::<T>(x, &labels, classes, scale)))?;
        Ok(vec![to.give(gradient)?])
    })
}

fn sum<T: Real>(logits: &[T], labels: &[u32], classes: usize) -> f64 {
    let rows = logits.par_chunks(classes.max(1)).zip(labels);
    let losses = rows.with_min_len(rows_per_task(classes)).map(|(row, label)| {
        let (max, log_sum) = log_sum_exp(row);
        log_sum - (row[*label as usize].to_f64() - max)
    });
    // Collected, then added in order: a parallel sum would depend on how it was split.
    losses.collect::<Vec<f64>>().iter().sum()
}

/// softmax(logits) − onehot(label), times the gradient of the loss.
fn slopes<T: Real>(logits: &[T], labels: &[u32], classes: usize, scale: f64) -> Vec<T> {
    output(logits.len(), |out| {
        let rows = out.par_chunks_mut(classes.max(1)).zip(logits.par_chunks(classes.max(1)));
        let rows = rows.zip(labels).with_min_len(rows_per_task(classes));
        rows.for_each(|((out, row), label)| {
            let (max, log_sum) = log_sum_exp(row);
            for (class, (out, logit)) in out.iter_mut().zip(row).enumerate() {
                let onehot = f64::from(u8::from(class == *label as usize));
                *out = T::from_f64(scale * ((logit.to_f64() - max - log_sum).exp() - onehot));
            }
        });
    })
}

/// The row's maximum and log Σ exp(row − maximum). Kept apart: their sum would round the second
/// away when logits are large.
fn log_sum_exp<T: Real>(row: &[T]) -> (f64, f64) {
    let max = row.iter().map(|x| x.to_f64()).fold(f64::NEG_INFINITY, f64::max);
    (max, row.iter().map(|x| (x.to_f64() - max).exp()).sum::<f64>().ln())
}

fn rows_per_task(classes: usize) -> usize {
    // An exponential costs about as much as eight plain operations.
    (TASK_ELEMENTS / 8 / classes.max(1)).max(1)
}
