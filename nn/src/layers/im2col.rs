//! Images as matrices, so that a convolution is a matrix product.
//!
//! Chellapilla, Puri, Simard: *High Performance Convolutional Neural Networks for Document
//! Processing* (IWFHR 2006). A *tap* is one weight of a kernel: a channel, a row and a column. The
//! matrix has a row per tap and a column per output pixel, images side by side, so that both ways
//! copy whole runs of pixels.

use crate::cpu::TASK_ELEMENTS;
use candle_core::WithDType;
use rayon::prelude::*;
use std::ops::Range;

/// Elements of a matrix that is made at once: 4 MiB of `f32`, to stay near the caches. A constant,
/// because the order of sums over images follows from it.
const MATRIX_ELEMENTS: usize = 1 << 20;

/// The sizes of one convolution.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) channels: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) outputs: usize,
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) padding: usize,
}

/// One tap: its channel, and where it sits in the window.
struct Tap {
    channel: usize,
    y: usize,
    x: usize,
}

impl Geometry {
    pub(super) fn out_height(&self) -> usize {
        (self.height + 2 * self.padding - self.kernel) / self.stride + 1
    }

    pub(super) fn out_width(&self) -> usize {
        (self.width + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Pixels of an output plane.
    pub(super) fn out_area(&self) -> usize {
        self.out_height() * self.out_width()
    }

    /// Weights of one output channel.
    pub(super) fn taps(&self) -> usize {
        self.channels * self.kernel * self.kernel
    }

    /// Numbers of one input image.
    pub(super) fn image(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Numbers of one output image.
    pub(super) fn out_image(&self) -> usize {
        self.outputs * self.out_area()
    }

    /// How many images to take at once.
    pub(super) fn images_at_once(&self) -> usize {
        (MATRIX_ELEMENTS / (self.taps() * self.out_area())).max(1)
    }

    /// `[images, channels, height, width]` to `[taps, images · out_area]`.
    pub(super) fn im2col<T: WithDType>(&self, x: &[T]) -> Vec<T> {
        let (images, area) = (x.len() / self.image(), self.height * self.width);
        let mut matrix = vec![T::zero(); self.taps() * images * self.out_area()];
        let rows = matrix.par_chunks_mut(images * self.out_area()).enumerate();
        rows.for_each(|(tap, row)| {
            let tap = self.tap(tap);
            for (out, image) in row.chunks_mut(self.out_area()).zip(x.chunks(self.image())) {
                let plane = &image[tap.channel * area..][..area];
                self.runs(&tap, |pixels, start| self.gather(&mut out[pixels], &plane[start..]));
            }
        });
        matrix
    }

    /// Its transpose: adds every element of the matrix to the pixel that it came from.
    pub(super) fn col2im<T: WithDType>(&self, matrix: &[T], x: &mut [T]) {
        let (images, area) = (x.len() / self.image(), self.height * self.width);
        let (out_area, per_channel) = (self.out_area(), self.kernel * self.kernel);
        let planes = x.par_chunks_mut(area).enumerate();
        planes.with_min_len((TASK_ELEMENTS / area / per_channel).max(1)).for_each(
            |(index, plane)| {
                let (image, channel) = (index / self.channels, index % self.channels);
                for tap in channel * per_channel..(channel + 1) * per_channel {
                    let row = &matrix[(tap * images + image) * out_area..][..out_area];
                    self.runs(&self.tap(tap), |pixels, start| {
                        self.scatter(&row[pixels], &mut plane[start..])
                    });
                }
            },
        );
    }

    /// `[outputs, images · out_area]` plus a bias to `[images, outputs, out_area]`.
    pub(super) fn images_first<T: WithDType>(&self, matrix: &[T], bias: &[T], y: &mut [T]) {
        let (images, out_area) = (y.len() / self.out_image(), self.out_area());
        y.par_chunks_mut(self.out_image()).enumerate().for_each(|(image, y)| {
            for (output, (y, bias)) in y.chunks_mut(out_area).zip(bias).enumerate() {
                let run = &matrix[(output * images + image) * out_area..][..out_area];
                y.iter_mut().zip(run).for_each(|(y, value)| *y = *value + *bias);
            }
        });
    }

    /// `[images, outputs, out_area]` to `[outputs, images · out_area]`.
    pub(super) fn outputs_first<T: WithDType>(&self, y: &[T]) -> Vec<T> {
        let mut matrix = vec![T::zero(); y.len()];
        let (images, out_area) = (y.len() / self.out_image(), self.out_area());
        matrix.par_chunks_mut(images * out_area).enumerate().for_each(|(output, row)| {
            for (run, image) in row.chunks_mut(out_area).zip(y.chunks(self.out_image())) {
                run.copy_from_slice(&image[output * out_area..][..out_area]);
            }
        });
        matrix
    }

    fn tap(&self, index: usize) -> Tap {
        Tap {
            channel: index / (self.kernel * self.kernel),
            y: index / self.kernel % self.kernel,
            x: index % self.kernel,
        }
    }

    /// Calls `run` for each row of output pixels that `tap` reaches: which pixels of the output
    /// plane, and where in the input plane the first of them lies.
    fn runs(&self, tap: &Tap, mut run: impl FnMut(Range<usize>, usize)) {
        let columns = self.reached(tap.x, self.width, self.out_width());
        if columns.is_empty() {
            return;
        }
        for row in self.reached(tap.y, self.height, self.out_height()) {
            let y = row * self.stride + tap.y - self.padding;
            let x = columns.start * self.stride + tap.x - self.padding;
            let first = row * self.out_width();
            run(first + columns.start..first + columns.end, y * self.width + x);
        }
    }

    /// The output positions whose input position, `position · stride + tap − padding`, is one.
    fn reached(&self, tap: usize, size: usize, out: usize) -> Range<usize> {
        let start = self.padding.saturating_sub(tap).div_ceil(self.stride);
        let end = (size + self.padding).saturating_sub(tap).div_ceil(self.stride);
        start..end.min(out)
    }

    fn gather<T: WithDType>(&self, out: &mut [T], plane: &[T]) {
        match self.stride {
            1 => out.copy_from_slice(&plane[..out.len()]),
            stride => {
                let pixels = plane.iter().step_by(stride);
                out.iter_mut().zip(pixels).for_each(|(out, pixel)| *out = *pixel);
            }
        }
    }

    fn scatter<T: WithDType>(&self, row: &[T], plane: &mut [T]) {
        match self.stride {
            1 => plane.iter_mut().zip(row).for_each(|(pixel, value)| *pixel += *value),
            stride => {
                let pixels = plane.iter_mut().step_by(stride);
                pixels.zip(row).for_each(|(pixel, value)| *pixel += *value);
            }
        }
    }
}
