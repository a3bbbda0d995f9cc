//! What becomes of one row in one step, once the matrix products are there.
//!
//! Short loops over a few slices each: the compiler vectorises them, and a row stays in the cache.

use crate::kernels::Real;

/// A kind of cell. Its gates lie one behind the other, as in PyTorch's weights.
pub(super) trait Cell: 'static {
    /// How many gates there are.
    const GATES: usize;
    /// Gradients per hidden unit: first those of the gates as the input sees them.
    const GRADIENTS: usize;
    /// Where among them those of the gates begin as the hidden state sees them.
    const RECURRENT: usize;
    /// The memory is part of the state, not just kept for the backward pass.
    const HAS_MEMORY: bool;

    /// Computes the next state.
    fn forward<T: Real>(row: Forward<'_, T>);

    /// Turns the gradient of the state after the step into those of the gates, and of the state
    /// before it but for what goes through the gates.
    fn backward<T: Real>(row: Backward<'_, T>);
}

/// One row of one step.
pub(super) struct Forward<'a, T> {
    /// What the input gives each gate; becomes the gates.
    pub(super) gates: &'a mut [T],
    /// What the hidden state gives each gate.
    pub(super) recurrent: &'a [T],
    /// To be added to either.
    pub(super) biases: [&'a [T]; 2],
    /// The state before the step; becomes the one after it.
    pub(super) hidden: &'a mut [T],
    pub(super) memory: &'a mut [T],
}

/// The same row on the way back.
pub(super) struct Backward<'a, T> {
    pub(super) gates: &'a [T],
    /// The hidden state before the step.
    pub(super) hidden: &'a [T],
    /// The memory before and after it.
    pub(super) memory: [&'a [T]; 2],
    /// Becomes the gradients of the gates.
    pub(super) gradients: &'a mut [T],
    /// Gradients of the state: after the step, then before it.
    pub(super) d_hidden: &'a mut [T],
    pub(super) d_memory: &'a mut [T],
}

/// Hochreiter and Schmidhuber: *Long Short-Term Memory* (1997), with the forget gate of Gers,
/// Schmidhuber and Cummins (2000). Gates: input, forget, candidate, output.
pub(super) struct LstmCell;

impl Cell for LstmCell {
    const GATES: usize = 4;
    const GRADIENTS: usize = 4;
    const RECURRENT: usize = 0;
    const HAS_MEMORY: bool = true;

    #[inline(always)]
    fn forward<T: Real>(row: Forward<'_, T>) {
        let width = row.hidden.len();
        let [i, f, g, o] = parts_mut(row.gates, width);
        let recurrent = parts::<4, T>(row.recurrent, width);
        let biases = row.biases.map(|bias| parts::<4, T>(bias, width));
        let sum = |x: T, [h, b, c]: [T; 3]| (x + b) + (h + c);
        let inputs = |gate: usize| [recurrent[gate], biases[0][gate], biases[1][gate]];
        each(i, inputs(0), |x, others| sum(x, others).sigmoid());
        each(f, inputs(1), |x, others| sum(x, others).sigmoid());
        each(g, inputs(2), |x, others| sum(x, others).tanh());
        each(o, inputs(3), |x, others| sum(x, others).sigmoid());
        each(row.memory, [i, f, g], |c, [i, f, g]| f.mul_add(c, i * g));
        each(row.hidden, [o, row.memory], |_, [o, c]| o * c.tanh());
    }

    #[inline(always)]
    fn backward<T: Real>(row: Backward<'_, T>) {
        let width = row.d_hidden.len();
        let [i, f, g, o] = parts(row.gates, width);
        let [di, df, dg, d_o] = parts_mut(row.gradients, width);
        let (dh, dc) = (row.d_hidden, row.d_memory);
        each(d_o, [row.memory[1]], |_, [c]| c.tanh());
        each(dc, [dh, o, d_o], |dc, [dh, o, tanh]| dc + dh * o * (T::one() - tanh * tanh));
        each(d_o, [dh, o], |tanh, [dh, o]| dh * tanh * sigmoid_slope(o));
        each(di, [dc, i, g], |_, [dc, i, g]| dc * g * sigmoid_slope(i));
        each(df, [dc, f, row.memory[0]], |_, [dc, f, c]| dc * c * sigmoid_slope(f));
        each(dg, [dc, i, g], |_, [dc, i, g]| dc * i * (T::one() - g * g));
        each(dc, [f], |dc, [f]| dc * f);
        dh.fill(T::zero());
    }
}

/// Cho et al.: *Learning Phrase Representations using RNN Encoder-Decoder* (2014), with the reset
/// after the product. Gates: reset, update, candidate. Its memory is what the hidden state gives
/// the candidate before the reset.
pub(super) struct GruCell;

impl Cell for GruCell {
    const GATES: usize = 3;
    const GRADIENTS: usize = 6;
    const RECURRENT: usize = 3;
    const HAS_MEMORY: bool = false;

    #[inline(always)]
    fn forward<T: Real>(row: Forward<'_, T>) {
        let width = row.hidden.len();
        let [r, z, n] = parts_mut(row.gates, width);
        let recurrent = parts::<3, T>(row.recurrent, width);
        let [input, hidden] = row.biases.map(|bias| parts::<3, T>(bias, width));
        let sum = |x: T, [h, b, c]: [T; 3]| (x + b) + (h + c);
        each(r, [recurrent[0], input[0], hidden[0]], |x, others| sum(x, others).sigmoid());
        each(z, [recurrent[1], input[1], hidden[1]], |x, others| sum(x, others).sigmoid());
        each(row.memory, [recurrent[2], hidden[2]], |_, [h, c]| h + c);
        each(n, [input[2], r, row.memory], |x, [b, r, m]| r.mul_add(m, x + b).tanh());
        each(row.hidden, [n, z], |h, [n, z]| z.mul_add(h - n, n));
    }

    #[inline(always)]
    fn backward<T: Real>(row: Backward<'_, T>) {
        let width = row.d_hidden.len();
        let [r, z, n] = parts(row.gates, width);
        let [dr, dz, dn, recurrent_r, recurrent_z, recurrent_n] = parts_mut(row.gradients, width);
        let dh = row.d_hidden;
        each(dn, [dh, z, n], |_, [dh, z, n]| dh * (T::one() - z) * (T::one() - n * n));
        each(dr, [dn, r, row.memory[1]], |_, [dn, r, m]| dn * m * sigmoid_slope(r));
        each(dz, [dh, n, row.hidden], |_, [dh, n, h]| dh * (h - n));
        each(dz, [z], |dz, [z]| dz * sigmoid_slope(z));
        recurrent_r.copy_from_slice(dr);
        recurrent_z.copy_from_slice(dz);
        each(recurrent_n, [dn, r], |_, [dn, r]| dn * r);
        each(dh, [z], |dh, [z]| dh * z);
    }
}

/// The slope where the sigmoid has the value `y`.
#[inline(always)]
fn sigmoid_slope<T: Real>(y: T) -> T {
    y * (T::one() - y)
}

/// Sets each element of `out` to `f` of itself and of those at its place in `inputs`.
#[inline(always)]
fn each<T: Real, const N: usize>(out: &mut [T], inputs: [&[T]; N], f: impl Fn(T, [T; N]) -> T) {
    let inputs = inputs.map(|input| &input[..out.len()]);
    for (at, out) in out.iter_mut().enumerate() {
        *out = f(*out, inputs.map(|input| input[at]));
    }
}

#[inline(always)]
fn parts<const N: usize, T>(whole: &[T], width: usize) -> [&[T]; N] {
    std::array::from_fn(|part| &whole[part * width..][..width])
}

#[inline(always)]
fn parts_mut<const N: usize, T>(whole: &mut [T], width: usize) -> [&mut [T]; N] {
    let mut parts = whole.chunks_exact_mut(width);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}
