//! Dropout whose masks are recomputed, never stored.

use crate::cpu::{TASK_ELEMENTS, unsupported, with_values};
use crate::kernels::{Real, vectorized};
use crate::link::{Source, result};
use crate::{Error, Module, Params, Pass, Result};
use candle_core::{DType, Device, Tensor};
use mobula_core::random::{Stream, philox4x32_10};
use rayon::prelude::*;
use std::array::from_fn;

/// Sets each feature to 0 with probability `rate` in training and divides the others by
/// `1 − rate`; the identity in evaluation.
///
/// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov: *Dropout* (JMLR 15, 2014), in the
/// inverted form. The first dimension is the rows. A mask is a pure function of the pass's keys
/// (see [`Pass`]), this layer's name, the row and the feature; a step has up to 2³² rows. A
/// layer that is applied twice in one pass drops the same features both times.
#[derive(Clone, Debug)]
pub struct Dropout {
    rate: f64,
    name: String,
}

impl Dropout {
    /// A layer named by the path of `params`; it has no parameters. Errors unless `rate` is in
    /// `[0, 1)`.
    pub fn new(params: &Params, rate: f64) -> Result<Self> {
        Self::named(params.path().to_owned(), rate)
    }

    pub(super) fn named(name: String, rate: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&rate) {
            return Err(Error::option("dropout", rate, "at least 0 and less than 1"));
        }
        Ok(Self { rate, name })
    }

    /// What it drops in a pass; `None` where that is nothing.
    pub(super) fn mask(&self, pass: &Pass) -> Result<Option<Mask>> {
        let Some(training) = pass.training().filter(|_| self.rate > 0.0) else {
            return Ok(None);
        };
        Ok(Some(Mask {
            stream: Stream::new(training.seed, &format!("dropout {}", self.name)),
            step: training.step,
            first_row: u32::try_from(training.row_offset).map_err(|_| {
                let expected = "less than 2^32, the rows that a step may have";
                Error::option("row_offset", training.row_offset, expected)
            })?,
            threshold: (self.rate * (1u64 << 32) as f64) as u32,
            scale: 1.0 / (1.0 - self.rate),
        }))
    }
}

impl Module for Dropout {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let Some(mask) = self.mask(pass)? else {
            return Ok(x.clone());
        };
        if x.rank() == 0 {
            return Err(Error::shape("the input of dropout", "[rows, ..]", &[]));
        }
        if crate::cpu::has_kernels(x) {
            let x = &x.contiguous()?;
            return Ok(match x.dtype() {
                DType::F32 => mask.forward::<f32>(x)?,
                DType::F64 => mask.forward::<f64>(x)?,
                other => return Err(unsupported(other, "dropout").into()),
            });
        }
        let ones = |dtype| Tensor::ones(x.shape(), dtype, &Device::Cpu);
        let mask = match x.dtype() {
            DType::F64 => mask.forward::<f64>(&ones(DType::F64)?)?,
            other => mask.forward::<f32>(&ones(DType::F32)?)?.to_dtype(other)?,
        };
        Ok(x.mul(&mask.to_device(x.device())?)?)
    }
}

/// The mask of one layer in one step: the operation is its own gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mask {
    stream: Stream,
    step: u64,
    first_row: u32,
    /// A word below this drops its feature.
    threshold: u32,
    scale: f64,
}

impl Mask {
    fn apply<T: Real>(&self, x: &[T], features: usize) -> Vec<T> {
        let mut out = vec![T::zero(); x.len()];
        if x.is_empty() {
            return out;
        }
        let rows = out.par_chunks_mut(features).zip(x.par_chunks(features));
        let rows = rows.with_min_len((TASK_ELEMENTS / features).max(1));
        rows.enumerate().for_each(|(row, (out, x))| self.apply_row(row, x, out));
        out
    }

    fn apply_row<T: Real>(&self, row: usize, x: &[T], out: &mut [T]) {
        self.factors(row, out);
        let scale = T::from_f64(self.scale);
        vectorized(
            #[inline(always)]
            || {
                let kept = |out: T| out > T::zero();
                out.iter_mut().zip(x).for_each(|(out, x)| *out = (*x * scale).when(kept(*out)));
            },
        );
    }

    /// The mask of number `index` of several that are independent.
    pub(super) fn child(&self, index: usize) -> Self {
        Self { stream: self.stream.child(index as u64), ..*self }
    }

    /// What the kept are multiplied with.
    pub(super) fn scale(&self) -> f64 {
        self.scale
    }

    /// Sets `out` to what the features of a row are multiplied with: 0 or the scale. Draws what
    /// `Stream::at(step, row)` would.
    pub(super) fn factors<T: Real>(&self, row: usize, out: &mut [T]) {
        let scale = T::from_f64(self.scale);
        let (step, row) = (self.step, self.first_row.wrapping_add(row as u32));
        let (counter, key) = ([row, step as u32, (step >> 32) as u32], self.stream.key());
        let (many, rest) = out.as_chunks_mut::<{ 4 * LANES }>();
        for (block, out) in (many.len() * LANES..).zip(rest.chunks_mut(4)) {
            let [a, b, c] = counter;
            let words = philox4x32_10([block as u32, a, b, c], key);
            out.iter_mut().zip(words).for_each(|(out, w)| *out = scale.when(w >= self.threshold));
        }
        vectorized(
            #[inline(always)]
            || {
                for (at, out) in many.iter_mut().enumerate() {
                    let words = blocks((at * LANES) as u32, counter, key);
                    for (lane, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                        *out = from_fn(|of| scale.when(words[of][lane] >= self.threshold));
                    }
                }
            },
        );
    }

    fn forward<T: Real>(self, x: &Tensor) -> candle_core::Result<Tensor> {
        let features = x.dims()[1..].iter().product();
        let y = with_values([x], |[x]| Ok(self.apply::<T>(x, features)))?;
        let source = Source::of(x);
        let to = source.clone();
        // The mask is its own gradient.
        result(y, x.shape().clone(), &[&source], move |gradient| {
            let gradient = T::cpu_storage_as_slice(&gradient)?;
            Ok(vec![to.give(self.apply(gradient, features))?])
        })
    }
}

/// Blocks that are drawn at once.
const LANES: usize = 16;

/// [`philox4x32_10`] of the block `first` and those that follow, by word, then by block: in this form
/// it compiles to vectors, and takes a sixth of the time.
#[inline(always)]
fn blocks(first: u32, counter: [u32; 3], mut key: [u32; 2]) -> [[u32; LANES]; 4] {
    let numbers = from_fn(|lane| first.wrapping_add(lane as u32));
    let [mut a, mut b, mut c, mut d] =
        [numbers, [counter[0]; LANES], [counter[1]; LANES], [counter[2]; LANES]];
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        for lane in 0..LANES {
            let p0 = 0xD251_1F53 * u64::from(a[lane]);
            let p1 = 0xCD9E_8D57 * u64::from(c[lane]);
            a[lane] = (p1 >> 32) as u32 ^ b[lane] ^ key[0];
            c[lane] = (p0 >> 32) as u32 ^ d[lane] ^ key[1];
            (b[lane], d[lane]) = (p1 as u32, p0 as u32);
        }
    }
    [a, b, c, d]
}
