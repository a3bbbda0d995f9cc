//! One pass over a parameter, its gradient and its state, in place, on all threads, with the widest
//! vectors that the processor has.

use super::element::{Elementwise, Number};
use super::state::ParamState;
use crate::{Error, Result};
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor, Var};
use pulp::NullaryFnOnce;
use rayon::prelude::*;
use std::cell::RefCell;

/// Elements that one thread takes at a time. What is computed over several elements is computed
/// block by block, so its bits do not depend on the number of threads.
pub(super) const CHUNK: usize = 1 << 14;

/// Applies the rule to all elements. Errors when the state is not that of this rule.
pub(super) fn elements<const N: usize>(
    rule: &impl Elementwise<N>,
    values: &mut [f32],
    gradient: &[f32],
    state: &mut ParamState,
) -> Result<()> {
    check_gradient(values, gradient)?;
    let slots = state.tensors([values.len(); N])?;
    let mut slots = slots.each_mut().map(|slot| slot.values.chunks_mut(CHUNK));
    let mut passes = Vec::with_capacity(values.len().div_ceil(CHUNK));
    for (values, gradient) in values.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK)) {
        let state = slots.each_mut().map(|chunks| chunks.next().unwrap_or_default());
        passes.push(Pass { rule, values, gradient, state });
    }
    for_each(passes, |pass| pulp::Arch::new().dispatch(pass));
    Ok(())
}

/// Each value has its gradient.
pub(super) fn check_gradient(values: &[f32], gradient: &[f32]) -> Result<()> {
    let (expected, got) = (values.len(), gradient.len());
    if expected == got { Ok(()) } else { Err(Error::OptimizerModel { expected, got }) }
}

/// On all threads, unless there is only one thing to do.
pub(super) fn for_each<T: Send>(mut work: Vec<T>, run: impl Fn(T) + Sync + Send) {
    match work.len() {
        1 => work.drain(..).for_each(run),
        _ => work.into_par_iter().for_each(run),
    }
}

struct Pass<'a, R, const N: usize> {
    rule: &'a R,
    values: &'a mut [f32],
    gradient: &'a [f32],
    state: [&'a mut [f32]; N],
}

impl<R: Elementwise<N>, const N: usize> NullaryFnOnce for Pass<'_, R, N> {
    type Output = ();

    // Inlined, because only then it is compiled for the processor that it was dispatched to.
    #[inline(always)]
    fn call(self) {
        let len = self.values.len();
        let (values, gradient) = (self.values, &self.gradient[..len]);
        let mut state = self.state.map(|slot| &mut slot[..len]);
        for at in 0..len {
            let before = state.each_ref().map(|slot| slot[at]);
            let (value, after) = self.rule.update(values[at], gradient[at], before);
            values[at] = value;
            for (slot, after) in state.iter_mut().zip(after) {
                slot[at] = after;
            }
        }
    }
}

/// `from + weight · (to − from)`, rounded as PyTorch's `lerp` rounds it.
#[inline(always)]
pub(super) fn lerp(from: f32, to: f32, weight: f32) -> f32 {
    Number::lerp(from, to, weight)
}

/// Of all values. In double precision, and in an order that the number of threads does not change.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    sums_of_squares([(values, true)]).iter().sum()
}

/// Sums of squares, of one block after the other of all pieces, or of a piece that does not count, zeros.
/// In double precision, and of blocks that the number of threads does not change.
pub(super) fn sums_of_squares<'a>(pieces: impl IntoIterator<Item = (&'a [f32], bool)>) -> Vec<f64> {
    let blocks = pieces.into_iter().flat_map(|(piece, counts)| {
        piece.chunks(CHUNK).map(move |block| (if counts { block } else { &[] }, 0.0))
    });
    let mut blocks: Vec<_> = blocks.collect();
    for_each(blocks.iter_mut().collect(), |(block, sum): &mut (&[f32], f64)| {
        *sum = pulp::Arch::new().dispatch(SquareSum(block));
    });
    blocks.into_iter().map(|(_, sum)| sum).collect()
}

/// The sum of squares of one block.
pub(super) struct SquareSum<'a>(pub(super) &'a [f32]);

impl NullaryFnOnce for SquareSum<'_> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        // As many running sums on every processor, so that the order of additions is the same.
        let mut sums = [0.0f64; 16];
        let (blocks, rest) = self.0.as_chunks::<16>();
        for block in blocks {
            for (sum, value) in sums.iter_mut().zip(block) {
                *sum += f64::from(*value) * f64::from(*value);
            }
        }
        let rest: f64 = rest.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
        sums.iter().sum::<f64>() + rest
    }
}

/// Multiplies all values by a factor.
pub(crate) fn scale(values: &mut [f32], factor: f32) {
    if factor == 1.0 {
        return;
    }
    for_each(values.chunks_mut(CHUNK).collect(), |chunk: &mut [f32]| {
        pulp::Arch::new().dispatch(|| chunk.iter_mut().for_each(|value| *value *= factor));
    });
}

/// Adds to each value another one.
pub(crate) fn add(values: &mut [f32], others: &[f32]) {
    let chunks = values.chunks_mut(CHUNK).zip(others.chunks(CHUNK)).collect();
    for_each(chunks, |(values, others): (&mut [f32], &[f32])| {
        let add = |(value, other): (&mut f32, &f32)| *value += *other;
        pulp::Arch::new().dispatch(|| values.iter_mut().zip(others).for_each(add));
    });
}

/// Gives `change` the values of a parameter where candle keeps them, under its write lock.
///
/// Only one at a time, and on the thread that steps: a pool thread may be in the middle of an
/// evaluation, which holds some parameters and waits for others, and would wait for itself. For the
/// same reason an evaluation beside a step must not be a job of the pool that steps: `change` may
/// wait for that pool, and so take up such a job.
pub(crate) fn in_place(var: &Var, change: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    if !var.device().is_cpu() {
        return by_copy(var, change);
    }
    let op = InPlace(RefCell::new((Some(change), Ok(()))));
    var.inplace_op1(&op)?;
    op.0.into_inner().1
}

/// Gives `see` the values of a parameter, wherever it is.
pub(crate) fn read(var: &Var, see: impl FnOnce(&[f32]) -> Result<()>) -> Result<()> {
    match var.device().is_cpu() {
        true => in_place(var, |values| see(values)),
        false => see(&var.as_detached_tensor().flatten_all()?.to_vec1::<f32>()?),
    }
}

/// For a parameter that is not on the CPU: changes a copy, which then replaces its values.
fn by_copy(var: &Var, change: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    let mut values = var.flatten_all()?.to_vec1::<f32>()?;
    change(&mut values)?;
    Ok(var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?)
}

struct InPlace<F>(RefCell<(Option<F>, Result<()>)>);

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "optimizer"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("optimizer: expected f32 parameters")
        };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("optimizer: expected contiguous parameters, got {layout:?}")
        };
        let (change, result) = &mut *self.0.borrow_mut();
        if let Some(change) = change.take() {
            *result = change(&mut values[start..end]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::Simd;

    struct Sqrt;

    impl Elementwise<2> for Sqrt {
        #[inline(always)]
        fn update<X: Number>(&self, p: X, g: X, [m, v]: [X; 2]) -> (X, [X; 2]) {
            let (m, v) = (m.lerp(g.clone(), 0.1), v * 0.999 + g.square() * 0.001);
            (p * 0.99 - m.clone() / (v.clone().sqrt() + 1e-8) * 0.01, [m, v])
        }
    }

    fn numbers(seed: u32) -> Vec<f32> {
        (0..1003u32).map(|at| (at.wrapping_mul(2_654_435_761 + seed) >> 8) as f32 / 9e6).collect()
    }

    /// What other devices do comes to the same, and leaves a parameter as it was after an error.
    #[test]
    fn a_copy_replaces_the_values() {
        let var = || Var::new(&[[1f32, 2.0], [3.0, 4.0]], &candle_core::Device::Cpu).expect("var");
        let double = |values: &mut [f32]| {
            values.iter_mut().for_each(|value| *value *= 2.0);
            Ok(())
        };
        let (here, elsewhere) = (var(), var());
        in_place(&here, double).expect("in place");
        by_copy(&elsewhere, double).expect("by copy");
        let values = |var: &Var| var.to_vec2::<f32>().expect("values");
        assert_eq!(values(&here), [[2.0, 4.0], [6.0, 8.0]]);
        assert_eq!(values(&here), values(&elsewhere));
        let failed = by_copy(&elsewhere, |values| check_gradient(values, &[]));
        assert!(failed.is_err() && values(&here) == values(&elsewhere));
    }

    /// No instruction set fuses a product with a sum, or adds in another order.
    #[test]
    fn bits_do_not_depend_on_the_vector_unit() {
        let run = |wide: bool| {
            let (mut p, g, mut m, mut v) = (numbers(1), numbers(2), numbers(3), numbers(4));
            let state = [m.as_mut_slice(), v.as_mut_slice()];
            let pass = Pass { rule: &Sqrt, values: &mut p, gradient: &g, state };
            let sum = match wide {
                true => {
                    pulp::Arch::new().dispatch(pass);
                    pulp::Arch::new().dispatch(SquareSum(&g))
                }
                false => {
                    pulp::Scalar.vectorize(pass);
                    pulp::Scalar.vectorize(SquareSum(&g))
                }
            };
            (p, m, v, sum)
        };
        assert_eq!(run(true), run(false));
    }
}
