//! Products of `f32` matrices with AVX-512, of the numbers as they are or [rounded](Pairs) to `bf16`.
//!
//! Goto and van de Geijn: *Anatomy of High-Performance Matrix Multiplication* (2008), with less
//! packing: only the right side is copied, a panel of [`WIDTH`] columns at a time, which is what
//! the vectors run along; of the left side a kernel reads one number at a time, wherever it is.
//!
//! Each number of the result is summed along the inner dimension in blocks of [`DEPTH`] slots, one
//! after the other, whatever the outer dimensions and the number of threads: it does not depend on
//! how many rows are computed with it. The exception are products of up to [`FEW`] rows with a
//! right side whose columns are together, such as the transposed weight of a linear layer: there
//! packing would cost more than the product, and vectors run along the inner dimension, of numbers
//! that are not rounded. For some more rows the sides change places, and with them rows and columns
//! of the result, for the right one is the larger.

mod dots;
mod form;
mod pack;
mod pairs;
mod tile;

use super::gemm::Mat;
use dots::dot_products;
use pack::pack;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::LazyLock;
use tile::{HEIGHT, tiles};

pub(super) use form::{Form, Singles};
pub(super) use pack::{pack_all, packed_len, transpose};
pub(super) use pairs::Pairs;

/// Columns of a panel: four vectors.
const WIDTH: usize = 64;
/// Inner dimension of a block, in slots: a panel of it is 128 KiB, within an L2 cache.
const DEPTH: usize = 512;
/// Rows that are worth packing a panel for.
const ROWS: usize = 96;
/// Inner dimension, for each row, that is worth to write rows as columns for.
const TURNED: usize = 4;
/// Rows for which nothing is packed, if possible.
const FEW: usize = 16;
/// Multiplications that are worth a task of their own.
const TASK: usize = 1 << 18;
/// Floats of a vector.
const LANES: usize = 16;

thread_local! {
    static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Whether the machine has it, and `MOBULA_AVX512` is not 0 in the environment.
pub(super) fn is_available() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
        let is_wanted = std::env::var_os("MOBULA_AVX512").is_none_or(|wanted| wanted != "0");
        is_wanted && std::is_x86_feature_detected!("avx512f")
    });
    *AVAILABLE
}

/// The same for [`Pairs`].
pub(super) fn has_pairs() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
        is_available()
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512bf16")
    });
    *AVAILABLE
}

/// Where the result goes.
#[derive(Clone, Copy)]
struct Target {
    out: *mut f32,
    stride: usize,
    is_added: bool,
    alpha: f32,
    /// Rows and columns of a tile change places.
    is_turned: bool,
}

impl Target {
    /// From so many numbers further on.
    ///
    /// # Safety
    ///
    /// That must be within the result.
    unsafe fn from(self, numbers: usize) -> Self {
        // SAFETY: this function's contract.
        Self { out: unsafe { self.out.add(numbers) }, ..self }
    }
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
/// The form must be available ([`is_available`], [`has_pairs`]), `a` and `b` must lie within their
/// slices and fit each other, and `out` must hold the rows of the result.
pub(super) unsafe fn product<F: Form>(
    out: &mut [f32],
    stride: usize,
    is_added: bool,
    alpha: f32,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    is_parallel: bool,
) {
    let target = Target { out: out.as_mut_ptr(), stride, is_added, alpha, is_turned: false };
    let (rows, depth) = a.shape();
    let (_, columns) = b.shape();
    if a.strides().1 == 1 && b.strides().0 == 1 && depth > 0 && rows <= WIDTH {
        // SAFETY: this function's contract.
        match rows {
            ..=FEW => return unsafe { dot_products(target, a, b.t(), is_parallel) },
            _ if columns > rows && depth >= TURNED * rows => {
                return unsafe { turned::<F>(target, a, b.t(), is_parallel) };
            }
            _ => {}
        }
    }
    let panels = columns.div_ceil(WIDTH);
    let height = task_rows(rows, depth, panels);
    let tasks = rows.div_ceil(height) * panels;
    let multiply = |a: Mat<'_, f32>| {
        run(tasks, is_parallel, |at| {
            let (block, panel) = (at / panels, at % panels);
            let rows = block * height..((block + 1) * height).min(rows);
            let columns = panel * WIDTH..((panel + 1) * WIDTH).min(columns);
            // SAFETY: the ranges are within the shapes, and each task has a tile of its own; the
            // rest is this function's contract.
            unsafe { tile_task::<F>(target, a, b, rows, columns) };
        });
    };
    // SAFETY: this function's contract.
    unsafe { F::with_left(a, is_parallel, multiply) };
}

/// Products of the rows of `a` and of `b`, as `(b · aᵀ)ᵀ`: packs the smaller one of them.
///
/// # Safety
///
/// As for [`product`] of `a` and the transposed `b`.
unsafe fn turned<F: Form>(target: Target, a: Mat<'_, f32>, b: Mat<'_, f32>, is_parallel: bool) {
    let ((rows, depth), (columns, _)) = (a.shape(), b.shape());
    let mut panels = vec![0.0; packed_len::<F>(depth, rows)];
    // SAFETY: this function's contract.
    unsafe { pack_all::<F>(a.t(), &mut panels) };
    let target = Target { is_turned: true, ..target };
    let height = TASK.div_ceil(depth * WIDTH).next_multiple_of(HEIGHT);
    let task = |at: usize| {
        let some = at * height..((at + 1) * height).min(columns);
        // SAFETY: within the result, in which rows of `b` are columns.
        let target = unsafe { target.from(some.start) };
        // SAFETY: this function's contract; each task has columns of its own.
        unsafe { packed_task::<F>(target, b.some_rows(some), &panels, rows) };
    };
    run(columns.div_ceil(height), is_parallel, task);
}

/// Of a left side in slots.
///
/// # Safety
///
/// As for [`product`], and no other task may have a place of these rows and columns.
unsafe fn tile_task<F: Form>(
    target: Target,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    rows: Range<usize>,
    columns: Range<usize>,
) {
    let (_, slots) = a.shape();
    PANEL.with_borrow_mut(|panel| {
        panel.resize(DEPTH * WIDTH, 0.0);
        let mut first = 0;
        // Once for an inner dimension of 0 too, which gives zeros.
        loop {
            let inner = first..(first + DEPTH).min(slots);
            // SAFETY: this function's contract.
            unsafe { pack::<F>(b, inner.clone(), columns.clone(), panel) };
            let target = Target { is_added: target.is_added || first > 0, ..target };
            // SAFETY: the tiles are within the result and the rows within `a`, as the contract says;
            // the panel has `inner.len()` rows of `WIDTH`.
            unsafe { tiles::<F>(target, a, inner.clone(), panel, rows.clone(), columns.clone()) };
            first = inner.end;
            if first >= slots {
                break;
            }
        }
    });
}

/// All tasks, on this thread or on those of the current pool.
fn run(tasks: usize, is_parallel: bool, task: impl Fn(usize) + Send + Sync) {
    match is_parallel && tasks > 1 {
        true => (0..tasks).into_par_iter().for_each(task),
        false => (0..tasks).for_each(task),
    }
}

/// Rows of a task: fewer where there are few panels, so that there are tasks for all threads.
fn task_rows(rows: usize, depth: usize, panels: usize) -> usize {
    let worth = TASK.div_ceil(depth.max(1) * WIDTH).max(ROWS);
    let wanted = rows.div_ceil(16usize.div_ceil(panels.max(1))).max(worth);
    wanted.next_multiple_of(HEIGHT)
}

/// The same as [`product`] of a right side with `columns` columns whose panels are
/// [there](pack_all), on this thread.
///
/// # Safety
///
/// As for [`product`].
pub(super) unsafe fn product_of_packed<F: Form>(
    out: &mut [f32],
    stride: usize,
    is_added: bool,
    a: Mat<'_, f32>,
    panels: &[f32],
    columns: usize,
) {
    let (out, alpha) = (out.as_mut_ptr(), 1.0);
    let target = Target { out, stride, is_added, alpha, is_turned: false };
    // SAFETY: this function's contract.
    unsafe { packed_task::<F>(target, a, panels, columns) };
}

/// # Safety
///
/// As for [`product`], and no other task may have a place of these rows.
unsafe fn packed_task<F: Form>(target: Target, a: Mat<'_, f32>, panels: &[f32], columns: usize) {
    let (rows, depth) = a.shape();
    let slots = F::slots(depth);
    let multiply = |a: Mat<'_, f32>| {
        for (at, panel) in panels.chunks_exact((slots * WIDTH).max(1)).enumerate() {
            let columns = at * WIDTH..((at + 1) * WIDTH).min(columns);
            for first in (0..slots).step_by(DEPTH) {
                let inner = first..(first + DEPTH).min(slots);
                let panel = &panel[first * WIDTH..inner.end * WIDTH];
                let target = Target { is_added: target.is_added || first > 0, ..target };
                // SAFETY: the tiles are within the result and the rows within `a`, as the contract
                // says; the panel has `inner.len()` rows of `WIDTH`.
                unsafe { tiles::<F>(target, a, inner, panel, 0..rows, columns.clone()) };
            }
        }
    };
    // SAFETY: this function's contract.
    unsafe { F::with_left(a, false, multiply) };
}
