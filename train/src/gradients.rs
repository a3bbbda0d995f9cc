//! The gradients of a model as one flat buffer, in the order of the parameters' names: what is
//! summed over the ranks and read by the optimizer.

use crate::optim::sum_of_squares;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Storage, Tensor};
use mobula_nn::Params;
use std::ops::Range;

/// The flat gradient of every parameter, and where each one lies. Behind the gradients travels
/// the loss, so that one sum over the ranks brings both.
#[derive(Debug)]
pub struct Gradients {
    values: Vec<f32>,
    places: Vec<(String, Range<usize>)>,
}

impl Gradients {
    /// Zeros for these parameters.
    pub fn zeros(params: &Params) -> Self {
        let mut end = 0;
        let place = |(name, var): (String, candle_core::Var)| {
            let start = end;
            end += var.elem_count();
            (name, start..end)
        };
        let places: Vec<_> = params.vars().into_iter().map(place).collect();
        Self { values: vec![0.0; end + 1], places }
    }

    /// Overwrites them with `scale` times the gradients of a backward pass. Errors with the names
    /// of parameters that got none.
    pub fn fill(&mut self, params: &Params, store: &GradStore, scale: f32) -> Result<()> {
        let missing = params.without_gradient(store);
        if !missing.is_empty() {
            return Err(Error::NoGradient { names: missing });
        }
        for ((_, range), (_, var)) in self.places.iter().zip(params.vars()) {
            if let Some(gradient) = store.get(&var) {
                copy_scaled(gradient, scale, &mut self.values[range.clone()])?;
            }
        }
        Ok(())
    }

    /// Overwrites them, and the loss, with zeros: the part of a rank that has no rows.
    pub fn clear(&mut self) {
        self.values.fill(0.0);
    }

    /// All of them, in the order of the parameters' names.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.values.len() - 1]
    }

    /// The same, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        let end = self.values.len() - 1;
        &mut self.values[..end]
    }

    /// The loss that travels with them.
    pub fn loss(&self) -> f32 {
        self.values[self.values.len() - 1]
    }

    /// Sets the loss that travels with them.
    pub fn set_loss(&mut self, loss: f32) {
        let last = self.values.len() - 1;
        self.values[last] = loss;
    }

    /// Gradients and loss, to be summed over the ranks in place.
    pub(crate) fn as_reduced_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Name and place of each parameter.
    pub fn places(&self) -> &[(String, Range<usize>)] {
        &self.places
    }

    /// The parameter that the first value which is not finite belongs to.
    pub fn first_non_finite(&self) -> Option<&str> {
        // A sum is not finite as soon as one term is not: one cheap pass in the good case.
        if sum_of_squares([self.values.as_slice()]).is_finite() {
            return None;
        }
        let at = self.values.iter().position(|value| !value.is_finite())?;
        let place = self.places.iter().find(|(_, range)| range.contains(&at));
        place.map(|(name, _)| name.as_str())
    }
}

/// The sum of the gradients of several backward passes, each scaled by its share of the rows.
#[derive(Default)]
pub(crate) struct Accumulation(Vec<f32>);

impl Accumulation {
    pub(crate) fn add(&mut self, values: &[f32]) {
        match self.0.is_empty() {
            true => self.0.extend_from_slice(values),
            false => self.0.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
        }
    }

    /// Overwrites the values with their sum; with zeros if there were none.
    pub(crate) fn finish(self, values: &mut [f32]) {
        match self.0.is_empty() {
            true => values.fill(0.0),
            false => values.copy_from_slice(&self.0),
        }
    }
}

fn copy_scaled(gradient: &Tensor, scale: f32, into: &mut [f32]) -> Result<()> {
    let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = gradient.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => {
            for (to, from) in into.iter_mut().zip(&values[start..end]) {
                *to = from * scale;
            }
        }
        _ => {
            drop(storage);
            let values = gradient.flatten_all()?.to_vec1::<f32>()?;
            for (to, from) in into.iter_mut().zip(values) {
                *to = from * scale;
            }
        }
    }
    Ok(())
}
