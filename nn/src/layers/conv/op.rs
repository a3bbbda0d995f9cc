//! A convolution, a bias, an activation and a max-pooling as one operation.
//!
//! Some images at a time become products by one of two [methods](Method), and these the results,
//! while they are in the caches.

use super::finish::{Finish, Start};
use super::geometry::Geometry;
use super::method::{self, Group, Method};
use super::plan::{Plan, sized};
use super::pooling::Pooling;
use crate::Precision;
use crate::backward::parameter_gradient;
use crate::cpu::with_values;
use crate::kernels::{Real, add_assign, lane_sum, output, put, vectorized};
use crate::layers::activation::Activation;
use crate::link::{Source, Told, owned, result_kept};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// One convolution, and what follows it.
#[derive(Clone, Copy)]
pub(super) struct Convolution {
    pub(super) geometry: Geometry,
    pub(super) activation: Activation,
    pub(super) pooling: Option<Pooling>,
    pub(super) precision: Precision,
}

/// What stays the same while a convolution goes through its images.
struct Pass<'a, T: Clone> {
    of: Convolution,
    method: Method,
    plan: Plan,
    weights: Cow<'a, [T]>,
}

impl Convolution {
    /// Pixels of a plane of the result.
    pub(super) fn y_area(&self) -> usize {
        self.pooling.map_or(self.geometry.out_area(), |pooling| pooling.area())
    }

    /// Numbers of an image of the result.
    pub(super) fn y_image(&self) -> usize {
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
        let pass = Pass::new(self, images, Some(weight));
        let part = pass.plan.part;
        let (x_part, y_part) = (part * self.geometry.image(), part * self.y_image());
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
            let [is_x, is_weight, is_bias] = sources.each_ref().map(Source::is_tracked);
            let of = (is_weight || is_bias).then_some(x);
            let mut sums = Sums::default();
            let mut go =
                |dx: Option<&mut [T]>| sums = self.gradients(of, weights, &slopes, images, dx);
            let dx = match is_x {
                true => sources[0].give(output(x.len(), |dx| go(Some(dx))))?,
                false => {
                    go(None);
                    None
                }
            };
            let dw = match is_weight {
                true => parameter_gradient(weight, |dw, is_added| sums.weight(dw, is_added))?,
                false => None,
            };
            let db = match is_bias {
                true => parameter_gradient(bias, |db, is_added| put(&sums.bias, db, is_added))?,
                false => None,
            };
            Ok(vec![dx, dw, db])
        })
    }

    /// Writes the gradients of the images, if `dx` is there; those of weight and bias are what
    /// comes out, if the images `x` are there.
    pub(super) fn gradients<T: Real>(
        self,
        x: Option<&[T]>,
        weight: &[T],
        slopes: &Slopes<'_, T>,
        images: usize,
        dx: Option<&mut [T]>,
    ) -> Sums<T> {
        // The weights lead to images alone.
        let pass = Pass::new(self, images, dx.is_some().then_some(weight));
        let part = pass.plan.part;
        let parts = images.div_ceil(part).max(1);
        let mut sums: Vec<_> = (0..parts).map(|_| x.map(|_| pass.sums())).collect();
        let mut dxs: Vec<Option<&mut [T]>> = Vec::new();
        let numbers = (part * self.geometry.image()).max(1);
        dxs.extend(dx.into_iter().flat_map(|dx| dx.chunks_mut(numbers)).map(Some));
        dxs.resize_with(parts, || None);
        let jobs = sums.par_iter_mut().zip(dxs).enumerate();
        jobs.for_each(|(at, (sums, dx))| {
            let images = at * part..((at + 1) * part).min(images);
            pass.backward(x.zip(sums.as_mut()), slopes, images, dx);
        });
        sums.into_iter().flatten().reduce(Sums::and).unwrap_or_default()
    }
}

/// The gradient of a result, and what leads from it to that of the products.
pub(super) struct Slopes<'a, T> {
    pub(super) y: &'a [T],
    pub(super) best: &'a [u8],
    pub(super) gradient: &'a [T],
}

/// The gradients of bias and weight, the latter as the method has it.
pub(super) struct Sums<T> {
    method: Option<Method>,
    weight: Vec<T>,
    bias: Vec<T>,
}

impl<T> Default for Sums<T> {
    fn default() -> Self {
        Self { method: None, weight: Vec::new(), bias: Vec::new() }
    }
}

impl<T: Real> Sums<T> {
    fn and(mut self, other: Self) -> Self {
        add_assign(&mut self.weight, &other.weight);
        add_assign(&mut self.bias, &other.bias);
        self
    }

    /// Sets the gradient of the weight, or adds to it.
    pub(super) fn weight(&self, to: &mut [T], is_added: bool) {
        if let Some(method) = self.method {
            method.weight_gradients(&self.weight, to, is_added);
        }
    }
}

impl<'a, T: Real> Pass<'a, T> {
    fn new(of: Convolution, images: usize, weights: Option<&'a [T]>) -> Self {
        let method = Method::new(&of.geometry, images);
        let weights = weights.map(|weights| method.weights(weights)).unwrap_or_default();
        Self { of, method, plan: method.plan(images), weights }
    }

    fn sums(&self) -> Sums<T> {
        let outputs = self.of.geometry.groups * self.of.geometry.outputs;
        let [weight, bias] = [self.method.weights_len(), outputs].map(|len| vec![T::zero(); len]);
        Sums { method: Some(self.method), weight, bias }
    }

    fn group(&self, group: usize) -> Group<'_, T> {
        let Convolution { geometry, precision, .. } = self.of;
        let len = self.weights.len() / geometry.groups;
        let weights = &self.weights[group * len..][..len];
        Group { geometry, group, weights, threads: self.plan.threads, precision }
    }

    /// Adds the bias, applies the activation and pools.
    fn forward(&self, x: &[T], bias: &[T], y: &mut [T], best: &mut [u8]) {
        let (of, geometry, threads) = (self.of, &self.of.geometry, self.plan.threads);
        let mut scratch = Scratch::new();
        let (mut y, mut best) = (y, best);
        for x in x.chunks(self.plan.images * geometry.image()) {
            let images = x.len() / geometry.image();
            let y = y.split_off_mut(..images * of.y_image()).unwrap_or_default();
            let best_len = images * of.y_image() * usize::from(of.pooling.is_some());
            let best = best.split_off_mut(..best_len).unwrap_or_default();
            for group in 0..geometry.groups {
                let len = geometry.outputs * images * geometry.out_area();
                let product = sized(&mut scratch.product, len);
                self.method.forward(self.group(group), x, product, &mut scratch.method);
                let (y, best) = (&mut *y, &mut *best);
                of.activation.visit(Finish { of, threads, group, bias, product, y, best });
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
        let (of, geometry, threads) = (self.of, &self.of.geometry, self.plan.threads);
        let mut scratch = Scratch::new();
        for first in images.clone().step_by(self.plan.images) {
            let some = first..(first + self.plan.images).min(images.end);
            let pixels = some.start * geometry.image()..some.end * geometry.image();
            let range = some.start * of.y_image()..some.end * of.y_image();
            let best = slopes.best.get(range.clone()).unwrap_or_default();
            let (y, gradient) = (&slopes.y[range.clone()], &slopes.gradient[range]);
            let mut dx = dx.as_mut().and_then(|dx| dx.split_off_mut(..pixels.len()));
            for group in 0..geometry.groups {
                let len = geometry.outputs * some.len() * geometry.out_area();
                let product = sized(&mut scratch.product, len);
                of.activation.visit(Start { of, threads, group, y, gradient, best, product });
                let sums = sums.as_mut().map(|(x, sums)| {
                    row_sums(
                        product,
                        &mut sums.bias[group * geometry.outputs..][..geometry.outputs],
                    );
                    let len = sums.weight.len() / geometry.groups;
                    (&x[pixels.clone()], &mut sums.weight[group * len..][..len])
                });
                let job = self.group(group);
                self.method.backward(job, product, sums, dx.as_deref_mut(), &mut scratch.method);
            }
        }
    }
}

/// Memory that one part works in.
struct Scratch<T> {
    product: Vec<T>,
    method: method::Scratch<T>,
}

impl<T> Scratch<T> {
    fn new() -> Self {
        Self { product: Vec::new(), method: method::Scratch::default() }
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
