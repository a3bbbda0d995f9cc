//! Rotary position embedding.

use crate::cpu::{unsupported, with_values};
use crate::kernels::{Real, output};
use crate::link::{Source, owned, result};
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Turns pairs of features by angles that grow with the place (Su et al.: *RoFormer*, 2021), the
/// first half of a head with the second, as GPT-NeoX and Llama do.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// Of each pair, radians per place.
    frequencies: Arc<[f64]>,
}

impl Rotary {
    /// For heads of `size` features. The usual `base` is 10,000. Errors unless `size` is even.
    pub fn new(size: usize, base: f64) -> Result<Self> {
        if size == 0 || !size.is_multiple_of(2) {
            return Err(Error::option("size", size, "an even number of features per head"));
        }
        let frequency = |pair: usize| base.powf(-2.0 * pair as f64 / size as f64);
        Ok(Self { frequencies: (0..size / 2).map(frequency).collect() })
    }

    /// Turns `[rows, places, heads · size]`; the first place is number `offset`.
    pub fn forward(&self, x: &Tensor, offset: usize) -> Result<Tensor> {
        let size = 2 * self.frequencies.len();
        match *x.dims() {
            [_, _, width] if width.is_multiple_of(size) => self.turn(x, width / size, size, offset),
            _ => Err(self.refuse(x)),
        }
    }

    /// Turns the first `heads` heads, and leaves what follows.
    pub(super) fn turn(
        &self,
        x: &Tensor,
        heads: usize,
        size: usize,
        offset: usize,
    ) -> Result<Tensor> {
        if size != 2 * self.frequencies.len() {
            return Err(Error::option(
                "size",
                size,
                format!("{} as of the rotary embedding", 2 * self.frequencies.len()),
            ));
        }
        if !crate::cpu::has_kernels(x) {
            return Ok(self.composed(x, heads, offset)?);
        }
        let x = &x.contiguous()?;
        Ok(match x.dtype() {
            DType::F32 => self.apply::<f32>(x, heads, offset)?,
            DType::F64 => self.apply::<f64>(x, heads, offset)?,
            other => return Err(unsupported(other, "rotary").into()),
        })
    }

    fn refuse(&self, x: &Tensor) -> Error {
        let expected = format!("[rows, places, a multiple of {}]", 2 * self.frequencies.len());
        Error::shape("the input of a rotary embedding", expected, x.dims())
    }

    /// Cosine and sine of each place and pair.
    fn angles<T: Real>(&self, places: usize, offset: usize) -> Arc<[(T, T)]> {
        let angle = |place: usize| {
            self.frequencies.iter().map(move |frequency| {
                let (sin, cos) = ((offset + place) as f64 * frequency).sin_cos();
                (T::from_f64(cos), T::from_f64(sin))
            })
        };
        (0..places).flat_map(angle).collect()
    }

    fn apply<T: Real>(
        &self,
        x: &Tensor,
        heads: usize,
        offset: usize,
    ) -> candle_core::Result<Tensor> {
        let (_, places, width) = x.dims3()?;
        let angles = self.angles::<T>(places, offset);
        let rotation = Rotation { angles, places, width, heads };
        let y = with_values([x], |[x]| {
            Ok(output(x.len(), |y: &mut [T]| {
                y.copy_from_slice(x);
                rotation.turn(y, T::one());
            }))
        })?;
        let source = Source::of(x);
        let to = source.clone();
        result(y, x.shape().clone(), &[&source], move |gradient| {
            // A rotation's transpose turns back.
            let mut gradient = owned::<T>(gradient)?;
            rotation.turn(&mut gradient, T::zero() - T::one());
            Ok(vec![to.give(gradient)?])
        })
    }

    fn composed(&self, x: &Tensor, heads: usize, offset: usize) -> candle_core::Result<Tensor> {
        let (rows, places, width) = x.dims3()?;
        let pairs = self.frequencies.len();
        let angles = self.angles::<f64>(places, offset);
        let table = |of: fn(&(f64, f64)) -> f64| {
            let values: Vec<f64> = angles.iter().map(of).collect();
            Tensor::from_vec(values, (1, places, 1, pairs), &candle_core::Device::Cpu)?
                .to_dtype(x.dtype())?
                .to_device(x.device())
        };
        let (cos, sin) = (table(|a| a.0)?, table(|a| a.1)?);
        let turned = x.narrow(2, 0, heads * 2 * pairs)?.contiguous()?;
        let turned = turned.reshape((rows, places, heads, 2 * pairs))?;
        let (a, b) = (turned.narrow(3, 0, pairs)?, turned.narrow(3, pairs, pairs)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let turned =
            Tensor::cat(&[first, second], D::Minus1)?.reshape((rows, places, heads * 2 * pairs))?;
        let rest = width - heads * 2 * pairs;
        if rest == 0 {
            return Ok(turned);
        }
        Tensor::cat(&[turned, x.narrow(2, heads * 2 * pairs, rest)?], D::Minus1)
    }
}

struct Rotation<T> {
    angles: Arc<[(T, T)]>,
    places: usize,
    width: usize,
    heads: usize,
}

impl<T: Real> Rotation<T> {
    fn turn(&self, x: &mut [T], sign: T) {
        let pairs = self.angles.len() / self.places.max(1);
        x.par_chunks_mut(self.width.max(1)).with_min_len(16).enumerate().for_each(|(at, x)| {
            let angles = &self.angles[at % self.places * pairs..][..pairs];
            for head in x.chunks_exact_mut(2 * pairs).take(self.heads) {
                let (a, b) = head.split_at_mut(pairs);
                for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(angles) {
                    (*a, *b) = (*a * *cos - *b * *sin * sign, *b * *cos + *a * *sin * sign);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Init, Params};
    use candle_core::Device;

    #[test]
    fn the_kernel_agrees_with_candles_operations() {
        let params = Params::with_dtype(1, &Device::Cpu, DType::F64);
        let init = Init::Normal { mean: 0.0, std: 1.0 };
        let x = params.get((2, 5, 12), "x", init).expect("x");
        let rotary = Rotary::new(4, 100.0).expect("rotary");
        for (heads, offset) in [(3, 0), (2, 7), (1, 1)] {
            let ours = rotary.turn(&x, heads, 4, offset).expect("kernel");
            let theirs = rotary.composed(&x, heads, offset).expect("composed");
            let close = |a: &Tensor, b: &Tensor| {
                let greatest = (a - b).and_then(|d| d.abs()?.max_all()?.to_scalar::<f64>());
                assert!(greatest.expect("difference") < 1e-12);
            };
            close(&ours, &theirs);
            let weights = params.vars()[0].1.sin().expect("weights").detach();
            let gradient = |y: Tensor| {
                let store = (y * &weights).and_then(|y| y.backward()).expect("backward");
                store.get(&params.vars()[0].1).expect("gradient").clone()
            };
            close(&gradient(ours), &gradient(theirs));
        }
        let error = Rotary::new(3, 1e4).expect_err("odd").to_string();
        assert!(error.contains("an even number"), "{error}");
    }

    /// Scores depend on the distance alone.
    #[test]
    fn a_shift_of_both_changes_no_product() {
        let x = Tensor::new(&[[[0.3f64, -1.0, 0.7, 0.2], [1.0, 0.4, -0.6, 0.9]]], &Device::Cpu)
            .expect("x");
        let rotary = Rotary::new(4, 100.0).expect("rotary");
        let product = |offset| {
            let x = rotary.forward(&x, offset).expect("turn").squeeze(0).expect("one row");
            x.matmul(&x.t().expect("t")).expect("product").to_vec2::<f64>().expect("values")[0][1]
        };
        assert!((product(0) - product(1000)).abs() < 1e-9);
    }
}
