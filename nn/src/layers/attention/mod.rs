//! Attention.

mod composed;
mod kernel;
mod parts;
mod rotary;

pub use rotary::Rotary;

use super::dropout::Mask;
use super::linear_op::affine;
use super::{Activation, Dropout, Linear};
use crate::cpu::{matmul, unsupported};
use crate::{Error, Init, Module, Params, Pass, Precision, Result};
use candle_core::{DType, Tensor};
use kernel::Attention;
use parts::{Columns, Inputs};
use std::sync::Arc;

/// Which keys each query sees; by default all.
#[derive(Clone, Debug, Default)]
pub struct AttentionMask {
    causal: bool,
    lengths: Option<Arc<[usize]>>,
    bias: Option<Bias>,
}

/// What is added to the scores, for the kernel and for other devices.
#[derive(Clone, Debug)]
struct Bias {
    tensor: Tensor,
    values: Arc<[f64]>,
}

impl AttentionMask {
    /// Each query sees the keys up to its own place; where there are more keys than queries, the
    /// last of both are at the same place.
    pub fn causal() -> Self {
        Self { causal: true, ..Self::default() }
    }

    /// Row `i` of the batch has `lengths[i]` keys; what follows is padding that nobody sees. A
    /// query that sees nothing gets zeros.
    #[must_use]
    pub fn with_lengths(self, lengths: impl Into<Arc<[usize]>>) -> Self {
        Self { lengths: Some(lengths.into()), ..self }
    }

    /// Adds a constant `[queries, keys]` to the scores, such as −∞ where a query must not look.
    /// It gets no gradient.
    pub fn with_bias(self, bias: &Tensor) -> Result<Self> {
        let values = bias.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?.into();
        Ok(Self { bias: Some(Bias { tensor: bias.detach(), values }), ..self })
    }
}

/// softmax(q kᵀ / √size) v of `heads` heads side by side: `q [rows, queries, heads · size]`,
/// `k` and `v` `[rows, keys, kv_heads · size]`, to the shape of `q` (Vaswani et al., 2017; with
/// fewer heads of keys than of queries, Ainslie et al., 2023).
///
/// Memory grows with the length, not with its square, on the CPU. Its products are of
/// [`Precision::F32`]. Errors where the shapes do not
/// fit each other or the mask.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    kv_heads: usize,
    mask: &AttentionMask,
) -> Result<Tensor> {
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let shape = |what: &str, t: &Tensor, heads: usize| match *t.dims() {
        [rows, places, width] if heads > 0 && width > 0 && width.is_multiple_of(heads) => {
            Ok((rows, places, width / heads))
        }
        _ => Err(Error::shape(
            format!("the {what} of attention"),
            format!("[rows, places, a multiple of {heads} heads]"),
            t.dims(),
        )),
    };
    let (rows, queries, size) = shape("queries", &q, heads)?;
    let (_, keys, _) = shape("keys", &k, kv_heads)?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(Error::option("kv_heads", kv_heads, format!("a divisor of {heads} heads")));
    }
    for (what, t) in [("keys", &k), ("values", &v)] {
        let expected = [rows, keys, kv_heads * size];
        if t.dims() != expected {
            return Err(Error::shape(
                format!("the {what} of attention"),
                format!("{expected:?}"),
                t.dims(),
            ));
        }
    }
    if keys == 0 {
        return Err(Error::shape(
            "the keys of attention",
            "[rows, at least 1 place, ..]",
            k.dims(),
        ));
    }
    let sizes = Sizes { rows, queries, keys, heads, kv_heads, size };
    let whole = |stride| Columns { first: 0, stride };
    let widths = (heads * size, kv_heads * size);
    let at = [(0, whole(widths.0)), (1, whole(widths.1)), (2, whole(widths.1))];
    if !crate::cpu::has_kernels(&q) {
        return sizes.composed(&q, &k, &v, mask, None, Precision::F32);
    }
    sizes.kernel(&Inputs { tensors: vec![&q, &k, &v], at }, mask, None, Precision::F32)
}

#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    size: usize,
}

impl Sizes {
    fn check(&self, mask: &AttentionMask) -> Result<()> {
        if let Some(lengths) = &mask.lengths {
            let too_long = lengths.iter().any(|length| *length > self.keys);
            if lengths.len() != self.rows || too_long {
                let expected = format!("[{}], each at most {}", self.rows, self.keys);
                return Err(Error::shape("the lengths of an attention mask", expected, lengths));
            }
        }
        match &mask.bias {
            Some(Bias { tensor, .. }) if tensor.dims() != [self.queries, self.keys] => {
                let expected = format!("[{}, {}]", self.queries, self.keys);
                Err(Error::shape("the bias of an attention mask", expected, tensor.dims()))
            }
            _ => Ok(()),
        }
    }

    fn kernel(
        &self,
        inputs: &Inputs<'_>,
        mask: &AttentionMask,
        dropout: Option<Mask>,
        precision: Precision,
    ) -> Result<Tensor> {
        self.check(mask)?;
        let Self { rows, queries, keys, heads, kv_heads, size } = *self;
        let bias = mask.bias.as_ref().map(|bias| Arc::clone(&bias.values));
        let (is_causal, lengths) = (mask.causal, mask.lengths.clone());
        let kernel = Attention {
            rows,
            queries,
            keys,
            heads,
            kv_heads,
            size,
            is_causal,
            lengths,
            bias,
            dropout,
            precision,
        };
        Ok(match inputs.tensors[0].dtype() {
            DType::F32 => kernel.apply::<f32>(inputs)?,
            DType::F64 => kernel.apply::<f64>(inputs)?,
            other => return Err(unsupported(other, "attention").into()),
        })
    }
}

/// Multi-head self-attention with its projections: `[rows, places, features]` to the same.
///
/// Parameters as PyTorch's `nn.MultiheadAttention` names and initialises them: `in_proj_weight
/// [3 · features, features]`, `in_proj_bias`, `out_proj.weight`, `out_proj.bias`.
#[derive(Clone, Debug)]
pub struct MultiHeadAttention {
    weight: Tensor,
    bias: Tensor,
    out: Linear,
    heads: usize,
    rotary: Option<Rotary>,
    dropout: Dropout,
    name: String,
}

impl MultiHeadAttention {
    /// Creates the parameters in `params`. Errors unless `heads` divides `features`.
    pub fn new(params: &Params, features: usize, heads: usize) -> Result<Self> {
        if heads == 0 || features == 0 || !features.is_multiple_of(heads) {
            return Err(Error::option("heads", heads, format!("a divisor of {features} features")));
        }
        let xavier = Init::XavierUniform { gain: 1.0 };
        Ok(Self {
            weight: params.get((3 * features, features), "in_proj_weight", xavier)?,
            bias: params.get(3 * features, "in_proj_bias", Init::Zeros)?,
            out: Linear::new(&params.scope("out_proj"), features, features)?,
            heads,
            rotary: None,
            dropout: Dropout::named(String::new(), 0.0)?,
            name: params.path().to_owned(),
        })
    }

    /// Turns queries and keys by their places.
    #[must_use]
    pub fn with_rotary(self, rotary: Rotary) -> Self {
        Self { rotary: Some(rotary), ..self }
    }

    /// Sets each weight of the softmax to 0 with probability `rate` in training and divides the
    /// others by `1 − rate`, as PyTorch's `dropout`. Default 0. Errors unless it is in `[0, 1)`.
    ///
    /// Like those of [`Dropout`] the numbers are a pure function: weight `key` of `query` and `head`
    /// is dropped by word `key` of `Stream::new(seed, "dropout NAME.dropout")`, its `child(head)`,
    /// its `child(query)`, `at(step, row)`, where NAME is the path of this layer. The backward pass
    /// draws them again: no memory is kept for them on the CPU.
    pub fn with_dropout(self, rate: f64) -> Result<Self> {
        let name = match self.name.as_str() {
            "" => "dropout".to_owned(),
            name => format!("{name}.dropout"),
        };
        Ok(Self { dropout: Dropout::named(name, rate)?, ..self })
    }

    /// What each place of `x` gathers from those that it sees.
    pub fn forward_masked(&self, x: &Tensor, mask: &AttentionMask, pass: &Pass) -> Result<Tensor> {
        let features = self.bias.elem_count() / 3;
        let [rows, places, got] = *x.dims() else { return Err(self.refuse(x)) };
        if got != features {
            return Err(self.refuse(x));
        }
        let size = features / self.heads;
        let sizes = Sizes {
            rows,
            queries: places,
            keys: places,
            heads: self.heads,
            kv_heads: self.heads,
            size,
        };
        let precision = pass.precision();
        let mut qkv = self.project(x, features, precision)?;
        if let Some(rotary) = &self.rotary {
            qkv = rotary.turn(&qkv, 2 * self.heads, size, 0)?;
        }
        let dropout = self.dropout.mask(pass)?;
        let y = if crate::cpu::has_kernels(x) {
            let at =
                [0, 1, 2].map(|part| (0, Columns { first: part * features, stride: 3 * features }));
            sizes.kernel(&Inputs { tensors: vec![&qkv], at }, mask, dropout, precision)?
        } else {
            let [q, k, v] = [0, 1, 2].map(|part| qkv.narrow(2, part * features, features));
            sizes.composed(&q?, &k?, &v?, mask, dropout, precision)?
        };
        self.out.forward(&y, pass)
    }

    fn project(&self, x: &Tensor, features: usize, precision: Precision) -> Result<Tensor> {
        if crate::cpu::has_kernels(x) {
            return Ok(affine(x, &self.weight, &self.bias, Activation::Identity, precision)?);
        }
        let y = matmul(&x.reshape(((), features))?, &self.weight.t()?, precision)?;
        let y = y.broadcast_add(&self.bias)?;
        Ok(y.reshape((x.dim(0)?, x.dim(1)?, 3 * features))?)
    }

    fn refuse(&self, x: &Tensor) -> Error {
        let what = format!("the input of attention {:?}", self.name);
        Error::shape(what, format!("[rows, places, {}]", self.bias.elem_count() / 3), x.dims())
    }
}

impl Module for MultiHeadAttention {
    /// Every place sees all others.
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.forward_masked(x, &AttentionMask::default(), pass)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Two implementations, one answer: for outputs and for every gradient, with dropout and
    /// without.
    #[test]
    fn the_kernel_agrees_with_candles_operations() {
        let bias = Tensor::arange(0.0, 70.0 * 70.0, &Device::Cpu)
            .and_then(|t| (t * 0.1)?.sin()?.reshape((70, 70)));
        let bias = bias.expect("bias");
        let causal = AttentionMask::causal;
        let cases = [
            (1, 1, 1, 1, AttentionMask::default()),
            (5, 7, 4, 2, AttentionMask::default()),
            (70, 70, 2, 2, causal()),
            (3, 9, 4, 1, causal()),
            (9, 3, 2, 2, AttentionMask::default().with_lengths([2, 3])),
            (66, 66, 2, 1, causal().with_lengths([66, 5])),
            (70, 70, 2, 2, causal().with_bias(&bias).expect("mask")),
        ];
        for (queries, keys, heads, kv_heads, mask) in cases {
            let params = Params::with_dtype(1, &Device::Cpu, DType::F64);
            let init = Init::Normal { mean: 0.0, std: 1.0 };
            let of = |name, places, heads| {
                params.get((2, places, heads * 3), name, init).expect("tensor")
            };
            let (q, k, v) =
                (of("q", queries, heads), of("k", keys, kv_heads), of("v", keys, kv_heads));
            let sizes = Sizes { rows: 2, queries, keys, heads, kv_heads, size: 3 };
            let columns = |index, heads| (index, Columns { first: 0, stride: heads * 3 });
            let at = [columns(0, heads), columns(1, kv_heads), columns(2, kv_heads)];
            let inputs = Inputs { tensors: vec![&q, &k, &v], at };
            let pass = Pass::train(3, 4).with_row_offset(5);
            let dropout = Dropout::named("d".into(), 0.3).expect("dropout");
            let dropout = dropout.mask(&pass).expect("mask");
            assert!(dropout.is_some());
            for dropout in [None, dropout] {
                let f32 = Precision::F32;
                let ours = sizes.kernel(&inputs, &mask, dropout, f32).expect("kernel");
                let theirs = sizes.composed(&q, &k, &v, &mask, dropout, f32).expect("composed");
                assert_close(&ours, &theirs);
                let weights = (theirs.detach() + 0.5).expect("weights");
                let gradients =
                    |y: Tensor| (y * &weights).and_then(|y| y.backward()).expect("backward");
                let (ours, theirs) = (gradients(ours), gradients(theirs));
                for (_, var) in params.vars() {
                    assert_close(ours.get(&var).expect("ours"), theirs.get(&var).expect("theirs"));
                }
            }
        }
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        assert_eq!(a.dims(), b.dims());
        let greatest = (a - b).and_then(|d| d.abs()?.max_all()?.to_scalar::<f64>());
        assert!(greatest.expect("difference") < 1e-10);
    }

    #[test]
    fn no_keys_are_refused() {
        let of = |places| Tensor::zeros((1, places, 8), DType::F32, &Device::Cpu).expect("zeros");
        let refused = attention(&of(2), &of(0), &of(0), 2, 2, &AttentionMask::default());
        let error = refused.expect_err("no keys").to_string();
        assert!(error.contains("at least 1 place"), "{error}");
    }

    #[test]
    fn who_sees_nothing_gets_nothing() {
        let x = Tensor::ones((2, 3, 4), DType::F32, &Device::Cpu).expect("x");
        let mask = AttentionMask::default().with_lengths([0, 3]);
        let y = attention(&x, &x, &x, 2, 2, &mask).expect("attention").flatten_all().expect("flat");
        let y: Vec<f32> = y.to_vec1().expect("values");
        assert_eq!(y, [[0.0; 12], [1.0; 12]].concat());
    }
}
