//! Backward passes that put the gradients of parameters where they are wanted.
//!
//! Candle zeroes a tensor for each gradient, adds to it into a new one, and hands out a map; a
//! trainer then copies it into the buffer that it reduces. Here the operations of this crate write
//! a parameter's gradient into that buffer at once, and tell candle that there is none. What other
//! operations compute still comes through candle's map and is added.

use crate::cpu::{TASK_ELEMENTS, has_kernels, tensor, with_values};
use crate::kernels::{Real, output, vectorized};
use crate::{Error, Params, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, TensorId};
use rayon::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

/// The gradients of a model as one flat buffer, `f32`, in the order of the parameters' names: what
/// is summed over the ranks and read by the optimizer. Behind the gradients travel the loss and its
/// weight, so that one sum over the ranks brings all.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::{Gradients, Module, Params, Pass, layers::Linear};
///
/// let params = Params::new(7, &Device::Cpu);
/// let layer = Linear::new(&params, 2, 1)?;
/// let x = Tensor::new(&[[3f32, 5.0]], &Device::Cpu)?;
/// let loss = layer.forward(&x, &Pass::train(7, 0))?.sum_all()?;
/// let mut gradients = Gradients::zeros(&params);
/// gradients.backward(&loss, 2.0)?;
/// assert_eq!(gradients.values(), [2.0, 6.0, 10.0]); // bias, weight
/// assert!(gradients.missing().is_empty());
/// # Ok::<(), mobula_nn::Error>(())
/// ```
#[derive(Debug)]
pub struct Gradients {
    /// The last ones are the loss and its weight.
    values: Vec<f32>,
    places: Vec<(String, Range<usize>)>,
    parameters: Vec<Parameter>,
    by_id: HashMap<TensorId, usize>,
    /// Those of parameters that are elsewhere, in one piece there, if they are to stay.
    elsewhere: Option<Tensor>,
    stays_elsewhere: bool,
    listener: Option<Listener>,
}

/// What hears of a place that was written, and what it holds now.
pub type OnWrite = dyn FnMut(usize, &[f32]) + Send;

struct Listener(Box<OnWrite>);

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

/// The state of one place.
#[derive(Debug)]
struct Parameter {
    tensor: Tensor,
    /// Something was written since the last [`Gradients::start`].
    is_written: bool,
    /// It may go without.
    is_exempt: bool,
}

thread_local! {
    /// What the backward pass of this thread fills.
    static FILLED: RefCell<Option<Gradients>> = const { RefCell::new(None) };
}

/// What travels behind the gradients.
const LOSS: usize = 2;
const WEIGHT: usize = 1;

impl Gradients {
    /// Zeros for these parameters.
    pub fn zeros(params: &Params) -> Self {
        let (mut gradients, mut end) = (Self::of_nothing(), 0);
        for (at, (name, var)) in params.vars().into_iter().enumerate() {
            let start = end;
            end += var.elem_count();
            gradients.by_id.insert(var.as_tensor().id(), at);
            let (tensor, is_exempt) = (var.as_tensor().clone(), params.is_exempt(&name));
            gradients.parameters.push(Parameter { tensor, is_written: false, is_exempt });
            gradients.places.push((name, start..end));
        }
        gradients.values = vec![0.0; end + LOSS];
        gradients
    }

    fn of_nothing() -> Self {
        let (places, parameters) = (Vec::new(), Vec::new());
        let (values, by_id) = (vec![0.0; LOSS], HashMap::new());
        let (elsewhere, stays_elsewhere, listener) = (None, false, None);
        Self { values, places, parameters, by_id, elsewhere, stays_elsewhere, listener }
    }

    /// Overwrites them and the loss with `scale` times what a backward pass of `loss` gives.
    ///
    /// Parameters without a gradient are [`missing`](Self::missing), and their values zeros.
    /// Errors unless `loss` has one element.
    pub fn backward(&mut self, loss: &Tensor, scale: f64) -> Result<()> {
        self.start();
        self.add_backward(loss, scale)
    }

    /// Adds instead, to accumulate over micro-batches.
    pub fn add_backward(&mut self, loss: &Tensor, scale: f64) -> Result<()> {
        if loss.elem_count() != 1 {
            return Err(Error::shape("the loss", "one element", loss.dims()));
        }
        let scaled = if scale == 1.0 { loss.clone() } else { (loss * scale)? };
        let filling = Filling::start(self);
        let store = scaled.backward();
        drop(filling);
        let store = store?;
        if self.parameters.iter().all(|parameter| has_kernels(&parameter.tensor)) {
            self.add_here(&store)?;
        } else {
            self.add_elsewhere(&store)?;
        }
        let value = scaled.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?[0];
        self.set_loss(self.loss() + value);
        Ok(())
    }

    /// Has `listener` hear of each of the [places](Self::places) right after it is written or added to, in
    /// the order in which backward passes come to them: from the end of a model to its start, mostly, and
    /// more than once where a parameter is used more than once. Gradients of other operations than this
    /// crate's come at the end of a pass. For sums over ranks that begin before a pass has ended.
    pub fn set_listener(&mut self, listener: Option<Box<OnWrite>>) {
        self.listener = listener.map(Listener);
    }

    /// Has the gradients of parameters that are not on the CPU stay where these are, for sums over ranks and
    /// updates there: they are not among the [`values`](Self::values) then, but [taken](Self::take_elsewhere).
    pub fn stay_elsewhere(&mut self, stay: bool) {
        self.stays_elsewhere = stay;
    }

    /// The gradients that have [stayed](Self::stay_elsewhere), of all parameters in one piece, on the
    /// device of these. Zeros when no pass was begun since the [start](Self::start).
    pub fn take_elsewhere(&mut self) -> Result<Tensor> {
        let device = self.parameters.first().map_or(&Device::Cpu, |first| first.tensor.device());
        match self.elsewhere.take() {
            Some(gradients) => Ok(gradients),
            None => Ok(Tensor::zeros(self.values.len() - LOSS, DType::F32, device)?),
        }
    }

    /// The gradients that are elsewhere, if they are: of all parameters in one piece.
    pub fn elsewhere(&self) -> Option<&Tensor> {
        self.elsewhere.as_ref()
    }

    /// Has the gradients be these, of all parameters in one piece, wherever it is. Errors when it has not as
    /// many numbers, or they are not `f32`.
    pub fn put_elsewhere(&mut self, gradients: Tensor) -> Result<()> {
        let len = self.values.len() - LOSS;
        if (gradients.dims(), gradients.dtype()) != (&[len], DType::F32) {
            let what = format!("gradients in one piece, of {:?},", gradients.dtype());
            return Err(Error::shape(what, format!("[{len}] of F32"), gradients.dims()));
        }
        self.elsewhere = Some(gradients.detach());
        Ok(())
    }

    /// Has gradients that are elsewhere be the [`values`](Self::values), as if they had never been there.
    pub fn bring_here(&mut self) -> Result<()> {
        let Some(there) = self.elsewhere.take() else {
            return Ok(());
        };
        let values = self.values_mut();
        Ok(with_values([&there.to_device(&Device::Cpu)?], |[there]| {
            values.copy_from_slice(there);
            Ok(())
        })?)
    }

    /// Zeros everywhere, the loss too: the part of a rank that has no rows.
    pub fn clear(&mut self) {
        self.start();
        self.values.fill(0.0);
    }

    /// The gradients, in the order of the parameters' names.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.values.len() - LOSS]
    }

    /// To clip or scale them in place.
    pub fn values_mut(&mut self) -> &mut [f32] {
        let end = self.values.len() - LOSS;
        &mut self.values[..end]
    }

    /// The loss that travels with them.
    pub fn loss(&self) -> f32 {
        self.values[self.values.len() - LOSS]
    }

    /// Sets the loss that travels with them.
    pub fn set_loss(&mut self, loss: f32) {
        let at = self.values.len() - LOSS;
        self.values[at] = loss;
    }

    /// The weight of the loss, such as a number of rows: whatever was set since the
    /// [start](Self::start).
    pub fn weight(&self) -> f32 {
        self.values[self.values.len() - WEIGHT]
    }

    /// Sets the weight that travels with them.
    pub fn set_weight(&mut self, weight: f32) {
        let at = self.values.len() - WEIGHT;
        self.values[at] = weight;
    }

    /// The same, to be read.
    pub fn as_reduced(&self) -> &[f32] {
        &self.values
    }

    /// Gradients, loss and weight, to be summed over the ranks in place.
    pub fn as_reduced_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Name and place of each parameter.
    pub fn places(&self) -> &[(String, Range<usize>)] {
        &self.places
    }

    /// The parameters that got no gradient, but for those that [may go without](Params::exempt).
    ///
    /// Candle drops gradients silently where an operation has no backward pass; a training loop
    /// that looks after its first step finds out.
    pub fn missing(&self) -> Vec<String> {
        let places = self.places.iter().zip(&self.parameters);
        let missing = places.filter(|(_, one)| !one.is_written && !one.is_exempt);
        missing.map(|((name, _), _)| name.clone()).collect()
    }

    /// The parameter that the first of the [`values`](Self::values) which is not finite belongs to.
    pub fn first_non_finite(&self) -> Option<&str> {
        let at = self.first_non_finite_in(0..self.places.len())?;
        Some(&self.places[at].0)
    }

    /// Which of these [places](Self::places) the first value which is not finite is in.
    pub fn first_non_finite_in(&self, places: Range<usize>) -> Option<usize> {
        let first = places.start;
        let places = self.places.get(places)?;
        let (start, end) = (places.first()?.1.start, places.last()?.1.end);
        if are_finite(&self.values[start..end]) {
            return None;
        }
        let is_not = |range: &Range<usize>| !are_finite(&self.values[range.clone()]);
        places.iter().position(|(_, range)| is_not(range)).map(|at| first + at)
    }

    /// Has the next [`add_backward`](Self::add_backward) overwrite what is there, which is cheaper
    /// than to [`clear`](Self::clear) first.
    pub fn start(&mut self) {
        self.parameters.iter_mut().for_each(|parameter| parameter.is_written = false);
        self.elsewhere = None;
        self.set_loss(0.0);
        self.set_weight(0.0);
    }

    /// Adds what came through candle's map, beside what this crate's operations have written.
    fn add_here(&mut self, store: &GradStore) -> Result<()> {
        for at in 0..self.places.len() {
            if let Some(gradient) = store.get(&self.parameters[at].tensor) {
                self.add(at, gradient)?;
            }
        }
        self.zero_missing();
        Ok(())
    }

    /// All of it came through candle's map. One piece is one copy to the CPU: each waits until the device
    /// has computed all that it was told to.
    fn add_elsewhere(&mut self, store: &GradStore) -> Result<()> {
        let all = self.in_one_piece(store)?;
        let given = self.parameters.iter().map(|parameter| store.get(&parameter.tensor).is_some());
        let given: Vec<usize> = given.enumerate().filter_map(|(at, is)| is.then_some(at)).collect();
        if self.stays_elsewhere {
            given.into_iter().for_each(|at| self.parameters[at].is_written = true);
            self.elsewhere = Some(match self.elsewhere.take() {
                Some(before) => (before + all)?,
                None => all,
            });
            return Ok(());
        }
        with_values([&all.to_device(&Device::Cpu)?], |[all]| {
            for at in given {
                let range = self.places[at].1.clone();
                self.write(at, |values, is_added| put(values, &all[range], is_added));
            }
            Ok(())
        })?;
        self.zero_missing();
        Ok(())
    }

    /// The gradients of all parameters, where these are; zeros for those that got none.
    fn in_one_piece(&self, store: &GradStore) -> Result<Tensor> {
        // A gradient may know how it came about, and would hold on to all of that.
        let piece = |parameter: &Parameter| match store.get(&parameter.tensor) {
            Some(gradient) => gradient.detach().to_dtype(DType::F32)?.flatten_all(),
            None => {
                let (len, device) = (parameter.tensor.elem_count(), parameter.tensor.device());
                Tensor::zeros(len, DType::F32, device)
            }
        };
        let pieces = self.parameters.iter().map(piece).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&pieces, 0)?)
    }

    fn zero_missing(&mut self) {
        for ((_, range), parameter) in self.places.iter().zip(&self.parameters) {
            if !parameter.is_written {
                self.values[range.clone()].fill(0.0);
            }
        }
    }

    /// Adds a gradient that came through candle's map.
    fn add(&mut self, at: usize, gradient: &Tensor) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?.flatten_all()?;
        with_values([&gradient.contiguous()?], |[gradient]| {
            self.write(at, |values, is_added| put(values, gradient, is_added));
            Ok(())
        })?;
        Ok(())
    }

    fn write(&mut self, at: usize, write: impl FnOnce(&mut [f32], bool)) {
        let parameter = &mut self.parameters[at];
        let range = self.places[at].1.clone();
        write(&mut self.values[range.clone()], parameter.is_written);
        parameter.is_written = true;
        if let Some(Listener(listener)) = &mut self.listener {
            listener(at, &self.values[range]);
        }
    }
}

fn put(values: &mut [f32], gradient: &[f32], is_added: bool) {
    match is_added {
        true => values.iter_mut().zip(gradient).for_each(|(to, from)| *to += *from),
        false => values.copy_from_slice(gradient),
    }
}

/// A value that is not finite has all bits of its exponent set.
fn are_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let largest = |values: &[f32]| {
        vectorized(
            #[inline(always)]
            || values.iter().fold(0, |max, value| max.max(value.to_bits() & EXPONENT)),
        )
    };
    values.par_chunks(TASK_ELEMENTS).all(|values| largest(values) != EXPONENT)
}

/// Has this thread's backward pass fill `into`, until dropped.
struct Filling<'a> {
    into: &'a mut Gradients,
    before: Option<Gradients>,
}

impl<'a> Filling<'a> {
    fn start(into: &'a mut Gradients) -> Self {
        let before = FILLED.replace(Some(std::mem::replace(into, Gradients::of_nothing())));
        Self { into, before }
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        if let Some(filled) = FILLED.replace(self.before.take()) {
            *self.into = filled;
        }
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
