//! Products of a few rows: vectors run along the inner dimension, and nothing is packed.

use super::super::gemm::Mat;
use super::{LANES, TASK, Target, run};
use std::arch::x86_64::{
    __m512, __mmask16, _mm512_fmadd_ps, _mm512_maskz_loadu_ps, _mm512_reduce_add_ps,
    _mm512_setzero_ps,
};

/// Rows and columns of a tile of dot products.
const DOTS: usize = 4;

/// Products of the rows of `a` and of `b`.
///
/// # Safety
///
/// As for [`product`](super::product) of `a` and the transposed `b`; the columns of both must be together.
pub(super) unsafe fn dot_products(
    target: Target,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    is_parallel: bool,
) {
    let ((rows, depth), (columns, _)) = (a.shape(), b.shape());
    let width = TASK.div_ceil(depth * rows.max(1)).next_multiple_of(DOTS);
    let task = |at: usize| {
        let columns = at * width..((at + 1) * width).min(columns);
        for column in columns.clone().step_by(DOTS) {
            for row in (0..rows).step_by(DOTS) {
                let (height, width) = (DOTS.min(rows - row), DOTS.min(columns.end - column));
                // SAFETY: the rows are within `a` and `b`, the tile within the result.
                unsafe { DOT_KERNELS[height - 1][width - 1](target, a, b, row, column) };
            }
        }
    };
    run(columns.div_ceil(width), is_parallel, task);
}

type DotKernel = unsafe fn(Target, Mat<'_, f32>, Mat<'_, f32>, usize, usize);

/// By rows of the left and of the right side.
const DOT_KERNELS: [[DotKernel; DOTS]; DOTS] = [
    [dots::<1, 1>, dots::<1, 2>, dots::<1, 3>, dots::<1, 4>],
    [dots::<2, 1>, dots::<2, 2>, dots::<2, 3>, dots::<2, 4>],
    [dots::<3, 1>, dots::<3, 2>, dots::<3, 3>, dots::<3, 4>],
    [dots::<4, 1>, dots::<4, 2>, dots::<4, 3>, dots::<4, 4>],
];

/// # Safety
///
/// `a` must have `ROWS` rows from `row` on and `b` `COLUMNS` from `column` on, both with their
/// columns together, the result must have a place for each pair, and AVX-512F must be available.
#[target_feature(enable = "avx512f")]
unsafe fn dots<const ROWS: usize, const COLUMNS: usize>(
    target: Target,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    row: usize,
    column: usize,
) {
    let (_, depth) = a.shape();
    let left: [*const f32; ROWS] = std::array::from_fn(|at| a.row(row + at).as_ptr());
    let right: [*const f32; COLUMNS] = std::array::from_fn(|at| b.row(column + at).as_ptr());
    let mut sums = [[_mm512_setzero_ps(); COLUMNS]; ROWS];
    let mut step = |at: usize, mask: __mmask16| {
        // SAFETY: the lanes of the mask are within the rows.
        let load = |from: *const f32| unsafe { _mm512_maskz_loadu_ps(mask, from.add(at)) };
        let right: [__m512; COLUMNS] = std::array::from_fn(|column| load(right[column]));
        for (sums, left) in sums.iter_mut().zip(left) {
            let left = load(left);
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = _mm512_fmadd_ps(left, right, *sum);
            }
        }
    };
    let whole = depth / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        step(at, !0);
    }
    if whole < depth {
        step(whole, ((1u32 << (depth - whole)) - 1) as __mmask16);
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (c, sum) in sums.into_iter().enumerate() {
            // SAFETY: within the result.
            let out = unsafe { &mut *target.out.add((row + r) * target.stride + column + c) };
            let value = target.alpha * _mm512_reduce_add_ps(sum);
            *out = if target.is_added { *out + value } else { value };
        }
    }
}
