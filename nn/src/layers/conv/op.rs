//! A convolution, a bias, an activation and a max-pooling as one operation.
//!
//! Some images at a time become a matrix, which is multiplied while it is in the caches: each
//! thread takes images of its own where there are enough, else all share each product. Which of
//! the two, and how many images, follows from the shapes alone, and so does every sum's order.

use super::geometry::Geometry;
use super::pooling::Pooling;
use crate::backward::parameter_gradient;
use crate::cpu::with_values;
use crate::kernels::{
    Mat, Real, Threads, add_assign, gemm, gemm_add, lane_sum, output, vectorized,
};
use crate::layers::activation::{Activation, Scalar, Visitor};
use crate::link::{Source, Told, owned, result_kept};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Elements of the matrix of one thread's images: half a megabyte of `f32`, within an L2 cache.
const OWN: usize = 1 << 17;
/// Elements of a matrix that all threads work on.
const SHARED: usize = 1 << 20;
/// Into how many parts the images are split where each thread has its own; each has a gradient of
/// the weight, and these are added in order.
const PARTS: usize = 16;

/// One convolution, and what follows it.
#[derive(Clone, Copy)]
pub(super) struct Convolution {
    pub(super) geometry: Geometry,
    pub(super) activation: Activation,
    pub(super) pooling: Option<Pooling>,
}

/// How the images are gone through.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// Images of a matrix.
    images: usize,
    /// Images of a part, a multiple of the former.
    part: usize,
    /// Inside a part.
    threads: Threads,
}

impl Plan {
    fn new(geometry: &Geometry, images: usize) -> Self {
        let matrix = (geometry.taps() * geometry.out_area()).max(1);
        let own = (OWN / matrix).max(1);
        let chunks = images.div_ceil(own);
        if matrix <= 2 * OWN && chunks >= PARTS {
            return Self { images: own, part: chunks.div_ceil(PARTS) * own, threads: Threads::One };
        }
        let shared = (SHARED / matrix).clamp(1, images.max(1));
        Self { images: shared, part: images.max(1), threads: Threads::All }
    }
}

/// Memory that one part works in.
struct Scratch<T> {
    columns: Vec<T>,
    product: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new() -> Self {
        Self { columns: Vec::new(), product: Vec::new() }
    }
}

/// The first `len` elements, whatever they are.
fn sized<T: Real>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        *buffer = output(len, |_| ());
    }
    &mut buffer[..len]
}

/// Calls `f` for each run of `len` elements.
fn each_run<T: Real>(
    threads: Threads,
    data: &mut [T],
    len: usize,
    f: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    match threads {
        Threads::One => data.chunks_mut(len).enumerate().for_each(|(at, run)| f(at, run)),
        Threads::All => data.par_chunks_mut(len).enumerate().for_each(|(at, run)| f(at, run)),
    }
}

/// What stays the same while a convolution goes through its images.
struct Pass<'a, T> {
    of: Convolution,
    plan: Plan,
    weight: &'a [T],
}

impl Convolution {
    /// Pixels of a plane of the result.
    pub(super) fn y_area(&self) -> usize {
        self.pooling.map_or(self.geometry.out_area(), |pooling| pooling.area())
    }

    /// Numbers of an image of the result.
    fn y_image(&self) -> usize {
        self.geometry.groups * self.geometry.outputs * self.y_area()
    }

    /// Of images `x` and `weight [outputs, taps]`, outputs of all groups.
    pub(super) fn apply<T: Real>(
        self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        shape: [usize; 4],
    ) -> Result<Tensor> {
        let sources = [x, weight, bias].map(Source::of);
        let (y, best) =
            with_values([x, weight, bias], |values| Ok(self.forward::<T>(values, shape[0])))?;
        let [x, weight, bias] = [x.detach(), weight.clone(), bias.clone()];
        let kept = sources.clone();
        let [a, b, c] = &sources;
        result_kept(y, shape.as_slice(), &[a, b, c], move |gradient, y| {
            let gradient = owned::<T>(gradient)?;
            self.backward([&x, &weight, &bias, y], &kept, &best, &gradient)
        })
    }

    /// The result, and where the maxima are, if it is pooled.
    pub(super) fn forward<T: Real>(
        self,
        [x, weight, bias]: [&[T]; 3],
        images: usize,
    ) -> (Vec<T>, Vec<u8>) {
        let plan = Plan::new(&self.geometry, images);
        let pass = Pass { of: self, plan, weight };
        let (x_part, y_part) = (plan.part * self.geometry.image(), plan.part * self.y_image());
        let mut best = vec![0; if self.pooling.is_some() { images * self.y_image() } else { 0 }];
        let y = output(images * self.y_image(), |y: &mut [T]| {
            // Nothing but empty parts where nothing is pooled.
            let bests: Vec<&mut [u8]> = match self.pooling {
                Some(_) => best.chunks_mut(y_part.max(1)).collect(),
                None => y.chunks(y_part.max(1)).map(|_| Default::default()).collect(),
            };
            let parts = y.par_chunks_mut(y_part.max(1)).zip(x.par_chunks(x_part.max(1)));
            parts.zip(bests).for_each(|((y, x), best)| pass.forward(x, bias, y, best));
        });
        (y, best)
    }

    fn backward<T: Real>(
        self,
        [x, weight, bias, y]: [&Tensor; 4],
        sources: &[Source; 3],
        best: &[u8],
        gradient: &[T],
    ) -> Result<Vec<Told>> {
        let images = x.dims()[0];
        with_values([x, weight, y], |[x, weights, y]| {
            let slopes = Slopes { y, best, gradient };
            let mut sums = Vec::new();
            let mut go =
                |dx: Option<&mut [T]>| sums = self.gradients(Some(x), weights, &slopes, images, dx);
            let dx = match sources[0].is_tracked() {
                true => sources[0].give(output(x.len(), |dx| go(Some(dx))))?,
                false => {
                    go(None);
                    None
                }
            };
            let dw =
                parameter_gradient(weight, |dw, added| total(&sums, |s| &s.weight, dw, added))?;
            let db = parameter_gradient(bias, |db, added| total(&sums, |s| &s.bias, db, added))?;
            Ok(vec![dx, dw, db])
        })
    }

    /// Writes the gradients of the images, if `dx` is there; those of weight and bias, by parts,
    /// are what comes out, if the images `x` are there.
    pub(super) fn gradients<T: Real>(
        self,
        x: Option<&[T]>,
        weight: &[T],
        slopes: &Slopes<'_, T>,
        images: usize,
        dx: Option<&mut [T]>,
    ) -> Vec<Sums<T>> {
        let plan = Plan::new(&self.geometry, images);
        let pass = Pass { of: self, plan, weight };
        let parts = images.div_ceil(plan.part).max(1);
        let mut sums: Vec<_> = (0..parts).map(|_| x.map(|_| Sums::new(&self.geometry))).collect();
        let part = (plan.part * self.geometry.image()).max(1);
        let mut dxs: Vec<Option<&mut [T]>> = Vec::new();
        dxs.extend(dx.into_iter().flat_map(|dx| dx.chunks_mut(part)).map(Some));
        dxs.resize_with(parts, || None);
        let jobs = sums.par_iter_mut().zip(dxs).enumerate();
        jobs.for_each(|(at, (sums, dx))| {
            let images = at * plan.part..((at + 1) * plan.part).min(images);
            pass.backward(x.zip(sums.as_mut()), slopes, images, dx);
        });
        sums.into_iter().flatten().collect()
    }
}

/// `to`, or what is added to it, becomes the sum of one gradient over all parts.
pub(super) fn total<T: Real>(
    sums: &[Sums<T>],
    of: fn(&Sums<T>) -> &[T],
    to: &mut [T],
    is_added: bool,
) {
    if !is_added {
        to.fill(T::zero());
    }
    sums.iter().for_each(|sums| add_assign(to, of(sums)));
}

/// The gradient of a result, and what leads from it to that of the products.
pub(super) struct Slopes<'a, T> {
    pub(super) y: &'a [T],
    pub(super) best: &'a [u8],
    pub(super) gradient: &'a [T],
}

/// The gradients of weight and bias, of some images.
pub(super) struct Sums<T> {
    pub(super) weight: Vec<T>,
    bias: Vec<T>,
}

impl<T: Real> Sums<T> {
    fn new(geometry: &Geometry) -> Self {
        let outputs = geometry.groups * geometry.outputs;
        Self { weight: vec![T::zero(); outputs * geometry.taps()], bias: vec![T::zero(); outputs] }
    }
}

impl<T: Real> Pass<'_, T> {
    fn weight(&self, group: usize) -> Mat<'_, T> {
        let Geometry { outputs, .. } = self.of.geometry;
        let taps = self.of.geometry.taps();
        Mat::new(&self.weight[group * outputs * taps..][..outputs * taps], outputs, taps)
    }

    fn unfold(&self, x: &[T], group: usize, columns: &mut [T]) {
        let width = columns.len() / self.of.geometry.taps();
        each_run(self.plan.threads, columns, width, |tap, row| {
            vectorized(
                #[inline(always)]
                || self.of.geometry.im2col(x, group, tap, row),
            )
        });
    }

    /// Adds the bias, applies the activation and pools, for the images of one matrix.
    fn forward(&self, x: &[T], bias: &[T], y: &mut [T], best: &mut [u8]) {
        let (of, geometry) = (self.of, &self.of.geometry);
        let mut scratch = Scratch::new();
        let (mut y, mut best) = (y, best);
        for x in x.chunks(self.plan.images * geometry.image()) {
            let images = x.len() / geometry.image();
            let width = images * geometry.out_area();
            let y_part = y.split_off_mut(..images * of.y_image()).unwrap_or_default();
            let best_len = images * of.y_image() * usize::from(of.pooling.is_some());
            let best_part = best.split_off_mut(..best_len).unwrap_or_default();
            for group in 0..geometry.groups {
                let columns = sized(&mut scratch.columns, geometry.taps() * width);
                self.unfold(x, group, columns);
                let product = sized(&mut scratch.product, geometry.outputs * width);
                let columns = Mat::new(columns, geometry.taps(), width);
                gemm(product, T::one(), self.weight(group), columns, self.plan.threads);
                let finish =
                    Finish { pass: self, group, bias, product, y: y_part, best: best_part };
                of.activation.visit(finish);
            }
        }
    }

    /// Adds to the sums over `images`, and writes their gradients; each where it is asked for.
    fn backward(
        &self,
        mut sums: Option<(&[T], &mut Sums<T>)>,
        slopes: &Slopes<'_, T>,
        images: Range<usize>,
        mut dx: Option<&mut [T]>,
    ) {
        let (of, geometry) = (self.of, &self.of.geometry);
        let taps = geometry.taps();
        let mut scratch = Scratch::new();
        for first in images.clone().step_by(self.plan.images) {
            let some = first..(first + self.plan.images).min(images.end);
            let width = some.len() * geometry.out_area();
            let pixels = some.start * geometry.image()..some.end * geometry.image();
            let range = some.start * of.y_image()..some.end * of.y_image();
            let best = slopes.best.get(range.clone()).unwrap_or_default();
            let (y, gradient) = (&slopes.y[range.clone()], &slopes.gradient[range]);
            let mut dx = dx.as_mut().and_then(|dx| dx.split_off_mut(..pixels.len()));
            for group in 0..geometry.groups {
                let product = sized(&mut scratch.product, geometry.outputs * width);
                of.activation.visit(Start { pass: self, group, y, gradient, best, product });
                let columns = sized(&mut scratch.columns, taps * width);
                if let Some((x, sums)) = &mut sums {
                    let outputs = group * geometry.outputs..(group + 1) * geometry.outputs;
                    row_sums(product, &mut sums.bias[outputs.clone()]);
                    self.unfold(&x[pixels.clone()], group, columns);
                    let dw = &mut sums.weight[outputs.start * taps..outputs.end * taps];
                    let (gradient, columns) = (
                        Mat::new(product, geometry.outputs, width),
                        Mat::new(columns, taps, width),
                    );
                    gemm_add(dw, gradient, columns.t(), self.plan.threads);
                }
                if let Some(dx) = &mut dx {
                    let gradient = Mat::new(product, geometry.outputs, width);
                    gemm(columns, T::one(), self.weight(group).t(), gradient, self.plan.threads);
                    self.fold(columns, group, dx);
                }
            }
        }
    }

    /// The gradients of the images of one matrix, of one group's channels.
    fn fold(&self, columns: &[T], group: usize, dx: &mut [T]) {
        let geometry = &self.of.geometry;
        let (area, out_area) = (geometry.area(), geometry.out_area());
        let width = columns.len() / geometry.taps();
        each_run(self.plan.threads, dx, geometry.image(), |image, dx| {
            let share = geometry.share(group, geometry.channels, area);
            for (channel, plane) in dx[share].chunks_mut(area.max(1)).enumerate() {
                plane.fill(T::zero());
                let row = |tap: usize| &columns[tap * width + image * out_area..][..out_area];
                vectorized(
                    #[inline(always)]
                    || geometry.col2im(channel, row, plane),
                );
            }
        });
    }
}

/// From products `[outputs, images · out_area]` to results `[images, outputs, y_area]`.
struct Finish<'a, T> {
    pass: &'a Pass<'a, T>,
    group: usize,
    bias: &'a [T],
    product: &'a mut [T],
    y: &'a mut [T],
    best: &'a mut [u8],
}

impl<T: Real> Visitor for Finish<'_, T> {
    type Output = ();

    fn visit<S: Scalar>(self) {
        let Self { pass, group, bias, product, y, best } = self;
        let (of, geometry) = (pass.of, &pass.of.geometry);
        let (area, y_area, image) = (geometry.out_area(), of.y_area(), of.y_image());
        let images = y.len() / image.max(1);
        let share = geometry.share(group, geometry.outputs, y_area);
        let bias = &bias[group * geometry.outputs..][..geometry.outputs];
        let plane = |output: usize, at: usize| &product[(output * images + at) * area..][..area];
        let Some(pooling) = of.pooling else {
            return each_run(pass.plan.threads, y, image, |at, y| {
                for (output, (y, bias)) in y[share.clone()].chunks_mut(area).zip(bias).enumerate() {
                    let plane = plane(output, at);
                    vectorized(
                        #[inline(always)]
                        || y.iter_mut().zip(plane).for_each(|(y, x)| *y = S::value(*x + *bias)),
                    );
                }
            });
        };
        let one = |at: usize, y: &mut [T], best: &mut [u8]| {
            let planes =
                y[share.clone()].chunks_mut(y_area).zip(best[share.clone()].chunks_mut(y_area));
            for (output, ((y, best), bias)) in planes.zip(bias).enumerate() {
                let plane = plane(output, at);
                vectorized(
                    #[inline(always)]
                    || {
                        pooling.pool(plane, y, best);
                        // The activation never falls, so that the largest stays the largest.
                        y.iter_mut().for_each(|y| *y = S::value(*y + *bias));
                    },
                );
            }
        };
        match pass.plan.threads {
            Threads::One => {
                let images = y.chunks_mut(image).zip(best.chunks_mut(image)).enumerate();
                images.for_each(|(at, (y, best))| one(at, y, best));
            }
            Threads::All => {
                let images = y.par_chunks_mut(image).zip(best.par_chunks_mut(image)).enumerate();
                images.for_each(|(at, (y, best))| one(at, y, best));
            }
        }
    }
}

/// From the gradients of results to those of products.
struct Start<'a, T> {
    pass: &'a Pass<'a, T>,
    group: usize,
    y: &'a [T],
    gradient: &'a [T],
    best: &'a [u8],
    product: &'a mut [T],
}

impl<T: Real> Visitor for Start<'_, T> {
    type Output = ();

    fn visit<S: Scalar>(self) {
        let Self { pass, group, y, gradient, best, product } = self;
        let (of, geometry) = (pass.of, &pass.of.geometry);
        let (area, y_area, image) = (geometry.out_area(), of.y_area(), of.y_image());
        let width = product.len() / geometry.outputs;
        each_run(pass.plan.threads, product, width, |output, row| {
            let mut scaled = vec![T::zero(); if of.pooling.is_some() { y_area } else { 0 }];
            for (at, plane) in row.chunks_mut(area).enumerate() {
                let from = at * image + (group * geometry.outputs + output) * y_area;
                let (y, gradient) = (&y[from..][..y_area], &gradient[from..][..y_area]);
                vectorized(
                    #[inline(always)]
                    || {
                        let to = if of.pooling.is_some() { &mut scaled[..] } else { &mut *plane };
                        for ((to, gradient), y) in to.iter_mut().zip(gradient).zip(y) {
                            // What needs its input is not fused: see `Conv2d`.
                            *to = *gradient * S::slope(*y, *y);
                        }
                        if let Some(pooling) = of.pooling {
                            pooling.unpool(&scaled, &best[from..][..y_area], plane);
                        }
                    },
                );
            }
        });
    }
}

/// Adds each row's sum to its element of `sums`.
fn row_sums<T: Real>(matrix: &[T], sums: &mut [T]) {
    let columns = matrix.len() / sums.len().max(1);
    for (row, sum) in matrix.chunks(columns.max(1)).zip(sums) {
        *sum += vectorized(
            #[inline(always)]
            || lane_sum(row),
        );
    }
}
