//! Dropout whose masks are recomputed, never stored.

use crate::cpu::{TASK_ELEMENTS, unsupported, with_values};
use crate::kernels::Real;
use crate::link::{Source, result};
use crate::{Error, Module, Params, Pass, Result};
use candle_core::{DType, Device, Tensor};
use mobula_core::random::{Stream, philox4x32_10};
use rayon::prelude::*;

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
        if !(0.0..1.0).contains(&rate) {
            return Err(Error::option("dropout", rate, "at least 0 and less than 1"));
        }
        Ok(Self { rate, name: params.path().to_owned() })
    }
}

impl Module for Dropout {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let Some(training) = pass.training().filter(|_| self.rate > 0.0) else {
            return Ok(x.clone());
        };
        if x.rank() == 0 {
            return Err(Error::shape("the input of dropout", "[rows, ..]", &[]));
        }
        let mask = Mask {
            key: Stream::new(training.seed, &format!("dropout {}", self.name)).key(),
            step: training.step,
            first_row: u32::try_from(training.row_offset).map_err(|_| {
                let expected = "less than 2^32, the rows that a step may have";
                Error::option("row_offset", training.row_offset, expected)
            })?,
            threshold: (self.rate * (1u64 << 32) as f64) as u32,
            scale: 1.0 / (1.0 - self.rate),
        };
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
#[derive(Clone, Copy)]
struct Mask {
    key: [u32; 2],
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

    /// Draws what `Stream::at(step, row)` would, a block of four words at a time.
    fn apply_row<T: Real>(&self, row: usize, x: &[T], out: &mut [T]) {
        let row = self.first_row.wrapping_add(row as u32);
        let scale = T::from_f64(self.scale);
        for (block, (out, x)) in out.chunks_mut(4).zip(x.chunks(4)).enumerate() {
            let counter = [block as u32, row, self.step as u32, (self.step >> 32) as u32];
            let words = philox4x32_10(counter, self.key);
            for ((out, x), word) in out.iter_mut().zip(x).zip(words) {
                if word >= self.threshold {
                    *out = *x * scale;
                }
            }
        }
    }
}

impl Mask {
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
