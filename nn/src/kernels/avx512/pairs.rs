//! Products of numbers that are rounded to `bf16`, two at a time.

use super::super::gemm::Mat;
use super::form::{Form, first_lanes};
use super::pack::{Block, transpose_block};
use super::tile::Kernels;
use super::{LANES, run};
use std::arch::x86_64::{
    __m512, __m512bh, __m512i, __mmask16, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh,
    _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_permutexvar_epi16,
};
use std::cell::Cell;
use std::mem::transmute;
use std::ops::Range;

/// Numbers that are worth a task of their own to round.
const TASK: usize = 1 << 14;

/// Halves of slots, each time one of the first vector, then one of the second.
static TURNS: [u16; 2 * LANES] = {
    let (mut turns, mut at) = ([0; 2 * LANES], 0);
    while at < turns.len() {
        turns[at] = (at / 2 + at % 2 * LANES) as u16;
        at += 1;
    }
    turns
};

thread_local! {
    static LEFT: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Two numbers that follow each other, rounded to the nearest `bf16`, to the even one of two. The
/// first one is in the lower half. Their products are summed in `f32`. Denormal numbers are zeros.
///
/// Available with AVX-512F, AVX-512BW and AVX-512 BF16.
pub(in super::super) struct Pairs;

impl Form for Pairs {
    const NUMBERS: usize = 2;
    const KERNELS: Kernels = super::tile::kernels!(super::tile::kernel_of_pairs);

    #[inline(always)]
    unsafe fn add(sum: __m512, left: __m512, right: __m512) -> __m512 {
        // SAFETY: the trait's contract; vectors of the same size, valid whatever their bits.
        unsafe {
            let [left, right] = transmute::<[__m512; 2], [__m512bh; 2]>([left, right]);
            _mm512_dpbf16_ps(sum, left, right)
        }
    }

    unsafe fn with_left<R>(
        a: Mat<'_, f32>,
        is_parallel: bool,
        f: impl FnOnce(Mat<'_, f32>) -> R,
    ) -> R {
        let ((rows, depth), is_along) = (a.shape(), a.strides().1 == 1);
        let slots = Self::slots(depth);
        let (lines, len) = if is_along { (rows, slots) } else { (slots, rows) };
        // Away from powers of two, by which lines of a matrix would share few places of a cache.
        let stride = len.next_multiple_of(LANES) + LANES;
        // Taken out while it is used, for a thread that waits for others may compute another product.
        let mut buffer = LEFT.take();
        if buffer.len() < lines * stride {
            buffer.resize(lines * stride, 0.0);
        }
        let (at_once, to) = ((TASK / len.max(1)).max(1), Lines(buffer.as_mut_ptr()));
        let tasks = if len > 0 { lines.div_ceil(at_once) } else { 0 };
        run(tasks, is_parallel, |task| {
            for line in task * at_once..((task + 1) * at_once).min(lines) {
                // SAFETY: lines of the buffer, of which each is this task's alone.
                let to = unsafe { to.line(line * stride, len) };
                if is_along {
                    // SAFETY: this function's contract.
                    unsafe { pair_along(a.row(line), to) };
                } else {
                    let (first, second) = rows_of(a.t(), line, 0..rows);
                    // SAFETY: this function's contract.
                    unsafe { pair_across(first, second, to) };
                }
            }
        });
        let view = Mat::strided(&buffer, lines, len, stride);
        let result = f(if is_along { view } else { view.t() });
        LEFT.set(buffer);
        result
    }

    unsafe fn put_row(b: Mat<'_, f32>, slot: usize, columns: Range<usize>, to: &mut [f32]) {
        let (width, (first, second)) = (columns.len(), rows_of(b, slot, columns));
        // SAFETY: this function's contract.
        unsafe { pair_across(first, second, &mut to[..width]) };
        to[width..].fill(0.0);
    }

    #[inline(always)]
    unsafe fn load(numbers: &[f32]) -> __m512 {
        let rest = numbers.len().saturating_sub(LANES);
        // SAFETY: the lanes of the masks are within the numbers; the trait's contract.
        unsafe {
            let low = _mm512_maskz_loadu_ps(first_lanes(numbers.len()), numbers.as_ptr());
            let high =
                _mm512_maskz_loadu_ps(first_lanes(rest), numbers.as_ptr().wrapping_add(LANES));
            transmute(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn transpose(from: Block<'_>, to: &mut [f32], stride: usize, stored: __mmask16) {
        // SAFETY: this function's contract.
        unsafe { transpose_block::<Self>(from, to, stride, stored) }
    }
}

/// Where lines of slots go.
#[derive(Clone, Copy)]
struct Lines(*mut f32);

// SAFETY: tasks write lines that do not overlap, of a buffer that outlives them.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

impl Lines {
    /// # Safety
    ///
    /// They must be within the buffer, and nobody else's.
    unsafe fn line<'a>(self, start: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// Some columns of the two rows of a slot; of the second none, if it is not there.
fn rows_of(b: Mat<'_, f32>, slot: usize, columns: Range<usize>) -> (&[f32], &[f32]) {
    let second = if 2 * slot + 1 < b.shape().0 { b.row(2 * slot + 1) } else { &[] };
    (&b.row(2 * slot)[columns.clone()], second.get(columns).unwrap_or_default())
}

/// Writes the pairs of neighbours in a row.
///
/// # Safety
///
/// `to` must have half as many places, rounded up, and the machine what [`Pairs`] needs.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pair_along(row: &[f32], to: &mut [f32]) {
    for (numbers, to) in row.chunks(2 * LANES).zip(to.chunks_mut(LANES)) {
        // SAFETY: as many numbers as a chunk has; the lanes of the mask are within `to`.
        unsafe {
            let slots = Pairs::load(numbers);
            _mm512_mask_storeu_ps(to.as_mut_ptr(), first_lanes(to.len()), slots);
        }
    }
}

/// Writes the pairs of what is at the same place of two rows; the second is empty for zeros.
///
/// # Safety
///
/// `to` must have a place for each number of the first row, the second one be as long or empty, and
/// the machine have what [`Pairs`] needs.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pair_across(first: &[f32], second: &[f32], to: &mut [f32]) {
    // SAFETY: a vector's size.
    let turns: __m512i = unsafe { _mm512_loadu_si512(TURNS.as_ptr().cast()) };
    let (first, to, is_alone) = (first.as_ptr(), to, second.is_empty());
    for at in (0..to.len()).step_by(LANES) {
        let lanes = first_lanes(to.len() - at);
        // SAFETY: the lanes of the masks are within the rows and `to`; vectors of the same size.
        unsafe {
            let low = _mm512_maskz_loadu_ps(lanes, first.add(at));
            let others = if is_alone { 0 } else { lanes };
            let high = _mm512_maskz_loadu_ps(others, second.as_ptr().wrapping_add(at));
            let halves: __m512i = transmute(_mm512_cvtne2ps_pbh(high, low));
            let slots = _mm512_castsi512_ps(_mm512_permutexvar_epi16(turns, halves));
            _mm512_mask_storeu_ps(to.as_mut_ptr().add(at), lanes, slots);
        }
    }
}
