//! Where the windows of a pooling lie.

use super::PoolOptions;
use std::ops::Range;

/// The windows along one axis.
#[derive(Clone, Debug)]
pub(super) struct Spans {
    pub(super) size: usize,
    /// Within the image.
    pub(super) spans: Vec<Range<usize>>,
    /// What the sum of each is divided by for its average.
    pub(super) counts: Vec<usize>,
}

impl Spans {
    /// Windows of one size; `None` where not even one fits.
    pub(super) fn sliding(size: usize, options: PoolOptions) -> Option<Self> {
        let PoolOptions { kernel, stride, padding, count_include_pad } = options;
        let padded = (size + 2 * padding).checked_sub(kernel).filter(|_| size > 0)?;
        let spans = (0..=padded / stride).map(|at| at * stride);
        let spans = spans.map(|start| {
            start.saturating_sub(padding)..(start + kernel).saturating_sub(padding).min(size)
        });
        let spans: Vec<Range<usize>> = spans.collect();
        let count = |span: &Range<usize>| if count_include_pad { kernel } else { span.len() };
        Some(Self { size, counts: spans.iter().map(count).collect(), spans })
    }

    /// `out` windows that share the axis as evenly as whole pixels allow; they may overlap.
    pub(super) fn adaptive(size: usize, out: usize) -> Self {
        let span = |at: usize| at * size / out..((at + 1) * size).div_ceil(out);
        let spans: Vec<Range<usize>> = (0..out).map(span).collect();
        Self { size, counts: spans.iter().map(Range::len).collect(), spans }
    }

    pub(super) fn out(&self) -> usize {
        self.spans.len()
    }
}

/// The windows of a plane.
#[derive(Clone, Debug)]
pub(super) struct Windows {
    pub(super) height: Spans,
    pub(super) width: Spans,
}

impl Windows {
    /// Pixels of a plane.
    pub(super) fn area(&self) -> usize {
        self.height.size * self.width.size
    }

    pub(super) fn out_area(&self) -> usize {
        self.height.out() * self.width.out()
    }

    /// Calls `visit` for each window in reading order.
    #[inline(always)]
    pub(super) fn each(&self, mut visit: impl FnMut(Window)) {
        for (rows, height) in self.height.spans.iter().zip(&self.height.counts) {
            for (columns, width) in self.width.spans.iter().zip(&self.width.counts) {
                let (rows, columns) = (rows.clone(), columns.clone());
                visit(Window { rows, columns, stride: self.width.size, count: height * width });
            }
        }
    }
}

pub(super) struct Window {
    rows: Range<usize>,
    columns: Range<usize>,
    /// From one row of the plane to the next.
    stride: usize,
    pub(super) count: usize,
}

impl Window {
    /// The place of its first pixel in the plane.
    #[inline(always)]
    pub(super) fn first(&self) -> usize {
        self.rows.start * self.stride + self.columns.start
    }

    /// The places of its rows in the plane.
    #[inline(always)]
    pub(super) fn rows(self) -> impl Iterator<Item = Range<usize>> {
        let Self { rows, columns, stride, .. } = self;
        rows.map(move |row| row * stride + columns.start..row * stride + columns.end)
    }
}
