//! The transforms of tiles: sixteen channels at a time, in loops that become vector code.

use crate::kernels::Real;

/// Channels that are worked on at once.
pub(super) const LANES: usize = 16;
/// Of a tile.
pub(super) const POINTS: usize = 16;
/// Weights of a window.
pub(super) const WINDOW: usize = 9;

/// Of each point, numbers that are written together.
pub(super) type Piece<'a, T> = [&'a mut [T]; POINTS];

/// Sixteen numbers of each element of a matrix.
pub(super) type Blocks<T, const N: usize> = [[[T; LANES]; N]; N];

/// Whatever is at these places.
#[inline(always)]
pub(super) fn load<T: Real, const N: usize>(from: &[T], places: [[usize; N]; N]) -> Blocks<T, N> {
    let mut blocks = [[[T::zero(); LANES]; N]; N];
    for (blocks, places) in blocks.iter_mut().zip(&places) {
        for (block, place) in blocks.iter_mut().zip(places) {
            block.copy_from_slice(&from[*place..][..LANES]);
        }
    }
    blocks
}

/// One block of all points, which are `stride` apart.
#[inline(always)]
pub(super) fn load_points<T: Real>(points: &[T], at: usize, stride: usize) -> Blocks<T, 4> {
    let mut places = [[0; 4]; 4];
    for (k, place) in places.as_flattened_mut().iter_mut().enumerate() {
        *place = k * stride + at;
    }
    load(points, places)
}

#[inline(always)]
pub(super) fn store<T: Real>(to: &mut Piece<'_, T>, at: usize, points: &Blocks<T, 4>) {
    for (to, from) in to.iter_mut().zip(points.as_flattened()) {
        to[at..][..LANES].copy_from_slice(from);
    }
}

/// Windows of weights; that of a lane is number `at(lane)`.
#[inline(always)]
pub(super) fn load_windows<T: Real>(weights: &[T], at: impl Fn(usize) -> usize) -> Blocks<T, 3> {
    let mut blocks = [[[T::zero(); LANES]; 3]; 3];
    for lane in 0..LANES {
        let window = &weights[at(lane) * WINDOW..][..WINDOW];
        let blocks = blocks.as_flattened_mut().iter_mut();
        blocks.zip(window).for_each(|(block, weight)| block[lane] = *weight);
    }
    blocks
}

/// Sets windows of weights or adds to them.
#[inline(always)]
pub(super) fn put_windows<T: Real>(
    blocks: &Blocks<T, 3>,
    weights: &mut [T],
    at: impl Fn(usize) -> usize,
    is_added: bool,
) {
    for lane in 0..LANES {
        let window = &mut weights[at(lane) * WINDOW..][..WINDOW];
        for (weight, block) in window.iter_mut().zip(blocks.as_flattened()) {
            *weight = if is_added { *weight + block[lane] } else { block[lane] };
        }
    }
}

/// Transforms columns, then rows, of each of the sixteen matrices.
#[inline(always)]
pub(super) fn both<T: Real, const N: usize, const M: usize>(
    from: &Blocks<T, N>,
    f: impl Fn([T; N]) -> [T; M],
) -> Blocks<T, M> {
    let mut to = [[[T::zero(); LANES]; M]; M];
    // A loop that becomes vector code.
    for lane in 0..LANES {
        let mut columns = [[T::zero(); N]; M];
        for column in 0..N {
            let mut of = [T::zero(); N];
            for row in 0..N {
                of[row] = from[row][column][lane];
            }
            let new = f(of);
            for row in 0..M {
                columns[row][column] = new[row];
            }
        }
        for row in 0..M {
            let new = f(columns[row]);
            for column in 0..M {
                to[row][column][lane] = new[column];
            }
        }
    }
    to
}

// The matrices of the paper, and their transposes.

#[inline(always)]
pub(super) fn input_to_points<T: Real>([a, b, c, d]: [T; 4]) -> [T; 4] {
    [a - c, b + c, c - b, b - d]
}

#[inline(always)]
pub(super) fn points_to_input<T: Real>([a, b, c, d]: [T; 4]) -> [T; 4] {
    [a, b - c + d, b + c - a, T::zero() - d]
}

#[inline(always)]
pub(super) fn weight_to_points<T: Real>([a, b, c]: [T; 3]) -> [T; 4] {
    let half = T::from_f64(0.5);
    [a, (a + c + b) * half, (a + c - b) * half, c]
}

#[inline(always)]
pub(super) fn points_to_weight<T: Real>([a, b, c, d]: [T; 4]) -> [T; 3] {
    let half = T::from_f64(0.5);
    let middle = (b + c) * half;
    [a + middle, (b - c) * half, middle + d]
}

#[inline(always)]
pub(super) fn points_to_result<T: Real>([a, b, c, d]: [T; 4]) -> [T; 2] {
    [a + b + c, b - c - d]
}

#[inline(always)]
pub(super) fn result_to_points<T: Real>([a, b]: [T; 2]) -> [T; 4] {
    [a, a + b, a - b, T::zero() - b]
}
