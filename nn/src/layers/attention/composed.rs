//! Attention in candle's own operations.

use super::{AttentionMask, Bias, Sizes};
use crate::cpu::matmul;
use crate::layers::dropout::Mask;
use crate::{Precision, Result};
use candle_core::{D, Tensor};

impl Sizes {
    /// In candle's own operations, for devices that this crate has no kernel for.
    pub(super) fn composed(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: &AttentionMask,
        dropout: Option<Mask>,
        precision: Precision,
    ) -> Result<Tensor> {
        self.check(mask)?;
        let Self { rows, queries, keys, heads, kv_heads, size } = *self;
        let split = |t: &Tensor, places: usize, count: usize| -> candle_core::Result<Tensor> {
            let t = t.reshape((rows, places, count, size))?.transpose(1, 2)?;
            let group = heads / count;
            let t = t.unsqueeze(2)?.broadcast_as((rows, count, group, places, size))?;
            t.contiguous()?.reshape((rows * heads, places, size))
        };
        let (q, k, v) =
            (split(q, queries, heads)?, split(k, keys, kv_heads)?, split(v, keys, kv_heads)?);
        let scores = (matmul(&q, &k.t()?, precision)? / (size as f64).sqrt())?;
        let scores = scores.reshape((rows, heads, queries, keys))?;
        let scores = scores.broadcast_add(&self.constant(mask, &scores)?)?;
        // Where a query sees nothing, −∞ less −∞ and 0 by 0 must not be; else the sum is at least 1.
        let largest = scores.detach().max_keepdim(D::Minus1)?.maximum(f64::from(f32::MIN))?;
        let shifted = scores.broadcast_sub(&largest)?.exp()?;
        let weights = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?.maximum(0.5)?)?;
        let weights = match dropout {
            Some(dropout) => ((&weights * self.kept(&dropout, &weights)?)? * dropout.scale())?,
            None => weights,
        };
        let y = matmul(&weights.reshape((rows * heads, queries, keys))?, &v, precision)?;
        let y = y.reshape((rows, heads, queries, size))?.transpose(1, 2)?;
        Ok(y.contiguous()?.reshape((rows, queries, heads * size))?)
    }

    /// 1 for each weight that is kept: `[rows, heads, queries, keys]`.
    fn kept(&self, dropout: &Mask, like: &Tensor) -> candle_core::Result<Tensor> {
        let Self { rows, heads, queries, keys, .. } = *self;
        let (mut kept, mut factors) = (Vec::with_capacity(like.elem_count()), vec![0f32; keys]);
        for row in 0..rows {
            for of_head in (0..heads).map(|head| dropout.child(head)) {
                for query in 0..queries {
                    of_head.child(query).factors(row, &mut factors);
                    kept.extend(factors.iter().map(|factor| u8::from(*factor > 0.0)));
                }
            }
        }
        Tensor::from_vec(kept, like.shape(), like.device())?.to_dtype(like.dtype())
    }

    /// What is added to the scores: `[rows, 1, queries, keys]`.
    fn constant(&self, mask: &AttentionMask, like: &Tensor) -> candle_core::Result<Tensor> {
        let Self { rows, queries, keys, .. } = *self;
        let sees = |row: usize, query: usize, key: usize| {
            let length = mask.lengths.as_ref().map_or(keys, |lengths| lengths[row]);
            key < length && (!mask.causal || key + queries <= query + keys)
        };
        let mut values = Vec::with_capacity(rows * queries * keys);
        for (row, query) in (0..rows).flat_map(|row| (0..queries).map(move |query| (row, query))) {
            values.extend((0..keys).map(|key| match sees(row, query, key) {
                true => 0.0f32,
                false => f32::NEG_INFINITY,
            }));
        }
        let constant = Tensor::from_vec(values, (rows, 1, queries, keys), like.device())?;
        let constant = constant.to_dtype(like.dtype())?;
        match &mask.bias {
            Some(Bias { tensor, .. }) => {
                constant.broadcast_add(&tensor.to_dtype(like.dtype())?.to_device(like.device())?)
            }
            None => Ok(constant),
        }
    }
}
