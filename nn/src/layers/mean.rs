//! Means over places.

use crate::cpu::{unsupported, with_values};
use crate::kernels::{Real, output, vectorized};
use crate::link::{Source, result};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// The mean over the places of `[rows, places, features]`: `[rows, features]`. Errors for 0
/// places.
pub fn mean_places(x: &Tensor) -> Result<Tensor> {
    let places = match *x.dims() {
        [_, places, _] if places > 0 => places,
        _ => {
            return Err(Error::shape(
                "the input of mean_places",
                "[rows, places ≥ 1, features]",
                x.dims(),
            ));
        }
    };
    if !crate::cpu::has_kernels(x) {
        return Ok((x.sum(1)? / places as f64)?);
    }
    let x = &x.contiguous()?;
    Ok(match x.dtype() {
        DType::F32 => mean_as::<f32>(x)?,
        DType::F64 => mean_as::<f64>(x)?,
        other => return Err(unsupported(other, "mean_places").into()),
    })
}

fn mean_as<T: Real>(x: &Tensor) -> candle_core::Result<Tensor> {
    let (rows, places, features) = x.dims3()?;
    let (scale, width) = (T::from_f64(1.0 / places as f64), features.max(1));
    let y = with_values([x], |[x]| {
        Ok(output(rows * features, |y: &mut [T]| {
            let rows = y.par_chunks_mut(width).zip(x.par_chunks(places * width));
            rows.for_each(|(y, x)| {
                vectorized(
                    #[inline(always)]
                    || {
                        y.fill(T::zero());
                        for x in x.chunks_exact(width) {
                            y.iter_mut().zip(x).for_each(|(y, x)| *y += *x);
                        }
                        y.iter_mut().for_each(|y| *y *= scale);
                    },
                )
            });
        }))
    })?;
    let source = Source::of(x);
    let to = source.clone();
    result(y, (rows, features), &[&source], move |gradient| {
        let gradient = T::cpu_storage_as_slice(&gradient)?;
        let dx = output(rows * places * features, |dx: &mut [T]| {
            let rows = dx.par_chunks_mut(places * width).zip(gradient.par_chunks(width));
            rows.for_each(|(dx, gradient)| {
                for dx in dx.chunks_exact_mut(width) {
                    dx.iter_mut().zip(gradient).for_each(|(dx, g)| *dx = *g * scale);
                }
            });
        });
        Ok(vec![to.give(dx)?])
    })
}
