//! What follows the products of a convolution, and what comes before them on the way back.

use super::op::Convolution;
use super::plan::{each, each_run};
use crate::kernels::{Real, Threads, vectorized};
use crate::layers::activation::{Scalar, Visitor};

/// From products `[outputs, images · out_area]` to results `[images, outputs, y_area]`.
pub(super) struct Finish<'a, T> {
    pub(super) of: Convolution,
    pub(super) threads: Threads,
    pub(super) group: usize,
    pub(super) bias: &'a [T],
    pub(super) product: &'a [T],
    pub(super) y: &'a mut [T],
    pub(super) best: &'a mut [u8],
}

impl<T: Real> Visitor for Finish<'_, T> {
    type Output = ();

    fn visit<S: Scalar>(self) {
        let Self { of, threads, group, bias, product, y, best } = self;
        let geometry = &of.geometry;
        let (area, y_area, image) = (geometry.out_area(), of.y_area(), of.y_image());
        let images = y.len() / image.max(1);
        let share = geometry.share(group, geometry.outputs, y_area);
        let bias = &bias[group * geometry.outputs..][..geometry.outputs];
        let plane = |output: usize, at: usize| &product[(output * images + at) * area..][..area];
        let Some(pooling) = of.pooling else {
            return each_run(threads, y, image, |(at, y)| {
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
        let jobs = y.chunks_mut(image).zip(best.chunks_mut(image)).collect();
        each(threads, jobs, |(at, (y, best))| one(at, y, best));
    }
}

/// From the gradients of results to those of products.
pub(super) struct Start<'a, T> {
    pub(super) of: Convolution,
    pub(super) threads: Threads,
    pub(super) group: usize,
    pub(super) y: &'a [T],
    pub(super) gradient: &'a [T],
    pub(super) best: &'a [u8],
    pub(super) product: &'a mut [T],
}

impl<T: Real> Visitor for Start<'_, T> {
    type Output = ();

    fn visit<S: Scalar>(self) {
        let Self { of, threads, group, y, gradient, best, product } = self;
        let geometry = &of.geometry;
        let (area, y_area, image) = (geometry.out_area(), of.y_area(), of.y_image());
        let width = product.len() / geometry.outputs;
        each_run(threads, product, width, |(output, row)| {
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
