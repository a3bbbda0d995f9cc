//! What the numbers of a product are multiplied as.

use super::super::gemm::Mat;
use super::LANES;
use super::pack::{Block, transpose_block};
use super::tile::Kernels;
use std::arch::x86_64::{__m512, __mmask16, _mm512_fmadd_ps, _mm512_maskz_loadu_ps};
use std::ops::Range;

/// How the numbers of both sides lie in slots of 32 bits along the inner dimension: what a lane of
/// a vector has, and what is one step of the inner loop. Slots are moved as `f32` whatever they hold.
pub(in super::super) trait Form: Sized + 'static {
    /// Numbers of a slot.
    const NUMBERS: usize;
    /// By rows and vectors of a tile.
    const KERNELS: Kernels;

    /// `sum + left · right` in every lane.
    ///
    /// # Safety
    ///
    /// The machine must have what the form is available with; so for all others.
    unsafe fn add(sum: __m512, left: __m512, right: __m512) -> __m512;

    /// Calls `f` with a left side in slots, which it prepares, on this thread or on all of the pool.
    unsafe fn with_left<R>(
        a: Mat<'_, f32>,
        is_parallel: bool,
        f: impl FnOnce(Mat<'_, f32>) -> R,
    ) -> R;

    /// Writes a row of slots, of some columns of a right side whose columns are together.
    unsafe fn put_row(b: Mat<'_, f32>, slot: usize, columns: Range<usize>, to: &mut [f32]);

    /// The slots of numbers that follow each other, at most [`LANES`]; zeros in the other lanes.
    unsafe fn load(numbers: &[f32]) -> __m512;

    /// [`transpose_block`] for the machines that have the form.
    unsafe fn transpose(from: Block<'_>, to: &mut [f32], stride: usize, stored: __mmask16);

    /// How many slots so many numbers have.
    fn slots(numbers: usize) -> usize {
        numbers.div_ceil(Self::NUMBERS)
    }

    /// The numbers of some of the slots of `len` numbers.
    fn numbers(slots: Range<usize>, len: usize) -> Range<usize> {
        slots.start * Self::NUMBERS..(slots.end * Self::NUMBERS).min(len)
    }
}

/// The lanes of the first `count` numbers, which are [`LANES`] or more for all.
pub(super) fn first_lanes(count: usize) -> __mmask16 {
    if count >= LANES { !0 } else { ((1u32 << count) - 1) as __mmask16 }
}

/// As they are. Available with AVX-512F.
pub(in super::super) struct Singles;

impl Form for Singles {
    const NUMBERS: usize = 1;
    const KERNELS: Kernels = super::tile::kernels!(super::tile::kernel_of_singles);

    #[inline(always)]
    unsafe fn add(sum: __m512, left: __m512, right: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_fmadd_ps(left, right, sum) }
    }

    unsafe fn with_left<R>(a: Mat<'_, f32>, _: bool, f: impl FnOnce(Mat<'_, f32>) -> R) -> R {
        f(a)
    }

    #[inline(always)]
    unsafe fn put_row(b: Mat<'_, f32>, slot: usize, columns: Range<usize>, to: &mut [f32]) {
        let width = columns.len();
        to[..width].copy_from_slice(&b.row(slot)[columns]);
        to[width..].fill(0.0);
    }

    #[inline(always)]
    unsafe fn load(numbers: &[f32]) -> __m512 {
        // SAFETY: the lanes of the mask are within the numbers; the trait's contract.
        unsafe { _mm512_maskz_loadu_ps(first_lanes(numbers.len()), numbers.as_ptr()) }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn transpose(from: Block<'_>, to: &mut [f32], stride: usize, stored: __mmask16) {
        // SAFETY: this function's contract.
        unsafe { transpose_block::<Self>(from, to, stride, stored) }
    }
}
