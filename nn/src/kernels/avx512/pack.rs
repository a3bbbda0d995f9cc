//! Right sides in panels, and transposes.

use super::super::gemm::Mat;
use super::form::{Form, Singles, first_lanes};
use super::{LANES, WIDTH};
use std::arch::x86_64::{
    __m512, __mmask16, _mm512_castpd_ps, _mm512_castps_pd, _mm512_mask_storeu_ps,
    _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_unpackhi_pd, _mm512_unpackhi_ps,
    _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::ops::Range;

/// Slots of all panels of a right side.
pub(in super::super) fn packed_len<F: Form>(depth: usize, columns: usize) -> usize {
    columns.div_ceil(WIDTH) * F::slots(depth) * WIDTH
}

/// Writes the panels of `b` one after the other.
///
/// # Safety
///
/// The form must be available.
pub(in super::super) unsafe fn pack_all<F: Form>(b: Mat<'_, f32>, panels: &mut [f32]) {
    let (depth, columns) = b.shape();
    let slots = F::slots(depth);
    for (at, panel) in panels.chunks_exact_mut((slots * WIDTH).max(1)).enumerate() {
        // SAFETY: this function's contract.
        unsafe { pack::<F>(b, 0..slots, at * WIDTH..((at + 1) * WIDTH).min(columns), panel) };
    }
}

/// Copies some columns of some rows of slots, the columns of a row together, up to the next whole
/// vector.
///
/// # Safety
///
/// The form must be available.
pub(super) unsafe fn pack<F: Form>(
    b: Mat<'_, f32>,
    inner: Range<usize>,
    columns: Range<usize>,
    panel: &mut [f32],
) {
    if inner.is_empty() || columns.is_empty() {
        return;
    }
    if b.strides().1 != 1 {
        // SAFETY: this function's contract.
        return unsafe { pack_transposed::<F>(b, inner, columns, panel) };
    }
    for (to, slot) in panel.chunks_exact_mut(WIDTH).zip(inner) {
        // SAFETY: this function's contract.
        unsafe { F::put_row(b, slot, columns.clone(), to) };
    }
}

/// The same where the rows of a column are together: sixteen by sixteen.
///
/// # Safety
///
/// The form must be available.
unsafe fn pack_transposed<F: Form>(
    b: Mat<'_, f32>,
    inner: Range<usize>,
    columns: Range<usize>,
    panel: &mut [f32],
) {
    let b = b.t();
    for (at, column) in columns.clone().step_by(LANES).enumerate() {
        let width = LANES.min(columns.end - column);
        let rows: [&[f32]; LANES] =
            std::array::from_fn(|row| if row < width { b.row(column + row) } else { &[] });
        for first in (0..inner.len()).step_by(LANES) {
            let height = LANES.min(inner.len() - first);
            let slots = inner.start + first..inner.start + first + height;
            let numbers = F::numbers(slots, b.shape().1);
            let to = &mut panel[first * WIDTH + at * LANES..];
            assert!(to.len() >= (height - 1) * WIDTH + LANES, "room in the panel");
            let from = Block { rows: &rows, width, numbers, height };
            // SAFETY: this function's contract; `to` has the rows of the block.
            unsafe { F::transpose(from, to, WIDTH, !0) };
        }
    }
}

/// Writes the columns of `from` as rows of `to`, which are as long as `from` has rows.
///
/// Panics unless both have as many elements.
///
/// # Safety
///
/// AVX-512F must be available.
pub(in super::super) unsafe fn transpose(from: Mat<'_, f32>, to: &mut [f32]) {
    let (rows, columns) = from.shape();
    assert_eq!(to.len(), rows * columns, "room for the transpose");
    for row in (0..rows).step_by(LANES) {
        let width = LANES.min(rows - row);
        let stored = first_lanes(width);
        let block: [&[f32]; LANES] =
            std::array::from_fn(|at| if at < width { from.row(row + at) } else { &[] });
        for first in (0..columns).step_by(LANES) {
            let height = LANES.min(columns - first);
            let to = &mut to[first * rows + row..];
            assert!(to.len() >= (height - 1) * rows + width, "room in the transpose");
            let from = Block { rows: &block, width, numbers: first..first + height, height };
            // SAFETY: `to` has a place for each of `width` rows in each of `height` rows.
            unsafe { Singles::transpose(from, to, rows, stored) };
        }
    }
}

/// Some numbers of up to [`LANES`] rows.
pub(in super::super) struct Block<'a> {
    rows: &'a [&'a [f32]; LANES],
    /// How many rows there are.
    width: usize,
    numbers: Range<usize>,
    /// How many slots those are, at most [`LANES`].
    height: usize,
}

/// Writes the columns of a block as rows of `to`, `stride` apart, and zeros for the rows that there
/// are not; of these, what `stored` says.
///
/// Inlined into functions for what the form needs, and so is all that it calls.
///
/// # Safety
///
/// `to` must have room for `height` rows of what is stored. The form must be available.
#[inline(always)]
pub(super) unsafe fn transpose_block<F: Form>(
    Block { rows, width, numbers, height }: Block<'_>,
    to: &mut [f32],
    stride: usize,
    stored: __mmask16,
) {
    // SAFETY: this function's contract.
    unsafe {
        let mut r = [_mm512_setzero_ps(); LANES];
        for (at, r) in r.iter_mut().enumerate() {
            if at < width {
                *r = F::load(&rows[at][numbers.clone()]);
            }
        }
        // Pairs of numbers, then of pairs, within the four parts of each vector; then whole parts.
        let mut t = r;
        for (at, t) in t.iter_mut().enumerate() {
            let (a, b) = (r[at / 2 * 2], r[at / 2 * 2 + 1]);
            *t = if at % 2 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) };
        }
        for (at, r) in r.iter_mut().enumerate() {
            let (a, b) = (at / 4 * 4 + at % 4 / 2, at / 4 * 4 + at % 4 / 2 + 2);
            let (a, b) = (_mm512_castps_pd(t[a]), _mm512_castps_pd(t[b]));
            *r = _mm512_castpd_ps(match at % 2 {
                0 => _mm512_unpacklo_pd(a, b),
                _ => _mm512_unpackhi_pd(a, b),
            });
        }
        for (at, t) in t.iter_mut().enumerate() {
            let (a, b) = (r[at / 8 * 8 + at % 4], r[at / 8 * 8 + at % 4 + 4]);
            *t = parts(a, b, at % 8 >= 4);
        }
        for (at, r) in r.iter_mut().enumerate() {
            *r = parts(t[at % 8], t[at % 8 + 8], at >= 8);
        }
        for (row, values) in r.into_iter().enumerate().take(height) {
            _mm512_mask_storeu_ps(to.as_mut_ptr().add(row * stride), stored, values);
        }
    }
}

/// The even parts of two vectors, or the odd ones.
///
/// # Safety
///
/// AVX-512F must be available.
#[inline(always)]
unsafe fn parts(a: __m512, b: __m512, are_odd: bool) -> __m512 {
    // SAFETY: this function's contract.
    unsafe {
        match are_odd {
            false => _mm512_shuffle_f32x4::<0x88>(a, b),
            true => _mm512_shuffle_f32x4::<0xdd>(a, b),
        }
    }
}
