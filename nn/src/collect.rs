//! Backward passes that put the gradients of parameters where they are wanted.
//!
//! Candle zeroes a tensor for each gradient, adds to it into a new one, and hands out a map; a
//! trainer then copies it into the buffer that it reduces. Here the operations of this crate write
//! a parameter's gradient into that buffer at once, and tell candle that there is none. What other
//! operations compute still comes through candle's map and is added.

use crate::cpu::tensor;
use crate::kernels::{Real, output};
use crate::{Params, Result};
use candle_core::{DType, Tensor, TensorId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

/// The flat gradient of every parameter of a model, `f32`, in the order of their names.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::{FlatGradients, Module, Params, Pass, layers::Linear};
///
/// let params = Params::new(7, &Device::Cpu);
/// let layer = Linear::new(&params, 2, 1)?;
/// let x = Tensor::new(&[[3f32, 5.0]], &Device::Cpu)?;
/// let loss = layer.forward(&x, &Pass::train(7, 0))?.sum_all()?;
/// let mut gradients = FlatGradients::new(&params);
/// gradients.backward(&loss, 2.0)?;
/// assert_eq!(gradients.values(), [2.0, 6.0, 10.0]); // bias, weight
/// assert!(gradients.missing().is_empty());
/// # Ok::<(), mobula_nn::Error>(())
/// ```
#[derive(Debug)]
pub struct FlatGradients {
    values: Vec<f32>,
    places: Vec<Place>,
    by_id: HashMap<TensorId, usize>,
}

#[derive(Debug)]
struct Place {
    name: String,
    range: Range<usize>,
    tensor: Tensor,
    /// Something was written there by the present pass.
    is_written: bool,
}

thread_local! {
    /// What the backward pass of this thread fills.
    static FILLED: RefCell<Option<FlatGradients>> = const { RefCell::new(None) };
}

impl FlatGradients {
    /// Zeros for these parameters.
    pub fn new(params: &Params) -> Self {
        let mut end = 0;
        let place = |(name, var): (String, candle_core::Var)| {
            let start = end;
            end += var.elem_count();
            let tensor = var.as_tensor().clone();
            Place { name, range: start..end, tensor, is_written: false }
        };
        let places: Vec<Place> = params.vars().into_iter().map(place).collect();
        let by_id = places.iter().enumerate().map(|(at, place)| (place.tensor.id(), at)).collect();
        Self { values: vec![0.0; end], places, by_id }
    }

    /// Overwrites them with `scale` times the gradients of `loss`, a tensor of one element.
    /// Parameters without a gradient are [`missing`](Self::missing), and their values zeros.
    pub fn backward(&mut self, loss: &Tensor, scale: f64) -> Result<()> {
        self.start();
        self.add_backward(loss, scale)
    }

    /// Adds instead, to accumulate over micro-batches.
    pub fn add_backward(&mut self, loss: &Tensor, scale: f64) -> Result<()> {
        let scaled = if scale == 1.0 { loss.clone() } else { (loss * scale)? };
        let mut filling = Filling::start(self);
        let store = scaled.backward();
        filling.end();
        drop(filling);
        let store = store?;
        for at in 0..self.places.len() {
            if let Some(gradient) = store.get(&self.places[at].tensor) {
                self.add(at, gradient)?;
            }
        }
        self.zero_missing();
        Ok(())
    }

    /// All zeros: the part of a rank that has no rows.
    pub fn clear(&mut self) {
        self.values.fill(0.0);
    }

    /// All of them, in the order of the parameters' names.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// To reduce or clip them in place.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Name and place of each parameter, in their order.
    pub fn places(&self) -> impl Iterator<Item = (&str, Range<usize>)> {
        self.places.iter().map(|place| (place.name.as_str(), place.range.clone()))
    }

    /// The parameters that the last backward pass gave no gradient.
    pub fn missing(&self) -> Vec<&str> {
        let missing = self.places.iter().filter(|place| !place.is_written);
        missing.map(|place| place.name.as_str()).collect()
    }

    fn start(&mut self) {
        self.places.iter_mut().for_each(|place| place.is_written = false);
    }

    fn zero_missing(&mut self) {
        for place in self.places.iter().filter(|place| !place.is_written) {
            self.values[place.range.clone()].fill(0.0);
        }
    }

    /// Adds a gradient that came through candle's map.
    fn add(&mut self, at: usize, gradient: &Tensor) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?.flatten_all()?.contiguous()?;
        let gradient = gradient.to_vec1::<f32>()?;
        self.write(at, |values, is_added| match is_added {
            true => values.iter_mut().zip(&gradient).for_each(|(to, from)| *to += from),
            false => values.copy_from_slice(&gradient),
        });
        Ok(())
    }

    fn write(&mut self, at: usize, write: impl FnOnce(&mut [f32], bool)) {
        let place = &mut self.places[at];
        write(&mut self.values[place.range.clone()], place.is_written);
        place.is_written = true;
    }
}

/// Has this thread's backward pass fill `into`, until dropped.
struct Filling<'a> {
    into: &'a mut FlatGradients,
    before: Option<FlatGradients>,
    is_over: bool,
}

impl<'a> Filling<'a> {
    fn start(into: &'a mut FlatGradients) -> Self {
        let empty = FlatGradients { values: Vec::new(), places: Vec::new(), by_id: HashMap::new() };
        let before = FILLED.replace(Some(std::mem::replace(into, empty)));
        Self { into, before, is_over: false }
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.is_over, true)
            && let Some(filled) = FILLED.replace(self.before.take())
        {
            *self.into = filled;
        }
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// The gradient of `parameter`, for an operation's `bwd`: `write` sets the elements that it is
/// given, or adds to them if its second argument says so.
///
/// `None` when it went to where this thread's backward pass collects; else a tensor for candle.
pub(crate) fn parameter_gradient<T: Real>(
    parameter: &Tensor,
    write: impl FnOnce(&mut [T], bool),
) -> candle_core::Result<Option<Tensor>> {
    // Taken out while it is written, for a thread that waits for others may run another pass.
    let mut filled = FILLED.take();
    let place = filled.as_ref().and_then(|filled| filled.by_id.get(&parameter.id()).copied());
    let gradient = match (&mut filled, place) {
        (Some(filled), Some(at)) if T::DTYPE == DType::F32 => {
            filled.write(at, |values, is_added| {
                if let Some(values) = T::of_f32(values) {
                    write(values, is_added);
                }
            });
            None
        }
        _ => {
            let values = output(parameter.elem_count(), |values| write(values, false));
            Some(tensor(values, parameter.shape())?)
        }
    };
    FILLED.set(filled);
    Ok(gradient)
}
