//! The numbers that are reduced.

use half::{bf16, f16};

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
        type Sum: Copy + Default;
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
    ($type:ty, $sum:ty, $kind:literal, $values:ident, $widen:expr, $narrow:expr) => {
        impl sealed::Number for $type {
            type Sum = $sum;
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

number!(f32, f32, 0, F32, |x| x, |x| x);
number!(f64, f64, 1, F64, |x| x, |x| x);
number!(bf16, f32, 2, Bf16, bf16::to_f32, bf16::from_f32);
number!(f16, f32, 3, F16, f16::to_f32, f16::from_f32);

/// Elements that are reduced together: their sums stay in the nearest cache.
const BLOCK: usize = 512;

/// Reduces the values of all ranks in their order into those of rank `me`, and tells `wrote` each
/// piece of the result with its place.
pub(super) fn reduce<'a, T: Element>(
    op: ReduceOp,
    values: &mut [T],
    (me, world): (usize, usize),
    others: impl Fn(usize) -> &'a [T],
    mut wrote: impl FnMut(usize, &[T]),
) {
    let mut sums = [T::Sum::default(); BLOCK];
    for (at, values) in values.chunks_mut(BLOCK).enumerate() {
        let (first, sums) = (at * BLOCK, &mut sums[..values.len()]);
        for rank in 0..world {
            let given = match rank == me {
                true => &*values,
                false => &others(rank)[first..first + values.len()],
            };
            add(op, rank == 0, sums, given);
        }
        for (to, sum) in values.iter_mut().zip(sums) {
            *to = T::narrow(if op == ReduceOp::Mean { T::divide(*sum, world) } else { *sum });
        }
        wrote(first, values);
    }
}

/// Makes means of sums over so many ranks.
pub(super) fn divide<T: Element>(values: &mut [T], ranks: usize) {
    values.iter_mut().for_each(|value| *value = T::narrow(T::divide(value.widen(), ranks)));
}

fn add<T: Element>(op: ReduceOp, is_first: bool, sums: &mut [T::Sum], values: &[T]) {
    let pairs = sums.iter_mut().zip(values);
    match (is_first, op) {
        (true, _) => pairs.for_each(|(sum, value)| *sum = value.widen()),
        (false, ReduceOp::Max) => {
            pairs.for_each(|(sum, value)| *sum = T::combine(ReduceOp::Max, *sum, value.widen()));
        }
        (false, _) => {
            pairs.for_each(|(sum, value)| *sum = T::combine(ReduceOp::Sum, *sum, value.widen()));
        }
    }
}
