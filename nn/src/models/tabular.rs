//! Residual networks for tables.

use super::ids::Ids;
use super::positive;
use crate::layers::{
    Activation, BatchNorm, BatchNormOptions, Dropout, Embedding, Linear, add, flatten,
};
use crate::{Architecture, Error, Init, Module, Params, Pass, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

/// The options of [`Tabular`]: architecture `"tabular"`.
///
/// A row is one row of numbers: first the numeric columns, best standardised, then the category
/// ids of the others, whole numbers from 0.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::{Model, ModelSpec, models::TabularOptions};
///
/// // Two measures, an island of three and a sex; which of three species?
/// let options = TabularOptions::new(2, [3, 2], 3);
/// let model = Model::build(&ModelSpec::new("tabular", &options)?, 7, &Device::Cpu)?;
/// let penguins = Tensor::new(&[[0.3f32, -1.2, 2.0, 0.0], [1.0, 0.1, 0.0, 1.0]], &Device::Cpu)?;
/// assert_eq!(model.predict(&penguins)?.dims(), [2, 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TabularOptions {
    /// Numeric columns.
    pub numeric: usize,
    /// How many categories each categorical column has; none unless said otherwise.
    #[serde(default)]
    pub categories: Vec<usize>,
    /// Numbers that come out for a row, such as one logit per class.
    pub outputs: usize,
    /// Features that stand for a category; 64 unless said otherwise, the fewest that the paper tried.
    #[serde(default = "embedding")]
    pub embedding: usize,
    /// Features between the blocks; 192 unless said otherwise.
    #[serde(default = "width")]
    pub width: usize,
    /// Blocks; 2 unless said otherwise.
    #[serde(default = "blocks")]
    pub blocks: usize,
    /// Features inside a block; twice `width` where it is 0, as it is unless said otherwise.
    #[serde(default)]
    pub hidden: usize,
    /// The rate of dropout inside a block, in `[0, 1)`; 0.3 unless said otherwise.
    #[serde(default = "dropout")]
    pub dropout: f64,
    /// The rate of dropout at the end of a block, before its input is added; 0 unless said
    /// otherwise.
    #[serde(default)]
    pub residual_dropout: f64,
}

fn embedding() -> usize {
    64
}

fn width() -> usize {
    192
}

fn blocks() -> usize {
    2
}

fn dropout() -> f64 {
    0.3
}

impl TabularOptions {
    /// These columns, and the defaults of the paper's authors; change them with
    /// `..TabularOptions::new(..)`.
    pub fn new(numeric: usize, categories: impl Into<Vec<usize>>, outputs: usize) -> Self {
        Self {
            numeric,
            categories: categories.into(),
            outputs,
            embedding: embedding(),
            width: width(),
            blocks: blocks(),
            hidden: 0,
            dropout: dropout(),
            residual_dropout: 0.0,
        }
    }

    fn check(&self) -> Result<()> {
        positive(&[("outputs", self.outputs), ("width", self.width), ("blocks", self.blocks)])?;
        positive(&[("embedding", self.embedding)])?;
        if self.columns() == 0 {
            return Err(Error::option("numeric", 0, "at least 1 where there are no categories"));
        }
        if self.categories.contains(&0) {
            let got = format!("{:?}", self.categories);
            return Err(Error::option("categories", got, "at least 1 in each column"));
        }
        Ok(())
    }

    /// Of the input.
    fn columns(&self) -> usize {
        self.numeric + self.categories.len()
    }
}

/// The ResNet for tables of Gorishniy, Rubachev, Khrulkov, Babenko: *Revisiting Deep Learning Models
/// for Tabular Data* (NeurIPS 2021): a linear map, blocks with a skip, a norm, ReLU and a linear map,
/// `[rows, numeric + categories]` to `[rows, outputs]`.
///
/// A block is batch norm, linear, ReLU, dropout, linear, dropout. A training batch is of two rows at
/// least, for its norms see nothing in one.
///
/// Parameters `embedding.weight` (the categories of the first column, then those of the second and
/// so on), `input.*`, `blocks.0.norm.*`, `blocks.0.linear1.*`, `blocks.0.linear2.*`, `norm.*`,
/// `head.*`.
#[derive(Clone, Debug)]
pub struct Tabular {
    numeric: usize,
    categories: Option<Categories>,
    input: Linear,
    blocks: Vec<Block>,
    norm: BatchNorm,
    head: Linear,
}

impl Tabular {
    /// Creates the layers in `params`.
    pub fn new(options: &TabularOptions, params: &Params) -> Result<Self> {
        options.check()?;
        let TabularOptions { numeric, width, outputs, .. } = *options;
        let inputs = numeric + options.categories.len() * options.embedding;
        let block = |at: usize| Block::new(options, &params.scope(&format!("blocks.{at}")));
        Ok(Self {
            numeric,
            categories: Categories::new(options, &params.scope("embedding"))?,
            input: Linear::new(&params.scope("input"), inputs, width)?,
            blocks: (0..options.blocks).map(block).collect::<Result<_>>()?,
            norm: norm(&params.scope("norm"), width)?.with_activation(Activation::Relu),
            head: Linear::new(&params.scope("head"), width, outputs)?,
        })
    }

    /// Numeric columns and the vectors of the categories side by side.
    fn features(&self, x: &Tensor) -> Result<Tensor> {
        let columns = self.numeric + self.categories.as_ref().map_or(0, |c| c.counts.len());
        if !matches!(*x.dims(), [_, width] if width == columns) {
            let what = "the columns of a table";
            return Err(Error::shape(what, format!("[rows, {columns}]"), x.dims()));
        }
        let numbers = x.narrow(1, 0, self.numeric)?;
        let Some(categories) = &self.categories else {
            return Ok(numbers);
        };
        let ids = x.narrow(1, self.numeric, x.dim(1)? - self.numeric)?;
        let vectors = flatten(&categories.forward(&ids)?)?;
        if self.numeric == 0 {
            return Ok(vectors);
        }
        Ok(Tensor::cat(&[numbers, vectors], 1)?)
    }
}

impl Module for Tabular {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut x = self.input.forward(&self.features(x)?, pass)?;
        for block in &self.blocks {
            x = block.forward(&x, pass)?;
        }
        self.head.forward(&self.norm.forward(&x, pass)?, pass)
    }
}

/// One table of all columns' categories.
#[derive(Clone, Debug)]
struct Categories {
    counts: Vec<usize>,
    /// Where each column begins in the table.
    starts: Tensor,
    table: Embedding,
}

impl Categories {
    fn new(options: &TabularOptions, params: &Params) -> Result<Option<Self>> {
        let counts = options.categories.clone();
        if counts.is_empty() {
            return Ok(None);
        }
        let starts = counts.iter().scan(0, |next, count| {
            let start = *next;
            *next += *count as i64;
            Some(start)
        });
        let starts = Tensor::new(starts.collect::<Vec<i64>>(), &Device::Cpu)?;
        // Initial values as the authors have them: those of a linear layer.
        let (total, init) = (counts.iter().sum(), Init::default_weight());
        let table = Embedding::with_init(params, total, options.embedding, init)?;
        Ok(Some(Self { counts, starts, table }))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let ids = Ids { what: "category", option: "categories" };
        let ids = ids.check(x, |column| self.counts[column])?;
        self.table.forward(&ids.broadcast_add(&self.starts)?)
    }
}

#[derive(Clone, Debug)]
struct Block {
    norm: BatchNorm,
    linear1: Linear,
    linear2: Linear,
    dropouts: [Dropout; 2],
}

impl Block {
    fn new(options: &TabularOptions, params: &Params) -> Result<Self> {
        let TabularOptions { width, dropout, residual_dropout, .. } = *options;
        let hidden = if options.hidden == 0 { 2 * width } else { options.hidden };
        let scope = |name: &str| params.scope(name);
        Ok(Self {
            norm: norm(&scope("norm"), width)?,
            linear1: Linear::new(&scope("linear1"), width, hidden)?
                .with_activation(Activation::Relu),
            linear2: Linear::new(&scope("linear2"), hidden, width)?,
            dropouts: [
                Dropout::new(&scope("dropout1"), dropout)?,
                Dropout::new(&scope("dropout2"), residual_dropout)?,
            ],
        })
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let [inside, after] = &self.dropouts;
        let y = self.linear1.forward(&self.norm.forward(x, pass)?, pass)?;
        let y = self.linear2.forward(&inside.forward(&y, pass)?, pass)?;
        add(x, &after.forward(&y, pass)?)
    }
}

fn norm(params: &Params, features: usize) -> Result<BatchNorm> {
    BatchNorm::new(params, features, BatchNormOptions::default())
}

impl Architecture for TabularOptions {
    fn input_shape(&self) -> Vec<usize> {
        vec![self.columns()]
    }

    fn output_shape(&self) -> Vec<usize> {
        vec![self.outputs]
    }

    fn build(&self, params: &Params) -> Result<Box<dyn Module>> {
        Ok(Box::new(Tabular::new(self, params)?))
    }
}
