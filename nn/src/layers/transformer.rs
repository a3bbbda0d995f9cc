//! The block of a transformer.

use super::{
    Activation, AttentionMask, Dropout, LayerNorm, Linear, MultiHeadAttention, Rotary, add,
};
use crate::{Module, Params, Pass, Result};
use candle_core::Tensor;

/// Attention and two linear layers, each with a norm before it and added to its input:
/// `[rows, places, features]` to the same (Xiong et al.: *On Layer Normalization in the
/// Transformer Architecture*, 2020).
///
/// Parameters named as those of PyTorch's `nn.TransformerEncoderLayer(norm_first=True)`:
/// `self_attn.*`, `linear1.*`, `linear2.*`, `norm1.*`, `norm2.*`.
#[derive(Clone, Debug)]
pub struct TransformerBlock {
    attention: MultiHeadAttention,
    norm1: LayerNorm,
    norm2: LayerNorm,
    linear1: Linear,
    linear2: Linear,
    dropouts: [Dropout; 3],
}

impl TransformerBlock {
    /// Creates the layers in `params`: `heads` heads, `hidden` features between the two linear
    /// layers, with `activation` there. Errors unless `heads` divides `features` and `dropout` is
    /// in `[0, 1)`.
    pub fn new(
        params: &Params,
        features: usize,
        heads: usize,
        hidden: usize,
        activation: Activation,
        dropout: f64,
    ) -> Result<Self> {
        let scope = |name: &str| params.scope(name);
        let dropout = |name: &str| Dropout::new(&scope(name), dropout);
        Ok(Self {
            attention: MultiHeadAttention::new(&scope("self_attn"), features, heads)?,
            norm1: LayerNorm::new(&scope("norm1"), features)?,
            norm2: LayerNorm::new(&scope("norm2"), features)?,
            linear1: Linear::new(&scope("linear1"), features, hidden)?.with_activation(activation),
            linear2: Linear::new(&scope("linear2"), hidden, features)?,
            dropouts: [dropout("dropout1")?, dropout("dropout")?, dropout("dropout2")?],
        })
    }

    /// Turns queries and keys by their places.
    #[must_use]
    pub fn with_rotary(self, rotary: Rotary) -> Self {
        Self { attention: self.attention.with_rotary(rotary), ..self }
    }

    /// Drops weights of the attention in training, as [`MultiHeadAttention::with_dropout`]; by
    /// default none. Errors unless `rate` is in `[0, 1)`.
    pub fn with_attention_dropout(self, rate: f64) -> Result<Self> {
        Ok(Self { attention: self.attention.with_dropout(rate)?, ..self })
    }

    /// Each place sees those that the mask lets it see.
    pub fn forward_masked(&self, x: &Tensor, mask: &AttentionMask, pass: &Pass) -> Result<Tensor> {
        let [after_attention, between, after] = &self.dropouts;
        let y = self.attention.forward_masked(&self.norm1.forward(x, pass)?, mask, pass)?;
        let x = add(x, &after_attention.forward(&y, pass)?)?;
        let y = self.linear1.forward(&self.norm2.forward(&x, pass)?, pass)?;
        let y = self.linear2.forward(&between.forward(&y, pass)?, pass)?;
        add(&x, &after.forward(&y, pass)?)
    }
}

impl Module for TransformerBlock {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.forward_masked(x, &AttentionMask::default(), pass)
    }
}
