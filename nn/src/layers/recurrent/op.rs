//! A layer as one operation of candle's graph, on the CPU.
//!
//! A direction has up to three results: outputs, final hidden state, final memory. In the graph
//! they stand on its *run*, a number that nobody reads, whose backward pass is the direction's;
//! what it needs of their gradients meets in a [`Joint`].

use super::Weights;
use super::cell::Cell;
use super::steps::{self, Geometry, Given, Strips, Tape};
use crate::Precision;
use crate::backward::parameter_gradient;
use crate::cpu::{tensor, with_values};
use crate::kernels::{Mat, Real, Threads, column_sums, gemm, gemm_add, output, put};
use crate::link::{Gradient, Source, Told, result};
use candle_core::{Result, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// What a layer is given.
pub(super) struct Input<'a> {
    /// `[rows, length, inputs]`.
    pub(super) x: &'a Tensor,
    pub(super) lengths: Option<&'a Arc<[usize]>>,
    /// Whether the outputs of all steps are wanted, or the final state alone.
    pub(super) wants_outputs: bool,
    pub(super) precision: Precision,
}

/// The weights of a direction, and hidden state and memory before its first step, if not zeros.
pub(super) struct Direction<'a> {
    pub(super) weights: &'a Weights,
    pub(super) initial: Vec<Tensor>,
}

/// What a layer gives.
pub(super) struct Outputs {
    /// `[rows, length, directions · hidden]`; of length 0 if not wanted.
    pub(super) outputs: Tensor,
    /// Of each direction: hidden state and, if the cell has one, memory, `[rows, hidden]`.
    pub(super) states: Vec<Vec<Tensor>>,
}

/// A layer whose first direction runs forward, a second one in reverse.
pub(super) fn layer<C: Cell, T: Real>(
    input: &Input<'_>,
    directions: &[Direction<'_>],
) -> Result<Outputs> {
    let x = input.x.contiguous()?;
    let (rows, length, inputs) = x.dims3()?;
    let (input, hidden) = (Input { x: &x, ..*input }, directions[0].weights.hidden());
    let lengths = input.lengths.cloned();
    let (is_reverse, precision) = (false, input.precision);
    let geometry = Geometry { rows, length, inputs, hidden, is_reverse, precision, lengths };
    let turned = with_values([&x], |[x]| Ok(geometry.turned::<T>(x, inputs, false)))?;
    let turned = Arc::new(turned);
    let width = directions.len() * hidden;
    let shape = (rows, if input.wants_outputs { length } else { 0 }, width);
    // Rows that have ended stay 0.
    let mut y = vec![T::zero(); shape.0 * shape.1 * shape.2];
    let mut done = Vec::new();
    for (at, direction) in directions.iter().enumerate() {
        let geometry = Geometry { is_reverse: at == 1, ..geometry.clone() };
        let turned = Arc::clone(&turned);
        done.push(Done::new::<C>(&input, turned, direction, geometry, (&mut y, width))?);
    }
    let runs = done.into_iter().enumerate();
    let runs = runs.map(|(at, done)| done.into_run::<C>(Columns { at, width }));
    let (runs, last): (Vec<_>, Vec<_>) = runs.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let states = runs.iter().zip(last).map(|(run, last)| run.states(last));
    let states = states.collect::<Result<_>>()?;
    let outputs = match input.wants_outputs {
        true => reveal(y, shape, runs)?,
        false => tensor(y, shape)?,
    };
    Ok(Outputs { outputs, states })
}

/// A direction whose forward pass is done.
struct Done<T> {
    geometry: Geometry,
    /// The input.
    turned: Arc<Vec<T>>,
    weights: Weights,
    /// Of the input, the weights, the initial state.
    sources: Vec<Source>,
    tape: Tape<T>,
}

/// Where the outputs of direction `at` lie among the `width` of a step.
#[derive(Clone, Copy)]
struct Columns {
    at: usize,
    width: usize,
}

impl<T: Real> Done<T> {
    fn new<C: Cell>(
        input: &Input<'_>,
        turned: Arc<Vec<T>>,
        direction: &Direction<'_>,
        geometry: Geometry,
        (outputs, stride): (&mut [T], usize),
    ) -> Result<Self> {
        let weights = direction.weights.clone();
        let initial = direction.initial.iter().map(Tensor::contiguous);
        let initial = initial.collect::<Result<Vec<_>>>()?;
        let sources = std::iter::once(input.x).chain(weights.all()).chain(&initial);
        let sources: Vec<_> = sources.map(Source::of).collect();
        let keeps = sources.iter().any(Source::is_tracked);
        let start = |at: usize| -> Result<Option<Vec<T>>> {
            let copy = |state| with_values([state], |[state]| Ok(state.to_vec()));
            initial.get(at).map(copy).transpose()
        };
        let start = [start(0)?, start(1)?];
        let start = start.each_ref().map(Option::as_deref);
        let first = usize::from(geometry.is_reverse) * geometry.hidden;
        let y = Strips { values: outputs, stride, start: first };
        let y = input.wants_outputs.then_some(y);
        let tape = with_values(weights.all(), |weights| {
            Ok(steps::forward::<C, T>(&geometry, &turned, weights, start, keeps, y))
        })?;
        Ok(Self { geometry, turned, weights, sources, tape })
    }

    /// Its place in the graph, and its final state.
    fn into_run<C: Cell>(mut self, columns: Columns) -> Result<(Run, Vec<Vec<T>>)> {
        let Geometry { rows, hidden, .. } = self.geometry;
        let mut states: Vec<_> = std::mem::take(&mut self.tape.last).into();
        states.truncate(1 + usize::from(C::HAS_MEMORY));
        let joint = Arc::new(Joint::default());
        let (given, sources) = (Arc::clone(&joint), self.sources.clone());
        let sources: Vec<_> = sources.iter().collect();
        let run = result(vec![T::zero()], (), &sources, move |_| {
            self.backward::<C>(&given.take(), columns)
        })?;
        Ok((Run { source: Source::of(&run), joint, shape: (rows, hidden) }, states))
    }

    fn backward<C: Cell>(&self, given: &[Option<Gradient>; 3], at: Columns) -> Result<Vec<Told>> {
        let geometry = &self.geometry;
        let values = |part: usize| given[part].as_deref().map(T::cpu_storage_as_slice).transpose();
        let strips = |values| Strips { values, stride: at.width, start: at.at * geometry.hidden };
        let given = Given {
            outputs: values(OUTPUTS)?.map(strips),
            hidden: values(HIDDEN)?,
            memory: values(MEMORY)?,
        };
        let gradients = with_values([&self.weights.weight_hh], |[weight]| {
            Ok(steps::backward::<C, T>(geometry, &self.tape, weight, &given))
        })?;
        let mut told = vec![self.give_input::<C>(&gradients.gates)?];
        told.extend(self.weight_gradients::<C>(&gradients.gates)?);
        let initial = self.sources[told.len()..].iter();
        let initial = initial.zip([gradients.hidden, gradients.memory]);
        for (source, gradient) in initial {
            told.push(source.give(gradient)?);
        }
        Ok(told)
    }

    /// The gradients of the gates, as the input or as the hidden state sees them.
    fn gates<'a, C: Cell>(&self, gradients: &'a [T], start: usize) -> Mat<'a, T> {
        let Geometry { rows, length, hidden, .. } = self.geometry;
        let start = (start * hidden).min(gradients.len());
        let (width, stride) = (C::GATES * hidden, C::GRADIENTS * hidden);
        Mat::strided(&gradients[start..], rows * length, width, stride)
    }

    fn give_input<C: Cell>(&self, gradients: &[T]) -> Result<Told> {
        if !self.sources[0].is_tracked() {
            return Ok(None);
        }
        let Geometry { rows, length, inputs, hidden, .. } = self.geometry;
        let gates = self.gates::<C>(gradients, 0);
        let turned = with_values([&self.weights.weight_ih], |[weight]| {
            let weight = Mat::new(weight, C::GATES * hidden, inputs);
            Ok(output(rows * length * inputs, |dx| {
                gemm(dx, T::one(), gates, weight, Threads::All, self.geometry.precision);
            }))
        })?;
        self.sources[0].give(self.geometry.turned(&turned, inputs, true))
    }

    /// Over all steps at once.
    fn weight_gradients<C: Cell>(&self, gradients: &[T]) -> Result<[Told; 4]> {
        let Geometry { rows, length, inputs, hidden, precision, .. } = self.geometry;
        let x = Mat::new(&self.turned, rows * length, inputs);
        let before = Mat::new(&self.tape.hidden, rows * length, hidden);
        let [weight_ih, weight_hh, bias_ih, bias_hh] = self.weights.all();
        let sums = output(C::GRADIENTS * hidden, |sums: &mut [T]| {
            column_sums(gradients, sums, false);
        });
        let bias = |start: usize| &sums[start * hidden..][..C::GATES * hidden];
        Ok([
            product(weight_ih, self.gates::<C>(gradients, 0), x, precision)?,
            product(weight_hh, self.gates::<C>(gradients, C::RECURRENT), before, precision)?,
            parameter_gradient(bias_ih, |to, is_added| put(bias(0), to, is_added))?,
            parameter_gradient(bias_hh, |to, is_added| put(bias(C::RECURRENT), to, is_added))?,
        ])
    }
}

/// The gradient of a weight: `gatesᵀ · x`.
fn product<T: Real>(
    weight: &Tensor,
    gates: Mat<'_, T>,
    x: Mat<'_, T>,
    precision: Precision,
) -> Result<Told> {
    parameter_gradient(weight, |to, is_added| match is_added {
        true => gemm_add(to, gates.t(), x, Threads::All, precision),
        false => gemm(to, T::one(), gates.t(), x, Threads::All, precision),
    })
}

const OUTPUTS: usize = 0;
const HIDDEN: usize = 1;
const MEMORY: usize = 2;

/// The gradients of a direction's results, as far as those were used.
#[derive(Default)]
struct Joint([Mutex<Option<Gradient>>; 3]);

impl Joint {
    fn put(&self, part: usize, gradient: Gradient) {
        *self.0[part].lock().unwrap_or_else(PoisonError::into_inner) = Some(gradient);
    }

    fn take(&self) -> [Option<Gradient>; 3] {
        self.0.each_ref().map(|part| part.lock().unwrap_or_else(PoisonError::into_inner).take())
    }
}

/// A direction in the graph.
#[derive(Clone)]
struct Run {
    source: Source,
    joint: Arc<Joint>,
    /// Of a state.
    shape: (usize, usize),
}

impl Run {
    /// Hands over the gradient of one of its results.
    fn give<T: Real>(&self, part: usize, gradient: Gradient) -> Result<Told> {
        self.joint.put(part, gradient);
        self.source.give(vec![T::zero()])
    }

    /// The results that are its final state.
    fn states<T: Real>(&self, last: Vec<Vec<T>>) -> Result<Vec<Tensor>> {
        let state = |(values, part)| {
            let run = self.clone();
            result(values, self.shape, &[&self.source], move |gradient| {
                Ok(vec![run.give::<T>(part, gradient)?])
            })
        };
        last.into_iter().zip([HIDDEN, MEMORY]).map(state).collect()
    }
}

/// The result that is the outputs of all directions.
fn reveal<T: Real>(values: Vec<T>, shape: (usize, usize, usize), runs: Vec<Run>) -> Result<Tensor> {
    let sources: Vec<_> = runs.iter().map(|run| run.source.clone()).collect();
    let sources: Vec<_> = sources.iter().collect();
    result(values, shape, &sources, move |gradient| {
        runs.iter().map(|run| run.give::<T>(OUTPUTS, Arc::clone(&gradient))).collect()
    })
}
