//! Right sides in panels, and transposes.

use super::super::gemm::Mat;
use super::{LANES, WIDTH};
use std::arch::x86_64::{
    __m512, __mmask16, _mm512_castpd_ps, _mm512_castps_pd, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_unpackhi_pd,
    _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::ops::Range;

/// Numbers of all panels of a right side.
pub(in super::super) fn packed_len(depth: usize, columns: usize) -> usize {
    columns.div_ceil(WIDTH) * depth * WIDTH
}

/// Writes the panels of `b` one after the other.
///
/// # Safety
///
/// AVX-512F must be available.
pub(in super::super) unsafe fn pack_all(b: Mat<'_, f32>, panels: &mut [f32]) {
    let (depth, columns) = b.shape();
    for (at, panel) in panels.chunks_exact_mut((depth * WIDTH).max(1)).enumerate() {
        // SAFETY: this function's contract.
        unsafe { pack(b, 0..depth, at * WIDTH..((at + 1) * WIDTH).min(columns), panel) };
    }
}

/// Copies some columns of some rows, the columns of a row together, up to the next whole vector.
///
/// # Safety
///
/// AVX-512F must be available.
pub(super) unsafe fn pack(
    b: Mat<'_, f32>,
    inner: Range<usize>,
    columns: Range<usize>,
    panel: &mut [f32],
) {
    let width = columns.len();
    if inner.is_empty() || width == 0 {
        return;
    }
    let rows = panel.chunks_exact_mut(WIDTH).zip(inner.clone());
    match b.strides() {
        (_, 1) => rows.for_each(|(to, row)| {
            to[..width].copy_from_slice(&b.row(row)[columns.clone()]);
            to[width..].fill(0.0);
        }),
        // SAFETY: this function's contract.
        (1, _) => unsafe { pack_transposed(b, inner, columns, panel) },
        _ => rows.for_each(|(to, row)| {
            to.fill(0.0);
            to.iter_mut().zip(columns.clone()).for_each(|(to, column)| *to = b.at(row, column));
        }),
    }
}

/// The same where the rows of a column are together: sixteen by sixteen.
///
/// # Safety
///
/// AVX-512F must be available.
unsafe fn pack_transposed(
    b: Mat<'_, f32>,
    inner: Range<usize>,
    columns: Range<usize>,
    panel: &mut [f32],
) {
    let b = b.t();
    for (at, column) in columns.clone().step_by(LANES).enumerate() {
        let width = LANES.min(columns.end - column);
        let rows: [&[f32]; LANES] = std::array::from_fn(|row| match row < width {
            true => &b.row(column + row)[inner.clone()],
            false => &[],
        });
        for first in (0..inner.len()).step_by(LANES) {
            let height = LANES.min(inner.len() - first);
            let to = &mut panel[first * WIDTH + at * LANES..];
            assert!(to.len() >= (height - 1) * WIDTH + LANES, "room in the panel");
            // SAFETY: this function's contract; the rows are empty or reach to `inner`'s end, and
            // `to` has the rows of the block.
            unsafe { transpose_block(&rows, width, first, height, to, WIDTH, !0) };
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
        let mask = ((1u32 << width) - 1) as __mmask16;
        let block: [&[f32]; LANES] =
            std::array::from_fn(|at| if at < width { from.row(row + at) } else { &[] });
        for first in (0..columns).step_by(LANES) {
            let height = LANES.min(columns - first);
            let to = &mut to[first * rows + row..];
            assert!(to.len() >= (height - 1) * rows + width, "room in the transpose");
            // SAFETY: `width` rows are `columns` long, and `to` has a place for each of them in
            // each of `height` rows.
            unsafe { transpose_block(&block, width, first, height, to, rows, mask) };
        }
    }
}

/// Writes the columns from `first` on of `width` rows as rows of `to`, `stride` apart, and zeros
/// for the rows that there are not; of these, what `stored` says.
///
/// # Safety
///
/// `width` rows must have `first + height` elements, and `to` must have room for `height` rows of
/// what is stored. Both are at most [`LANES`], and AVX-512F must be available.
#[target_feature(enable = "avx512f")]
unsafe fn transpose_block(
    rows: &[&[f32]; LANES],
    width: usize,
    first: usize,
    height: usize,
    to: &mut [f32],
    stride: usize,
    stored: __mmask16,
) {
    let mask = ((1u32 << height) - 1) as __mmask16;
    let r: [__m512; LANES] = std::array::from_fn(|row| match row < width {
        // SAFETY: the lanes of the mask are within the row.
        true => unsafe { _mm512_maskz_loadu_ps(mask, rows[row].as_ptr().add(first)) },
        false => _mm512_setzero_ps(),
    });
    // Pairs of numbers, then of pairs, within the four parts of each vector; then whole parts.
    let t: [__m512; LANES] = std::array::from_fn(|at| {
        let (a, b) = (r[at / 2 * 2], r[at / 2 * 2 + 1]);
        if at % 2 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) }
    });
    let r: [__m512; LANES] = std::array::from_fn(|at| {
        let (a, b) = (at / 4 * 4 + at % 4 / 2, at / 4 * 4 + at % 4 / 2 + 2);
        let (a, b) = (_mm512_castps_pd(t[a]), _mm512_castps_pd(t[b]));
        _mm512_castpd_ps(match at % 2 {
            0 => _mm512_unpacklo_pd(a, b),
            _ => _mm512_unpackhi_pd(a, b),
        })
    });
    let parts = |a: __m512, b: __m512, odd: bool| match odd {
        false => _mm512_shuffle_f32x4::<0x88>(a, b),
        true => _mm512_shuffle_f32x4::<0xdd>(a, b),
    };
    let t: [__m512; LANES] = std::array::from_fn(|at| {
        let a = at / 8 * 8 + at % 4;
        parts(r[a], r[a + 4], at % 8 >= 4)
    });
    let r: [__m512; LANES] = std::array::from_fn(|at| parts(t[at % 8], t[at % 8 + 8], at >= 8));
    for (row, values) in r.into_iter().take(height).enumerate() {
        // SAFETY: what is stored of the row is within `to`.
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr().add(row * stride), stored, values) };
    }
}
