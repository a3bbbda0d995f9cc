//! Max-pooling of planes by windows side by side.

use crate::kernels::Real;

/// The largest side of a window: places in it are bytes.
pub(in crate::layers) const LARGEST: usize = 15;

/// Windows of `kernel`×`kernel` pixels side by side; what is left at the ends is not looked at.
#[derive(Clone, Copy, Debug)]
pub(in crate::layers) struct Pooling {
    pub(in crate::layers) kernel: usize,
    pub(in crate::layers) height: usize,
    pub(in crate::layers) width: usize,
}

impl Pooling {
    /// Pixels of a pooled plane.
    pub(in crate::layers) fn area(&self) -> usize {
        (self.height / self.kernel) * (self.width / self.kernel)
    }

    /// The first maximum of each window in reading order, and its place in the window; a NaN
    /// counts as the maximum.
    #[inline(always)]
    pub(in crate::layers) fn pool<T: Real>(&self, plane: &[T], y: &mut [T], best: &mut [u8]) {
        let (kernel, width) = (self.kernel, self.width / self.kernel);
        let outputs = y.chunks_exact_mut(width).zip(best.chunks_exact_mut(width));
        for ((y, best), rows) in outputs.zip(plane.chunks_exact(kernel * self.width)) {
            match kernel {
                2 => pool_pairs(rows.split_at(self.width), y, best),
                _ => self.pool_rows(rows, y, best),
            }
        }
    }

    #[inline(always)]
    fn pool_rows<T: Real>(&self, rows: &[T], y: &mut [T], best: &mut [u8]) {
        y.fill(T::from_f64(f64::NEG_INFINITY));
        best.fill(0);
        for (row, pixels) in rows.chunks_exact(self.width).enumerate() {
            let windows = pixels.chunks_exact(self.kernel);
            for ((y, best), pixels) in y.iter_mut().zip(best.iter_mut()).zip(windows) {
                for (column, &pixel) in pixels.iter().enumerate() {
                    let place = (row * self.kernel + column) as u8;
                    (*y, *best) = larger((*y, *best), (pixel, place));
                }
            }
        }
    }

    /// Gives each window's gradient to its maximum, and the other pixels 0.
    #[inline(always)]
    pub(in crate::layers) fn unpool<T: Real>(&self, gradient: &[T], best: &[u8], plane: &mut [T]) {
        let (kernel, width) = (self.kernel, self.width / self.kernel);
        let whole = gradient.len() / width * kernel * self.width;
        plane[whole..].fill(T::zero());
        let rows = gradient.chunks_exact(width).zip(best.chunks_exact(width));
        for ((gradient, best), rows) in rows.zip(plane.chunks_exact_mut(kernel * self.width)) {
            if kernel == 2 {
                unpool_pairs(gradient, best, rows.split_at_mut(self.width));
                continue;
            }
            rows.fill(T::zero());
            for (column, (gradient, best)) in gradient.iter().zip(best).enumerate() {
                let (y, x) = (usize::from(*best) / kernel, usize::from(*best) % kernel);
                rows[y * self.width + column * kernel + x] = *gradient;
            }
        }
    }
}

/// The larger of two values with their places; the first, if they are alike.
#[inline(always)]
fn larger<T: Real>(a: (T, u8), b: (T, u8)) -> (T, u8) {
    #[expect(clippy::eq_op, reason = "true for a NaN alone")]
    let is_larger = (b.0 > a.0) | (b.0 != b.0);
    if is_larger { b } else { a }
}

/// Two rows of windows of two pixels: a loop that becomes vector code.
#[inline(always)]
fn pool_pairs<T: Real>((top, bottom): (&[T], &[T]), y: &mut [T], best: &mut [u8]) {
    let rows = top.as_chunks::<2>().0.iter().zip(bottom.as_chunks::<2>().0);
    for ((y, best), (top, bottom)) in y.iter_mut().zip(best).zip(rows) {
        let first = larger((top[0], 0), (top[1], 1));
        (*y, *best) = larger(larger(first, (bottom[0], 2)), (bottom[1], 3));
    }
}

#[inline(always)]
fn unpool_pairs<T: Real>(gradient: &[T], best: &[u8], (top, bottom): (&mut [T], &mut [T])) {
    let (top, top_rest) = top.as_chunks_mut::<2>();
    let (bottom, bottom_rest) = bottom.as_chunks_mut::<2>();
    top_rest.fill(T::zero());
    bottom_rest.fill(T::zero());
    let rows = top.iter_mut().zip(bottom);
    for ((gradient, best), (top, bottom)) in gradient.iter().zip(best).zip(rows) {
        let of = |place| gradient.when(*best == place);
        *top = [of(0), of(1)];
        *bottom = [of(2), of(3)];
    }
}
