//! The inner loop.

use super::super::gemm::Mat;
use super::form::{Form, Singles, first_lanes};
use super::pairs::Pairs;
use super::{LANES, Target, WIDTH};
use std::arch::x86_64::{
    __m512, __mmask16, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::ops::Range;

/// Rows of a tile. With four vectors each they fill 24 of the 32 registers.
pub(super) const HEIGHT: usize = 6;

/// Some columns of some rows, a tile at a time. The left side is in slots.
///
/// # Safety
///
/// They must be within the result, the rows and `inner` within `a`, and `panel` must have a row of
/// [`WIDTH`] for each of `inner`. The form must be available.
pub(super) unsafe fn tiles<F: Form>(
    target: Target,
    a: Mat<'_, f32>,
    inner: Range<usize>,
    panel: &[f32],
    rows: Range<usize>,
    columns: Range<usize>,
) {
    for row in rows.clone().step_by(HEIGHT) {
        let height = HEIGHT.min(rows.end - row);
        // SAFETY: this function's contract.
        unsafe { tile::<F>(target, a, inner.clone(), panel, row, height, columns.clone()) };
    }
}

/// One tile, by the kernel of its height and width.
///
/// # Safety
///
/// As for [`tiles`].
unsafe fn tile<F: Form>(
    target: Target,
    a: Mat<'_, f32>,
    inner: Range<usize>,
    panel: &[f32],
    row: usize,
    height: usize,
    columns: Range<usize>,
) {
    let vectors = columns.len().div_ceil(LANES);
    let kernel = F::KERNELS[height - 1][vectors - 1];
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
        out: match target.is_turned {
            false => unsafe { target.out.add(row * target.stride + columns.start) },
            true => unsafe { target.out.add(columns.start * target.stride + row) },
        },
        last: first_lanes(last),
        target,
    };
    // SAFETY: this function's contract.
    unsafe { kernel(job) }
}

/// What a kernel computes.
pub(in super::super) struct Job {
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

/// By rows and vectors of a tile.
pub(in super::super) type Kernels = [[unsafe fn(Job); 4]; HEIGHT];

/// The [`Kernels`] of a function of rows and vectors.
macro_rules! kernels {
    ($of:path) => {
        super::tile::kernels!($of, 1 2 3 4 5 6)
    };
    ($of:path, $($rows:literal)*) => {{
        use $of as of;
        [$([of::<$rows, 1>, of::<$rows, 2>, of::<$rows, 3>, of::<$rows, 4>]),*]
    }};
}
pub(super) use kernels;

/// # Safety
///
/// As for [`kernel`], of [`Singles`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn kernel_of_singles<const ROWS: usize, const VECTORS: usize>(job: Job) {
    // SAFETY: this function's contract.
    unsafe { kernel::<Singles, ROWS, VECTORS>(job) }
}

/// # Safety
///
/// As for [`kernel`], of [`Pairs`].
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn kernel_of_pairs<const ROWS: usize, const VECTORS: usize>(job: Job) {
    // SAFETY: this function's contract.
    unsafe { kernel::<Pairs, ROWS, VECTORS>(job) }
}

/// Inlined into functions for what the form needs, and so is all that it calls in its loop.
///
/// # Safety
///
/// `job` must describe a tile of `ROWS` rows and `VECTORS` vectors, the last of them in part, as
/// [`tile`] does. The form must be available.
#[inline(always)]
unsafe fn kernel<F: Form, const ROWS: usize, const VECTORS: usize>(job: Job) {
    // SAFETY: zeros.
    let zero = unsafe { _mm512_setzero_ps() };
    let mut sums: [[__m512; VECTORS]; ROWS] = [[zero; VECTORS]; ROWS];
    let (mut a, mut panel) = (job.a, job.panel);
    for _ in 0..job.depth {
        // SAFETY: `panel` and `a` are at one of `depth` steps within their slices.
        unsafe {
            let mut right = [zero; VECTORS];
            for (vector, right) in right.iter_mut().enumerate() {
                *right = _mm512_loadu_ps(panel.add(vector * LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let left = _mm512_set1_ps(*a.add(row * job.row_stride));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = F::add(*sum, left, right);
                }
            }
        }
        a = a.wrapping_add(job.column_stride);
        panel = panel.wrapping_add(WIDTH);
    }
    if job.target.is_turned {
        // SAFETY: this function's contract.
        return unsafe { store_turned(&sums, &job) };
    }
    // SAFETY: the same number in each lane.
    let alpha = unsafe { _mm512_set1_ps(job.target.alpha) };
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

/// Writes the rows of a tile as columns.
///
/// # Safety
///
/// As for [`kernel`].
#[inline(always)]
unsafe fn store_turned<const ROWS: usize, const VECTORS: usize>(
    sums: &[[__m512; VECTORS]; ROWS],
    job: &Job,
) {
    let Target { stride, is_added, alpha, .. } = job.target;
    for vector in 0..VECTORS {
        let mut block = [[0f32; LANES]; ROWS];
        for (block, sums) in block.iter_mut().zip(sums) {
            // SAFETY: a block has a place for each lane.
            unsafe { _mm512_storeu_ps(block.as_mut_ptr(), sums[vector]) };
        }
        let lanes = if vector + 1 == VECTORS { job.last.count_ones() as usize } else { LANES };
        for lane in 0..lanes {
            for (row, block) in block.iter().enumerate() {
                // SAFETY: within the result.
                let out = unsafe { &mut *job.out.add((vector * LANES + lane) * stride + row) };
                let value = block[lane];
                *out = if is_added { value.mul_add(alpha, *out) } else { value * alpha };
            }
        }
    }
}
