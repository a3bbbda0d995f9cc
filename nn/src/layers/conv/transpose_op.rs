//! A transposed convolution and a bias as one operation: forward is the input gradient of a
//! convolution, and backward that convolution.

use super::op::{Convolution, Slopes};
use crate::backward::parameter_gradient;
use crate::cpu::with_values;
use crate::kernels::{Real, lane_sum, output, vectorized};
use crate::link::{Source, owned, result};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

impl Convolution {
    /// Its transpose, of images `x` such as it gives. Of a convolution alone: without activation
    /// and pooling.
    pub(super) fn apply_transposed<T: Real>(
        self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        shape: [usize; 4],
    ) -> Result<Tensor> {
        let sources = [x, weight, bias].map(Source::of);
        let images = shape[0];
        let y = with_values([x, weight, bias], |[x, weight, bias]| {
            let slopes = Slopes { y: x, best: &[], gradient: x };
            Ok(output(shape.iter().product(), |y: &mut [T]| {
                self.gradients(None, weight, &slopes, images, Some(&mut *y));
                self.add_bias(y, bias);
            }))
        })?;
        let [x, weight, bias] = [x.detach(), weight.clone(), bias.clone()];
        let kept = sources.clone();
        let [a, b, c] = &sources;
        result(y, shape.as_slice(), &[a, b, c], move |gradient| {
            let gradient = owned::<T>(gradient)?;
            with_values([&x, &weight], |[x, weights]| {
                let zeros = vec![T::zero(); self.geometry.groups * self.geometry.outputs];
                let dx = match kept[0].is_tracked() {
                    true => kept[0].give(self.forward([&gradient, weights, &zeros], images).0)?,
                    false => None,
                };
                let slopes = Slopes { y: x, best: &[], gradient: x };
                let sums = self.gradients(Some(&gradient), weights, &slopes, images, None);
                let dw = parameter_gradient(&weight, |dw, is_added| sums.weight(dw, is_added))?;
                let db = parameter_gradient(&bias, |db, is_added| {
                    self.channel_sums(&gradient, db, is_added)
                })?;
                Ok(vec![dx, dw, db])
            })
        })
    }

    fn add_bias<T: Real>(&self, images: &mut [T], bias: &[T]) {
        images.par_chunks_mut(self.geometry.image()).for_each(|image| {
            for (plane, bias) in image.chunks_mut(self.geometry.area()).zip(bias) {
                vectorized(
                    #[inline(always)]
                    || plane.iter_mut().for_each(|y| *y += *bias),
                );
            }
        });
    }

    /// The sum of each channel over all images.
    fn channel_sums<T: Real>(&self, images: &[T], sums: &mut [T], is_added: bool) {
        let (channels, area) = (sums.len(), self.geometry.area());
        sums.par_iter_mut().enumerate().for_each(|(channel, sum)| {
            let mut total = if is_added { *sum } else { T::zero() };
            for plane in images.chunks_exact(area).skip(channel).step_by(channels) {
                total += vectorized(
                    #[inline(always)]
                    || lane_sum(plane),
                );
            }
            *sum = total;
        });
    }
}
