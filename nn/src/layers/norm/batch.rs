//! Normalisation over the batch.

use super::rows::{product_sum, square_sum};
use super::{EPS, check_channels, positive};
use crate::backward::parameter_gradient;
use crate::cpu::{unsupported, with_values};
use crate::kernels::{Real, lane_sum, output, put, vectorized};
use crate::layers::activation::{Activation, Scalar, Visitor};
use crate::link::{Source, Told, owned, result_kept};
use crate::pass::SyncSum;
use crate::{Error, Init, Module, Params, Pass, Result};
use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;
use std::sync::Arc;

/// Numbers of a channel that say something of its variance.
const ENOUGH: f64 = 2.0;

/// Settings of [`BatchNorm`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNormOptions {
    /// Added to the variance. Default 10⁻⁵.
    pub eps: f64,
    /// How much of each batch goes into the running statistics. Default 0.1.
    pub momentum: f64,
}

impl Default for BatchNormOptions {
    fn default() -> Self {
        Self { eps: EPS, momentum: 0.1 }
    }
}

/// Each channel less its mean, by its standard deviation, times `weight` plus `bias`, then, if
/// asked for, plus another tensor and through an activation, in one operation:
/// `[rows, channels, ..]` to the same (Ioffe and Szegedy, 2015).
///
/// In training mean and deviation are those of the batch: of this worker's rows, or of all
/// workers' where the [`Pass`] brings a [`SyncSum`]. In evaluation they are the running
/// statistics, which each training pass moves towards the batch's (the variance's unbiased
/// estimate, as in PyTorch). A batch of one number for each channel says nothing of its variance:
/// it is normalised to the bias, and moves nothing.
///
/// Parameters `weight` and `bias` `[channels]`, ones and zeros; buffers `running_mean` and
/// `running_var`, which are saved with the parameters.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Var,
    running_var: Var,
    options: BatchNormOptions,
    activation: Activation,
    name: String,
}

impl BatchNorm {
    /// Creates parameters and buffers in `params`. Errors for 0 channels.
    pub fn new(params: &Params, channels: usize, options: BatchNormOptions) -> Result<Self> {
        positive("channels", channels)?;
        Ok(Self {
            weight: params.get(channels, "weight", Init::Ones)?,
            bias: params.get(channels, "bias", Init::Zeros)?,
            running_mean: params.buffer(channels, "running_mean", Init::Zeros)?,
            running_var: params.buffer(channels, "running_var", Init::Ones)?,
            options,
            activation: Activation::Identity,
            name: params.path().to_owned(),
        })
    }

    /// Applies `activation` to what comes out.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// Adds `skip`, of the input's shape, before the activation: the end of a residual block.
    pub fn forward_residual(&self, x: &Tensor, skip: &Tensor, pass: &Pass) -> Result<Tensor> {
        if x.dims() != skip.dims() {
            let what = format!("what batch norm {:?} adds", self.name);
            return Err(Error::shape(what, format!("{:?}", x.dims()), skip.dims()));
        }
        self.run(x, Some(skip), pass)
    }

    fn run(&self, x: &Tensor, skip: Option<&Tensor>, pass: &Pass) -> Result<Tensor> {
        check_channels(x, self.weight.elem_count(), "batch norm", &self.name)?;
        if pass.training().is_some() && x.elem_count() == 0 {
            return Err(Error::EmptyBatch { what: "batch norm" });
        }
        if !crate::cpu::has_kernels(x) {
            return self.composed(x, skip, pass);
        }
        if self.activation.needs_input() {
            let plain = Self { activation: Activation::Identity, ..self.clone() };
            return self.activation.forward(&plain.run(x, skip, pass)?);
        }
        let (x, skip) = (x.contiguous()?, skip.map(Tensor::contiguous).transpose()?);
        match x.dtype() {
            DType::F32 => self.apply::<f32>(&x, skip.as_ref(), pass),
            DType::F64 => self.apply::<f64>(&x, skip.as_ref(), pass),
            other => Err(unsupported(other, "batch norm").into()),
        }
    }

    /// In candle's own operations; not with the rows of other workers.
    fn composed(&self, x: &Tensor, skip: Option<&Tensor>, pass: &Pass) -> Result<Tensor> {
        if pass.training().is_some() && pass.sync().is_some() {
            let text = "batch norms do so on the CPU alone; train without it on other devices";
            return Err(Error::sync(text.into()));
        }
        let channels = self.weight.elem_count();
        let by_channel = |t: &Tensor| t.reshape((1, channels, 1));
        let flat = x.reshape((x.dim(0)?, channels, ()))?;
        let (mean, var) = match pass.training() {
            None => (self.running_mean.as_detached_tensor(), self.running_var.as_detached_tensor()),
            Some(_) => {
                let mean = flat.mean((0, 2))?;
                let var = flat.broadcast_sub(&by_channel(&mean)?)?.sqr()?.mean((0, 2))?;
                let count = (x.elem_count() / channels) as f64;
                if count >= ENOUGH {
                    let unbiased = (var.detach() * (count / (count - 1.0)))?;
                    self.track(&mean.detach(), &unbiased)?;
                }
                (mean, var)
            }
        };
        let scale = (var + self.options.eps)?.sqrt()?;
        let y = flat.broadcast_sub(&by_channel(&mean)?)?.broadcast_div(&by_channel(&scale)?)?;
        let y = y.broadcast_mul(&by_channel(&self.weight)?)?;
        let y = y.broadcast_add(&by_channel(&self.bias)?)?.reshape(x.shape())?;
        let y = match skip {
            Some(skip) => (y + skip)?,
            None => y,
        };
        self.activation.forward(&y)
    }

    /// Moves the running statistics.
    fn track(&self, mean: &Tensor, var: &Tensor) -> Result<()> {
        let momentum = self.options.momentum;
        for (running, new) in [(&self.running_mean, mean), (&self.running_var, var)] {
            let kept = (running.as_detached_tensor() * (1.0 - momentum))?;
            running.set(&(kept + (new * momentum)?)?)?;
        }
        Ok(())
    }

    fn apply<T: Real>(&self, x: &Tensor, skip: Option<&Tensor>, pass: &Pass) -> Result<Tensor> {
        let sync = pass.sync().filter(|_| pass.training().is_some()).cloned();
        let planes =
            Planes { channels: self.weight.elem_count(), area: x.dims()[2..].iter().product() };
        let moments = match pass.training() {
            None => self.running::<T>()?,
            Some(_) => {
                let local = with_values([x], |[x]| Ok(planes.moments::<T>(x)))?;
                let global = combine(local, sync.as_deref())?;
                self.track_moments(&global)?;
                let scales = global.iter().map(|m| Channel {
                    mean: T::from_f64(m.mean),
                    scale: T::from_f64(1.0 / (m.square_sum / m.count + self.options.eps).sqrt()),
                });
                scales.collect()
            }
        };
        let count = (x.elem_count() / planes.channels) as f64;
        let kept = Kept {
            planes,
            moments,
            activation: self.activation,
            // Constants have no part in the gradient.
            count: pass.training().map(|_| count),
            sync,
        };
        Ok(kept.apply(x, skip, &self.weight, &self.bias)?)
    }

    fn running<T: Real>(&self) -> Result<Vec<Channel<T>>> {
        let (mean, var) =
            (self.running_mean.as_detached_tensor(), self.running_var.as_detached_tensor());
        Ok(with_values([&mean, &var], |[mean, var]| {
            let channels = mean.iter().zip(var).map(|(mean, var)| {
                let scale = 1.0 / (T::to_f64(*var) + self.options.eps).sqrt();
                Channel { mean: *mean, scale: T::from_f64(scale) }
            });
            Ok(channels.collect())
        })?)
    }

    fn track_moments(&self, moments: &[Moments]) -> Result<()> {
        if moments.iter().any(|moments| moments.count < ENOUGH) {
            return Ok(());
        }
        let tensor = |of: &dyn Fn(&Moments) -> f64| {
            let values: Vec<f64> = moments.iter().map(of).collect();
            Tensor::new(values, &Device::Cpu)?.to_dtype(self.weight.dtype())
        };
        let unbiased = |m: &Moments| m.square_sum / (m.count - 1.0);
        self.track(&tensor(&|m| m.mean)?, &tensor(&unbiased)?)
    }
}

impl Module for BatchNorm {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.run(x, None, pass)
    }
}

/// What a channel is made of.
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    count: f64,
    mean: f64,
    /// Of the distances from the mean.
    square_sum: f64,
}

impl Moments {
    /// Chan, Golub, LeVeque: *Updating Formulae* (1979).
    fn and(self, other: Self) -> Self {
        let count = self.count + other.count;
        if other.count == 0.0 {
            return self;
        }
        let delta = other.mean - self.mean;
        Self {
            count,
            mean: self.mean + delta * other.count / count,
            square_sum: self.square_sum
                + other.square_sum
                + delta * delta * self.count * other.count / count,
        }
    }
}

/// Of the rows of all workers.
fn combine(local: Vec<Moments>, sync: Option<&dyn SyncSum>) -> Result<Vec<Moments>> {
    let Some(sync) = sync else { return Ok(local) };
    let channels = local.len();
    let mut sums: Vec<f64> = local.iter().map(|m| m.count).collect();
    sums.extend(local.iter().map(|m| m.count * m.mean));
    sync.sum(&mut sums).map_err(Error::sync)?;
    let means: Vec<f64> = (0..channels).map(|at| sums[channels + at] / sums[at]).collect();
    let about = |(m, mean): (&Moments, &f64)| m.square_sum + m.count * (m.mean - mean).powi(2);
    let mut squares: Vec<f64> = local.iter().zip(&means).map(about).collect();
    sync.sum(&mut squares).map_err(Error::sync)?;
    let all = (0..channels).map(|at| Moments {
        count: sums[at],
        mean: means[at],
        square_sum: squares[at],
    });
    Ok(all.collect())
}

/// How one channel is normalised.
#[derive(Clone, Copy)]
struct Channel<T> {
    mean: T,
    scale: T,
}

/// Rows of planes: `[rows, channels, area]`.
#[derive(Clone, Copy)]
struct Planes {
    channels: usize,
    area: usize,
}

impl Planes {
    /// The planes of each channel, in the order of the rows.
    fn by_channel<'a, T>(&self, data: &'a mut [T]) -> Vec<Vec<&'a mut [T]>> {
        let rows = data.len() / (self.channels * self.area).max(1);
        let mut channels: Vec<Vec<&mut [T]>> =
            (0..self.channels).map(|_| Vec::with_capacity(rows)).collect();
        for (at, plane) in data.chunks_exact_mut(self.area.max(1)).enumerate() {
            channels[at % self.channels].push(plane);
        }
        channels
    }

    /// One channel's plane of a row.
    fn plane<'a, T>(&self, data: &'a [T], row: usize, channel: usize) -> &'a [T] {
        &data[(row * self.channels + channel) * self.area..][..self.area]
    }

    fn moments<T: Real>(&self, x: &[T]) -> Vec<Moments> {
        let rows = x.len() / (self.channels * self.area).max(1);
        let of = |channel| {
            let planes = (0..rows).map(|row| {
                let plane = self.plane(x, row, channel);
                vectorized(
                    #[inline(always)]
                    || plane_moments(plane),
                )
            });
            planes.fold(Moments::default(), Moments::and)
        };
        (0..self.channels).into_par_iter().map(of).collect()
    }
}

#[inline(always)]
fn plane_moments<T: Real>(plane: &[T]) -> Moments {
    let count = plane.len() as f64;
    let mean = T::from_f64(lane_sum(plane).to_f64() / count);
    Moments { count, mean: mean.to_f64(), square_sum: square_sum(plane, mean).to_f64() }
}

/// What the backward pass needs.
struct Kept<T> {
    planes: Planes,
    moments: Vec<Channel<T>>,
    activation: Activation,
    /// How many numbers of this worker each channel has, if the moments are those of the batch.
    count: Option<f64>,
    sync: Option<Arc<dyn SyncSum>>,
}

impl<T: Real> Kept<T> {
    fn apply(
        self,
        x: &Tensor,
        skip: Option<&Tensor>,
        weight: &Tensor,
        bias: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let mut sources = vec![Source::of(x), Source::of(weight), Source::of(bias)];
        sources.extend(skip.map(Source::of));
        let nothing = Tensor::zeros(0, T::DTYPE, &Device::Cpu)?;
        let y =
            with_values([x, skip.unwrap_or(&nothing), weight, bias], |[x, skip, weight, bias]| {
                let y = |y: &mut [T]| {
                    let (kept, skip) = (&self, Some(skip).filter(|skip| !skip.is_empty()));
                    self.activation.visit(Forward { kept, x, skip, weight, bias, y });
                };
                Ok(output(x.len(), y))
            })?;
        let (shape, x) = (x.shape().clone(), x.detach());
        let (weight, bias, to) = (weight.clone(), bias.clone(), sources.clone());
        let sources: Vec<&Source> = sources.iter().collect();
        result_kept(y, shape, &sources, move |gradient, y| {
            let gradient = owned::<T>(gradient)?;
            self.backward([&x, y, &weight, &bias], &to, gradient)
        })
    }

    fn backward(
        &self,
        [x, y, weight, bias]: [&Tensor; 4],
        to: &[Source],
        mut gradient: Vec<T>,
    ) -> candle_core::Result<Vec<Told>> {
        with_values([x, y, weight], |[x_values, y, weight_values]| {
            let gradients = &mut gradient;
            let sums = self.activation.visit(Sums { kept: self, x: x_values, y, gradients });
            let [dw, db] = [0, 1].map(|at| sums.iter().map(|sum| sum[at]).collect::<Vec<T>>());
            let means = self.means(&sums)?;
            // What was added gets the gradient as it is.
            let skip = to.get(3).map(|skip| skip.give(gradient.clone())).transpose()?;
            self.spread(x_values, weight_values, &means, &mut gradient);
            let dw = parameter_gradient(weight, |to, is_added| put(&dw, to, is_added))?;
            let db = parameter_gradient(bias, |to, is_added| put(&db, to, is_added))?;
            Ok([
                vec![to[0].give(std::mem::take(&mut gradient))?, dw, db],
                skip.into_iter().collect(),
            ]
            .concat())
        })
    }

    /// The means, over all rows of all workers, that the batch's statistics take off.
    fn means(&self, sums: &[[T; 2]]) -> candle_core::Result<Vec<[T; 2]>> {
        let Some(count) = self.count else { return Ok(vec![[T::zero(); 2]; sums.len()]) };
        let mut all: Vec<f64> = sums.iter().flatten().map(|sum| sum.to_f64()).collect();
        all.push(count);
        if let Some(sync) = &self.sync {
            sync.sum(&mut all).map_err(|error| candle_core::Error::Msg(error.to_string()))?;
        }
        let count = all.pop().unwrap_or(count);
        let (pairs, _) = all.as_chunks::<2>();
        Ok(pairs.iter().map(|pair| pair.map(|sum| T::from_f64(sum / count))).collect())
    }

    /// From the gradient of the normalised to that of `x`, in place.
    fn spread(&self, x: &[T], weight: &[T], means: &[[T; 2]], gradient: &mut [T]) {
        let channels = self.planes.by_channel(gradient).into_par_iter().enumerate();
        channels.for_each(|(channel, planes)| {
            let (Channel { mean, scale }, [slope, sum]) = (self.moments[channel], means[channel]);
            let factor = weight[channel] * scale;
            for (row, gradient) in planes.into_iter().enumerate() {
                let x = self.planes.plane(x, row, channel);
                vectorized(
                    #[inline(always)]
                    || {
                        for (g, x) in gradient.iter_mut().zip(x) {
                            *g = (*g - sum - (*x - mean) * scale * slope) * factor;
                        }
                    },
                );
            }
        });
    }
}

struct Forward<'a, T> {
    kept: &'a Kept<T>,
    x: &'a [T],
    skip: Option<&'a [T]>,
    weight: &'a [T],
    bias: &'a [T],
    y: &'a mut [T],
}

impl<T: Real> Visitor for Forward<'_, T> {
    type Output = ();

    fn visit<S: Scalar>(self) {
        let Self { kept, x, skip, weight, bias, y } = self;
        let planes = kept.planes;
        y.par_chunks_mut(planes.area.max(1)).enumerate().with_min_len(4).for_each(|(at, y)| {
            let channel = at % planes.channels;
            let Channel { mean, scale } = kept.moments[channel];
            let factor = weight[channel] * scale;
            let offset = bias[channel] - mean * factor;
            let range = at * planes.area..(at + 1) * planes.area;
            vectorized(
                #[inline(always)]
                || match skip {
                    None => {
                        for (y, x) in y.iter_mut().zip(&x[range]) {
                            *y = S::value(x.mul_add(factor, offset));
                        }
                    }
                    Some(skip) => {
                        for ((y, x), skip) in y.iter_mut().zip(&x[range.clone()]).zip(&skip[range])
                        {
                            *y = S::value(x.mul_add(factor, offset) + *skip);
                        }
                    }
                },
            );
        });
    }
}

/// Multiplies the gradients by the slopes; of each channel the sums of that times what was
/// normalised, and of that alone.
struct Sums<'a, T> {
    kept: &'a Kept<T>,
    x: &'a [T],
    y: &'a [T],
    gradients: &'a mut [T],
}

impl<T: Real> Visitor for Sums<'_, T> {
    type Output = Vec<[T; 2]>;

    fn visit<S: Scalar>(self) -> Self::Output {
        let Self { kept, x, y, gradients } = self;
        let channels = kept.planes.by_channel(gradients).into_par_iter().enumerate();
        let sums = channels.map(|(channel, planes)| {
            let Channel { mean, scale } = kept.moments[channel];
            let mut sums = [0.0; 2];
            for (row, gradient) in planes.into_iter().enumerate() {
                let x = kept.planes.plane(x, row, channel);
                let y = kept.planes.plane(y, row, channel);
                let [slope, sum] = vectorized(
                    #[inline(always)]
                    || {
                        for (g, y) in gradient.iter_mut().zip(y) {
                            *g *= S::slope(*y, *y);
                        }
                        [product_sum(gradient, x, mean) * scale, lane_sum(gradient)]
                    },
                );
                sums = [sums[0] + slope.to_f64(), sums[1] + sum.to_f64()];
            }
            sums.map(T::from_f64)
        });
        sums.collect()
    }
}
