//! Normalisation of groups of channels.

use super::rows::{product_sum, square_sum};
use super::{EPS, check_channels, positive};
use crate::backward::parameter_gradient;
use crate::cpu::{unsupported, with_values};
use crate::kernels::{Real, lane_sum, output, put, vectorized};
use crate::link::{Source, result};
use crate::{Error, Init, Module, Params, Pass, Result};
use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

/// The channels of each group and all their pixels, less their mean, by their standard deviation,
/// times `weight` plus `bias` by channel: `[rows, channels, ..]` to the same (Wu and He, 2018).
///
/// As many groups as channels make an instance norm. Parameters `weight` and `bias` `[channels]`,
/// ones and zeros.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
    name: String,
}

impl GroupNorm {
    /// Creates the parameters in `params`; ε is 10⁻⁵. Errors unless `groups` divides `channels`.
    pub fn new(params: &Params, groups: usize, channels: usize) -> Result<Self> {
        positive("channels", channels)?;
        if groups == 0 || !channels.is_multiple_of(groups) {
            let expected = format!("a divisor of {channels} channels");
            return Err(Error::option("groups", groups, expected));
        }
        Ok(Self {
            weight: params.get(channels, "weight", Init::Ones)?,
            bias: params.get(channels, "bias", Init::Zeros)?,
            groups,
            eps: EPS,
            name: params.path().to_owned(),
        })
    }

    /// With another ε.
    #[must_use]
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, channels) = (x.dim(0)?, self.weight.elem_count());
        let grouped = x.reshape((rows, self.groups, ()))?;
        let centered = grouped.broadcast_sub(&grouped.mean_keepdim(D::Minus1)?)?;
        let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
        let y = centered.broadcast_div(&(variance + self.eps)?.sqrt()?)?;
        let y = y.reshape((rows, channels, ()))?;
        let by_channel = |t: &Tensor| t.reshape((1, channels, 1));
        let y = y.broadcast_mul(&by_channel(&self.weight)?)?;
        Ok(y.broadcast_add(&by_channel(&self.bias)?)?.reshape(x.shape())?)
    }

    fn apply<T: Real>(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let channels = self.weight.elem_count();
        let area = x.dims()[2..].iter().product();
        let kernel = Kernel { per_group: channels / self.groups, area, channels, eps: self.eps };
        let sources = [x, &self.weight, &self.bias].map(Source::of);
        let y = with_values([x, &self.weight, &self.bias], |[x, weight, bias]| {
            Ok(output(x.len(), |y: &mut [T]| kernel.forward(x, weight, bias, y)))
        })?;
        let (shape, x) = (x.shape().clone(), x.detach());
        let (weight, bias, to) = (self.weight.clone(), self.bias.clone(), sources.clone());
        let [a, b, c] = &sources;
        result(y, shape, &[a, b, c], move |gradient| {
            let gradient = T::cpu_storage_as_slice(&gradient)?;
            with_values([&x, &weight], |[x, weight_values]| {
                let (mut dw, mut db) = (vec![T::zero(); channels], vec![T::zero(); channels]);
                let dx = output(x.len(), |dx| {
                    kernel.backward(x, weight_values, gradient, dx, &mut dw, &mut db);
                });
                let dw = parameter_gradient(&weight, |to, is_added| put(&dw, to, is_added))?;
                let db = parameter_gradient(&bias, |to, is_added| put(&db, to, is_added))?;
                Ok(vec![to[0].give(dx)?, dw, db])
            })
        })
    }
}

impl Module for GroupNorm {
    fn forward(&self, x: &Tensor, _pass: &Pass) -> Result<Tensor> {
        check_channels(x, self.weight.elem_count(), "group norm", &self.name)?;
        if !crate::cpu::has_kernels(x) {
            return self.composed(x);
        }
        let x = &x.contiguous()?;
        Ok(match x.dtype() {
            DType::F32 => self.apply::<f32>(x)?,
            DType::F64 => self.apply::<f64>(x)?,
            other => return Err(unsupported(other, "group norm").into()),
        })
    }
}

/// A group of a row is one run of elements, `per_group` planes of `area`.
#[derive(Clone, Copy)]
struct Kernel {
    per_group: usize,
    area: usize,
    channels: usize,
    eps: f64,
}

impl Kernel {
    fn run(&self) -> usize {
        (self.per_group * self.area).max(1)
    }

    /// The first channel of a run.
    fn channel(&self, run: usize) -> usize {
        run * self.per_group % self.channels
    }

    #[inline(always)]
    fn moments<T: Real>(&self, run: &[T]) -> (T, T) {
        let count = T::from_f64(run.len() as f64);
        let mean = lane_sum(run) / count;
        let variance = square_sum(run, mean) / count;
        (mean, T::one() / (variance + T::from_f64(self.eps)).sqrt())
    }

    fn forward<T: Real>(self, x: &[T], weight: &[T], bias: &[T], y: &mut [T]) {
        let runs = y.par_chunks_mut(self.run()).zip(x.par_chunks(self.run())).enumerate();
        runs.for_each(|(run, (y, x))| {
            vectorized(
                #[inline(always)]
                || {
                    let (mean, scale) = self.moments(x);
                    let planes = y.chunks_exact_mut(self.area).zip(x.chunks_exact(self.area));
                    for (channel, (y, x)) in (self.channel(run)..).zip(planes) {
                        let (weight, bias) = (weight[channel], bias[channel]);
                        for (y, x) in y.iter_mut().zip(x) {
                            *y = ((*x - mean) * scale).mul_add(weight, bias);
                        }
                    }
                },
            )
        });
    }

    fn backward<T: Real>(
        self,
        x: &[T],
        weight: &[T],
        gradient: &[T],
        dx: &mut [T],
        dw: &mut [T],
        db: &mut [T],
    ) {
        // Of each plane: what its weight and its bias get.
        let mut partial = vec![[T::zero(); 2]; x.len() / self.area.max(1)];
        let runs = dx.par_chunks_mut(self.run()).zip(x.par_chunks(self.run()));
        let runs = runs.zip(gradient.par_chunks(self.run()));
        let runs = runs.zip(partial.par_chunks_mut(self.per_group)).enumerate();
        runs.for_each(|(run, (((dx, x), gradient), partial))| {
            vectorized(
                #[inline(always)]
                || self.run_backward(&weight[self.channel(run)..], x, gradient, dx, partial),
            )
        });
        // In the order of the rows.
        for row in partial.chunks_exact(self.channels) {
            for ((dw, db), [w, b]) in dw.iter_mut().zip(db.iter_mut()).zip(row) {
                (*dw, *db) = (*dw + *w, *db + *b);
            }
        }
    }

    #[inline(always)]
    fn run_backward<T: Real>(
        &self,
        weight: &[T],
        x: &[T],
        gradient: &[T],
        dx: &mut [T],
        partial: &mut [[T; 2]],
    ) {
        let (mean, scale) = self.moments(x);
        let count = T::from_f64(x.len() as f64);
        let (mut sum, mut slope) = (T::zero(), T::zero());
        let planes = x.chunks_exact(self.area).zip(gradient.chunks_exact(self.area));
        for (((x, g), weight), partial) in planes.zip(weight).zip(partial) {
            *partial = [product_sum(g, x, mean) * scale, lane_sum(g)];
            sum += partial[1] * *weight;
            slope += partial[0] * *weight;
        }
        let (sum, slope) = (sum / count, slope / count);
        let planes = x.chunks_exact(self.area).zip(gradient.chunks_exact(self.area));
        for ((dx, (x, g)), weight) in dx.chunks_exact_mut(self.area).zip(planes).zip(weight) {
            for ((dx, x), g) in dx.iter_mut().zip(x).zip(g) {
                *dx = (*g * *weight - sum - (*x - mean) * scale * slope) * scale;
            }
        }
    }
}
