//! A vector for each of a fixed number of things.

use super::Activation;
use super::linear_op::affine;
use crate::backward::parameter_gradient;
use crate::cpu::{TASK_ELEMENTS, matmul, unsupported, with_values};
use crate::kernels::{Real, output, vectorized};
use crate::link::{Source, result};
use crate::{Error, Init, Params, Pass, Result};
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;

/// The rows of a table: indices `[..]` to `[.., features]`.
///
/// Parameter `weight [count, features]`, standard normal as in PyTorch. The gradient of a row is
/// summed over the places of its index in their order, so its bits do not depend on the number of
/// threads.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::{layers::Embedding, Params};
///
/// let embedding = Embedding::new(&Params::new(7, &Device::Cpu), 10, 4)?;
/// let y = embedding.forward(&Tensor::new(&[[1u32, 2, 3], [9, 1, 1]], &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [2, 3, 4]);
/// let error = embedding.forward(&Tensor::new(&[3i64, 10], &Device::Cpu)?).unwrap_err();
/// assert!(error.to_string().starts_with("index 10 at position 1 is out of range"));
/// # Ok::<(), mobula_nn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Tensor,
    padding: Option<usize>,
}

impl Embedding {
    /// Creates the parameter in `params`. Errors for sizes of 0.
    pub fn new(params: &Params, count: usize, features: usize) -> Result<Self> {
        Self::with_init(params, count, features, Init::Normal { mean: 0.0, std: 1.0 })
    }

    /// The same with other initial values.
    pub fn with_init(params: &Params, count: usize, features: usize, init: Init) -> Result<Self> {
        for (option, size) in [("count", count), ("features", features)] {
            if size == 0 {
                return Err(Error::option(option, 0, "at least 1"));
            }
        }
        Ok(Self { weight: params.get((count, features), "weight", init)?, padding: None })
    }

    /// The same with an index that stands for nothing, as PyTorch's `padding_idx`: its row is set to
    /// zeros now and gets no gradient from what looks it up. Errors unless it is less than `count`.
    pub fn with_padding(self, index: usize) -> Result<Self> {
        let (count, features) = self.weight.dims2()?;
        if index >= count {
            return Err(Error::option("padding", index, format!("less than {count}, the count")));
        }
        let zeros = Tensor::zeros((1, features), self.weight.dtype(), self.weight.device())?;
        self.weight.slice_set(&zeros, 0, index)?;
        Ok(Self { padding: Some(index), ..self })
    }

    /// `[count, features]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The rows of `indices`, which are `u32` or `i64`. Errors for one that is not in the table.
    pub fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        let (count, features) = self.weight.dims2()?;
        let shape = [indices.dims(), &[features]].concat();
        let indices = checked(indices, count)?;
        Ok(match (crate::cpu::has_kernels(&self.weight), self.weight.dtype()) {
            (true, DType::F32) => self.fused::<f32>(indices, shape)?,
            (true, DType::F64) => self.fused::<f64>(indices, shape)?,
            (true, other) => return Err(unsupported(other, "embedding").into()),
            (false, _) => self.composed(&indices, &shape)?,
        })
    }

    /// The products of `x [.., features]` with each row of the table, `[.., count]`: the logits of a
    /// head that shares its weight with the embedding (Press and Wolf, 2017; Flax's `attend`).
    pub fn attend(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let (count, features) = self.weight.dims2()?;
        if x.rank() < 2 || x.dim(D::Minus1)? != features {
            let what = "what is compared with an embedding";
            return Err(Error::shape(what, format!("[.., {features}]"), x.dims()));
        }
        if crate::cpu::has_kernels(x) {
            let no_bias = Tensor::zeros(count, self.weight.dtype(), &Device::Cpu)?;
            return Ok(affine(x, &self.weight, &no_bias, Activation::Identity, pass.precision())?);
        }
        let shape = [&x.dims()[..x.rank() - 1], &[count]].concat();
        let y = matmul(&x.reshape(((), features))?, &self.weight.t()?, pass.precision())?;
        Ok(y.reshape(shape)?)
    }

    fn fused<T: Real>(
        &self,
        indices: Vec<usize>,
        shape: Vec<usize>,
    ) -> candle_core::Result<Tensor> {
        let (count, features) = self.weight.dims2()?;
        let y = with_values([&self.weight], |[table]| Ok(gather::<T>(table, features, &indices)))?;
        let (weight, padding) = (self.weight.clone(), self.padding);
        result(y, shape, &[&Source::of(&self.weight)], move |gradient| {
            let gradient = T::cpu_storage_as_slice(&gradient)?;
            let places = Places::new(&indices, count, padding);
            let dw = parameter_gradient(&weight, |dw, is_added| {
                places.scatter(gradient, features, dw, is_added);
            })?;
            Ok(vec![dw])
        })
    }

    /// In candle's own operations, for devices that this crate has no kernel for.
    fn composed(&self, indices: &[usize], shape: &[usize]) -> Result<Tensor> {
        let device = self.weight.device();
        let numbers = indices.iter().map(|index| *index as i64);
        let y = self.weight.index_select(&Tensor::from_iter(numbers, device)?, 0)?;
        let Some(padding) = self.padding else {
            return Ok(y.reshape(shape)?);
        };
        let trained = indices.iter().map(|index| f64::from(u8::from(*index != padding)));
        let trained = Tensor::from_iter(trained, device)?.to_dtype(y.dtype())?;
        let trained = trained.reshape((indices.len(), 1))?;
        // The value of `y` with the gradient of its trained rows.
        let y = (y.detach() + (&y - y.detach())?.broadcast_mul(&trained)?)?;
        Ok(y.reshape(shape)?)
    }
}

/// The indices in a row, each of them in the table.
fn checked(indices: &Tensor, count: usize) -> Result<Vec<usize>> {
    if !matches!(indices.dtype(), DType::U32 | DType::I64) {
        return Err(Error::IndexType { got: indices.dtype().as_str() });
    }
    let indices = indices.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.flatten_all()?;
    let indices = indices.to_vec1::<i64>()?.into_iter().enumerate();
    let check = |(position, index)| match usize::try_from(index) {
        Ok(index) if index < count => Ok(index),
        _ => Err(Error::IndexOutOfRange { index, position, count }),
    };
    indices.map(check).collect()
}

fn gather<T: Real>(table: &[T], features: usize, indices: &[usize]) -> Vec<T> {
    output(indices.len() * features, |y: &mut [T]| {
        let rows = y.par_chunks_mut(features).zip(indices);
        let rows = rows.with_min_len((TASK_ELEMENTS / features).max(1));
        rows.for_each(|(y, index)| y.copy_from_slice(&table[index * features..][..features]));
    })
}

/// Where each index stands, in order.
struct Places {
    places: Vec<usize>,
    /// Of index `i`: `places[starts[i]..starts[i + 1]]`.
    starts: Vec<usize>,
}

impl Places {
    /// A counting sort. Those of `padding` are left out.
    fn new(indices: &[usize], count: usize, padding: Option<usize>) -> Self {
        let kept = || indices.iter().enumerate().filter(|(_, index)| Some(**index) != padding);
        let mut starts = vec![0; count + 1];
        kept().for_each(|(_, index)| starts[index + 1] += 1);
        for index in 0..count {
            starts[index + 1] += starts[index];
        }
        let mut next = starts.clone();
        let mut places = vec![0; starts[count]];
        for (place, index) in kept() {
            places[next[*index]] = place;
            next[*index] += 1;
        }
        Self { places, starts }
    }

    /// Adds up the gradients of each index, one task per part of the table.
    fn scatter<T: Real>(&self, gradient: &[T], features: usize, dw: &mut [T], is_added: bool) {
        let rows = dw.par_chunks_mut(features).enumerate();
        let rows = rows.with_min_len((TASK_ELEMENTS / features).max(1));
        rows.for_each(|(index, dw)| {
            if !is_added {
                dw.fill(T::zero());
            }
            for place in &self.places[self.starts[index]..self.starts[index + 1]] {
                let gradient = &gradient[place * features..][..features];
                vectorized(
                    #[inline(always)]
                    || dw.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += *value),
                );
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operation_and_the_composition_agree() {
        let params = Params::with_dtype(3, &Device::Cpu, DType::F64);
        let embedding = Embedding::new(&params, 5, 3).expect("embedding");
        for embedding in [embedding.clone(), embedding.with_padding(2).expect("padding")] {
            let indices = [4, 2, 0, 4, 2, 4];
            let both = [
                embedding.fused::<f64>(indices.to_vec(), vec![2, 3, 3]).expect("fused"),
                embedding.composed(&indices, &[2, 3, 3]).expect("composed"),
            ];
            let [fused, composed] = both.map(|y| {
                let gradients = y.sqr().and_then(|y| y.backward()).expect("backward");
                let gradient = gradients.get(embedding.weight()).expect("gradient");
                let all = Tensor::cat(&[y.reshape(((), 3)).expect("rows"), gradient.clone()], 0);
                all.and_then(|all| all.to_vec2::<f64>()).expect("values")
            });
            assert_eq!(fused, composed);
        }
    }
}
