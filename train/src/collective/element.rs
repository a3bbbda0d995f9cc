//! The numbers that are reduced.

use half::{bf16, f16};
use pulp::NullaryFnOnce;
use std::ops::Range;

/// What can be reduced: `f32`, `f64`, `bf16` and `f16`. Sealed: shared memory relies on every bit
/// pattern being a value.
pub trait Element: sealed::Number {}

impl<T: sealed::Number> Element for T {}

/// How the values of the ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// Their sum divided by the number of ranks.
    Mean,
    /// The largest; NaN where one is NaN.
    Max,
}

/// Values of any type that can be reduced, in place.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Values<'a> {
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
    Bf16(&'a mut [bf16]),
    F16(&'a mut [f16]),
}

pub(super) mod sealed {
    use super::{ReduceOp, Values};

    /// A plain number without padding, for which every bit pattern is a value.
    pub trait Number: bytemuck::Pod + Default + Send + Sync {
        /// What is added up; rounded once at the end.
        type Sum: Number<Sum = Self::Sum>;
        /// What sums may be rounded to on their way between hosts.
        type Wire: Number<Sum = Self::Sum>;
        /// Below 4, and of no other type.
        const KIND: u64;
        fn widen(self) -> Self::Sum;
        fn narrow(sum: Self::Sum) -> Self;
        fn combine(op: ReduceOp, a: Self::Sum, b: Self::Sum) -> Self::Sum;
        fn divide(sum: Self::Sum, ranks: usize) -> Self::Sum;
        fn values(values: &mut [Self]) -> Values<'_>;
    }
}

macro_rules! number {
    ($type:ty, $sum:ty, $wire:ty, $kind:literal, $values:ident, $widen:expr, $narrow:expr) => {
        impl sealed::Number for $type {
            type Sum = $sum;
            type Wire = $wire;
            const KIND: u64 = $kind;

            #[inline(always)]
            fn widen(self) -> $sum {
                $widen(self)
            }

            #[inline(always)]
            fn narrow(sum: $sum) -> Self {
                $narrow(sum)
            }

            #[inline(always)]
            fn combine(op: ReduceOp, a: $sum, b: $sum) -> $sum {
                match op {
                    ReduceOp::Sum | ReduceOp::Mean => a + b,
                    ReduceOp::Max if a > b || a.is_nan() => a,
                    ReduceOp::Max => b,
                }
            }

            #[inline(always)]
            fn divide(sum: $sum, ranks: usize) -> $sum {
                sum / ranks as $sum
            }

            fn values(values: &mut [Self]) -> Values<'_> {
                Values::$values(values)
            }
        }
    };
}

number!(f32, f32, bf16, 0, F32, |x| x, |x| x);
number!(f64, f64, f64, 1, F64, |x| x, |x| x);
number!(bf16, f32, bf16, 2, Bf16, bf16::to_f32, to_bf16);
number!(f16, f32, f16, 3, F16, f16::to_f32, f16::from_f32);

/// As `bf16::from_f32`, but without branches, so that it becomes vector code.
#[inline(always)]
fn to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    // Halves go to the even one.
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
}

/// Elements that are reduced together: their sums stay in the nearest cache.
const BLOCK: usize = 1024;

/// Reduces the values of all ranks into those of rank `me`, and tells `wrote` each piece of the
/// result with its place. The order is that of a tree: the ranks of its lower half, a power of two,
/// those of the upper half, then both.
pub(super) fn reduce<'a, T: Element>(
    op: ReduceOp,
    values: &mut [T],
    (me, world): (usize, usize),
    others: impl Fn(usize) -> &'a [T],
    mut wrote: impl FnMut(usize, &[T]),
) {
    let arch = pulp::Arch::new();
    let mut sums = [T::Sum::default(); BLOCK];
    // Up to three ranks need no more.
    let mut more = vec![T::Sum::default(); world.max(1).ilog2().saturating_sub(1) as usize * BLOCK];
    for (at, values) in values.chunks_mut(BLOCK).enumerate() {
        let (first, sums) = (at * BLOCK, &mut sums[..values.len()]);
        let given = |rank: usize| match rank == me {
            true => &*values,
            false => &others(rank)[first..first + values.len()],
        };
        add_up(op, 0..world, &given, sums, &mut more);
        arch.dispatch(Round { op, world, sums, values });
        wrote(first, values);
    }
}

/// A branch of the tree. `more` is for the branches within.
fn add_up<'a, T: Element>(
    op: ReduceOp,
    ranks: Range<usize>,
    given: &impl Fn(usize) -> &'a [T],
    sums: &mut [T::Sum],
    more: &mut [T::Sum],
) {
    let (arch, first) = (pulp::Arch::new(), ranks.start);
    if ranks.len() <= 1 {
        return arch.dispatch(Add { op, is_first: true, sums, values: given(first) });
    }
    let middle = first + ranks.len().next_power_of_two() / 2;
    add_up(op, first..middle, given, sums, more);
    if middle + 1 == ranks.end {
        return arch.dispatch(Add { op, is_first: false, sums, values: given(middle) });
    }
    let (upper, more) = more.split_at_mut(BLOCK);
    let upper = &mut upper[..sums.len()];
    add_up(op, middle..ranks.end, given, upper, more);
    arch.dispatch(Add::<T::Sum> { op, is_first: false, sums, values: upper });
}

/// Vector code for the processor that it is dispatched to, and so inlined.
struct Add<'a, T: Element> {
    op: ReduceOp,
    is_first: bool,
    sums: &'a mut [T::Sum],
    values: &'a [T],
}

impl<T: Element> NullaryFnOnce for Add<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let pairs = self.sums.iter_mut().zip(self.values);
        match (self.is_first, self.op) {
            (true, _) => pairs.for_each(|(sum, value)| *sum = value.widen()),
            (false, ReduceOp::Max) => {
                pairs
                    .for_each(|(sum, value)| *sum = T::combine(ReduceOp::Max, *sum, value.widen()));
            }
            (false, _) => {
                pairs
                    .for_each(|(sum, value)| *sum = T::combine(ReduceOp::Sum, *sum, value.widen()));
            }
        }
    }
}

struct Round<'a, T: Element> {
    op: ReduceOp,
    world: usize,
    sums: &'a [T::Sum],
    values: &'a mut [T],
}

impl<T: Element> NullaryFnOnce for Round<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let pairs = self.values.iter_mut().zip(self.sums);
        match self.op {
            ReduceOp::Mean => {
                pairs.for_each(|(to, sum)| *to = T::narrow(T::divide(*sum, self.world)));
            }
            _ => pairs.for_each(|(to, sum)| *to = T::narrow(*sum)),
        }
    }
}

/// Rounds sums to what travels.
pub(super) fn narrow<T: Element>(sums: &[T::Sum], values: &mut [T]) {
    pulp::Arch::new().dispatch(Round { op: ReduceOp::Sum, world: 1, sums, values });
}

/// Makes of sums what is left of them when they have travelled.
pub(super) fn round<T: Element>(sums: &mut [T::Sum]) {
    pulp::Arch::new().dispatch(There::<T>(sums));
}

struct There<'a, T: Element>(&'a mut [T::Sum]);

impl<T: Element> NullaryFnOnce for There<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.0.iter_mut().for_each(|sum| *sum = T::narrow(*sum).widen());
    }
}

/// Makes means of sums over so many ranks.
pub(super) fn divide<T: Element>(values: &mut [T], ranks: usize) {
    values.iter_mut().for_each(|value| *value = T::narrow(T::divide(value.widen(), ranks)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_to_bf16_as_half_does() {
        let numbers = (0..=u16::MAX).flat_map(|high| {
            [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|low| u32::from(high) << 16 | low)
        });
        for number in numbers.map(f32::from_bits) {
            assert_eq!(to_bf16(number).to_bits(), bf16::from_f32(number).to_bits(), "{number:e}");
        }
    }
}
