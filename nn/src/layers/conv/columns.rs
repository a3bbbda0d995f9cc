//! Products of images that become matrices first.

use super::geometry::Geometry;
use super::method::Group;
use super::plan::{Plan, each_run, sized};
use crate::kernels::{Mat, Real, gemm, gemm_add, vectorized};

pub(super) fn plan(geometry: &Geometry, images: usize) -> Plan {
    let Geometry { outputs, groups, .. } = *geometry;
    let matrix = geometry.taps() * geometry.out_area();
    Plan::new(matrix, groups * outputs * geometry.taps(), geometry.numbers(), images)
}

/// See [`Method::forward`](super::method::Method::forward).
pub(super) fn forward<T: Real>(
    group: Group<'_, T>,
    x: &[T],
    product: &mut [T],
    scratch: &mut Vec<T>,
) {
    let columns = unfold(group, x, product.len(), scratch);
    gemm(product, T::one(), weights(group), columns, group.threads, group.precision);
}

/// See [`Method::backward`](super::method::Method::backward).
pub(super) fn backward<T: Real>(
    group: Group<'_, T>,
    product: &[T],
    sums: Option<(&[T], &mut [T])>,
    dx: Option<&mut [T]>,
    scratch: &mut Vec<T>,
) {
    let Geometry { outputs, .. } = group.geometry;
    let gradient = Mat::new(product, outputs, product.len() / outputs);
    if let Some((x, sums)) = sums {
        let columns = unfold(group, x, product.len(), scratch);
        gemm_add(sums, gradient, columns.t(), group.threads, group.precision);
    }
    if let Some(dx) = dx {
        let len = group.geometry.taps() * product.len() / outputs;
        let columns = sized(scratch, len);
        gemm(columns, T::one(), weights(group).t(), gradient, group.threads, group.precision);
        fold(group, columns, dx);
    }
}

fn weights<T: Real>(group: Group<'_, T>) -> Mat<'_, T> {
    Mat::new(group.weights, group.geometry.outputs, group.geometry.taps())
}

/// The images as a matrix `[taps, images · out_area]`.
fn unfold<'a, T: Real>(
    Group { geometry, group, threads, .. }: Group<'_, T>,
    x: &[T],
    product: usize,
    scratch: &'a mut Vec<T>,
) -> Mat<'a, T> {
    let (taps, width) = (geometry.taps(), product / geometry.outputs);
    let columns = sized(scratch, taps * width);
    each_run(threads, columns, width, |(tap, row)| {
        vectorized(
            #[inline(always)]
            || geometry.im2col(x, group, tap, row),
        )
    });
    Mat::new(columns, taps, width)
}

/// The gradients of images of the group's channels.
fn fold<T: Real>(group: Group<'_, T>, columns: &[T], dx: &mut [T]) {
    let Group { geometry, group, threads, .. } = group;
    let (area, out_area) = (geometry.area(), geometry.out_area());
    let width = columns.len() / geometry.taps();
    each_run(threads, dx, geometry.image(), |(image, dx)| {
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
