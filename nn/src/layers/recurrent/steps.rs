//! One direction of one layer, from step to step. Everything here is time-major: steps, rows,
//! features, so that the rows of a step lie together.

use super::cell::{Backward, Cell, Forward};
use crate::cpu::TASK_ELEMENTS;
use crate::kernels::{Mat, Real, Threads, gemm, gemm_add, output, vectorized};
use rayon::prelude::*;
use std::sync::Arc;

/// Sizes, and in which order the steps are taken.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    pub(super) rows: usize,
    pub(super) length: usize,
    pub(super) inputs: usize,
    pub(super) hidden: usize,
    pub(super) is_reverse: bool,
    /// How many steps each row has; all of them without.
    pub(super) lengths: Option<Arc<[usize]>>,
}

impl Geometry {
    /// The places of the steps in the sequence, in the order in which they are taken.
    fn places(&self) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let (length, is_reverse) = (self.length, self.is_reverse);
        (0..length).map(move |step| if is_reverse { length - 1 - step } else { step })
    }

    /// Which of the `length + 1` states is the one before the step at `place`.
    fn before(&self, place: usize) -> usize {
        place + usize::from(self.is_reverse)
    }

    pub(super) fn after(&self, place: usize) -> usize {
        place + usize::from(!self.is_reverse)
    }

    fn first(&self) -> usize {
        if self.is_reverse { self.length } else { 0 }
    }

    pub(super) fn last(&self) -> usize {
        self.length - self.first()
    }

    /// Whether the row's sequence reaches to `place`. Beyond its end its state stays as it is.
    #[inline(always)]
    pub(super) fn reaches(&self, row: usize, place: usize) -> bool {
        self.lengths.as_ref().is_none_or(|lengths| place < lengths[row])
    }

    /// Rows of one task, if each has `width` numbers to be computed.
    fn task(&self, width: usize) -> usize {
        (TASK_ELEMENTS / width).max(1)
    }
}

/// States of all rows: `length + 1` of them, or the last two.
pub(super) struct States<T> {
    values: Vec<T>,
    /// Elements of one.
    size: usize,
    count: usize,
}

impl<T: Real> States<T> {
    fn new(geometry: &Geometry, keeps_all: bool, initial: Option<&[T]>) -> Self {
        let size = geometry.rows * geometry.hidden;
        let count = if keeps_all { geometry.length + 1 } else { 2 };
        let mut states = Self { values: vec![T::zero(); count * size], size, count };
        if let Some(initial) = initial {
            let start = geometry.first() % count * size;
            states.values[start..][..size].copy_from_slice(initial);
        }
        states
    }

    pub(super) fn get(&self, index: usize) -> &[T] {
        &self.values[index % self.count * self.size..][..self.size]
    }

    /// One to read and another one to write.
    fn pair(&mut self, from: usize, to: usize) -> (&[T], &mut [T]) {
        let (from, to, size) = (from % self.count, to % self.count, self.size);
        let (low, high) = self.values.split_at_mut(from.max(to) * size);
        let (low, high) = (&mut low[from.min(to) * size..][..size], &mut high[..size]);
        if from < to { (low, high) } else { (high, low) }
    }

    /// Those before each step, in the order of their places.
    pub(super) fn before_all(&self, geometry: &Geometry) -> &[T] {
        &self.values[geometry.before(0) * self.size..][..geometry.length * self.size]
    }
}

/// What the forward pass leaves.
pub(super) struct Tape<T> {
    gates: Vec<T>,
    pub(super) hidden: States<T>,
    pub(super) memory: States<T>,
}

/// Weights of the input and of the hidden state, their biases.
pub(super) type Weights<'a, T> = [&'a [T]; 4];

/// Of what the states are kept: for the outputs, and for the backward pass.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    pub(super) hidden: bool,
    pub(super) all: bool,
}

/// Takes all steps over `x [length, rows, inputs]`.
pub(super) fn forward<C: Cell, T: Real>(
    geometry: &Geometry,
    x: &[T],
    [input, recurrent, biases @ ..]: Weights<'_, T>,
    initial: [Option<&[T]>; 2],
    kept: Kept,
) -> Tape<T> {
    let Geometry { rows, length, inputs, hidden, .. } = *geometry;
    let width = C::GATES * hidden;
    let x = Mat::new(x, length * rows, inputs);
    let input = Mat::new(input, width, inputs).t();
    let recurrent = Mat::new(recurrent, width, hidden).t();
    let gates = output(length * rows * width, |gates| {
        gemm(gates, T::one(), x, input, Threads::All);
    });
    let mut tape = Tape {
        gates,
        hidden: States::new(geometry, kept.all || kept.hidden, initial[0]),
        memory: States::new(geometry, kept.all, initial[1]),
    };
    let mut product = vec![T::zero(); rows * width];
    for place in geometry.places() {
        let before = Mat::new(tape.hidden.get(geometry.before(place)), rows, hidden);
        gemm(&mut product, T::one(), before, recurrent, Threads::All);
        step::<C, T>(geometry, place, &mut tape, &product, biases);
    }
    tape
}

/// The cells of one step.
fn step<C: Cell, T: Real>(
    geometry: &Geometry,
    place: usize,
    tape: &mut Tape<T>,
    product: &[T],
    biases: [&[T]; 2],
) {
    let (hidden, width) = (geometry.hidden, C::GATES * geometry.hidden);
    let task = geometry.task(width);
    let (from, to) = (geometry.before(place), geometry.after(place));
    let gates = &mut tape.gates[place * product.len()..][..product.len()];
    let (h, next_h) = tape.hidden.pair(from, to);
    let (m, next_m) = tape.memory.pair(from, to);
    let tasks = gates.par_chunks_mut(task * width).zip(product.par_chunks(task * width));
    let tasks = tasks.zip(h.par_chunks(task * hidden)).zip(m.par_chunks(task * hidden));
    let tasks = tasks.zip(next_h.par_chunks_mut(task * hidden));
    let tasks = tasks.zip(next_m.par_chunks_mut(task * hidden)).enumerate();
    tasks.for_each(|(index, (((((gates, product), h), m), next_h), next_m))| {
        vectorized(
            #[inline(always)]
            || {
                let rows = gates.chunks_exact_mut(width).zip(product.chunks_exact(width));
                let rows = rows.zip(h.chunks_exact(hidden)).zip(m.chunks_exact(hidden));
                let rows = rows.zip(next_h.chunks_exact_mut(hidden));
                let rows = rows.zip(next_m.chunks_exact_mut(hidden)).enumerate();
                for (row, (((((gates, recurrent), h), m), next_h), next_m)) in rows {
                    if geometry.reaches(index * task + row, place) {
                        let (before, hidden, memory) = ([h, m], next_h, next_m);
                        C::forward(Forward { gates, recurrent, biases, before, hidden, memory });
                    } else {
                        next_h.copy_from_slice(h);
                        next_m.copy_from_slice(m);
                    }
                }
            },
        )
    });
}

/// The gradients that come to a direction: of its outputs, of its final hidden state and memory.
pub(super) struct Given<'a, T> {
    pub(super) outputs: Option<Strips<'a, T>>,
    pub(super) hidden: Option<&'a [T]>,
    pub(super) memory: Option<&'a [T]>,
}

/// A direction's part of the outputs `[rows, length, stride]`.
#[derive(Clone, Copy)]
pub(super) struct Strips<'a, T> {
    pub(super) values: &'a [T],
    pub(super) stride: usize,
    pub(super) start: usize,
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
    given: Given<'_, T>,
) -> Gradients<T> {
    let Geometry { rows, length, hidden, .. } = *geometry;
    let (width, stride) = (C::GATES * hidden, C::GRADIENTS * hidden);
    let recurrent = Mat::new(recurrent, width, hidden);
    let start = |given: Option<&[T]>| match given {
        Some(given) => given.to_vec(),
        None => vec![T::zero(); rows * hidden],
    };
    let (mut d_hidden, mut d_memory) = (start(given.hidden), start(given.memory));
    let gates = output(length * rows * stride, |gradients| {
        for place in geometry.places().rev() {
            let gradients = &mut gradients[place * rows * stride..][..rows * stride];
            let d_state = [&mut d_hidden[..], &mut d_memory[..]];
            step_back::<C, T>(geometry, place, tape, given.outputs, gradients, d_state);
            if rows > 0 {
                let gradients = &gradients[C::RECURRENT * hidden..];
                let gradients = Mat::strided(gradients, rows, width, stride);
                gemm_add(&mut d_hidden, gradients, recurrent, Threads::All);
            }
        }
    });
    Gradients { gates, hidden: d_hidden, memory: d_memory }
}

/// The cells of one step, on the way back.
fn step_back<C: Cell, T: Real>(
    geometry: &Geometry,
    place: usize,
    tape: &Tape<T>,
    outputs: Option<Strips<'_, T>>,
    gradients: &mut [T],
    [d_hidden, d_memory]: [&mut [T]; 2],
) {
    let Geometry { rows, length, hidden, .. } = *geometry;
    let (width, stride) = (C::GATES * hidden, C::GRADIENTS * hidden);
    let task = geometry.task(stride);
    let (from, to) = (geometry.before(place), geometry.after(place));
    let gates = &tape.gates[place * rows * width..][..rows * width];
    let (h, m, next_m) = (tape.hidden.get(from), tape.memory.get(from), tape.memory.get(to));
    let of = |row: usize| row * hidden..(row + 1) * hidden;
    let tasks = gradients.par_chunks_mut(task * stride).zip(d_hidden.par_chunks_mut(task * hidden));
    let tasks = tasks.zip(d_memory.par_chunks_mut(task * hidden)).enumerate();
    tasks.for_each(|(index, ((gradients, d_hidden), d_memory))| {
        vectorized(
            #[inline(always)]
            || {
                let rows = gradients.chunks_exact_mut(stride);
                let rows = rows.zip(d_hidden.chunks_exact_mut(hidden));
                let rows = rows.zip(d_memory.chunks_exact_mut(hidden)).enumerate();
                for (row, ((gradients, d_hidden), d_memory)) in rows {
                    let row = index * task + row;
                    if !geometry.reaches(row, place) {
                        gradients.fill(T::zero());
                        continue;
                    }
                    if let Some(Strips { values, stride, start }) = outputs {
                        let given = &values[(row * length + place) * stride + start..][..hidden];
                        d_hidden.iter_mut().zip(given).for_each(|(sum, given)| *sum += *given);
                    }
                    C::backward(Backward {
                        gates: &gates[row * width..][..width],
                        before: [&h[of(row)], &m[of(row)]],
                        memory: &next_m[of(row)],
                        gradients,
                        d_hidden,
                        d_memory,
                    });
                }
            },
        )
    });
}

/// `[outer, inner, width]` to `[inner, outer, width]`.
pub(super) fn swap<T: Real>(x: &[T], outer: usize, inner: usize, width: usize) -> Vec<T> {
    output(x.len(), |out: &mut [T]| {
        let blocks = out.par_chunks_mut((outer * width).max(1)).enumerate();
        blocks.for_each(|(at, block)| {
            for (row, to) in block.chunks_exact_mut(width.max(1)).enumerate() {
                to.copy_from_slice(&x[(row * inner + at) * width..][..width]);
            }
        });
    })
}
