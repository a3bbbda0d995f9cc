//! Products of `f32` matrices with AVX-512.
//!
//! Goto and van de Geijn: *Anatomy of High-Performance Matrix Multiplication* (2008), with less
//! packing: only the right side is copied, a panel of [`WIDTH`] columns at a time, which is what
//! the vectors run along; of the left side a kernel reads one number at a time, wherever it is.
//!
//! Each number of the result is summed along the inner dimension in blocks of [`DEPTH`], one
//! after the other, whatever the outer dimensions and the number of threads: it does not depend on
//! how many rows are computed with it. The exception are products of up to [`FEW`] rows with a
//! right side whose columns are together, such as the transposed weight of a linear layer: there
//! packing would cost more than the product, and vectors run along the inner dimension.

use super::gemm::Mat;
use rayon::prelude::*;
use std::arch::x86_64::{
    __m512, __mmask16, _mm512_castpd_ps, _mm512_castps_pd, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_reduce_add_ps,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_unpackhi_pd,
    _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::cell::RefCell;
use std::ops::Range;

/// Columns of a panel: four vectors.
pub(super) const WIDTH: usize = 64;
/// Rows of a tile. With four vectors each they fill 24 of the 32 registers.
const HEIGHT: usize = 6;
/// Inner dimension of a block: a panel of it is 128 KiB, within an L2 cache.
const DEPTH: usize = 512;
/// Rows that are worth packing a panel for.
const ROWS: usize = 96;
/// Rows for which nothing is packed, if possible.
const FEW: usize = 16;
/// Rows and columns of a tile of dot products.
const DOTS: usize = 4;
/// Multiplications that are worth a task of their own.
const TASK: usize = 1 << 18;
/// Floats of a vector.
const LANES: usize = 16;

thread_local! {
    static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn is_available() -> bool {
    std::is_x86_feature_detected!("avx512f")
}

/// Where the result goes.
#[derive(Clone, Copy)]
struct Target {
    out: *mut f32,
    stride: usize,
    is_added: bool,
    alpha: f32,
}

// SAFETY: tasks write tiles that do not overlap, of a slice that `product` borrows mutably until
// all of them are done.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// `out = alpha · a · b` or that added, in rows that start `stride` apart.
///
/// # Safety
///
/// AVX-512F must be [available](is_available), `a` and `b` must lie within their slices and fit
/// each other, and `out` must hold the rows of the result.
pub(super) unsafe fn product(
    out: &mut [f32],
    stride: usize,
    is_added: bool,
    alpha: f32,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    is_parallel: bool,
) {
    let target = Target { out: out.as_mut_ptr(), stride, is_added, alpha };
    let (rows, depth) = a.shape();
    let (_, columns) = b.shape();
    if rows <= FEW && a.strides().1 == 1 && b.strides().0 == 1 && depth > 0 {
        // SAFETY: this function's contract.
        return unsafe { dot_products(target, a, b.t(), is_parallel) };
    }
    let panels = columns.div_ceil(WIDTH);
    let height = task_rows(rows, depth, panels);
    let task = |at: usize| {
        let (block, panel) = (at / panels, at % panels);
        let rows = block * height..((block + 1) * height).min(rows);
        let columns = panel * WIDTH..((panel + 1) * WIDTH).min(columns);
        // SAFETY: the ranges are within the shapes, and each task has a tile of its own; the rest
        // is this function's contract.
        unsafe { tile_task(target, a, b, rows, columns) };
    };
    let tasks = 0..rows.div_ceil(height) * panels;
    match is_parallel && tasks.len() > 1 {
        true => tasks.into_par_iter().for_each(task),
        false => tasks.for_each(task),
    }
}

/// Products of the rows of `a` and of `b`.
///
/// # Safety
///
/// As for [`product`] of `a` and the transposed `b`; the columns of both must be together.
unsafe fn dot_products(target: Target, a: Mat<'_, f32>, b: Mat<'_, f32>, is_parallel: bool) {
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
    let tasks = 0..columns.div_ceil(width);
    match is_parallel && tasks.len() > 1 {
        true => tasks.into_par_iter().for_each(task),
        false => tasks.for_each(task),
    }
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

/// Rows of a task: fewer where there are few panels, so that there are tasks for all threads.
fn task_rows(rows: usize, depth: usize, panels: usize) -> usize {
    let worth = TASK.div_ceil(depth.max(1) * WIDTH).max(ROWS);
    let wanted = rows.div_ceil(16usize.div_ceil(panels.max(1))).max(worth);
    wanted.next_multiple_of(HEIGHT)
}

/// Numbers of all panels of a right side.
pub(super) fn packed_len(depth: usize, columns: usize) -> usize {
    columns.div_ceil(WIDTH) * depth * WIDTH
}

/// Writes the panels of `b` one after the other. AVX-512F must be [available](is_available).
pub(super) fn pack_all(b: Mat<'_, f32>, panels: &mut [f32]) {
    let (depth, columns) = b.shape();
    for (at, panel) in panels.chunks_exact_mut((depth * WIDTH).max(1)).enumerate() {
        pack(b, 0..depth, at * WIDTH..((at + 1) * WIDTH).min(columns), panel);
    }
}

/// The same as [`product`] of a right side with `columns` columns whose panels are
/// [there](pack_all), on this thread.
///
/// # Safety
///
/// As for [`product`].
pub(super) unsafe fn product_of_packed(
    out: &mut [f32],
    stride: usize,
    is_added: bool,
    a: Mat<'_, f32>,
    panels: &[f32],
    columns: usize,
) {
    let target = Target { out: out.as_mut_ptr(), stride, is_added, alpha: 1.0 };
    let (rows, depth) = a.shape();
    for (at, panel) in panels.chunks_exact((depth * WIDTH).max(1)).enumerate() {
        let columns = at * WIDTH..((at + 1) * WIDTH).min(columns);
        for first in (0..depth).step_by(DEPTH) {
            let inner = first..(first + DEPTH).min(depth);
            let panel = &panel[first * WIDTH..inner.end * WIDTH];
            let target = Target { is_added: is_added || first > 0, ..target };
            for row in (0..rows).step_by(HEIGHT) {
                let height = HEIGHT.min(rows - row);
                // SAFETY: the tile is within the result and the row within `a`, as the contract
                // says; the panel has `inner.len()` rows of `WIDTH`.
                unsafe { tile(target, a, inner.clone(), panel, row, height, columns.clone()) };
            }
        }
    }
}

/// # Safety
///
/// As for [`product`], and no other task may have a place of these rows and columns.
unsafe fn tile_task(
    target: Target,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    rows: Range<usize>,
    columns: Range<usize>,
) {
    let (_, depth) = a.shape();
    PANEL.with_borrow_mut(|panel| {
        panel.resize(DEPTH * WIDTH, 0.0);
        let mut first = 0;
        // Once for an inner dimension of 0 too, which gives zeros.
        loop {
            let inner = first..(first + DEPTH).min(depth);
            pack(b, inner.clone(), columns.clone(), panel);
            let target = Target { is_added: target.is_added || first > 0, ..target };
            for row in rows.clone().step_by(HEIGHT) {
                let height = HEIGHT.min(rows.end - row);
                // SAFETY: the tile is within the result and the row within `a`, as the contract
                // says; the panel has `inner.len()` rows of `WIDTH`.
                unsafe { tile(target, a, inner.clone(), panel, row, height, columns.clone()) };
            }
            first = inner.end;
            if first >= depth {
                break;
            }
        }
    });
}

/// Copies some columns of some rows, the columns of a row together, up to the next whole vector.
fn pack(b: Mat<'_, f32>, inner: Range<usize>, columns: Range<usize>, panel: &mut [f32]) {
    let width = columns.len();
    let rows = panel.chunks_exact_mut(WIDTH).zip(inner.clone());
    match b.strides() {
        (_, 1) => rows.for_each(|(to, row)| {
            to[..width].copy_from_slice(&b.row(row)[columns.clone()]);
            to[width..].fill(0.0);
        }),
        (1, _) => pack_transposed(b, inner, columns, panel),
        _ => rows.for_each(|(to, row)| {
            to.fill(0.0);
            to.iter_mut().zip(columns.clone()).for_each(|(to, column)| *to = b.at(row, column));
        }),
    }
}

/// The same where the rows of a column are together: sixteen by sixteen.
fn pack_transposed(b: Mat<'_, f32>, inner: Range<usize>, columns: Range<usize>, panel: &mut [f32]) {
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
            // SAFETY: AVX-512F is available, as for all of this module; the rows are empty or reach
            // to `inner`'s end, and `to` has the rows of the block.
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
/// AVX-512F must be [available](is_available).
pub(super) unsafe fn transpose(from: Mat<'_, f32>, to: &mut [f32]) {
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

/// One tile, by the kernel of its height and width.
///
/// # Safety
///
/// The tile must be within the result, its rows and `inner` within `a`, and `panel` must have a row
/// of [`WIDTH`] for each of `inner`. AVX-512F must be available.
unsafe fn tile(
    target: Target,
    a: Mat<'_, f32>,
    inner: Range<usize>,
    panel: &[f32],
    row: usize,
    height: usize,
    columns: Range<usize>,
) {
    let vectors = columns.len().div_ceil(LANES);
    let kernel = KERNELS[height - 1][vectors - 1];
    let (row_stride, column_stride) = a.strides();
    let last = (columns.len() - 1) % LANES + 1;
    let job = Job {
        depth: inner.len(),
        a: a.data()[(row * row_stride + inner.start * column_stride).min(a.data().len())..]
            .as_ptr(),
        row_stride,
        column_stride,
        panel: panel.as_ptr(),
        // SAFETY: within the result.
        out: unsafe { target.out.add(row * target.stride + columns.start) },
        last: ((1u32 << last) - 1) as __mmask16,
        target,
    };
    // SAFETY: this function's contract.
    unsafe { kernel(job) }
}

/// What a kernel computes.
struct Job {
    depth: usize,
    a: *const f32,
    row_stride: usize,
    column_stride: usize,
    panel: *const f32,
    out: *mut f32,
    /// Which lanes of the last vector are of the result.
    last: __mmask16,
    target: Target,
}

type Kernel = unsafe fn(Job);

/// By rows and vectors.
const KERNELS: [[Kernel; 4]; HEIGHT] = [
    [kernel::<1, 1>, kernel::<1, 2>, kernel::<1, 3>, kernel::<1, 4>],
    [kernel::<2, 1>, kernel::<2, 2>, kernel::<2, 3>, kernel::<2, 4>],
    [kernel::<3, 1>, kernel::<3, 2>, kernel::<3, 3>, kernel::<3, 4>],
    [kernel::<4, 1>, kernel::<4, 2>, kernel::<4, 3>, kernel::<4, 4>],
    [kernel::<5, 1>, kernel::<5, 2>, kernel::<5, 3>, kernel::<5, 4>],
    [kernel::<6, 1>, kernel::<6, 2>, kernel::<6, 3>, kernel::<6, 4>],
];

/// # Safety
///
/// `job` must describe a tile of `ROWS` rows and `VECTORS` vectors, the last of them in part, as
/// [`tile`] does.
#[target_feature(enable = "avx512f")]
unsafe fn kernel<const ROWS: usize, const VECTORS: usize>(job: Job) {
    let mut sums: [[__m512; VECTORS]; ROWS] = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    let (mut a, mut panel) = (job.a, job.panel);
    for _ in 0..job.depth {
        // SAFETY: `panel` and `a` are at one of `depth` steps within their slices.
        unsafe {
            let right: [__m512; VECTORS] =
                std::array::from_fn(|vector| _mm512_loadu_ps(panel.add(vector * LANES)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let left = _mm512_set1_ps(*a.add(row * job.row_stride));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = _mm512_fmadd_ps(left, right, *sum);
                }
            }
        }
        a = a.wrapping_add(job.column_stride);
        panel = panel.wrapping_add(WIDTH);
    }
    let alpha = _mm512_set1_ps(job.target.alpha);
    for (row, sums) in sums.iter().enumerate() {
        for (vector, sum) in sums.iter().enumerate() {
            let mask = if vector + 1 == VECTORS { job.last } else { !0 };
            // SAFETY: the lanes of the mask are within the result.
            unsafe {
                let out = job.out.add(row * job.target.stride + vector * LANES);
                let value = match job.target.is_added {
                    true => _mm512_fmadd_ps(*sum, alpha, _mm512_maskz_loadu_ps(mask, out)),
                    false => _mm512_mul_ps(*sum, alpha),
                };
                _mm512_mask_storeu_ps(out, mask, value);
            }
        }
    }
}
