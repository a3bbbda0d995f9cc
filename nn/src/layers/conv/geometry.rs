//! Images as matrices, so that a convolution is a matrix product.
//!
//! Chellapilla, Puri, Simard: *High Performance Convolutional Neural Networks for Document
//! Processing* (IWFHR 2006). A *tap* is one weight of a kernel: a channel, a row and a column. The
//! matrix has a row per tap and a column per output pixel, images side by side, so that both ways
//! copy whole runs of pixels.

use crate::kernels::Real;
use std::ops::Range;

/// One axis of a convolution.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    pub(super) size: usize,
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) padding: usize,
    pub(super) dilation: usize,
    /// Positions of the window.
    pub(super) out: usize,
}

impl Axis {
    /// The height of images that have none.
    pub(super) const ONE: Self =
        Self { size: 1, kernel: 1, stride: 1, padding: 0, dilation: 1, out: 1 };

    /// Pixels that the window covers, gaps included.
    pub(super) fn reach(kernel: usize, dilation: usize) -> usize {
        (kernel - 1) * dilation + 1
    }

    /// The output positions whose input position, `position · stride + tap · dilation − padding`,
    /// is one, and the input position of the first.
    #[inline(always)]
    fn reached(&self, tap: usize) -> (Range<usize>, usize) {
        let offset = tap * self.dilation;
        let start = self.padding.saturating_sub(offset).div_ceil(self.stride).min(self.out);
        let end = (self.size + self.padding).saturating_sub(offset).div_ceil(self.stride);
        let range = start..end.min(self.out).max(start);
        let first = (start * self.stride + offset).saturating_sub(self.padding);
        (range, first)
    }
}

/// The sizes of one convolution; of one of its groups, where there are several.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// Of the group.
    pub(super) channels: usize,
    /// Of the group.
    pub(super) outputs: usize,
    pub(super) groups: usize,
    pub(super) height: Axis,
    pub(super) width: Axis,
}

impl Geometry {
    /// Pixels of an input plane.
    pub(super) fn area(&self) -> usize {
        self.height.size * self.width.size
    }

    /// Pixels of an output plane.
    pub(super) fn out_area(&self) -> usize {
        self.height.out * self.width.out
    }

    fn per_channel(&self) -> usize {
        self.height.kernel * self.width.kernel
    }

    /// Weights of one output channel.
    pub(super) fn taps(&self) -> usize {
        self.channels * self.per_channel()
    }

    /// Numbers of one input image, all groups.
    pub(super) fn image(&self) -> usize {
        self.groups * self.channels * self.area()
    }

    /// Numbers of an image before and after, all groups.
    pub(super) fn numbers(&self) -> usize {
        self.image() + self.groups * self.outputs * self.out_area()
    }

    /// One group's share of an image of `channels` channels a group.
    pub(super) fn share(&self, group: usize, channels: usize, area: usize) -> Range<usize> {
        let size = channels * area;
        group * size..(group + 1) * size
    }

    /// The rows `taps` of the matrix of one group: `[taps, images · out_area]` of whole images.
    #[inline(always)]
    pub(super) fn im2col<T: Real>(&self, x: &[T], group: usize, tap: usize, row: &mut [T]) {
        let channel = group * self.channels + tap / self.per_channel();
        for (out, image) in row.chunks_mut(self.out_area()).zip(x.chunks(self.image())) {
            let plane = &image[channel * self.area()..][..self.area()];
            self.gather(tap % self.per_channel(), plane, out);
        }
    }

    /// Its transpose: adds what belongs to one plane of an image to it. `row(tap)` is the image's
    /// part of a row of the matrix.
    #[inline(always)]
    pub(super) fn col2im<'a, T: Real>(
        &self,
        channel: usize,
        row: impl Fn(usize) -> &'a [T],
        plane: &mut [T],
    ) {
        for tap in 0..self.per_channel() {
            self.scatter(tap, row(channel * self.per_channel() + tap), plane);
        }
    }

    /// Every pixel that one tap of a channel meets, zeros outside of the image.
    #[inline(always)]
    fn gather<T: Real>(&self, tap: usize, plane: &[T], out: &mut [T]) {
        let (rows, first_row) = self.height.reached(tap / self.width.kernel);
        let (columns, first) = self.width.reached(tap % self.width.kernel);
        let width = self.width.out;
        out[..rows.start * width].fill(T::zero());
        out[rows.end * width..].fill(T::zero());
        for (at, row) in rows.clone().enumerate() {
            let out = &mut out[row * width..][..width];
            out[..columns.start].fill(T::zero());
            out[columns.end..].fill(T::zero());
            let y = first_row + at * self.height.stride;
            let out = &mut out[columns.clone()];
            let pixels = plane[y * self.width.size..][..self.width.size].get(first..);
            let pixels = pixels.unwrap_or_default();
            match self.width.stride {
                1 => out.copy_from_slice(&pixels[..out.len()]),
                stride => {
                    let pixels = pixels.iter().step_by(stride);
                    out.iter_mut().zip(pixels).for_each(|(out, pixel)| *out = *pixel);
                }
            }
        }
    }

    #[inline(always)]
    fn scatter<T: Real>(&self, tap: usize, row: &[T], plane: &mut [T]) {
        let (rows, first_row) = self.height.reached(tap / self.width.kernel);
        let (columns, first) = self.width.reached(tap % self.width.kernel);
        for (at, out_row) in rows.enumerate() {
            let values = &row[out_row * self.width.out..][columns.clone()];
            let y = first_row + at * self.height.stride;
            let pixels = plane[y * self.width.size..][..self.width.size].get_mut(first..);
            let pixels = pixels.unwrap_or_default();
            match self.width.stride {
                1 => pixels.iter_mut().zip(values).for_each(|(pixel, value)| *pixel += *value),
                stride => {
                    let pixels = pixels.iter_mut().step_by(stride);
                    pixels.zip(values).for_each(|(pixel, value)| *pixel += *value);
                }
            }
        }
    }
}
