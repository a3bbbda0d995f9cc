//! Losses that are sums over elements.

use super::weights::repeated;
use crate::cpu::{TASK_ELEMENTS, unsupported, with_values};
use crate::kernels::{Real, lane_sum, output, vectorized};
use crate::link::{Source, result};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Elements whose sum is taken in their own type.
const BLOCK: usize = 256;

/// A loss of one number. `p` is its parameter, 1 where none is given.
pub(super) trait Pointwise: Copy + Send + Sync + 'static {
    fn value<T: Real>(self, x: T, target: T, p: T) -> T;

    /// The derivatives by the prediction and by the target.
    fn slopes<T: Real>(self, x: T, target: T, p: T) -> (T, T);

    /// In candle's own operations, for devices that this crate has no kernel for.
    fn composed(
        self,
        x: &Tensor,
        target: &Tensor,
        p: Option<&Tensor>,
    ) -> candle_core::Result<Tensor>;
}

/// The elements of a loss; all tensors of one shape and type.
#[derive(Clone)]
pub(super) struct Elements {
    x: Tensor,
    target: Tensor,
    weights: Option<Tensor>,
    parameters: Option<Tensor>,
}

impl Elements {
    /// `name` is the loss. `weights` are as [`repeated`] takes them.
    pub(super) fn new(
        name: &str,
        x: &Tensor,
        target: &Tensor,
        weights: Option<&Tensor>,
    ) -> Result<Self> {
        if x.dims() != target.dims() {
            let expected = format!("{:?} as the prediction has", x.dims());
            return Err(Error::shape(format!("the target of {name}"), expected, target.dims()));
        }
        let weights = weights.map(|weights| repeated(weights, x.dims())).transpose()?;
        Ok(Self {
            x: x.contiguous()?,
            target: target.contiguous()?,
            weights: weights.map(|weights| weights.to_dtype(x.dtype())).transpose()?,
            parameters: None,
        })
    }

    /// With a parameter for each element.
    pub(super) fn with_parameters(self, parameters: Option<Tensor>) -> Self {
        Self { parameters, ..self }
    }

    pub(super) fn weights(&self) -> Option<&Tensor> {
        self.weights.as_ref()
    }

    /// Σ weight · loss.
    pub(super) fn sum<L: Pointwise>(&self, loss: L) -> Result<Tensor> {
        if !crate::cpu::has_kernels(&self.x) {
            return Ok(self.composed(loss)?);
        }
        Ok(match self.x.dtype() {
            DType::F32 => self.sum_as::<f32, L>(loss)?,
            DType::F64 => self.sum_as::<f64, L>(loss)?,
            other => return Err(unsupported(other, "loss").into()),
        })
    }

    pub(super) fn composed<L: Pointwise>(&self, loss: L) -> candle_core::Result<Tensor> {
        let losses = loss.composed(&self.x, &self.target, self.parameters.as_ref())?;
        match &self.weights {
            Some(weights) => (losses * weights)?.sum_all(),
            None => losses.sum_all(),
        }
    }

    fn sum_as<T: Real, L: Pointwise>(&self, loss: L) -> candle_core::Result<Tensor> {
        let sum = self.with(|terms: Terms<'_, T>| Ok(terms.sum(loss)))?;
        let sources = [&self.x, &self.target].map(Source::of);
        let [to_x, to_target] = sources.clone();
        let kept = Self { x: self.x.detach(), target: self.target.detach(), ..self.clone() };
        let [x, target] = &sources;
        result(vec![T::from_f64(sum)], (), &[x, target], move |gradient| {
            let scale = T::cpu_storage_as_slice(&gradient)?[0];
            kept.with(|terms: Terms<'_, T>| {
                let dx = to_x.is_tracked().then(|| terms.slopes(loss, scale, |slopes| slopes.0));
                let dx = dx.map(|dx| to_x.give(dx)).transpose()?;
                let dt =
                    to_target.is_tracked().then(|| terms.slopes(loss, scale, |slopes| slopes.1));
                let dt = dt.map(|dt| to_target.give(dt)).transpose()?;
                Ok(vec![dx.flatten(), dt.flatten()])
            })
        })
    }

    fn with<T: Real, R>(
        &self,
        f: impl FnOnce(Terms<'_, T>) -> candle_core::Result<R>,
    ) -> candle_core::Result<R> {
        let [weights, parameters] = [&self.weights, &self.parameters].map(Option::as_ref);
        // `x` stands in for what is not there.
        let tensors =
            [&self.x, &self.target, weights.unwrap_or(&self.x), parameters.unwrap_or(&self.x)];
        with_values(tensors, |[x, target, w, p]| {
            f(Terms { x, target, weights: weights.map(|_| w), parameters: parameters.map(|_| p) })
        })
    }
}

#[derive(Clone, Copy)]
struct Terms<'a, T> {
    x: &'a [T],
    target: &'a [T],
    weights: Option<&'a [T]>,
    parameters: Option<&'a [T]>,
}

impl<'a, T: Real> Terms<'a, T> {
    #[inline(always)]
    fn range(&self, range: Range<usize>) -> Self {
        Self {
            x: &self.x[range.clone()],
            target: &self.target[range.clone()],
            weights: self.weights.map(|weights| &weights[range.clone()]),
            parameters: self.parameters.map(|parameters| &parameters[range]),
        }
    }

    fn sum<L: Pointwise>(&self, loss: L) -> f64 {
        let starts = (0..self.x.len()).into_par_iter().step_by(TASK_ELEMENTS);
        let sums = starts.map(|start| {
            let terms = self.range(start..(start + TASK_ELEMENTS).min(self.x.len()));
            vectorized(
                #[inline(always)]
                || terms.sum_of_blocks(loss),
            )
        });
        // Collected, then added in order: a parallel sum would depend on how it was split.
        sums.collect::<Vec<f64>>().iter().sum()
    }

    #[inline(always)]
    fn sum_of_blocks<L: Pointwise>(&self, loss: L) -> f64 {
        let mut sum = 0.0;
        let mut losses = [T::zero(); BLOCK];
        for start in (0..self.x.len()).step_by(BLOCK) {
            let block = self.range(start..(start + BLOCK).min(self.x.len()));
            block.each(&mut losses, |[x, target, w, p]| loss.value(x, target, p) * w);
            sum += lane_sum(&losses[..block.x.len()]).to_f64();
        }
        sum
    }

    /// The gradient of the prediction or of the target, whichever `of` takes.
    fn slopes<L: Pointwise>(
        &self,
        loss: L,
        scale: T,
        of: impl Fn((T, T)) -> T + Copy + Send + Sync,
    ) -> Vec<T> {
        output(self.x.len(), |out: &mut [T]| {
            out.par_chunks_mut(TASK_ELEMENTS).enumerate().for_each(|(at, out)| {
                let start = at * TASK_ELEMENTS;
                let terms = self.range(start..start + out.len());
                vectorized(
                    #[inline(always)]
                    || {
                        for (at, out) in out.chunks_mut(BLOCK).enumerate() {
                            let block = terms.range(at * BLOCK..at * BLOCK + out.len());
                            block.each(out, |[x, target, w, p]| {
                                of(loss.slopes(x, target, p)) * w * scale
                            });
                        }
                    },
                );
            });
        })
    }

    /// Sets `out` for a block: `f` is given prediction, target, weight and parameter.
    #[inline(always)]
    fn each(&self, out: &mut [T], f: impl Fn([T; 4]) -> T) {
        let ones = [T::one(); BLOCK];
        let (weights, parameters) =
            (self.weights.unwrap_or(&ones), self.parameters.unwrap_or(&ones));
        let values = self.x.iter().zip(self.target).zip(weights).zip(parameters);
        for (out, (((x, target), w), p)) in out.iter_mut().zip(values) {
            *out = f([*x, *target, *w, *p]);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{Init, Params};
    use candle_core::Device;

    /// Values and both gradients, with weights and parameters and without, in an odd shape.
    pub(in crate::loss) fn assert_composed_agrees<L: Pointwise>(loss: L, in_unit_interval: bool) {
        let params = Params::with_dtype(1, &Device::Cpu, DType::F64);
        let init = Init::Normal { mean: 0.0, std: 2.0 };
        let targets = match in_unit_interval {
            true => Init::Uniform { low: 0.0, high: 1.0 },
            false => init,
        };
        let x = params.get((13, 53), "x", init).expect("x");
        let target = params.get((13, 53), "target", targets).expect("target");
        let positive = Init::Uniform { low: 0.5, high: 2.0 };
        let weights = params.get(13, "weights", positive).expect("weights").detach();
        let p = params.get((13, 53), "p", positive).expect("parameters").detach();
        for (weights, p) in [(None, None), (Some(&weights), Some(p))] {
            let elements = Elements::new("test", &x, &target, weights).expect("elements");
            let elements = elements.with_parameters(p);
            let (ours, theirs) =
                (elements.sum(loss).expect("kernel"), elements.composed(loss).expect("composed"));
            assert_close(&ours, &theirs);
            let [ours, theirs] = [ours, theirs].map(|y| y.backward().expect("backward"));
            for tensor in [&x, &target] {
                assert_close(ours.get(tensor).expect("ours"), theirs.get(tensor).expect("theirs"));
            }
        }
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        assert_eq!(a.dims(), b.dims());
        let greatest = (a - b).and_then(|d| d.abs()?.max_all()?.to_scalar::<f64>());
        assert!(greatest.expect("difference") < 1e-10, "{a} {b}");
    }
}
