//! Convolutions of 3×3 windows with fewer multiplications.
//!
//! Lavin and Gray: *Fast Algorithms for Convolutional Neural Networks* (CVPR 2016), F(2×2, 3×3).
//! A tile of 4×4 pixels becomes 16 numbers, its *points*, and so does a window of 3×3 weights;
//! their products, summed over the channels, become a tile of 2×2 results: 16 multiplications for
//! each channel instead of 36. The sums are a matrix product for each point. Every step is linear,
//! and the backward pass is the transpose of each.
//!
//! Here the channels of a pixel stand together: vectors run along them, whatever the images' size.

mod transform;

use super::geometry::Geometry;
use super::method::Group;
use super::plan::{Plan, each, each_run, sized};
use crate::kernels::{Mat, Real, Threads, gemm, gemm_add, output, transpose, vectorized};
use std::array::from_fn;
use std::ops::Range;
use transform::{
    LANES, POINTS, Piece, WINDOW, both, input_to_points, load, load_points, load_windows,
    points_to_input, points_to_result, points_to_weight, put_windows, result_to_points, store,
    weight_to_points,
};

/// Pixels from a tile to the next.
const STEP: usize = 2;
/// Tiles for which it pays to transform the weights.
const LEAST_TILES: usize = 64;
/// Numbers of all points of the tiles that one thread works on at a time.
const OWN: usize = 1 << 18;
/// The same for all threads together.
const SHARED: usize = 1 << 22;
/// Tiles at a time, at least: each time all weights are read.
const LEAST_AT_A_TIME: usize = 64;

/// How images are cut into tiles.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    geometry: Geometry,
    across: usize,
    down: usize,
}

/// Memory to work in.
pub(super) struct Scratch<T> {
    inputs: Vec<T>,
    outputs: Vec<T>,
    turned: Vec<T>,
    input_points: Vec<T>,
    output_points: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        let [inputs, outputs, turned, input_points, output_points] = from_fn(|_| Vec::new());
        Self { inputs, outputs, turned, input_points, output_points }
    }
}

/// Images of one group, whose weights are the points `[points, channels, outputs]`.
#[derive(Clone, Copy)]
pub(super) struct Job<'a, T> {
    pub(super) tiles: Tiles,
    pub(super) group: Group<'a, T>,
}

impl Tiles {
    /// If that is a convolution for this, and there are enough images.
    pub(super) fn new(geometry: &Geometry, images: usize) -> Option<Self> {
        let Geometry { channels, outputs, height, width, .. } = *geometry;
        let is_one = |axis: super::Axis| axis.kernel == 3 && axis.stride == 1 && axis.dilation == 1;
        let are_whole = channels % LANES == 0 && outputs % LANES == 0;
        let (across, down) = (width.out.div_ceil(STEP), height.out.div_ceil(STEP));
        let are_enough = images * across * down >= LEAST_TILES;
        let fits = is_one(height) && is_one(width) && are_whole && are_enough;
        fits.then_some(Self { geometry: *geometry, across, down })
    }

    pub(super) fn plan(&self, images: usize) -> Plan {
        let Geometry { channels, outputs, .. } = self.geometry;
        let image = (channels * self.geometry.area()).max(outputs * self.geometry.out_area());
        Plan::new(image, self.weights_len(), self.geometry.numbers(), images)
    }

    /// Numbers of all groups' points.
    pub(super) fn weights_len(&self) -> usize {
        self.geometry.groups * self.weights_of_group()
    }

    fn weights_of_group(&self) -> usize {
        POINTS * self.geometry.channels * self.geometry.outputs
    }

    /// The points of weights `[groups · outputs, channels, 3, 3]`.
    pub(super) fn weights<T: Real>(&self, weight: &[T]) -> Vec<T> {
        let Geometry { channels, outputs, .. } = self.geometry;
        output(self.weights_len(), |to: &mut [T]| {
            let groups = to.chunks_mut(self.weights_of_group());
            for (to, weight) in groups.zip(weight.chunks(outputs * channels * WINDOW)) {
                each(Threads::All, pieces(to, outputs), |(channel, mut to)| {
                    vectorized(
                        #[inline(always)]
                        || {
                            for block in (0..outputs).step_by(LANES) {
                                let at = |lane| (block + lane) * channels + channel;
                                let windows = load_windows(weight, at);
                                store(&mut to, block, &both(&windows, weight_to_points));
                            }
                        },
                    );
                });
            }
        })
    }

    /// The gradients of weights from those of their points: sets `to` or adds to it.
    pub(super) fn weight_gradients<T: Real>(&self, points: &[T], to: &mut [T], is_added: bool) {
        let Geometry { channels, outputs, .. } = self.geometry;
        let blocks = to.chunks_mut(LANES * channels * WINDOW).collect::<Vec<_>>();
        each(Threads::All, blocks, |(block, to)| {
            let (group, output) = (block * LANES / outputs, block * LANES % outputs);
            let points = &points[group * self.weights_of_group()..][..self.weights_of_group()];
            vectorized(
                #[inline(always)]
                || {
                    for channel in 0..channels {
                        let at = channel * outputs + output;
                        let points = load_points(points, at, channels * outputs);
                        let windows = both(&points, points_to_weight);
                        let at = |lane| lane * channels + channel;
                        put_windows(&windows, to, at, is_added);
                    }
                },
            );
        });
    }

    /// Where the pixels of a tile of `size`×`size` are in a plane, which has one more at its end
    /// for all that are outside.
    #[inline(always)]
    fn pixels<const SIZE: usize>(
        &self,
        [row, tile]: [usize; 2],
        [height, width]: [usize; 2],
        padding: [usize; 2],
    ) -> [[usize; SIZE]; SIZE] {
        let within = |at: usize, padding: usize, size: usize| {
            at.checked_sub(padding).filter(|at| *at < size)
        };
        from_fn(|r| {
            let y = within(row * STEP + r, padding[0], height);
            from_fn(|c| match (y, within(tile * STEP + c, padding[1], width)) {
                (Some(y), Some(x)) => y * width + x,
                _ => height * width,
            })
        })
    }

    #[inline(always)]
    fn input_pixels(&self, row: usize, tile: usize) -> [[usize; 4]; 4] {
        let Geometry { height, width, .. } = self.geometry;
        self.pixels([row, tile], [height.size, width.size], [height.padding, width.padding])
    }

    #[inline(always)]
    fn output_pixels(&self, row: usize, tile: usize) -> [[usize; 2]; 2] {
        let Geometry { height, width, .. } = self.geometry;
        self.pixels([row, tile], [height.out, width.out], [0; 2])
    }

    /// Rows of tiles, of all images, that are worked on at a time.
    fn runs(&self, images: usize, threads: Threads) -> impl Iterator<Item = Range<usize>> {
        let Geometry { channels, outputs, .. } = self.geometry;
        let budget = if threads == Threads::One { OWN } else { SHARED };
        let tiles = (budget / (POINTS * (channels + outputs))).max(LEAST_AT_A_TIME);
        let (most, all) = (tiles.div_ceil(self.across), images * self.down);
        // Alike, for each reads all weights.
        let rows = all.div_ceil(all.div_ceil(most).max(1)).max(1);
        (0..all).step_by(rows).map(move |first| first..(first + rows).min(all))
    }
}

impl<T: Real> Job<'_, T> {
    /// Products `[outputs, images · pixels]` of the group's channels of images `x`.
    pub(super) fn forward(&self, x: &[T], product: &mut [T], scratch: &mut Scratch<T>) {
        let Geometry { channels, outputs, .. } = self.tiles.geometry;
        let images = x.len() / self.tiles.geometry.image();
        let inputs = self.turn_inputs(x, &mut scratch.inputs);
        let results = sized(&mut scratch.outputs, product.len());
        for rows in self.tiles.runs(images, self.group.threads) {
            let tiles = rows.len() * self.tiles.across;
            let points = sized(&mut scratch.input_points, POINTS * tiles * channels);
            self.input_points(inputs, rows.clone(), points);
            let products = sized(&mut scratch.output_points, POINTS * tiles * outputs);
            let jobs = products.chunks_mut(tiles * outputs).collect();
            each(self.group.threads, jobs, |(k, product)| {
                let points = point(points, k, tiles, channels);
                let Group { threads, precision, .. } = self.group;
                gemm(product, T::one(), points, self.weights(k), threads, precision);
            });
            self.results(products, rows, results);
        }
        self.turn(results, outputs, product);
    }

    /// Of `gradients` of products: adds to those of the weights' points, and writes those of the
    /// group's channels of images; each where it is asked for.
    pub(super) fn backward(
        &self,
        gradients: &[T],
        sums: Option<(&[T], &mut [T])>,
        dx: Option<&mut [T]>,
        scratch: &mut Scratch<T>,
    ) {
        let Geometry { channels, outputs, .. } = self.tiles.geometry;
        let images = gradients.len() / (outputs * self.tiles.geometry.out_area());
        let gradients = self.turn_gradients(gradients, images, &mut scratch.outputs);
        let mut sums = sums.map(|(x, sums)| (self.turn_inputs(x, &mut scratch.inputs), sums));
        let pixels = self.tiles.geometry.area() + 1;
        let mut turned = dx.as_ref().map(|_| {
            let turned = sized(&mut scratch.turned, images * pixels * channels);
            each_run(self.group.threads, turned, pixels * channels, |(_, image)| {
                image.fill(T::zero());
            });
            turned
        });
        for rows in self.tiles.runs(images, self.group.threads) {
            let tiles = rows.len() * self.tiles.across;
            let slopes = sized(&mut scratch.output_points, POINTS * tiles * outputs);
            self.gradient_points(gradients, rows.clone(), slopes);
            let points = sized(&mut scratch.input_points, POINTS * tiles * channels);
            if let Some((inputs, sums)) = &mut sums {
                self.input_points(inputs, rows.clone(), points);
                let jobs = sums.chunks_mut(channels * outputs).collect();
                each(self.group.threads, jobs, |(k, sums)| {
                    let slopes = point(slopes, k, tiles, outputs);
                    let points = point(points, k, tiles, channels);
                    let Group { threads, precision, .. } = self.group;
                    gemm_add(sums, points.t(), slopes, threads, precision);
                });
            }
            if let Some(turned) = &mut turned {
                let jobs = points.chunks_mut(tiles * channels).collect();
                each(self.group.threads, jobs, |(k, points)| {
                    let slopes = point(slopes, k, tiles, outputs);
                    let Group { threads, precision, .. } = self.group;
                    gemm(points, T::one(), slopes, self.weights(k).t(), threads, precision);
                });
                self.scatter(points, rows, turned);
            }
        }
        if let (Some(turned), Some(dx)) = (turned, dx) {
            self.turn_back(turned, dx);
        }
    }

    fn weights(&self, k: usize) -> Mat<'_, T> {
        let Geometry { channels, outputs, .. } = self.tiles.geometry;
        point(self.group.weights, k, channels, outputs)
    }

    /// Images `[pixels, channels]`, each with a pixel of zeros at its end.
    fn turn_inputs<'a>(&self, x: &[T], to: &'a mut Vec<T>) -> &'a [T] {
        let geometry = &self.tiles.geometry;
        let (channels, area) = (geometry.channels, geometry.area());
        let share = geometry.share(self.group.group, channels, area);
        let images =
            x.chunks(geometry.image()).map(|image| Mat::new(&image[share.clone()], channels, area));
        self.turn_planes(images, to)
    }

    /// The same of gradients `[outputs, images · pixels]`.
    fn turn_gradients<'a>(&self, from: &[T], images: usize, to: &'a mut Vec<T>) -> &'a [T] {
        let area = self.tiles.geometry.out_area();
        let planes = (0..images).map(|at| {
            let outputs = self.tiles.geometry.outputs;
            Mat::strided(&from[at * area..], outputs, area, images * area)
        });
        self.turn_planes(planes, to)
    }

    fn turn_planes<'a, 'b>(
        &self,
        images: impl ExactSizeIterator<Item = Mat<'b, T>>,
        to: &'a mut Vec<T>,
    ) -> &'a [T] {
        let images: Vec<_> = images.collect();
        let Some((channels, area)) = images.first().map(Mat::shape) else { return &[] };
        let to = sized(to, images.len() * (area + 1) * channels);
        let jobs = to.chunks_mut((area + 1) * channels).zip(images).collect();
        each(self.group.threads, jobs, |(_, (to, image))| {
            let (pixels, outside) = to.split_at_mut(area * channels);
            transpose(image, pixels);
            outside.fill(T::zero());
        });
        to
    }

    /// Images `[images · pixels, channels]` as `[channels, images · pixels]`.
    fn turn(&self, from: &[T], channels: usize, to: &mut [T]) {
        let pixels = from.len() / channels;
        let jobs = to.chunks_mut(LANES * pixels).collect();
        each(self.group.threads, jobs, |(block, to)| {
            let from = &from[(block * LANES).min(from.len())..];
            transpose(Mat::strided(from, pixels, LANES, channels), to);
        });
    }

    /// Images, with the pixel that is none, to the group's channels of `dx`.
    fn turn_back(&self, turned: &[T], dx: &mut [T]) {
        let geometry = &self.tiles.geometry;
        let (channels, area) = (geometry.channels, geometry.area());
        let images = dx.chunks_mut(geometry.image());
        let jobs = images.zip(turned.chunks((area + 1) * channels)).collect();
        each(self.group.threads, jobs, |(_, (dx, turned))| {
            let dx = &mut dx[geometry.share(self.group.group, channels, area)];
            transpose(Mat::new(&turned[..area * channels], area, channels), dx);
        });
    }

    /// Calls `f` with each row of tiles, counted over all images, and its job.
    fn each_row<J: Send>(
        &self,
        rows: Range<usize>,
        jobs: Vec<J>,
        f: impl Fn(usize, J) + Send + Sync,
    ) {
        each(self.group.threads, jobs, |(at, job)| {
            vectorized(
                #[inline(always)]
                || f(rows.start + at, job),
            )
        });
    }

    fn input_points(&self, images: &[T], rows: Range<usize>, points: &mut [T]) {
        let Geometry { channels, .. } = self.tiles.geometry;
        let planes = (images, self.tiles.geometry.area(), channels);
        let pixels = |row, tile| self.tiles.input_pixels(row, tile);
        self.points(planes, rows, points, pixels, input_to_points);
    }

    fn gradient_points(&self, images: &[T], rows: Range<usize>, points: &mut [T]) {
        let Geometry { outputs, .. } = self.tiles.geometry;
        let planes = (images, self.tiles.geometry.out_area(), outputs);
        let pixels = |row, tile| self.tiles.output_pixels(row, tile);
        self.points(planes, rows, points, pixels, result_to_points);
    }

    /// Transforms the `pixels` of each tile of images `[area + 1, channels]`.
    #[inline(always)]
    fn points<const N: usize>(
        &self,
        (images, area, channels): (&[T], usize, usize),
        rows: Range<usize>,
        points: &mut [T],
        pixels: impl Fn(usize, usize) -> [[usize; N]; N] + Send + Sync,
        f: impl Fn([T; N]) -> [T; 4] + Send + Sync,
    ) {
        let Tiles { across, down, .. } = self.tiles;
        let image = (area + 1) * channels;
        let jobs = pieces(points, across * channels);
        self.each_row(
            rows,
            jobs,
            #[inline(always)]
            |row, mut to| {
                let image = &images[row / down * image..][..image];
                for tile in 0..across {
                    let pixels = pixels(row % down, tile);
                    for block in (0..channels).step_by(LANES) {
                        let from = load(image, at(&pixels, channels, block));
                        store(&mut to, tile * channels + block, &both(&from, &f));
                    }
                }
            },
        );
    }

    /// Results `[images, pixels, outputs]` of whole rows of tiles.
    fn results(&self, points: &[T], rows: Range<usize>, results: &mut [T]) {
        let Tiles { geometry, across, .. } = self.tiles;
        let (outputs, width) = (geometry.outputs, geometry.width.out);
        let tiles = rows.len() * across;
        let images = results.chunks_mut(geometry.out_area() * outputs);
        let all = images.flat_map(|image| image.chunks_mut(STEP * width * outputs));
        let jobs = all.skip(rows.start).take(rows.len()).collect();
        let first = rows.start;
        self.each_row(
            rows,
            jobs,
            #[inline(always)]
            |row, to: &mut [T]| {
                for tile in 0..across {
                    for block in (0..outputs).step_by(LANES) {
                        let from = ((row - first) * across + tile) * outputs + block;
                        let y = both(&load_points(points, from, tiles * outputs), points_to_result);
                        for (r, y) in y.iter().enumerate() {
                            for (c, y) in y.iter().enumerate() {
                                let column = tile * STEP + c;
                                let place = (r * width + column) * outputs + block;
                                if column < width
                                    && let Some(to) = to.get_mut(place..place + LANES)
                                {
                                    to.copy_from_slice(y);
                                }
                            }
                        }
                    }
                }
            },
        );
    }

    /// Adds the gradients of tiles to those of the pixels that they share.
    fn scatter(&self, points: &[T], rows: Range<usize>, turned: &mut [T]) {
        let Tiles { geometry, across, down } = self.tiles;
        let channels = geometry.channels;
        let tiles = rows.len() * across;
        let jobs = turned.chunks_mut((geometry.area() + 1) * channels).collect();
        each(self.group.threads, jobs, |(image, to)| {
            let own = (image * down).max(rows.start)..((image + 1) * down).min(rows.end);
            vectorized(
                #[inline(always)]
                || {
                    for row in own {
                        for tile in 0..across {
                            let pixels = self.tiles.input_pixels(row % down, tile);
                            let first = ((row - rows.start) * across + tile) * channels;
                            for block in (0..channels).step_by(LANES) {
                                let from = load_points(points, first + block, tiles * channels);
                                let values = both(&from, points_to_input);
                                for (pixels, values) in pixels.iter().zip(&values) {
                                    for (pixel, values) in pixels.iter().zip(values) {
                                        let to = &mut to[pixel * channels + block..][..LANES];
                                        to.iter_mut().zip(values).for_each(|(to, v)| *to += *v);
                                    }
                                }
                            }
                        }
                    }
                },
            );
        });
    }
}

/// Where a block of channels of pixels begins.
#[inline(always)]
fn at<const N: usize>(pixels: &[[usize; N]; N], channels: usize, block: usize) -> [[usize; N]; N] {
    let mut at = *pixels;
    at.as_flattened_mut().iter_mut().for_each(|at| *at = *at * channels + block);
    at
}

/// The numbers of one point, a row for each tile or channel.
fn point<T: Real>(points: &[T], k: usize, rows: usize, columns: usize) -> Mat<'_, T> {
    Mat::new(&points[k * rows * columns..][..rows * columns], rows, columns)
}

/// The next `len` numbers of every point, again and again.
fn pieces<T>(points: &mut [T], len: usize) -> Vec<Piece<'_, T>> {
    let of_point = points.len() / POINTS;
    let mut each: Vec<_> = points.chunks_mut(of_point).map(|point| point.chunks_mut(len)).collect();
    let pieces = (0..of_point / len).map(|_| from_fn(|k| each[k].next().unwrap_or_default()));
    pieces.collect()
}
