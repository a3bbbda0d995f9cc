//! Losses.

use crate::cpu::{TASK_ELEMENTS, elements};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;
use std::sync::Arc;

const OP: &str = "cross-entropy";

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
        let op = CrossEntropy { labels: classes.into() };
        return Ok(logits.contiguous()?.apply_op1(op)?);
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
struct CrossEntropy {
    labels: Arc<[u32]>,
}

/// softmax(logits) − onehot(label), times the gradient of the loss.
struct CrossEntropyGrad {
    labels: Arc<[u32]>,
    scale: f64,
}

impl CrossEntropy {
    fn sum<T: WithDType>(&self, logits: &[T], classes: usize) -> T {
        let rows = logits.par_chunks(classes.max(1)).zip(&self.labels[..]);
        let rows = rows.with_min_len(rows_per_task(classes));
        let losses = rows.map(|(row, label)| {
            let (max, log_sum) = log_sum_exp(row);
            log_sum - (row[*label as usize].to_f64() - max)
        });
        // Collected, then added in order: a parallel sum would depend on how it was split.
        T::from_f64(losses.collect::<Vec<f64>>().iter().sum())
    }
}

impl CrossEntropyGrad {
    fn rows<T: WithDType>(&self, logits: &[T], classes: usize) -> Vec<T> {
        let mut grad = vec![T::zero(); logits.len()];
        let rows = grad.par_chunks_mut(classes.max(1)).zip(logits.par_chunks(classes.max(1)));
        let rows = rows.zip(&self.labels[..]).with_min_len(rows_per_task(classes));
        rows.for_each(|((grad, row), label)| {
            let (max, log_sum) = log_sum_exp(row);
            for (class, (grad, logit)) in grad.iter_mut().zip(row).enumerate() {
                let onehot = f64::from(u8::from(class == *label as usize));
                *grad = T::from_f64(self.scale * ((logit.to_f64() - max - log_sum).exp() - onehot));
            }
        });
        grad
    }
}

/// The row's maximum and log Σ exp(row − maximum). Kept apart: their sum would round the second
/// away when logits are large.
fn log_sum_exp<T: WithDType>(row: &[T]) -> (f64, f64) {
    let max = row.iter().map(|x| x.to_f64()).fold(f64::NEG_INFINITY, f64::max);
    (max, row.iter().map(|x| (x.to_f64() - max).exp()).sum::<f64>().ln())
}

fn rows_per_task(classes: usize) -> usize {
    // An exponential costs about as much as eight plain operations.
    (TASK_ELEMENTS / 8 / classes.max(1)).max(1)
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, classes) = layout.shape().dims2()?;
        let sum = match storage {
            CpuStorage::F32(x) => {
                CpuStorage::F32(vec![self.sum(elements(x, layout, OP)?, classes)])
            }
            CpuStorage::F64(x) => {
                CpuStorage::F64(vec![self.sum(elements(x, layout, OP)?, classes)])
            }
            other => return Err(unsupported(other)),
        };
        Ok((sum, ().into()))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        _loss: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let op = CrossEntropyGrad {
            labels: Arc::clone(&self.labels),
            scale: grad.to_dtype(DType::F64)?.to_scalar()?,
        };
        logits.apply_op1_no_bwd(&op).map(Some)
    }
}

impl CustomOp1 for CrossEntropyGrad {
    fn name(&self) -> &'static str {
        "cross-entropy-grad"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, classes) = layout.shape().dims2()?;
        let grad = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(self.rows(elements(x, layout, OP)?, classes)),
            CpuStorage::F64(x) => CpuStorage::F64(self.rows(elements(x, layout, OP)?, classes)),
            other => return Err(unsupported(other)),
        };
        Ok((grad, layout.shape().clone()))
    }
}

fn unsupported(storage: &CpuStorage) -> candle_core::Error {
    candle_core::Error::UnsupportedDTypeForOp(storage.dtype(), OP).bt()
}
