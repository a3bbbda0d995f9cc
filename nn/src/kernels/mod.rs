//! What the CPU operations are made of. The only module of this crate with `unsafe` code.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(all(test, unix))]
mod fuzz;
mod gemm;
#[cfg(all(test, unix))]
mod guarded;
mod math;
mod output;
#[cfg(test)]
mod rounding;
mod sums;

#[cfg(test)]
pub(crate) use gemm::is_rounded;
pub(crate) use gemm::{Mat, Out, Packed, Threads, gemm, gemm_add, product, transpose};
pub(crate) use math::Real;
pub(crate) use output::output;
pub(crate) use sums::{add_assign, column_sums, lane_max, lane_sum, put};

/// Runs a loop compiled for the widest vectors that this machine has.
///
/// What `f` calls must be inlined into it, or it is compiled for the narrowest ones.
#[inline(always)]
pub(crate) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    struct Loop<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Loop<F> {
        type Output = R;

        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Loop(f))
}
