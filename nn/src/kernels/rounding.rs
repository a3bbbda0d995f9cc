//! Products of numbers that are rounded to `bf16`.

use super::gemm::tests::{has_own_kernels, numbers};
use super::gemm::{Mat, Out, Threads, gemm, is_rounded, product};
use crate::Precision;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// What [`Precision::Bf16`] makes of a number here.
fn rounded(numbers: &[f32]) -> Vec<f32> {
    if is_rounded(Precision::Bf16) {
        let numbers = Tensor::from_slice(numbers, numbers.len(), &Device::Cpu);
        let numbers = numbers.and_then(|n| n.to_dtype(DType::BF16)?.to_dtype(DType::F32));
        return numbers.and_then(|n| n.to_vec1()).expect("rounded");
    }
    numbers.to_vec()
}

/// The order of sums is all that differs.
#[test]
fn rounded_products_are_those_of_rounded_numbers() {
    for (rows, depth, columns) in [(17, 33, 70), (40, 600, 90), (130, 1101, 65), (9, 7, 20)] {
        let (a, b) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
        let [a_rounded, b_rounded] = [&a, &b].map(|numbers| rounded(numbers));
        for layout in 0..4 {
            let left = |a| match layout & 1 {
                0 => Mat::new(a, rows, depth),
                _ => Mat::new(a, depth, rows).t(),
            };
            let right = |b| match layout & 2 {
                0 => Mat::new(b, depth, columns),
                _ => Mat::new(b, columns, depth).t(),
            };
            let of = |a, b, precision| {
                let mut out = vec![0.25f32; rows * columns];
                let to = Out { rows: &mut out, first: 0, stride: columns };
                product(to, true, 0.5, left(a), right(b), Threads::All, precision);
                out
            };
            if layout == 2 && rows <= 16 {
                continue; // of numbers as they are: see `avx512`
            }
            let ours = of(&a, &b, Precision::Bf16);
            let theirs = of(&a_rounded, &b_rounded, Precision::F32);
            let exact = of(&a, &b, Precision::F32);
            let off = |other: &[f32]| {
                let pairs = ours.iter().zip(other);
                pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
            };
            let least = 1e-6 * (depth as f32).sqrt();
            assert!(off(&theirs) < least, "{rows}×{depth}×{columns} {layout}: {}", off(&theirs));
            assert_eq!(off(&exact) > 10.0 * least, is_rounded(Precision::Bf16));
            assert!(off(&exact) < 0.02 * (depth as f32).sqrt(), "{}", off(&exact));
        }
    }
}

/// Ties go to the even number, denormal ones to 0; what is no number, or none that is finite,
/// stays so.
#[test]
fn rounding_is_to_the_nearest() {
    let cases = [
        (1.0 + 1.0 / 256.0, 1.0),
        (1.0 + 3.0 / 256.0, 1.0 + 2.0 / 128.0),
        (-1.0 - 1.1 / 256.0, -1.0 - 1.0 / 128.0),
        (f32::MAX, f32::INFINITY),
        (f32::NEG_INFINITY, f32::NEG_INFINITY),
        (f32::NAN, f32::NAN),
        (1e-40, 0.0),
    ];
    for (number, wanted) in cases {
        // Alone in its row, on either side.
        let mut a = vec![0.0; 20 * 3];
        a[4 * 3 + 2] = number;
        let ones = [1.0; 3 * 20];
        let mut out = [vec![0.0; 400], vec![0.0; 400]];
        let (a, ones) = (Mat::new(&a, 20, 3), Mat::new(&ones, 3, 20));
        let [left, right] = out.each_mut();
        gemm(left, 1.0, a, ones, Threads::One, Precision::Bf16);
        gemm(right, 1.0, ones.t(), a.t(), Threads::One, Precision::Bf16);
        let wanted = if is_rounded(Precision::Bf16) { wanted } else { number };
        for got in [left[4 * 20], right[4]] {
            let is_same = got == wanted || got.is_nan() && wanted.is_nan();
            assert!(is_same, "{number:e} became {got:e}");
        }
    }
}

#[test]
fn rounded_rows_are_independent() {
    let (a, b) = (numbers(200 * 700, 1), numbers(700 * 90, 2));
    let b = Mat::new(&b, 90, 700).t();
    let of = |rows: Range<usize>, threads| {
        let mut out = vec![0f32; rows.len() * 90];
        let a = Mat::new(&a[rows.start * 700..rows.end * 700], rows.len(), 700);
        gemm(&mut out, 1.0, a, b, threads, Precision::Bf16);
        out
    };
    let all = of(0..200, Threads::All);
    assert_eq!(all, of(0..200, Threads::One));
    if has_own_kernels() {
        for rows in [0..40, 3..100, 130..200] {
            let wanted = &all[rows.start * 90..rows.end * 90];
            assert_eq!(of(rows, Threads::All), wanted);
        }
    }
}
