//! Products and transposes of any shape and layout, in memory with forbidden pages beside it.

use super::gemm::{Mat, Out, Packed, Threads, product, transpose};
use super::guarded::{Guard, Guarded};
use crate::Precision;
use proptest::prelude::*;

/// How a matrix lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Rows,
    /// Rows that are further apart than they are long.
    Apart(usize),
    Columns,
    /// Columns that are further apart than they are long.
    ColumnsApart(usize),
}

#[derive(Clone, Debug)]
struct Case {
    rows: usize,
    depth: usize,
    columns: usize,
    layouts: [Layout; 2],
    guards: [Guard; 3],
    is_added: bool,
    /// Between rows of the result, beyond their length.
    gap: usize,
    threads: Threads,
    precision: Precision,
}

fn layout() -> impl Strategy<Value = Layout> {
    prop_oneof![
        Just(Layout::Rows),
        (1usize..9).prop_map(Layout::Apart),
        Just(Layout::Columns),
        (1usize..9).prop_map(Layout::ColumnsApart),
    ]
}

fn guard() -> impl Strategy<Value = Guard> {
    prop_oneof![Just(Guard::Before), Just(Guard::After)]
}

/// Small, around the sizes of tiles and vectors, and some that take several blocks.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0usize..20, 3 => 60usize..70, 1 => 120usize..140]
}

fn depth() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0usize..40, 1 => 500usize..530, 1 => 1020usize..1040]
}

fn case() -> impl Strategy<Value = Case> {
    let shape = (size(), depth(), size(), 0usize..5);
    let layouts = [layout(), layout()];
    let precision = prop_oneof![Just(Precision::F32), Just(Precision::Bf16)];
    let how = (any::<bool>(), any::<bool>(), precision);
    (shape, layouts, [guard(), guard(), guard()], how).prop_map(
        |((rows, depth, columns, gap), layouts, guards, (is_added, is_parallel, precision))| {
            let threads = if is_parallel { Threads::All } else { Threads::One };
            Case { rows, depth, columns, layouts, guards, is_added, gap, threads, precision }
        },
    )
}

/// Whole numbers, whose products and sums are exact, rounded to `bf16` or not.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|at| ((at * 7 + seed * 5 + at * at % 11) % 13) as f32 - 6.0).collect()
}

/// A matrix without anything after its last element.
fn matrix(rows: usize, columns: usize, layout: Layout, guard: Guard, seed: usize) -> Guarded {
    let len = match layout {
        Layout::Apart(gap) if rows * columns > 0 => (rows - 1) * (columns + gap) + columns,
        Layout::ColumnsApart(gap) if rows * columns > 0 => (columns - 1) * (rows + gap) + rows,
        _ => rows * columns,
    };
    Guarded::new(&numbers(len, seed), guard)
}

fn view(data: &[f32], rows: usize, columns: usize, layout: Layout) -> Mat<'_, f32> {
    match layout {
        Layout::Rows => Mat::new(data, rows, columns),
        Layout::Apart(gap) => Mat::strided(data, rows, columns, columns + gap),
        Layout::Columns => Mat::new(data, columns, rows).t(),
        Layout::ColumnsApart(gap) => Mat::strided(data, columns, rows, rows + gap).t(),
    }
}

fn at(data: &[f32], [rows, columns]: [usize; 2], layout: Layout, row: usize, column: usize) -> f32 {
    match layout {
        Layout::Rows => data[row * columns + column],
        Layout::Apart(gap) => data[row * (columns + gap) + column],
        Layout::Columns => data[column * rows + row],
        Layout::ColumnsApart(gap) => data[column * (rows + gap) + row],
    }
}

proptest! {
    #[test]
    fn products_are_exact_and_touch_nothing_else(case in case()) {
        let Case { rows, depth, columns, layouts, guards, is_added, gap, threads, precision } = case;
        let a = matrix(rows, depth, layouts[0], guards[0], 1);
        let b = matrix(depth, columns, layouts[1], guards[1], 2);
        let stride = columns + gap;
        let len = if rows * columns == 0 { 0 } else { (rows - 1) * stride + columns };
        let before = numbers(len, 3);
        let mut out = Guarded::new(&before, guards[2]);
        let (left, right) =
            (view(&a, rows, depth, layouts[0]), view(&b, depth, columns, layouts[1]));
        let to = Out { rows: &mut out, first: 0, stride };
        product(to, is_added, 1.0, left, right, threads, precision);
        let sum = |row: usize, column: usize| -> f32 {
            let terms = (0..depth).map(|k| {
                at(&a, [rows, depth], layouts[0], row, k)
                    * at(&b, [depth, columns], layouts[1], k, column)
            });
            terms.sum()
        };
        for (at, (got, before)) in out.iter().zip(&before).enumerate() {
            let (row, column) = (at / stride, at % stride);
            let wanted = match column < columns {
                true => sum(row, column) + if is_added { *before } else { 0.0 },
                false => *before,
            };
            prop_assert_eq!(*got, wanted, "at {}, {}", row, column);
        }
        let mut packed = Guarded::new(&numbers(rows * columns, 3), guards[2]);
        Packed::new(right, precision).product(&mut packed, false, left);
        for (at, got) in packed.iter().enumerate() {
            prop_assert_eq!(*got, sum(at / columns, at % columns));
        }
        Packed::new(right, precision).product(&mut packed, true, left);
        for (at, got) in packed.iter().enumerate() {
            prop_assert_eq!(*got, 2.0 * sum(at / columns, at % columns));
        }
    }

    #[test]
    fn transposes_touch_nothing_else(
        (rows, columns) in (size(), size()),
        guards in [guard(), guard()],
        (gap, more) in (0usize..5, 0usize..40),
    ) {
        // A view may be of more than its rows.
        let len = rows * (columns + gap) + more;
        let from = Guarded::new(&numbers(len, 1), guards[0]);
        let mut to = Guarded::new(&vec![f32::NAN; rows * columns], guards[1]);
        transpose(view(&from, rows, columns, Layout::Apart(gap)), &mut to);
        for (place, got) in to.iter().enumerate() {
            let (column, row) = (place / rows, place % rows);
            prop_assert_eq!(*got, at(&from, [rows, columns], Layout::Apart(gap), row, column));
        }
    }
}
