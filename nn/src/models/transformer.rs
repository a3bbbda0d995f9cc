//! Transformers: encoders, and decoders without an encoder.

use super::ids::Ids;
use super::positive;
use crate::layers::{
    Activation, AttentionMask, Dropout, Embedding, LayerNorm, Linear, Rotary, TransformerBlock,
    add_to_rows, mean_places,
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
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::{Model, ModelSpec, models::TransformerOptions};
///
/// // A small GPT: 64 tokens in, logits of the 65 tokens that may follow each of them out.
/// let options = TransformerOptions {
///     layers: 2,
///     features: 32,
///     ..TransformerOptions::language_model(65, 64)
/// };
/// let model = Model::build(&ModelSpec::new("transformer", &options)?, 7, &Device::Cpu)?;
/// let tokens = Tensor::zeros((1, 64), candle_core::DType::U32, &Device::Cpu)?;
/// assert_eq!(model.predict(&tokens)?.dims(), [1, 64, 65]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TransformerOptions {
    /// Places of a row.
    pub length: usize,
    /// Numbers of a place of the input, where places are vectors.
    pub inputs: usize,
    /// Where it is not 0, places are token ids of `0..vocabulary`, one number each, and `inputs` is
    /// not looked at. Whole numbers in `f32` do, up to a vocabulary of 2²⁴.
    pub vocabulary: usize,
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
    /// The head's weight is that of the token embedding, without a bias (Press and Wolf: *Using the
    /// Output Embedding to Improve Language Models*, 2017). Needs `outputs` equal to `vocabulary`.
    pub tied: bool,
    /// The rate of dropout inside the blocks and after the positions, in `[0, 1)`.
    pub dropout: f64,
    /// The rate of dropout of the attention's weights, in `[0, 1)`.
    pub attention_dropout: f64,
    /// Between the two linear layers of a block.
    pub activation: Activation,
}

impl Default for TransformerOptions {
    fn default() -> Self {
        Self {
            length: 128,
            inputs: 256,
            vocabulary: 0,
            features: 256,
            heads: 4,
            layers: 4,
            hidden: 0,
            causal: false,
            positions: Positions::default(),
            pooling: Pooling::default(),
            outputs: 10,
            tied: false,
            dropout: 0.0,
            attention_dropout: 0.0,
            activation: Activation::Gelu,
        }
    }
}

impl TransformerOptions {
    /// A decoder of `length` tokens that gives the logits of the token after each: causal, an output
    /// per place and token, the head tied to the embedding; else as by default.
    pub fn language_model(vocabulary: usize, length: usize) -> Self {
        Self {
            length,
            vocabulary,
            causal: true,
            pooling: Pooling::Each,
            outputs: vocabulary,
            tied: true,
            ..Self::default()
        }
    }

    fn check(&self) -> Result<()> {
        let Self { features, heads, vocabulary, .. } = *self;
        positive(&[("length", self.length), ("features", features)])?;
        positive(&[("layers", self.layers), ("outputs", self.outputs)])?;
        if vocabulary == 0 {
            positive(&[("inputs", self.inputs)])?;
        }
        if heads == 0 || !features.is_multiple_of(heads) {
            return Err(Error::option("heads", heads, format!("a divisor of {features} features")));
        }
        if self.tied {
            positive(&[("vocabulary", vocabulary)])?;
        }
        if self.tied && self.outputs != vocabulary {
            let expected = format!("{vocabulary}, the vocabulary, where the head is tied to it");
            return Err(Error::option("outputs", self.outputs, expected));
        }
        Ok(())
    }
}

/// A linear map or a token embedding, positions, blocks, a norm and a linear map:
/// `[rows, length, inputs]`, or tokens `[rows, length]`, to `[rows, outputs]`, or
/// `[rows, length, outputs]`.
///
/// Parameters `embed.*`, `positions`, `layers.0.*` as of [`TransformerBlock`], `norm.*`, and
/// `head.*` unless it is tied. Positions and token embeddings begin as normal numbers with deviation
/// 0.02, as in GPT-2.
#[derive(Clone, Debug)]
pub struct Transformer {
    embed: Embed,
    positions: Option<Tensor>,
    dropout: Dropout,
    blocks: Vec<TransformerBlock>,
    norm: LayerNorm,
    head: Head,
    mask: AttentionMask,
    pooling: Pooling,
}

/// How a place becomes features.
#[derive(Clone, Debug)]
enum Embed {
    Vectors(Linear),
    Tokens(Embedding),
}

/// How features become outputs.
#[derive(Clone, Debug)]
enum Head {
    Own(Linear),
    Tied(Embedding),
}

/// The deviation of positions and token embeddings at the start.
const SMALL: Init = Init::Normal { mean: 0.0, std: 0.02 };

impl Transformer {
    /// Creates the layers in `params`.
    pub fn new(options: &TransformerOptions, params: &Params) -> Result<Self> {
        options.check()?;
        let TransformerOptions { length, features, dropout, .. } = *options;
        let learnt = options.positions == Positions::Learnt;
        let positions = learnt.then(|| params.get((length, features), "positions", SMALL));
        let block = |at: usize| Self::block(options, &params.scope(&format!("layers.{at}")));
        let embed = Embed::new(options, &params.scope("embed"))?;
        let mask = match options.causal {
            true => AttentionMask::causal(),
            false => AttentionMask::default(),
        };
        Ok(Self {
            head: Head::new(options, &embed, &params.scope("head"))?,
            embed,
            positions: positions.transpose()?,
            dropout: Dropout::new(&params.scope("dropout"), dropout)?,
            blocks: (0..options.layers).map(block).collect::<Result<_>>()?,
            norm: LayerNorm::new(&params.scope("norm"), features)?,
            mask,
            pooling: options.pooling,
        })
    }

    fn block(options: &TransformerOptions, params: &Params) -> Result<TransformerBlock> {
        let TransformerOptions { features, heads, activation, dropout, .. } = *options;
        let hidden = if options.hidden == 0 { 4 * features } else { options.hidden };
        let block = TransformerBlock::new(params, features, heads, hidden, activation, dropout)?
            .with_attention_dropout(options.attention_dropout)?;
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

impl Embed {
    fn new(options: &TransformerOptions, params: &Params) -> Result<Self> {
        let TransformerOptions { inputs, vocabulary, features, .. } = *options;
        Ok(match vocabulary {
            0 => Self::Vectors(Linear::new(params, inputs, features)?),
            _ => Self::Tokens(Embedding::with_init(params, vocabulary, features, SMALL)?),
        })
    }

    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        match self {
            Self::Vectors(linear) => linear.forward(x, pass),
            Self::Tokens(table) => {
                let vocabulary = table.weight().dim(0)?;
                let tokens = Ids { what: "token", option: "vocabulary" };
                table.forward(&tokens.check(x, |_| vocabulary)?)
            }
        }
    }
}

impl Head {
    fn new(options: &TransformerOptions, embed: &Embed, params: &Params) -> Result<Self> {
        Ok(match embed {
            Embed::Tokens(table) if options.tied => Self::Tied(table.clone()),
            _ => Self::Own(Linear::new(params, options.features, options.outputs)?),
        })
    }

    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        match self {
            Self::Own(linear) => linear.forward(x, pass),
            Self::Tied(table) => table.attend(x, pass),
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
        match self.vocabulary {
            0 => vec![self.length, self.inputs],
            _ => vec![self.length],
        }
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
