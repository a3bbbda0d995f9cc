//! Tensor batches for training: which rows a step has, for every rank of every world.

mod blocks;
mod collate;
mod order;
mod reader;
mod tensors;
mod values;

pub use collate::{Collate, ImageAugment, Rows};
pub use tensors::TensorSpec;

use crate::Dataset;
use crate::error::{Error, Result};
use crate::source::hash;
use collate::Collation;
use mobula_core::{BatchSource, BatchStream, Shard};
use order::Shape;
use reader::Reader;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use tensors::Layout;

/// Lanes that a stream has if the batch size allows them.
const LANES: usize = 16;

/// Batches that are made ahead, unless told otherwise.
const PREFETCH: usize = 2;

/// What a stream makes of a dataset.
///
/// ```
/// let options = mobula_data::StreamOptions::new(["image"], "label").with_batch_size(64).with_shuffle(7);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamOptions {
    tensors: Vec<TensorSpec>,
    label: Option<String>,
    batch_size: usize,
    shuffle: Option<u64>,
    lanes: Option<usize>,
    prefetch: usize,
    collate: Option<Collation>,
}

impl StreamOptions {
    /// A tensor for each of the columns `features` and one for `label`, named as the columns are.
    ///
    /// A feature is numeric and becomes `f32`, `[rows]`, or `[rows, n]` for a `FixedSizeList`: see
    /// [`TensorSpec::column`]. A label of whole numbers becomes `u32`; any other is treated as a
    /// feature is.
    ///
    /// Default: steps of 32 rows, in the dataset's order.
    pub fn new<S: Into<String>>(
        features: impl IntoIterator<Item = S>,
        label: impl Into<String>,
    ) -> Self {
        Self { label: Some(label.into()), ..Self::unlabelled(features) }
    }

    /// The same without a label, for prediction.
    pub fn unlabelled<S: Into<String>>(features: impl IntoIterator<Item = S>) -> Self {
        let tensors = features.into_iter().map(TensorSpec::column).collect();
        Self {
            tensors,
            label: None,
            batch_size: 32,
            shuffle: None,
            lanes: None,
            prefetch: PREFETCH,
            collate: None,
        }
    }

    /// A tensor for the column `label` alone, beside those that [`with_tensor`](Self::with_tensor)
    /// adds.
    pub fn labelled(label: impl Into<String>) -> Self {
        Self::new([] as [String; 0], label)
    }

    /// Adds a tensor.
    pub fn with_tensor(mut self, tensor: TensorSpec) -> Self {
        self.tensors.push(tensor);
        self
    }

    /// Sets the rows of a step over all ranks together.
    pub fn with_batch_size(self, batch_size: usize) -> Self {
        Self { batch_size, ..self }
    }

    /// Draws the rows of every epoch in another order.
    pub fn with_shuffle(self, seed: u64) -> Self {
        Self { shuffle: Some(seed), ..self }
    }

    /// Sets into how many lanes the rows are cut: the largest world that can read the stream. It
    /// must divide the batch size. Default: the largest divisor that is at most 16.
    pub fn with_lanes(self, lanes: usize) -> Self {
        Self { lanes: Some(lanes), ..self }
    }

    /// Sets how many batches are made ahead of who takes them, on a thread of its own; 0: none, and no
    /// thread. Default: 2.
    pub fn with_prefetch(self, batches: usize) -> Self {
        Self { prefetch: batches, ..self }
    }

    /// Sets what is done to the tensors of a batch before the program gets it.
    pub fn with_collate(self, collate: impl Collate + 'static) -> Self {
        Self { collate: Some(Collation(Arc::new(collate))), ..self }
    }

    fn shape(&self) -> Result<Shape> {
        let invalid = |option, expected: String, got: usize| {
            Err(Error::InvalidOption { option, expected, got: got.to_string() })
        };
        if self.batch_size == 0 {
            return invalid("batch_size", "at least 1".to_owned(), 0);
        }
        let divides = |lanes: &usize| self.batch_size.is_multiple_of(*lanes);
        let default = || (1..=LANES).rev().find(divides).unwrap_or(1);
        let lanes = self.lanes.unwrap_or_else(default);
        if lanes == 0 || !divides(&lanes) {
            let expected = format!("a divisor of the batch size {}", self.batch_size);
            return invalid("lanes", expected, lanes);
        }
        Ok(Shape { lanes, per_lane: self.batch_size / lanes })
    }
}

/// The description of a stream: a dataset, how it is cut into batches, and how many rows each
/// block has. It goes to the worker processes, which open their shards of it.
///
/// **Order.** The blocks (row groups of Parquet files) are put in an order drawn from the seed,
/// cut by rows into `lanes` of equal length, give or take one, and the rows of every four
/// neighbouring blocks of a lane are mixed. A step takes `batch_size / lanes` rows of each lane;
/// rank `r` of a world of `w` reads lanes `r`, `r + w`, `r + 2w`, … Therefore
///
/// * in an epoch every row is in exactly one step, and the last steps may be smaller;
/// * a step has the same rows whatever the world, which may change from any step to the next;
/// * all ranks have the same number of steps, some of which may have no row for a rank.
///
/// Without a shuffle the steps follow the dataset's order, and lane `l` is the `l`-th piece of
/// every step.
///
/// A rank keeps at most five decoded blocks for each of its lanes, and two for each processor that are
/// read ahead. It reads the blocks that its
/// lanes touch: with few, large blocks that is most of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TensorSource {
    dataset: Dataset,
    layout: Layout,
    shape: Shape,
    shuffle: Option<u64>,
    rows: Vec<u64>,
    prefetch: usize,
    collate: Option<Collation>,
    manifest: String,
}

impl TensorSource {
    pub(crate) fn new(dataset: &Dataset, options: StreamOptions) -> Result<Self> {
        let shape = options.shape()?;
        let schema = dataset.schema()?;
        let StreamOptions { mut tensors, label, shuffle, prefetch, collate, .. } = options;
        tensors.extend(label.map(|label| TensorSpec::label(label, &schema)));
        let layout = Layout::new(&schema, tensors)?;
        layout.room(0)?;
        let dataset = dataset.select(layout.columns.iter().cloned())?;
        let rows = dataset.count_blocks()?;
        if rows.iter().sum::<u64>() == 0 {
            return Err(Error::Empty { after: " after its filters and splits" });
        }
        let manifest = String::new();
        let mut source =
            Self { dataset, layout, shape, shuffle, rows, prefetch, collate, manifest };
        source.manifest = source.hash_of_everything()?;
        Ok(source)
    }

    /// Rows of an epoch.
    pub fn rows(&self) -> u64 {
        self.rows.iter().sum()
    }

    /// Steps of an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.shape.steps(self.rows())
    }

    /// Rows of a step over all ranks, except at the end of an epoch.
    pub fn batch_size(&self) -> usize {
        self.shape.lanes * self.shape.per_lane
    }

    /// The largest world that can read the stream.
    pub fn lanes(&self) -> usize {
        self.shape.lanes
    }

    /// What a resumed stream must have in common: content, operations, columns and batch size.
    fn hash_of_everything(&self) -> Result<String> {
        let content = self.dataset.open()?.fingerprint()?;
        let description =
            (self.dataset.ops(), &self.layout, &self.shape, &self.rows, &self.collate);
        let description = serde_json::to_vec(&description).map_err(mobula_core::Error::layer)?;
        let shuffled = [u8::from(self.shuffle.is_some())];
        Ok(hash([content.as_bytes(), &description, &shuffled]))
    }
}

impl BatchSource for TensorSource {
    fn open(&self, shard: Shard) -> Result<Box<dyn BatchStream>, mobula_core::Error> {
        if shard.rank >= shard.world || shard.world > self.shape.lanes {
            let option = "the shard of a stream";
            let lanes = self.shape.lanes;
            let expected = format!("a rank of a world of at most {lanes}, the stream's lanes");
            let got = format!("rank {} of {}", shard.rank, shard.world);
            return Err(Error::InvalidOption { option, expected, got }.into());
        }
        let found = self.hash_of_everything()?;
        if found != self.manifest {
            return Err(mobula_core::Error::StreamMismatch {
                what: "manifest (the files as they are now)",
                expected: found,
                got: self.manifest.clone(),
            });
        }
        Ok(Box::new(Reader::new(self, shard)))
    }
}
