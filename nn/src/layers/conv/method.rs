//! Two ways from images to products.

use super::columns;
use super::geometry::Geometry;
use super::plan::Plan;
use super::winograd::{self, Tiles};
use crate::Precision;
use crate::kernels::{Real, Threads, put};
use std::borrow::Cow;

#[derive(Clone, Copy, Debug)]
pub(super) enum Method {
    /// Images become matrices.
    Columns(Geometry),
    /// Fewer multiplications.
    Tiles(Tiles),
}

/// One group of images, and the weights as the method has them.
#[derive(Clone, Copy)]
pub(super) struct Group<'a, T> {
    pub(super) geometry: Geometry,
    pub(super) group: usize,
    pub(super) weights: &'a [T],
    pub(super) threads: Threads,
    pub(super) precision: Precision,
}

/// Memory to work in.
pub(super) struct Scratch<T> {
    columns: Vec<T>,
    tiles: winograd::Scratch<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self { columns: Vec::new(), tiles: winograd::Scratch::default() }
    }
}

impl Method {
    pub(super) fn new(geometry: &Geometry, images: usize) -> Self {
        Tiles::new(geometry, images).map_or(Self::Columns(*geometry), Self::Tiles)
    }

    pub(super) fn plan(&self, images: usize) -> Plan {
        match self {
            Self::Columns(geometry) => columns::plan(geometry, images),
            Self::Tiles(tiles) => tiles.plan(images),
        }
    }

    /// How many numbers that has the weights as.
    pub(super) fn weights_len(&self) -> usize {
        match self {
            Self::Columns(geometry) => geometry.groups * geometry.outputs * geometry.taps(),
            Self::Tiles(tiles) => tiles.weights_len(),
        }
    }

    /// Of weights `[groups · outputs, taps]`.
    pub(super) fn weights<'a, T: Real>(&self, weights: &'a [T]) -> Cow<'a, [T]> {
        match self {
            Self::Columns(_) => Cow::Borrowed(weights),
            Self::Tiles(tiles) => Cow::Owned(tiles.weights(weights)),
        }
    }

    /// Sets the gradients of weights, or adds to them.
    pub(super) fn weight_gradients<T: Real>(&self, sums: &[T], to: &mut [T], is_added: bool) {
        match self {
            Self::Columns(_) => put(sums, to, is_added),
            Self::Tiles(tiles) => tiles.weight_gradients(sums, to, is_added),
        }
    }

    /// Products `[outputs, images · out_area]` of images `x`.
    pub(super) fn forward<T: Real>(
        &self,
        group: Group<'_, T>,
        x: &[T],
        product: &mut [T],
        scratch: &mut Scratch<T>,
    ) {
        match self {
            Self::Columns(_) => columns::forward(group, x, product, &mut scratch.columns),
            Self::Tiles(tiles) => {
                winograd::Job { tiles: *tiles, group }.forward(x, product, &mut scratch.tiles);
            }
        }
    }

    /// Of the gradients of products: adds to those of the weights, given images, and writes those
    /// of images; each where it is asked for.
    pub(super) fn backward<T: Real>(
        &self,
        group: Group<'_, T>,
        product: &[T],
        sums: Option<(&[T], &mut [T])>,
        dx: Option<&mut [T]>,
        scratch: &mut Scratch<T>,
    ) {
        match self {
            Self::Columns(_) => columns::backward(group, product, sums, dx, &mut scratch.columns),
            Self::Tiles(tiles) => {
                let job = winograd::Job { tiles: *tiles, group };
                job.backward(product, sums, dx, &mut scratch.tiles);
            }
        }
    }
}
