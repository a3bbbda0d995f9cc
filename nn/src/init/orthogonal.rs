//! Random matrices with orthonormal rows or columns.

use crate::Precision;
use crate::kernels::{Mat, Threads, gemm, gemm_add, output};

/// Vectors that are made orthogonal one by one; what came before is removed from all of them by
/// matrix products.
const PANEL: usize = 32;

/// Makes the shorter side of a matrix with `rows` rows orthonormal: the factor Q of its QR
/// decomposition whose R has a positive diagonal, which for normal numbers is uniformly distributed.
pub(super) fn orthogonalise(matrix: &mut [f64], rows: usize) {
    let columns = matrix.len() / rows.max(1);
    if rows <= columns {
        return orthonormalise(matrix, columns);
    }
    let mut vectors = transposed(matrix, columns);
    orthonormalise(&mut vectors, rows);
    matrix.copy_from_slice(&transposed(&vectors, rows));
}

fn transposed(matrix: &[f64], columns: usize) -> Vec<f64> {
    let column = |at: usize| matrix.iter().skip(at).step_by(columns.max(1)).copied();
    (0..columns).flat_map(column).collect()
}

/// Gram–Schmidt for rows of `len` numbers, no more than `len` of them. Each part is done twice,
/// which is enough for full precision (Giraud et al., 2005).
fn orthonormalise(vectors: &mut [f64], len: usize) {
    for start in (0..vectors.len()).step_by((PANEL * len).max(1)) {
        let (before, rest) = vectors.split_at_mut(start);
        let size = rest.len().min(PANEL * len);
        let panel = &mut rest[..size];
        for _ in 0..2 {
            remove(before, panel, len);
            gram_schmidt(panel, len);
        }
    }
}

/// Subtracts from `panel` what lies in the direction of `before`.
fn remove(before: &[f64], panel: &mut [f64], len: usize) {
    let (directions, count) = (before.len() / len, panel.len() / len);
    let before = Mat::new(before, directions, len);
    let shares = output(count * directions, |shares: &mut [f64]| {
        gemm(shares, -1.0, Mat::new(panel, count, len), before.t(), Threads::All, Precision::F32);
    });
    gemm_add(panel, Mat::new(&shares, count, directions), before, Threads::All, Precision::F32);
}

fn gram_schmidt(panel: &mut [f64], len: usize) {
    for start in (0..panel.len()).step_by(len) {
        let (before, rest) = panel.split_at_mut(start);
        let vector = &mut rest[..len];
        for direction in before.chunks_exact(len) {
            let share = dot(direction, vector);
            vector.iter_mut().zip(direction).for_each(|(x, d)| *x -= share * d);
        }
        let norm = dot(vector, vector).sqrt();
        vector.iter_mut().for_each(|x| *x /= norm);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
