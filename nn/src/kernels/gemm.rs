//! Matrix products, into memory that is given.
//!
//! Products of `f32` with AVX-512 are [ours](super::avx512), others `gemm`'s. Their sums run over the inner dimension in an order that depends on
//! the shapes alone: bits do not depend on the number of threads.

use super::Real;
#[cfg(target_arch = "x86_64")]
use super::avx512::{self, Pairs, Singles};
use crate::Precision;
use gemm::Parallelism;
#[cfg(target_arch = "x86_64")]
use std::ops::Range;

/// A view of a matrix, of whose strides one is 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T: Real> Mat<'a, T> {
    /// The same view, if that is its type.
    #[cfg(target_arch = "x86_64")]
    fn f32s(self) -> Option<Mat<'a, f32>> {
        let Self { rows, columns, row_stride, column_stride, .. } = self;
        let data = T::f32s(self.data)?;
        Some(Mat { data, rows, columns, row_stride, column_stride })
    }
}

impl<'a, T> Mat<'a, T> {
    /// Rows one after the other. Panics unless `data` has `rows · columns` elements.
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a {rows}×{columns} matrix");
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// `rows` rows of `columns` elements whose starts are `stride` apart.
    pub(crate) fn strided(data: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        let view = Self { data, rows, columns, row_stride: stride, column_stride: 1 };
        assert!(view.reach() <= data.len(), "{rows} rows of {columns}, {stride} apart");
        view
    }

    /// The slice that it is a view of.
    pub(crate) fn data(&self) -> &'a [T] {
        self.data
    }

    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// From a row to the next, and from a column to the next.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn strides(&self) -> (usize, usize) {
        (self.row_stride, self.column_stride)
    }

    /// Some of the rows.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn some_rows(self, rows: Range<usize>) -> Self {
        let first = (rows.start * self.row_stride).min(self.data.len());
        Self { data: &self.data[first..], rows: rows.len(), ..self }
    }

    /// A row whose columns are together.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.row_stride..][..self.columns]
    }

    /// Elements up to the last one of the matrix.
    fn reach(&self) -> usize {
        match self.rows * self.columns {
            0 => 0,
            _ => (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1,
        }
    }
}

/// On how many threads of the current pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    One,
    All,
}

/// Where a product goes: rows that start `stride` apart, from `first` on.
pub(crate) struct Out<'a, T> {
    pub(crate) rows: &'a mut [T],
    pub(crate) first: usize,
    pub(crate) stride: usize,
}

/// `out = alpha · a · b`, rows one after the other. Panics when the shapes do not fit.
pub(crate) fn gemm<T: Real>(
    out: &mut [T],
    alpha: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    threads: Threads,
    precision: Precision,
) {
    let out = Out { rows: out, first: 0, stride: b.columns };
    product(out, false, alpha, a, b, threads, precision);
}

/// `out += a · b`.
pub(crate) fn gemm_add<T: Real>(
    out: &mut [T],
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    threads: Threads,
    precision: Precision,
) {
    let out = Out { rows: out, first: 0, stride: b.columns };
    product(out, true, T::one(), a, b, threads, precision);
}

/// `out = alpha · a · b`, or that added. Panics when the shapes do not fit.
pub(crate) fn product<T: Real>(
    out: Out<'_, T>,
    is_added: bool,
    alpha: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    threads: Threads,
    precision: Precision,
) {
    assert_eq!(a.columns, b.rows, "the inner dimensions of a matrix product");
    assert!(a.reach() <= a.data.len() && b.reach() <= b.data.len(), "views within their data");
    let Out { rows, first, stride } = out;
    let out = &mut rows[first..];
    let (row_stride, column_stride) = (stride, 1);
    let whole = Mat { data: &*out, rows: a.rows, columns: b.columns, row_stride, column_stride };
    let are_apart = b.columns <= stride || a.rows <= 1;
    assert!(whole.reach() <= out.len() && are_apart, "room for the product");
    #[cfg(target_arch = "x86_64")]
    if let (Some(out), Some(a), Some(b)) = (T::f32s_mut(out), a.f32s(), b.f32s())
        && avx512::is_available()
    {
        let (alpha, is_parallel) = (alpha.to_f64() as f32, threads == Threads::All);
        let product = match is_rounded(precision) {
            true => avx512::product::<Pairs>,
            false => avx512::product::<Singles>,
        };
        // SAFETY: the asserts above; the form is available.
        return unsafe { product(out, stride, is_added, alpha, a, b, is_parallel) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = precision;
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: the three asserts above say that every index that the strides allow lies within its
    // slice; `out` is borrowed mutably, so it overlaps neither input; its rows do not overlap each
    // other, since a row is no longer than the stride. `T` is `f32` or `f64`, which gemm knows.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            stride as isize,
            is_added,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            T::one(),
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Whether numbers are rounded to `bf16` here, if they may be.
#[cfg(any(test, target_arch = "x86_64"))]
pub(crate) fn is_rounded(precision: Precision) -> bool {
    #[cfg(target_arch = "x86_64")]
    return precision == Precision::Bf16 && avx512::has_pairs();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A matrix laid out for many products that it is the right side of, with few rows each.
pub(crate) struct Packed<T> {
    values: Vec<T>,
    depth: usize,
    columns: usize,
    precision: Precision,
}

impl<T: Real> Packed<T> {
    pub(crate) fn new(b: Mat<'_, T>, precision: Precision) -> Self {
        let (depth, columns) = b.shape();
        Self { values: packed(b, precision), depth, columns, precision }
    }

    /// `out = a · self`, or that added, on this thread. Panics when the shapes do not fit.
    pub(crate) fn product(&self, out: &mut [T], is_added: bool, a: Mat<'_, T>) {
        let Self { values, depth, columns, precision } = self;
        assert_eq!(a.columns, *depth, "the inner dimensions of a matrix product");
        assert!(a.reach() <= a.data.len(), "a view within its data");
        assert_eq!(out.len(), a.rows * columns, "room for the product");
        if *depth == 0 {
            if !is_added {
                out.fill(T::zero());
            }
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if let (Some(out), Some(a), Some(panels)) = (T::f32s_mut(out), a.f32s(), T::f32s(values))
            && avx512::is_available()
        {
            let product = match is_rounded(*precision) {
                true => avx512::product_of_packed::<Pairs>,
                false => avx512::product_of_packed::<Singles>,
            };
            // SAFETY: the asserts above; the form is available, and the panels were packed in it.
            return unsafe { product(out, *columns, is_added, a, panels, *columns) };
        }
        let out = Out { rows: out, first: 0, stride: *columns };
        let values = Mat::new(values, *depth, *columns);
        product(out, is_added, T::one(), a, values, Threads::One, *precision);
    }
}

/// In panels where those are multiplied, else with its columns together.
fn packed<T: Real>(b: Mat<'_, T>, precision: Precision) -> Vec<T> {
    #[cfg(target_arch = "x86_64")]
    if let (Some(b), true) = (b.f32s(), avx512::is_available()) {
        return match is_rounded(precision) {
            true => panels::<Pairs, T>(b),
            false => panels::<Singles, T>(b),
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = precision;
    let mut values = vec![T::zero(); b.rows * b.columns];
    match b.column_stride {
        1 => values.chunks_exact_mut(b.columns.max(1)).enumerate().for_each(|(row, to)| {
            to.copy_from_slice(&b.data[row * b.row_stride..][..b.columns]);
        }),
        _ => transpose(b.t(), &mut values),
    }
    values
}

/// The panels of a right side, in a form that is available.
#[cfg(target_arch = "x86_64")]
fn panels<F: avx512::Form, T: Real>(b: Mat<'_, f32>) -> Vec<T> {
    let mut panels = vec![T::zero(); avx512::packed_len::<F>(b.rows, b.columns)];
    if let Some(panels) = T::f32s_mut(&mut panels) {
        // SAFETY: the form is available.
        unsafe { avx512::pack_all::<F>(b, panels) };
    }
    panels
}

/// Writes the columns of `from` as rows of `to`, which are as long as `from` has rows.
pub(crate) fn transpose<T: Real>(from: Mat<'_, T>, to: &mut [T]) {
    /// Of a block, which is read and written while it is in the caches.
    const SIDE: usize = 16;
    assert_eq!(to.len(), from.rows * from.columns, "room for the transpose");
    assert_eq!(from.column_stride, 1, "the columns of a matrix that is transposed");
    if to.is_empty() {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let (Some(from), Some(to)) = (from.f32s(), T::f32s_mut(to))
        && avx512::is_available()
    {
        // SAFETY: it is available.
        unsafe { avx512::transpose(from, to) };
        return;
    }
    for block in (0..from.rows).step_by(SIDE) {
        for first in (0..from.columns).step_by(SIDE) {
            let columns = first..(first + SIDE).min(from.columns);
            for row in block..(block + SIDE).min(from.rows) {
                let values = &from.data[row * from.row_stride..][..from.columns];
                for column in columns.clone() {
                    to[column * from.rows + row] = values[column];
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    #[test]
    fn transposes_are_right() {
        fn check<T: Real>() {
            for (rows, columns) in [(1, 1), (16, 16), (3, 40), (33, 17), (0, 4), (4, 0), (64, 100)]
            {
                let from: Vec<T> = (0..rows * columns).map(|at| T::from_f64(at as f64)).collect();
                let mut to = vec![T::zero(); from.len()];
                transpose(Mat::new(&from, rows, columns), &mut to);
                let is_right = |(at, value): (usize, &T)| {
                    let (column, row) = (at / rows, at % rows);
                    value.to_f64() == (row * columns + column) as f64
                };
                assert!(to.iter().enumerate().all(is_right), "{rows}×{columns}");
            }
        }
        check::<f32>();
        check::<f64>();
    }

    #[test]
    fn products_are_right_for_views_of_every_kind() {
        let a: Vec<f64> = (0..6).map(f64::from).collect(); // [[0 1 2] [3 4 5]]
        let b: Vec<f64> = (0..12).map(f64::from).collect();
        let mut out = vec![f64::NAN; 8];
        gemm(&mut out, 2.0, Mat::new(&a, 2, 3), Mat::new(&b, 3, 4), Threads::All, Precision::F32);
        assert_eq!(out, [40.0, 46.0, 52.0, 58.0, 112.0, 136.0, 160.0, 184.0]);
        gemm_add(
            &mut out[..4],
            Mat::new(&a, 3, 2).t(),
            Mat::strided(&b, 3, 2, 5),
            Threads::One,
            Precision::F32,
        );
        // [[0 2 4] [1 3 5]] · [[0 1] [5 6] [10 11]]
        assert_eq!(out[..4], [40.0 + 50.0, 46.0 + 56.0, 52.0 + 65.0, 58.0 + 74.0]);
    }

    #[test]
    fn packed_products_are_the_same() {
        for (rows, depth, columns) in
            [(1, 1, 1), (8, 600, 70), (7, 33, 128), (2, 0, 5), (16, 64, 64)]
        {
            let (a, b) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
            let a = Mat::new(&a, rows, depth);
            for b in [Mat::new(&b, depth, columns), Mat::new(&b, columns, depth).t()] {
                // Many rows, for few have another order of sums.
                let many: Vec<f32> = a.data.repeat(17);
                let mut all = vec![1.0; 17 * rows * columns];
                gemm(
                    &mut all,
                    1.0,
                    Mat::new(&many, 17 * rows, depth),
                    b,
                    Threads::All,
                    Precision::F32,
                );
                let mut out = vec![f32::NAN; rows * columns];
                let packed = Packed::new(b, Precision::F32);
                packed.product(&mut out, false, a);
                let are_close = out.iter().zip(&all).all(|(a, b)| (a - b).abs() < 1e-4);
                assert!(are_close, "{rows}×{depth}×{columns}");
                assert!(!has_own_kernels() || out == all[..rows * columns], "to the bit");
                packed.product(&mut out, true, a);
                let twice = out.iter().zip(&all).all(|(out, one)| (out - 2.0 * one).abs() < 1e-4);
                assert!(twice, "{rows}×{depth}×{columns}");
            }
        }
        let mut out = [0.0; 2];
        Packed::new(Mat::new(&[1.0, 2.0, 3.0, 4.0], 2, 2).t(), Precision::F32).product(
            &mut out,
            false,
            Mat::new(&[5.0, 6.0], 1, 2),
        );
        assert_eq!(out, [17.0, 39.0]);
    }

    #[test]
    fn empty_inner_dimensions_give_zeros() {
        let mut out = [f32::NAN; 4];
        gemm(&mut out, 1.0, Mat::new(&[], 2, 0), Mat::new(&[], 0, 2), Threads::All, Precision::F32);
        assert_eq!(out, [0.0; 4]);
    }

    #[test]
    #[should_panic(expected = "room for the product")]
    fn a_short_output_is_refused() {
        gemm(
            &mut [0f32; 3],
            1.0,
            Mat::new(&[0.0; 4], 2, 2),
            Mat::new(&[0.0; 4], 2, 2),
            Threads::One,
            Precision::F32,
        );
    }

    /// Numbers in ±1, the same every time.
    pub(in super::super) fn numbers(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Of each shape and layout, against sums in `f64`; nothing beside the result is written.
    #[test]
    fn products_of_all_shapes_are_right() {
        let sizes = [1, 2, 5, 6, 7, 13, 16, 17, 48, 63, 64, 65, 100, 130];
        for (at, rows) in sizes.into_iter().enumerate() {
            for columns in sizes {
                let depth = [0, 1, 3, 16, 33, 511, 512, 513, 1030][(at + columns) % 9];
                for layout in 0..8 {
                    check_product(rows, columns, depth, layout);
                }
            }
        }
        check_product(700, 300, 600, 3);
    }

    fn check_product(rows: usize, columns: usize, depth: usize, layout: usize) {
        let (a, b) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
        let a =
            if layout & 1 == 0 { Mat::new(&a, rows, depth) } else { Mat::new(&a, depth, rows).t() };
        let b = if layout & 2 == 0 {
            Mat::new(&b, depth, columns)
        } else {
            Mat::new(&b, columns, depth).t()
        };
        let (is_added, stride) = (layout & 4 != 0, columns + layout);
        let before = numbers(rows * stride + 3, 3);
        let mut out = before.clone();
        let to = Out { rows: &mut out, first: 2, stride };
        product(to, is_added, 0.5, a, b, Threads::All, Precision::F32);
        for (at, (got, before)) in out.iter().zip(&before).enumerate() {
            let place = at.checked_sub(2).map(|at| (at / stride, at % stride));
            let Some((row, column)) =
                place.filter(|(row, column)| *row < rows && *column < columns)
            else {
                assert_eq!(got, before, "beside the result");
                continue;
            };
            let terms = (0..depth).map(|k| {
                let at = |m: Mat<'_, f32>, r: usize, c: usize| {
                    f64::from(m.data[r * m.row_stride + c * m.column_stride])
                };
                at(a, row, k) * at(b, k, column)
            });
            let sum = 0.5 * terms.sum::<f64>() + if is_added { f64::from(*before) } else { 0.0 };
            let close = (f64::from(*got) - sum).abs() < 1e-6 * (depth as f64 + 10.0);
            assert!(close, "{rows}×{depth}×{columns}, layout {layout}, {at}: {got} {sum}");
        }
    }

    /// Neither where the sides change places.
    #[test]
    fn rows_beside_a_transposed_side_are_independent() {
        if !has_own_kernels() {
            return;
        }
        let (a, b) = (numbers(200 * 700, 1), numbers(700 * 90, 2));
        let b = Mat::new(&b, 90, 700).t();
        let mut all = vec![0f32; 200 * 90];
        gemm(&mut all, 1.0, Mat::new(&a, 200, 700), b, Threads::All, Precision::F32);
        for rows in [17, 40, 64] {
            let mut some = vec![0f32; rows * 90];
            gemm(
                &mut some,
                1.0,
                Mat::new(&a[..rows * 700], rows, 700),
                b,
                Threads::All,
                Precision::F32,
            );
            assert_eq!(some, all[..rows * 90], "{rows}");
        }
    }

    pub(in super::super) fn has_own_kernels() -> bool {
        #[cfg(target_arch = "x86_64")]
        return avx512::is_available();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// A row's result does not depend on the rows beside it, nor on the threads.
    #[test]
    fn rows_are_independent() {
        let (a, b) = (numbers(200 * 700, 1), numbers(700 * 90, 2));
        let b = Mat::new(&b, 700, 90);
        let mut all = vec![0f32; 200 * 90];
        gemm(&mut all, 1.0, Mat::new(&a, 200, 700), b, Threads::All, Precision::F32);
        let mut alone = vec![0f32; 200 * 90];
        gemm(&mut alone, 1.0, Mat::new(&a, 200, 700), b, Threads::One, Precision::F32);
        assert_eq!(all, alone);
        if has_own_kernels() {
            // A few rows of a transposed right side have another order of sums: see there.
            for (row, all) in all.chunks(90).enumerate() {
                let mut one = vec![0f32; 90];
                gemm(
                    &mut one,
                    1.0,
                    Mat::new(&a[row * 700..][..700], 1, 700),
                    b,
                    Threads::One,
                    Precision::F32,
                );
                assert_eq!(one, all);
            }
        }
    }
}
