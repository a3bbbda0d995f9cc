//! One direction of one layer, from step to step.
//!
//! The products with the input, and those for the gradients of the weights, are taken over all
//! steps at once. Between them rows need nothing from each other: a few of them go through all
//! steps on one thread, which waits for nobody. What belongs to a row and a step is ordered by
//! those chunks of rows, then by step, then by row.

use super::cell::{Backward, Cell, Forward};
use crate::Precision;
use crate::kernels::{Mat, Packed, Real, Threads, gemm, output, vectorized};
use rayon::prelude::*;
use std::sync::Arc;

/// Rows that go through the steps together, of few rows and of many. Products of fewer are slower,
/// but a few rows should not all be one thread's; the order of sums follows from it.
const CHUNKS: [usize; 2] = [4, 8];

/// Sizes, and in which order the steps are taken.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    pub(super) rows: usize,
    pub(super) length: usize,
    pub(super) inputs: usize,
    pub(super) hidden: usize,
    pub(super) is_reverse: bool,
    pub(super) precision: Precision,
    /// How many steps each row has; all of them without.
    pub(super) lengths: Option<Arc<[usize]>>,
}

impl Geometry {
    /// The places of the steps in the sequence, in the order in which they are taken.
    fn places(&self) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let (length, is_reverse) = (self.length, self.is_reverse);
        (0..length).map(move |step| if is_reverse { length - 1 - step } else { step })
    }

    /// The place of the step before the one at `place`.
    fn previous(&self, place: usize) -> Option<usize> {
        match self.is_reverse {
            true => Some(place + 1).filter(|place| *place < self.length),
            false => place.checked_sub(1),
        }
    }

    /// Whether the row's sequence reaches to `place`. Beyond its end its state stays as it is.
    #[inline(always)]
    fn reaches(&self, row: usize, place: usize) -> bool {
        self.lengths.as_ref().is_none_or(|lengths| place < lengths[row])
    }

    /// The rows of a chunk.
    fn chunk_rows(&self) -> usize {
        CHUNKS[usize::from(self.rows >= 2 * CHUNKS[1])]
    }

    /// The elements of a chunk, if a row has `width` of them in a step.
    fn chunk(&self, width: usize) -> usize {
        (self.chunk_rows() * self.length * width).max(1)
    }

    /// `x [rows, length, width]` ordered by chunk, step, row; or, if `is_back`, the other way.
    pub(super) fn turned<T: Real>(&self, x: &[T], width: usize, is_back: bool) -> Vec<T> {
        let chunk = self.chunk(width);
        output(x.len(), |out: &mut [T]| {
            let chunks = out.par_chunks_mut(chunk).zip(x.par_chunks(chunk));
            chunks.for_each(|(to, from)| {
                let rows = to.len() / (self.length * width);
                let (outer, inner) =
                    if is_back { (self.length, rows) } else { (rows, self.length) };
                for (at, to) in to.chunks_exact_mut(width).enumerate() {
                    let from = &from[(at % outer * inner + at / outer) * width..];
                    to.copy_from_slice(&from[..width]);
                }
            });
        })
    }
}

/// A direction's part of outputs `[rows, length, stride]`, or of their gradient.
#[derive(Clone, Copy)]
pub(super) struct Strips<V> {
    pub(super) values: V,
    pub(super) stride: usize,
    pub(super) start: usize,
}

impl<V> Strips<V> {
    /// Where the hidden state of a row goes.
    #[inline(always)]
    fn range(&self, row_and_place: usize, hidden: usize) -> std::ops::Range<usize> {
        let start = row_and_place * self.stride + self.start;
        start..start + hidden
    }
}

/// What the forward pass leaves.
pub(super) struct Tape<T> {
    gates: Vec<T>,
    /// The hidden state before each step, if kept.
    pub(super) hidden: Vec<T>,
    /// The memory after each step, if kept.
    memory: Vec<T>,
    first_memory: Vec<T>,
    /// Hidden state and memory after the last step.
    pub(super) last: [Vec<T>; 2],
}

/// Weights of the input and of the hidden state, their biases.
pub(super) type Weights<'a, T> = [&'a [T]; 4];

/// Takes all steps over a [turned](Geometry::turned) input, and writes the outputs, if wanted, of
/// the steps that each row has. Keeps what the backward pass needs if `keeps`.
pub(super) fn forward<C: Cell, T: Real>(
    geometry: &Geometry,
    x: &[T],
    [input, recurrent, biases @ ..]: Weights<'_, T>,
    initial: [Option<&[T]>; 2],
    keeps: bool,
    outputs: Option<Strips<&mut [T]>>,
) -> Tape<T> {
    let Geometry { rows, length, inputs, hidden, .. } = *geometry;
    let (width, size) = (C::GATES * hidden, rows * hidden);
    let mut gates = output(length * rows * width, |gates| {
        let (x, input) = (Mat::new(x, length * rows, inputs), Mat::new(input, width, inputs));
        gemm(gates, T::one(), x, input.t(), Threads::All, geometry.precision);
    });
    let mut last = initial.map(|state| state.map_or_else(|| vec![T::zero(); size], <[T]>::to_vec));
    let first_memory = last[1].clone();
    let kept = || vec![T::zero(); if keeps { length * size } else { 0 }];
    let (mut before, mut after) = (kept(), kept());

    let recurrent = Packed::new(Mat::new(recurrent, width, hidden).t(), geometry.precision);
    let [h, m] = last.each_mut();
    let mut gates_of = gates.chunks_mut(geometry.chunk(width));
    let mut before_of = before.chunks_mut(geometry.chunk(hidden));
    let mut after_of = after.chunks_mut(geometry.chunk(hidden));
    let (stride, start) = outputs.as_ref().map_or((1, 0), |y| (y.stride, y.start));
    let y = outputs.map(|y| y.values).unwrap_or_default();
    let mut y = y.chunks_mut(geometry.chunk(stride));
    let at_once = geometry.chunk_rows();
    let states = h.chunks_mut(at_once * hidden).zip(m.chunks_mut(at_once * hidden));
    let chunks = states.enumerate().map(|(index, (hidden, memory))| Ahead {
        first: index * at_once,
        gates: gates_of.next().unwrap_or_default(),
        hidden,
        memory,
        kept: before_of.next().zip(after_of.next()),
        outputs: y.next().map(|values| Strips { values, stride, start }),
    });
    let chunks: Vec<_> = chunks.collect();
    chunks.into_par_iter().for_each(|chunk| chunk.run::<C>(geometry, &recurrent, biases));
    Tape { gates, hidden: before, memory: after, first_memory, last }
}

/// A chunk on its way forward.
struct Ahead<'a, T> {
    /// Its first row.
    first: usize,
    gates: &'a mut [T],
    /// The state between steps.
    hidden: &'a mut [T],
    memory: &'a mut [T],
    /// Hidden states before the steps, memories after them.
    kept: Option<(&'a mut [T], &'a mut [T])>,
    outputs: Option<Strips<&'a mut [T]>>,
}

impl<T: Real> Ahead<'_, T> {
    fn run<C: Cell>(mut self, geometry: &Geometry, recurrent: &Packed<T>, biases: [&[T]; 2]) {
        let (hidden, size) = (geometry.hidden, self.hidden.len());
        let mut product = vec![T::zero(); C::GATES * size];
        for place in geometry.places() {
            if let Some((before, _)) = &mut self.kept {
                before[place * size..][..size].copy_from_slice(self.hidden);
            }
            let h = Mat::new(self.hidden, size / hidden, hidden);
            recurrent.product(&mut product, false, h);
            self.step::<C>(geometry, place, &product, biases);
            if let Some((_, after)) = &mut self.kept {
                after[place * size..][..size].copy_from_slice(self.memory);
            }
        }
    }

    /// The cells of one step.
    fn step<C: Cell>(
        &mut self,
        geometry: &Geometry,
        place: usize,
        product: &[T],
        biases: [&[T]; 2],
    ) {
        let Geometry { length, hidden, .. } = *geometry;
        let width = C::GATES * hidden;
        let gates = &mut self.gates[place * product.len()..][..product.len()];
        vectorized(
            #[inline(always)]
            || {
                let states = self.hidden.chunks_exact_mut(hidden);
                let states = states.zip(self.memory.chunks_exact_mut(hidden)).enumerate();
                for (row, (h, memory)) in states {
                    if !geometry.reaches(self.first + row, place) {
                        continue;
                    }
                    let gates = &mut gates[row * width..][..width];
                    let recurrent = &product[row * width..][..width];
                    C::forward(Forward { gates, recurrent, biases, hidden: h, memory });
                    if let Some(y) = &mut self.outputs {
                        let range = y.range(row * length + place, hidden);
                        y.values[range].copy_from_slice(h);
                    }
                }
            },
        )
    }
}

/// The gradients that come to a direction: of its outputs, of its final hidden state and memory.
pub(super) struct Given<'a, T> {
    pub(super) outputs: Option<Strips<&'a [T]>>,
    pub(super) hidden: Option<&'a [T]>,
    pub(super) memory: Option<&'a [T]>,
}

/// The gradients that a direction gives.
pub(super) struct Gradients<T> {
    /// Of the gates, [`Cell::GRADIENTS`] of them for each hidden unit.
    pub(super) gates: Vec<T>,
    /// Of the initial state.
    pub(super) hidden: Vec<T>,
    pub(super) memory: Vec<T>,
}

/// Takes all steps back. `recurrent` is the weight of the hidden state.
pub(super) fn backward<C: Cell, T: Real>(
    geometry: &Geometry,
    tape: &Tape<T>,
    recurrent: &[T],
    given: &Given<'_, T>,
) -> Gradients<T> {
    let Geometry { rows, length, hidden, .. } = *geometry;
    let stride = C::GRADIENTS * hidden;
    let recurrent = Mat::new(recurrent, C::GATES * hidden, hidden);
    let recurrent = Packed::new(recurrent, geometry.precision);
    let start =
        |given: Option<&[T]>| given.map_or_else(|| vec![T::zero(); rows * hidden], <[T]>::to_vec);
    let (mut h, mut m) = (start(given.hidden), start(given.memory));
    let gates = output(length * rows * stride, |gates: &mut [T]| {
        let mut gates = gates.chunks_mut(geometry.chunk(stride));
        let at_once = geometry.chunk_rows();
        let states = h.chunks_mut(at_once * hidden).zip(m.chunks_mut(at_once * hidden));
        let chunks = states.enumerate().map(|(index, (d_hidden, d_memory))| Back {
            first: index * at_once,
            tape,
            outputs: given.outputs,
            gradients: gates.next().unwrap_or_default(),
            d_hidden,
            d_memory,
        });
        let chunks: Vec<_> = chunks.collect();
        chunks.into_par_iter().for_each(|chunk| chunk.run::<C>(geometry, &recurrent));
    });
    Gradients { gates, hidden: h, memory: m }
}

/// A chunk on its way back.
struct Back<'a, T> {
    /// Its first row.
    first: usize,
    tape: &'a Tape<T>,
    outputs: Option<Strips<&'a [T]>>,
    /// Of the gates.
    gradients: &'a mut [T],
    /// Of the state between steps.
    d_hidden: &'a mut [T],
    d_memory: &'a mut [T],
}

impl<T: Real> Back<'_, T> {
    fn run<C: Cell>(mut self, geometry: &Geometry, recurrent: &Packed<T>) {
        let hidden = geometry.hidden;
        let (width, stride) = (C::GATES * hidden, C::GRADIENTS * hidden);
        let rows = self.d_hidden.len() / hidden;
        for place in geometry.places().rev() {
            self.step::<C>(geometry, place);
            let gates = &self.gradients[place * rows * stride + C::RECURRENT * hidden..];
            let gates = Mat::strided(gates, rows, width, stride);
            recurrent.product(self.d_hidden, true, gates);
        }
    }

    /// The cells of one step.
    fn step<C: Cell>(&mut self, geometry: &Geometry, place: usize) {
        let Geometry { length, hidden, .. } = *geometry;
        let (width, stride) = (C::GATES * hidden, C::GRADIENTS * hidden);
        let rows = self.d_hidden.len() / hidden;
        let (tape, first) = (self.tape, self.first * length);
        let index = |place: usize, row: usize| first + place * rows + row;
        vectorized(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let gradients = &mut self.gradients[(place * rows + row) * stride..][..stride];
                    if !geometry.reaches(self.first + row, place) {
                        gradients.fill(T::zero());
                        continue;
                    }
                    let d_hidden = &mut self.d_hidden[row * hidden..][..hidden];
                    if let Some(y) = self.outputs {
                        let given = &y.values[y.range(first + row * length + place, hidden)];
                        d_hidden.iter_mut().zip(given).for_each(|(sum, given)| *sum += *given);
                    }
                    let at = index(place, row);
                    let before = match geometry.previous(place) {
                        Some(place) => &tape.memory[index(place, row) * hidden..][..hidden],
                        None => &tape.first_memory[(self.first + row) * hidden..][..hidden],
                    };
                    C::backward(Backward {
                        gates: &tape.gates[at * width..][..width],
                        hidden: &tape.hidden[at * hidden..][..hidden],
                        memory: [before, &tape.memory[at * hidden..][..hidden]],
                        gradients,
                        d_hidden,
                        d_memory: &mut self.d_memory[row * hidden..][..hidden],
                    });
                }
            },
        )
    }
}
