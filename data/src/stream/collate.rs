//! What is done to the tensors of a batch before the program gets it, where the next batch is made.

use super::order::Run;
use crate::error::Error;
use candle_core::{DType, Device, Tensor};
use mobula_core::random::{Philox, Stream};
use mobula_core::{Batch, BoxError};
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::sync::Arc;

/// A function of the tensors of a batch, for [`StreamOptions::with_collate`](super::StreamOptions::with_collate):
/// augmentation, or tensors that are made of several. It runs on the thread that makes batches ahead.
///
/// It must give the same for the same batch and rows, and may draw random numbers from
/// [`Rows`] alone: so a run that is resumed, or has another number of workers, sees the same.
///
/// ```
/// use candle_core::Tensor;
/// use mobula_core::{Batch, BoxError};
/// use mobula_data::{Collate, Rows, typetag};
/// use serde::{Deserialize, Serialize};
///
/// /// Adds noise to the tensor `x`, `[rows]`.
/// #[derive(Debug, Serialize, Deserialize)]
/// struct Noise;
///
/// #[typetag::serde]
/// impl Collate for Noise {
///     fn collate(&self, batch: Batch, rows: &Rows<'_>) -> Result<Batch, BoxError> {
///         let x = batch.get("x")?;
///         let noise = rows.random_of_all("noise").map(|mut draws| draws.normal() as f32);
///         let noise = Tensor::from_vec(noise.collect(), batch.rows(), x.device())?;
///         Ok(batch.replace(vec![("x".to_owned(), x.add(&noise)?)])?)
///     }
/// }
/// ```
#[typetag::serde]
pub trait Collate: Debug + Send + Sync {
    /// The batch that the program gets: it has as many rows.
    fn collate(&self, batch: Batch, rows: &Rows<'_>) -> Result<Batch, BoxError>;
}

/// Which rows a batch has.
#[derive(Debug)]
pub struct Rows<'a> {
    seed: u64,
    epoch: u64,
    runs: &'a [Run],
}

impl<'a> Rows<'a> {
    pub(super) fn new(seed: u64, epoch: u64, runs: &'a [Run]) -> Self {
        Self { seed, epoch, runs }
    }

    /// The epoch, from 0 on.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Random numbers for row `row` of the batch: others for each row of the data, each epoch, each
    /// purpose and each seed of the shuffle (0 without one), whatever batch the row is in. For many
    /// rows [`random_of_all`](Self::random_of_all) is faster.
    ///
    /// # Panics
    ///
    /// When the batch has fewer rows.
    pub fn random(&self, purpose: &str, row: usize) -> Philox {
        let mut first = 0;
        let found = self.runs.iter().find_map(|run| {
            let at = row.checked_sub(first).filter(|at| *at < run.rows);
            first += run.rows;
            at.map(|at| (run.block, run.row + at))
        });
        let Some((block, row)) = found else { panic!("row {row} of a batch of {first}") };
        Draws { epoch: Stream::new(self.seed, purpose).child(self.epoch) }.of(block, row)
    }

    /// Random numbers of all rows, in order.
    pub fn random_of_all(&self, purpose: &str) -> impl Iterator<Item = Philox> {
        let draws = Draws { epoch: Stream::new(self.seed, purpose).child(self.epoch) };
        self.runs.iter().flat_map(move |run| {
            let block = draws.epoch.child(run.block as u64);
            (run.row..run.row + run.rows).map(move |row| block.at(row as u64, 0))
        })
    }
}

struct Draws {
    epoch: Stream,
}

impl Draws {
    fn of(&self, block: usize, row: usize) -> Philox {
        self.epoch.child(block as u64).at(row as u64, 0)
    }
}

/// A [`Collate`] as part of a description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Collation(#[serde(with = "crate::shared")] pub(super) Arc<dyn Collate>);

impl PartialEq for Collation {
    fn eq(&self, other: &Self) -> bool {
        let text = |of: &Self| serde_json::to_string(of).ok();
        text(self) == text(other)
    }
}

/// Images for training: bytes, rows of pixels of `channels` values, as `f32`, `[rows, channels, height,
/// width]`, cropped at random, mirrored at random and normalised, in one pass.
///
/// ```
/// use candle_core::DType;
/// use mobula_data::{ImageAugment, StreamOptions, TensorSpec};
///
/// let image = TensorSpec::column("image").with_dtype(DType::U8);
/// let augment = ImageAugment::new("image", [28, 28, 1])
///     .with_crop(2)
///     .with_flip(0.5)
///     .with_normalize([0.286], [0.353]);
/// let options =
///     StreamOptions::labelled("label").with_tensor(image).with_shuffle(7).with_collate(augment);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageAugment {
    tensor: String,
    height: usize,
    width: usize,
    channels: usize,
    crop: usize,
    flip: f64,
    mean: Vec<f32>,
    std: Vec<f32>,
}

impl ImageAugment {
    /// Of the tensor of this name, whose rows are images of `[height, width, channels]`. Default:
    /// only scaled, from 0 to 1.
    pub fn new(tensor: impl Into<String>, [height, width, channels]: [usize; 3]) -> Self {
        let (mean, std) = (vec![0.0; channels], vec![1.0; channels]);
        Self { tensor: tensor.into(), height, width, channels, crop: 0, flip: 0.0, mean, std }
    }

    /// Pads all sides with so many black pixels, and takes a piece of the old size at random.
    pub fn with_crop(self, padding: usize) -> Self {
        Self { crop: padding, ..self }
    }

    /// Mirrors an image, left to right, with this probability.
    pub fn with_flip(self, probability: f64) -> Self {
        Self { flip: probability, ..self }
    }

    /// Takes `mean` from values between 0 and 1, and divides by `std`, by channel.
    pub fn with_normalize(self, mean: impl Into<Vec<f32>>, std: impl Into<Vec<f32>>) -> Self {
        Self { mean: mean.into(), std: std.into(), ..self }
    }

    fn check(&self, image: &Tensor) -> Result<(), Error> {
        let invalid = |option, expected: String, got: String| {
            Err(Error::InvalidOption { option, expected, got })
        };
        let pixels = self.height * self.width * self.channels;
        let rows = image.dims().first().copied().unwrap_or(0);
        if image.dtype() != DType::U8 || image.elem_count() != rows * pixels {
            let expected = format!("u8, [rows, {pixels}]; see TensorSpec::with_dtype");
            let got = format!("{}, {:?}", image.dtype().as_str(), image.dims());
            return invalid("the tensor of an ImageAugment", expected, got);
        }
        if [&self.mean, &self.std].iter().any(|of| of.len() != self.channels) {
            let expected = format!("{} numbers, one a channel", self.channels);
            let got = format!("{} and {}", self.mean.len(), self.std.len());
            return invalid("the mean and std of an ImageAugment", expected, got);
        }
        if !(0.0..=1.0).contains(&self.flip) {
            let expected = "a probability from 0 to 1".to_owned();
            return invalid("the flip of an ImageAugment", expected, self.flip.to_string());
        }
        if !self.mean.iter().all(|of| of.is_finite()) || !self.std.iter().all(|of| *of > 0.0) {
            let expected = "finite means, and std above 0".to_owned();
            let got = format!("{:?} and {:?}", self.mean, self.std);
            return invalid("the mean and std of an ImageAugment", expected, got);
        }
        Ok(())
    }

    /// What a byte of a channel becomes.
    fn table(&self, channel: usize) -> [f32; 256] {
        let (mean, std) = (self.mean[channel], self.std[channel]);
        std::array::from_fn(|byte| (byte as f32 / 255.0 - mean) / std)
    }

    /// One image, moved by (`down`, `right`) pixels.
    fn image(
        &self,
        from: &[u8],
        to: &mut Vec<f32>,
        tables: &[[f32; 256]],
        (down, right): (isize, isize),
        is_flipped: bool,
    ) {
        let (height, width) = (self.height as isize, self.width as isize);
        // The columns that there are.
        let inside = (-right).clamp(0, width)..(width - right).clamp(0, width);
        for (channel, table) in tables.iter().enumerate() {
            for row in 0..height {
                let start = to.len();
                let of = row + down;
                if !(0..height).contains(&of) {
                    to.resize(start + self.width, table[0]);
                    continue;
                }
                let line = &from[of as usize * self.width * self.channels..];
                let value = |column: isize| {
                    table[line[(column + right) as usize * self.channels + channel] as usize]
                };
                to.resize(start + inside.start as usize, table[0]);
                to.extend(inside.clone().map(value));
                to.resize(start + self.width, table[0]);
                if is_flipped {
                    to[start..].reverse();
                }
            }
        }
    }
}

#[typetag::serde(name = "image_augment")]
impl Collate for ImageAugment {
    fn collate(&self, batch: Batch, rows: &Rows<'_>) -> Result<Batch, BoxError> {
        let image = batch.get(&self.tensor)?;
        self.check(image)?;
        let bytes = image.flatten_all()?.to_vec1::<u8>()?;
        let tables: Vec<_> = (0..self.channels).map(|channel| self.table(channel)).collect();
        let pixels = self.height * self.width * self.channels;
        let mut values = Vec::with_capacity(bytes.len());
        let shifts = 2 * self.crop as u64 + 1;
        for (from, mut draws) in
            bytes.chunks_exact(pixels.max(1)).zip(rows.random_of_all("image_augment"))
        {
            let mut shift = || draws.below(shifts) as isize - self.crop as isize;
            let by = (shift(), shift());
            let is_flipped = draws.uniform() < self.flip;
            self.image(from, &mut values, &tables, by, is_flipped);
        }
        let shape = (batch.rows(), self.channels, self.height, self.width);
        let made = Tensor::from_vec(values, shape, &Device::Cpu)?;
        Ok(batch.replace(vec![(self.tensor.clone(), made)])?)
    }
}
