//! Softmax and the cost of labels as one operation.

use crate::Result;
use crate::cpu::{TASK_ELEMENTS, unsupported, with_values};
use crate::kernels::{Real, lane_sum, output, vectorized};
use crate::link::{Source, result};
use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

/// Numbers that are summed in their own type; the sums of such blocks are added in `f64`.
const BLOCK: usize = 512;

/// What the log-probabilities of each row cost.
pub(super) struct Costs {
    pub(super) classes: usize,
    pub(super) labels: Vec<u32>,
    /// The weight of each row; 0 for those that are not looked at.
    pub(super) rows: Vec<f64>,
    pub(super) class_weights: Option<Vec<f64>>,
    pub(super) smoothing: f64,
}

/// A row costs `−hit · lp[label] − spread · Σ class_weight · lp`, where `lp` are log-probabilities.
#[derive(Clone, Copy)]
struct Cost {
    label: usize,
    hit: f64,
    spread: f64,
}

impl Costs {
    /// What the sum of costs is divided by for the mean.
    pub(super) fn weight(&self) -> f64 {
        let rows = self.rows.iter().zip(&self.labels);
        rows.map(|(weight, label)| weight * self.class_weight(*label)).sum()
    }

    fn class_weight(&self, label: u32) -> f64 {
        // A row that is ignored has a label of 0, even where there are no classes.
        let weights = self.class_weights.as_deref();
        weights.map_or(1.0, |weights| weights.get(label as usize).copied().unwrap_or(0.0))
    }

    fn all_classes(&self) -> f64 {
        match &self.class_weights {
            Some(weights) => weights.iter().sum(),
            None => self.classes as f64,
        }
    }

    /// `None` for a row that is not looked at.
    fn of(&self, row: usize) -> Option<Cost> {
        let (label, weight) = (self.labels[row], self.rows[row]);
        (weight != 0.0).then(|| Cost {
            label: label as usize,
            hit: weight * self.class_weight(label) * (1.0 - self.smoothing),
            spread: weight * self.smoothing / self.classes as f64,
        })
    }

    /// Rows of a task. An exponential costs about as much as eight plain operations.
    fn rows_per_task(&self) -> usize {
        (TASK_ELEMENTS / 8 / self.classes.max(1)).max(1)
    }
}

/// The sum of all rows' costs. `is_log` says that `logits` are log-probabilities.
pub(super) fn cost(logits: &Tensor, costs: Costs, is_log: bool) -> Result<Tensor> {
    if !crate::cpu::has_kernels(logits) {
        return Ok(composed(logits, &costs, is_log)?);
    }
    let logits = &logits.contiguous()?;
    Ok(match logits.dtype() {
        DType::F32 => cost_as::<f32>(logits, costs, is_log)?,
        DType::F64 => cost_as::<f64>(logits, costs, is_log)?,
        other => return Err(unsupported(other, "cross-entropy").into()),
    })
}

/// In candle's own operations, for devices that this crate has no kernel for.
fn composed(logits: &Tensor, costs: &Costs, is_log: bool) -> candle_core::Result<Tensor> {
    let (device, dtype) = (logits.device(), logits.dtype());
    let counted = (0..costs.labels.len()).filter_map(|row| Some((row as u32, costs.of(row)?)));
    let (rows, each): (Vec<u32>, Vec<Cost>) = counted.unzip();
    let column = |of: fn(&Cost) -> f64| {
        let values = each.iter().map(of).collect();
        Tensor::from_vec(values, (each.len(), 1), device)?.to_dtype(dtype)
    };
    // What is not looked at may be anything, so it must not be multiplied with 0.
    if each.is_empty() {
        let zeros = logits.zeros_like()?;
        return zeros.to_dtype(DType::U8)?.where_cond(logits, &zeros)?.sum_all();
    }
    let rows = Tensor::new(rows, device)?;
    let mut log = logits.reshape((costs.labels.len(), costs.classes))?.index_select(&rows, 0)?;
    if !is_log {
        let shifted = log.broadcast_sub(&log.detach().max_keepdim(D::Minus1)?)?;
        log = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
    }
    let labels = each.iter().map(|cost| cost.label as u32).collect();
    let labels = Tensor::from_vec(labels, (each.len(), 1), device)?;
    let mut sum = (log.gather(&labels, D::Minus1)? * column(|cost| cost.hit)?)?.sum_all()?;
    if costs.smoothing > 0.0 {
        if let Some(weights) = &costs.class_weights {
            let weights = Tensor::new(weights.as_slice(), device)?.to_dtype(dtype)?;
            log = log.broadcast_mul(&weights)?;
        }
        sum = (sum + log.broadcast_mul(&column(|cost| cost.spread)?)?.sum_all()?)?;
    }
    sum.neg()
}

fn cost_as<T: Real>(logits: &Tensor, costs: Costs, is_log: bool) -> candle_core::Result<Tensor> {
    let softmax = Softmax::<T>::new(costs, is_log);
    let norms = with_values([logits], |[x]| Ok(softmax.forward(x)))?;
    let sum: f64 = norms.iter().map(|norm| norm.cost).sum();
    let (source, logits) = (Source::of(logits), logits.detach());
    let to = source.clone();
    result(vec![T::from_f64(sum)], (), &[&source], move |gradient| {
        let scale = T::cpu_storage_as_slice(&gradient)?[0].to_f64();
        let gradient = with_values([&logits], |[x]| Ok(softmax.backward(x, &norms, scale)))?;
        Ok(vec![to.give(gradient)?])
    })
}

/// What makes a row of logits probabilities, and what they cost.
#[derive(Clone, Copy, Default)]
struct Norm {
    max: f64,
    /// Σ exp(x − max). Apart from the maximum: their sum would round it away when logits are large.
    sum: f64,
    cost: f64,
}

struct Softmax<T> {
    costs: Costs,
    is_log: bool,
    /// Of [`Costs::class_weights`], where something is spread over all classes.
    class_weights: Option<Vec<T>>,
    all_classes: f64,
}

impl<T: Real> Softmax<T> {
    fn new(costs: Costs, is_log: bool) -> Self {
        let weights = costs.class_weights.as_ref().filter(|_| costs.smoothing > 0.0);
        let class_weights =
            weights.map(|weights| weights.iter().map(|w| T::from_f64(*w)).collect());
        Self { is_log, class_weights, all_classes: costs.all_classes(), costs }
    }

    fn forward(&self, x: &[T]) -> Vec<Norm> {
        let (classes, per_task) = (self.costs.classes.max(1), self.costs.rows_per_task());
        let mut norms = vec![Norm::default(); self.costs.labels.len()];
        let tasks = norms.par_chunks_mut(per_task).zip(x.par_chunks(per_task * classes));
        tasks.enumerate().for_each(|(task, (norms, x))| {
            vectorized(
                #[inline(always)]
                || {
                    for (at, (norm, x)) in norms.iter_mut().zip(x.chunks(classes)).enumerate() {
                        if let Some(cost) = self.costs.of(task * per_task + at) {
                            *norm = self.norm(x, cost);
                        }
                    }
                },
            )
        });
        norms
    }

    #[inline(always)]
    fn norm(&self, x: &[T], cost: Cost) -> Norm {
        let (max, sum) = if self.is_log { (T::zero(), 1.0) } else { exp_sum(x) };
        let log_sum = sum.ln();
        let max_f64 = max.to_f64();
        let mut total = cost.hit * (log_sum - (x[cost.label].to_f64() - max_f64));
        if cost.spread > 0.0 {
            let below = match &self.class_weights {
                Some(weights) => weighted_sum(x, weights, max),
                None => block_sum(x, |x| x - max),
            };
            total += cost.spread * (self.all_classes * log_sum - below);
        }
        Norm { max: max_f64, sum, cost: total }
    }

    fn backward(&self, x: &[T], norms: &[Norm], scale: f64) -> Vec<T> {
        let (classes, per_task) = (self.costs.classes.max(1), self.costs.rows_per_task());
        output(x.len(), |out: &mut [T]| {
            let tasks =
                out.par_chunks_mut(per_task * classes).zip(x.par_chunks(per_task * classes));
            tasks.enumerate().for_each(|(task, (out, x))| {
                vectorized(
                    #[inline(always)]
                    || {
                        let rows = out.chunks_mut(classes).zip(x.chunks(classes)).enumerate();
                        for (at, (out, x)) in rows {
                            let row = task * per_task + at;
                            self.slopes(out, x, norms[row], self.costs.of(row), scale);
                        }
                    },
                )
            });
        })
    }

    /// Of one row, from the gradient `scale` of the sum.
    #[inline(always)]
    fn slopes(&self, out: &mut [T], x: &[T], norm: Norm, cost: Option<Cost>, scale: f64) {
        let Some(Cost { label, hit, spread }) = cost else {
            return out.fill(T::zero());
        };
        let each = T::from_f64(spread * scale);
        if self.is_log {
            out.fill(T::zero());
        } else {
            let factor = T::from_f64(scale * (hit + spread * self.all_classes) / norm.sum);
            let max = T::from_f64(norm.max);
            out.iter_mut().zip(x).for_each(|(out, x)| *out = (*x - max).exp() * factor);
        }
        match &self.class_weights {
            Some(weights) => {
                out.iter_mut().zip(weights).for_each(|(out, weight)| *out -= each * *weight);
            }
            None => out.iter_mut().for_each(|out| *out -= each),
        }
        out[label] -= T::from_f64(hit * scale);
    }
}

/// The maximum, and Σ exp(x − maximum).
#[inline(always)]
fn exp_sum<T: Real>(x: &[T]) -> (T, f64) {
    let max = lane_max(x);
    (max, block_sum(x, |x| (x - max).exp()))
}

/// The largest number that is none of the NaNs; −∞ if there is none.
#[inline(always)]
fn lane_max<T: Real>(x: &[T]) -> T {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [T::from_f64(f64::NEG_INFINITY); 16];
    for chunk in chunks.iter().map(|chunk| chunk.as_slice()).chain([rest]) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = larger(*lane, *x));
    }
    lanes.into_iter().fold(lanes[0], larger)
}

/// `a` if `b` is a NaN.
#[inline(always)]
fn larger<T: Real>(a: T, b: T) -> T {
    if b > a { b } else { a }
}

#[inline(always)]
fn block_sum<T: Real>(x: &[T], f: impl Fn(T) -> T) -> f64 {
    let (mut sum, mut values) = (0.0, [T::zero(); BLOCK]);
    for x in x.chunks(BLOCK) {
        values.iter_mut().zip(x).for_each(|(value, x)| *value = f(*x));
        sum += lane_sum(&values[..x.len()]).to_f64();
    }
    sum
}

/// Σ weight · (x − max).
#[inline(always)]
fn weighted_sum<T: Real>(x: &[T], weights: &[T], max: T) -> f64 {
    let (mut sum, mut values) = (0.0, [T::zero(); BLOCK]);
    for (x, weights) in x.chunks(BLOCK).zip(weights.chunks(BLOCK)) {
        let pairs = values.iter_mut().zip(x).zip(weights);
        pairs.for_each(|((value, x), weight)| *value = (*x - max) * *weight);
        sum += lane_sum(&values[..x.len()]).to_f64();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Init, Params};
    use candle_core::Device;

    #[test]
    fn the_kernel_agrees_with_candles_operations() {
        // Of four classes nothing counts at all.
        let weights =
            |row: usize, classes| if classes == 4 { 0.0 } else { [1.0, 0.0, 2.5][row % 3] };
        for (rows, classes, smoothing, weighs_classes) in [
            (0, 3, 0.2, true),
            (2, 4, 0.1, false),
            (1, 1, 0.0, false),
            (7, 3, 0.0, true),
            (60, 17, 0.3, false),
            (5, 1100, 0.1, true),
        ] {
            for is_log in [false, true] {
                let costs = || Costs {
                    classes,
                    labels: (0..rows as u32).map(|row| row * 7 % classes as u32).collect(),
                    rows: (0..rows).map(|row| weights(row, classes)).collect(),
                    class_weights: weighs_classes
                        .then(|| (0..classes).map(|class| class as f64 % 3.0).collect()),
                    smoothing,
                };
                let params = Params::with_dtype(1, &Device::Cpu, DType::F64);
                let init = Init::Normal { mean: 0.0, std: 3.0 };
                let x = params.get((rows, classes), "x", init).expect("logits");
                let ours = cost(&x, costs(), is_log).expect("kernel");
                let theirs = composed(&x, &costs(), is_log).expect("composed");
                let [a, b] = [&ours, &theirs].map(|y| y.to_scalar::<f64>().expect("scalar"));
                assert!((a - b).abs() < 1e-10 * b.abs().max(1.0), "{a} {b}");
                let [a, b] = [ours, theirs].map(|y| y.backward().expect("backward"));
                let difference = (a.get(&x).expect("ours") - b.get(&x).expect("theirs"))
                    .and_then(|d| d.sqr()?.sum_all()?.to_scalar::<f64>());
                assert!(difference.expect("difference") < 1e-20);
            }
        }
    }
}
