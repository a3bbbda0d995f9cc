//! Max-pooling of planes by windows side by side.

use crate::kernels::Real;

/// The largest side of a window: places in it are bytes.
pub(super) const LARGEST: usize = 15;

/// Windows of `kernel`×`kernel` pixels side by side; what is left at the ends is not looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pooling {
    pub(super) kernel: usize,
    pub(super) height: usize,
    pub(super) width: usize,
}

impl Pooling {
    /// Pixels of a pooled plane.
    pub(super) fn area(&self) -> usize {
        (self.height / self.kernel) * (self.width / self.kernel)
    }

    /// The first maximum of each window in reading order, and its place in the window; a NaN
    /// counts as the maximum.
    #[inline(always)]
    pub(super) fn pool<T: Real>(&self, plane: &[T], y: &mut [T], best: &mut [u8]) {
        match self.kernel {
            2 => self.pool_by(2, plane, y, best),
            kernel => self.pool_by(kernel, plane, y, best),
        }
    }

    #[inline(always)]
    fn pool_by<T: Real>(&self, kernel: usize, plane: &[T], y: &mut [T], best: &mut [u8]) {
        let width = self.width / kernel;
        let outputs = y.chunks_exact_mut(width).zip(best.chunks_exact_mut(width));
        for ((y, best), rows) in outputs.zip(plane.chunks_exact(kernel * self.width)) {
            y.fill(T::from_f64(f64::NEG_INFINITY));
            best.fill(0);
            for row in 0..kernel {
                let pixels = rows[row * self.width..][..width * kernel].chunks_exact(kernel);
                for ((y, best), pixels) in y.iter_mut().zip(best.iter_mut()).zip(pixels) {
                    for (column, &pixel) in pixels.iter().enumerate() {
                        #[expect(clippy::eq_op, reason = "true for a NaN alone")]
                        let is_larger = (pixel > *y) | (pixel != pixel);
                        *y = if is_larger { pixel } else { *y };
                        *best = if is_larger { (row * kernel + column) as u8 } else { *best };
                    }
                }
            }
        }
    }

    /// Gives each window's gradient to its maximum, and the other pixels 0.
    pub(super) fn unpool<T: Real>(&self, gradient: &[T], best: &[u8], plane: &mut [T]) {
        let (kernel, width) = (self.kernel, self.width / self.kernel);
        plane.fill(T::zero());
        let rows = gradient.chunks_exact(width).zip(best.chunks_exact(width));
        for ((gradient, best), rows) in rows.zip(plane.chunks_exact_mut(kernel * self.width)) {
            for (column, (gradient, best)) in gradient.iter().zip(best).enumerate() {
                let (y, x) = (usize::from(*best) / kernel, usize::from(*best) % kernel);
                rows[y * self.width + column * kernel + x] = *gradient;
            }
        }
    }
}
