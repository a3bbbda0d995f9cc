//! Transformers: encoders, and decoders without an encoder.

use super::positive;
use crate::layers::{
    Activation, AttentionMask, Dropout, LayerNorm, Linear, Rotary, TransformerBlock, add_to_rows,
    mean_places,
};
use crate::{Architecture, Error, Init, Module, Params, Pass, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// How a transformer knows where its inputs are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Positions {
    /// Not at all, but for a causal mask.
    None,
    /// A learnt vector for each place is added.
    #[default]
    Learnt,
    /// Queries and keys are turned by their places, with base 10,000.
    Rotary,
}

/// What a transformer gives for a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pooling {
    /// `[outputs]`, of the mean over its places.
    #[default]
    Mean,
    /// `[length, outputs]`, of each place, as for a language model.
    Each,
}

/// The options of [`Transformer`]: architecture `"transformer"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TransformerOptions {
    /// Places of a row.
    pub length: usize,
    /// Numbers of a place of the input.
    pub inputs: usize,
    /// Features inside, a multiple of `heads`.
    pub features: usize,
    /// Attention heads.
    pub heads: usize,
    /// Blocks.
    pub layers: usize,
    /// Features between the two linear layers of a block; four times `features` where it is 0.
    pub hidden: usize,
    /// Each place sees only itself and those before it: a decoder.
    pub causal: bool,
    /// How places are told apart.
    pub positions: Positions,
    /// What comes out.
    pub pooling: Pooling,
    /// Numbers that come out for a row, or for a place.
    pub outputs: usize,
    /// The rate of dropout inside the blocks and after the positions, in `[0, 1)`.
    pub dropout: f64,
    /// Between the two linear layers of a block.
    pub activation: Activation,
}

impl Default for TransformerOptions {
    fn default() -> Self {
        Self {
            length: 128,
            inputs: 256,
            features: 256,
            heads: 4,
            layers: 4,
            hidden: 0,
            causal: false,
            positions: Positions::default(),
            pooling: Pooling::default(),
            outputs: 10,
            dropout: 0.0,
            activation: Activation::Gelu,
        }
    }
}

/// A linear map, positions, blocks, a norm and a linear map: `[rows, length, inputs]` to
/// `[rows, outputs]`, or `[rows, length, outputs]`.
///
/// Parameters `embed.*`, `positions`, `layers.0.*` as of [`TransformerBlock`], `norm.*`, `head.*`.
#[derive(Clone, Debug)]
pub struct Transformer {
    embed: Linear,
    positions: Option<Tensor>,
    dropout: Dropout,
    blocks: Vec<TransformerBlock>,
    norm: LayerNorm,
    head: Linear,
    mask: AttentionMask,
    pooling: Pooling,
}

impl Transformer {
    /// Creates the layers in `params`.
    pub fn new(options: &TransformerOptions, params: &Params) -> Result<Self> {
        let TransformerOptions { length, inputs, features, heads, outputs, dropout, .. } = *options;
        positive(&[("length", length), ("inputs", inputs), ("features", features)])?;
        positive(&[("layers", options.layers), ("outputs", outputs)])?;
        let learnt = options.positions == Positions::Learnt;
        let std = Init::Normal { mean: 0.0, std: 0.02 };
        let positions = learnt.then(|| params.get((length, features), "positions", std));
        let block = |at: usize| Self::block(options, &params.scope(&format!("layers.{at}")));
        let mask = match options.causal {
            true => AttentionMask::causal(),
            false => AttentionMask::default(),
        };
        if heads == 0 || !features.is_multiple_of(heads) {
            return Err(Error::option("heads", heads, format!("a divisor of {features} features")));
        }
        Ok(Self {
            embed: Linear::new(&params.scope("embed"), inputs, features)?,
            positions: positions.transpose()?,
            dropout: Dropout::new(&params.scope("dropout"), dropout)?,
            blocks: (0..options.layers).map(block).collect::<Result<_>>()?,
            norm: LayerNorm::new(&params.scope("norm"), features)?,
            head: Linear::new(&params.scope("head"), features, outputs)?,
            mask,
            pooling: options.pooling,
        })
    }

    fn block(options: &TransformerOptions, params: &Params) -> Result<TransformerBlock> {
        let TransformerOptions { features, heads, activation, dropout, .. } = *options;
        let hidden = if options.hidden == 0 { 4 * features } else { options.hidden };
        let block = TransformerBlock::new(params, features, heads, hidden, activation, dropout)?;
        match options.positions {
            Positions::Rotary => Ok(block.with_rotary(Rotary::new(features / heads, 10_000.0)?)),
            _ => Ok(block),
        }
    }

    fn place(&self, x: Tensor) -> Result<Tensor> {
        match &self.positions {
            Some(positions) => add_to_rows(&x, positions),
            None => Ok(x),
        }
    }
}

impl Module for Transformer {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let x = self.place(self.embed.forward(x, pass)?)?;
        let mut x = self.dropout.forward(&x, pass)?;
        for block in &self.blocks {
            x = block.forward_masked(&x, &self.mask, pass)?;
        }
        let x = self.norm.forward(&x, pass)?;
        let x = if self.pooling == Pooling::Mean { mean_places(&x)? } else { x };
        self.head.forward(&x, pass)
    }
}

impl Architecture for TransformerOptions {
    fn input_shape(&self) -> Vec<usize> {
        vec![self.length, self.inputs]
    }

    fn output_shape(&self) -> Vec<usize> {
        match self.pooling {
            Pooling::Mean => vec![self.outputs],
            Pooling::Each => vec![self.length, self.outputs],
        }
    }

    fn build(&self, params: &Params) -> Result<Box<dyn Module>> {
        Ok(Box::new(Transformer::new(self, params)?))
    }
}
