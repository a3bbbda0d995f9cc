//! The layers that are compared.

use crate::layers::*;
use crate::{Init, Module, Params, Pass, Result};
use candle_core::{Device, Tensor};

/// Makes a layer and its inputs in some parameters, and gives its output.
pub(super) type Build = fn(&Params) -> Result<Tensor>;

/// Every layer, with every option that changes what is computed.
pub(super) const LAYERS: &[(&str, Build)] = &[
    ("linear", |p| run(Linear::new(p, 4, 3)?.with_activation(Activation::Gelu), p, &[5, 4])),
    ("linear without bias", |p| run(Linear::without_bias(p, 4, 3)?, p, &[2, 5, 4])),
    ("identity", |p| activate(p, Activation::Identity)),
    ("relu", |p| activate(p, Activation::Relu)),
    ("relu6", |p| activate(p, Activation::Relu6)),
    ("leaky relu", |p| activate(p, Activation::LeakyRelu)),
    ("elu", |p| activate(p, Activation::Elu)),
    ("gelu", |p| activate(p, Activation::Gelu)),
    ("gelu by tanh", |p| activate(p, Activation::GeluTanh)),
    ("silu", |p| activate(p, Activation::Silu)),
    ("sigmoid", |p| activate(p, Activation::Sigmoid)),
    ("tanh", |p| activate(p, Activation::Tanh)),
    ("softplus", |p| activate(p, Activation::Softplus)),
    ("add", |p| add(&input(p, "a", &[3, 4])?, &input(p, "b", &[3, 4])?)),
    ("add to rows", |p| add_to_rows(&input(p, "a", &[3, 4])?, &input(p, "b", &[4])?)),
    ("mean over places", |p| mean_places(&input(p, "x", &[3, 4, 5])?)),
    ("flatten", |p| flatten(&input(p, "x", &[3, 4, 5])?)),
    ("dropout", |p| run(Dropout::new(p, 0.4)?, p, &[5, 7])),
    ("dropout of later rows", |p| {
        let pass = Pass::train(1, 2).with_row_offset(3);
        Dropout::new(p, 0.4)?.forward(&input(p, "x", &[5, 7])?, &pass)
    }),
    ("embedding", |p| Embedding::new(p, 5, 3)?.forward(&indices(p)?)),
    ("embedding with padding", |p| Embedding::new(p, 5, 3)?.with_padding(1)?.forward(&indices(p)?)),
    ("products with an embedding", |p| {
        Embedding::new(p, 5, 3)?.attend(&input(p, "x", &[2, 4, 3])?, &Pass::eval())
    }),
    ("layer norm", |p| run(LayerNorm::new(p, 6)?, p, &[4, 6])),
    ("layer norm with another ε", |p| run(LayerNorm::new(p, 6)?.with_eps(0.1), p, &[4, 6])),
    ("RMS norm", |p| run(RmsNorm::new(p, 6)?, p, &[2, 3, 6])),
    ("RMS norm with another ε", |p| run(RmsNorm::new(p, 6)?.with_eps(0.1), p, &[4, 6])),
    ("group norm", |p| run(GroupNorm::new(p, 2, 6)?, p, &[3, 6, 2, 2])),
    ("group norm with another ε", |p| run(GroupNorm::new(p, 3, 6)?.with_eps(0.1), p, &[3, 6])),
    ("batch norm", |p| run(batch_norm(p)?, p, &[5, 3, 2, 2])),
    ("batch norm and a sum", |p| {
        let (x, skip) = (input(p, "x", &[5, 3])?, input(p, "skip", &[5, 3])?);
        batch_norm(p)?.forward_residual(&x, &skip, &Pass::train(1, 2))
    }),
    ("batch norm in evaluation", |p| {
        batch_norm(p)?.forward(&input(p, "x", &[5, 3])?, &Pass::eval())
    }),
    ("batch norm and a sum in evaluation", |p| {
        let (x, skip) = (input(p, "x", &[5, 3])?, input(p, "skip", &[5, 3])?);
        batch_norm(p)?.forward_residual(&x, &skip, &Pass::eval())
    }),
    ("batch norm of one row", |p| run(batch_norm(p)?, p, &[1, 3])),
    ("batch norm with options", |p| {
        let norm = BatchNorm::new(p, 3, BatchNormOptions { eps: 0.1, momentum: 0.4 })?;
        run(norm.with_activation(Activation::Silu), p, &[5, 3, 2])
    }),
    ("batch norm alone", |p| run(BatchNorm::new(p, 3, BatchNormOptions::default())?, p, &[5, 3])),
    ("convolution", |p| {
        let options = Conv2dOptions { stride: 2, padding: 1, groups: 2, ..Default::default() };
        run(Conv2d::new(p, 4, 6, 3, options)?, p, &[2, 4, 7, 6])
    }),
    ("convolution with all that may follow", |p| {
        let options = Conv2dOptions { padding: 2, dilation: 2, bias: false, ..Default::default() };
        let layer = Conv2d::new(p, 2, 3, 3, options)?.with_activation(Activation::Silu);
        run(layer.with_max_pool(2), p, &[2, 2, 6, 5])
    }),
    ("convolution of many channels", |p| {
        let options = Conv2dOptions { padding: 1, ..Default::default() };
        run(Conv2d::new(p, 16, 32, 3, options)?, p, &[4, 16, 8, 8])
    }),
    ("convolution along one axis", |p| {
        let options = Conv1dOptions { stride: 2, padding: 1, ..Default::default() };
        run(Conv1d::new(p, 2, 3, 3, options)?, p, &[2, 2, 9])
    }),
    ("convolution along one axis with all that may follow", |p| {
        let options = Conv1dOptions { dilation: 2, groups: 2, bias: false, ..Default::default() };
        run(Conv1d::new(p, 4, 6, 3, options)?.with_activation(Activation::Tanh), p, &[2, 4, 9])
    }),
    ("transposed convolution", |p| {
        let options = ConvTransposeOptions {
            stride: 2,
            padding: 1,
            output_padding: 1,
            groups: 2,
            ..Default::default()
        };
        run(ConvTranspose2d::new(p, 4, 6, 3, options)?, p, &[2, 4, 3, 4])
    }),
    ("transposed convolution along one axis", |p| {
        let options = ConvTransposeOptions { stride: 3, dilation: 2, ..Default::default() };
        run(ConvTranspose1d::new(p, 2, 3, 3, options)?, p, &[2, 2, 4])
    }),
    ("transposed convolutions with all that may follow", |p| {
        let options = ConvTransposeOptions { dilation: 2, bias: false, ..Default::default() };
        let layer = ConvTranspose2d::new(&p.scope("two"), 2, 4, 3, options)?;
        let y = run(layer.with_activation(Activation::Relu), p, &[2, 2, 3, 4])?.flatten_from(2)?;
        let options = ConvTransposeOptions {
            stride: 3,
            padding: 1,
            output_padding: 2,
            groups: 2,
            ..Default::default()
        };
        let layer = ConvTranspose1d::new(&p.scope("one"), 4, 6, 3, options)?;
        layer.with_activation(Activation::Gelu).forward(&y, &Pass::train(1, 2))
    }),
    ("max-pooling", |p| max_pool2d(&input(p, "x", &[2, 3, 7, 5])?, 2)),
    ("max-pooling that overlaps", |p| {
        let options = PoolOptions { stride: 1, padding: 1, ..PoolOptions::new(3) };
        max_pool2d(&input(p, "x", &[2, 3, 7, 5])?, options)
    }),
    ("max-pooling along one axis", |p| {
        let options = PoolOptions { stride: 2, padding: 1, ..PoolOptions::new(3) };
        max_pool1d(&input(p, "x", &[2, 3, 7])?, options)
    }),
    ("max-pooling of what is no number", |p| {
        let nan = Tensor::new(&[0.0, f64::NAN, 0.0, 0.0], p.device())?;
        max_pool1d(&input(p, "x", &[1, 1, 4])?.broadcast_add(&nan)?, 2)
    }),
    ("average-pooling", |p| avg_pool2d(&input(p, "x", &[2, 3, 7, 5])?, 2)),
    ("average-pooling that overlaps", |p| {
        let options = PoolOptions { stride: 2, padding: 1, ..PoolOptions::new(3) };
        avg_pool2d(&input(p, "x", &[2, 3, 7, 5])?, options)
    }),
    ("average-pooling of the pixels inside", |p| {
        let inside = PoolOptions { padding: 1, count_include_pad: false, ..PoolOptions::new(3) };
        avg_pool2d(&input(p, "x", &[2, 3, 7, 5])?, inside)
    }),
    ("average-pooling along one axis", |p| {
        let inside = PoolOptions { padding: 1, count_include_pad: false, ..PoolOptions::new(3) };
        avg_pool1d(&input(p, "x", &[2, 3, 7])?, inside)
    }),
    ("average-pooling to a length", |p| adaptive_avg_pool1d(&input(p, "x", &[2, 3, 7])?, 3)),
    ("average-pooling to a size", |p| adaptive_avg_pool2d(&input(p, "x", &[2, 3, 7, 5])?, [3, 2])),
    ("average of all pixels", |p| global_avg_pool(&input(p, "x", &[2, 3, 7, 5])?)),
    ("attention", |p| {
        let bias = Tensor::new(&[[0.5, -0.5, f64::NEG_INFINITY], [1.0, 0.0, 0.25]], &Device::Cpu)?;
        let (q, k) = (input(p, "q", &[2, 2, 12])?, input(p, "k", &[2, 3, 6])?);
        let v = input(p, "v", &[2, 3, 6])?;
        let mask = AttentionMask::causal().with_lengths([3, 2]).with_bias(&bias)?;
        attention(&q, &k, &v, 4, 2, &mask)
    }),
    ("attention that sees nothing", |p| {
        let [q, k, v] = ["q", "k", "v"].map(|name| input(p, name, &[2, 3, 4]));
        attention(&q?, &k?, &v?, 2, 2, &AttentionMask::default().with_lengths([0, 2]))
    }),
    ("multi-head attention", |p| {
        let layer = MultiHeadAttention::new(p, 8, 2)?.with_rotary(Rotary::new(4, 100.0)?);
        run(layer, p, &[2, 5, 8])
    }),
    ("attention with dropout", |p| {
        run(MultiHeadAttention::new(p, 8, 2)?.with_dropout(0.3)?, p, &[2, 5, 8])
    }),
    ("multi-head attention with a mask", |p| {
        let mask = AttentionMask::causal().with_lengths([5, 2]);
        let layer = MultiHeadAttention::new(p, 8, 4)?;
        shake(p)?;
        layer.forward_masked(&input(p, "x", &[2, 5, 8])?, &mask, &Pass::train(1, 2))
    }),
    ("rotary embedding", |p| Rotary::new(4, 100.0)?.forward(&input(p, "x", &[2, 3, 8])?, 2)),
    ("transformer block", |p| {
        run(TransformerBlock::new(p, 8, 2, 6, Activation::Gelu, 0.2)?, p, &[2, 5, 8])
    }),
    ("transformer block with a mask", |p| {
        let block = TransformerBlock::new(p, 8, 2, 6, Activation::Relu, 0.0)?;
        let block = block.with_rotary(Rotary::new(4, 100.0)?).with_attention_dropout(0.3)?;
        shake(p)?;
        let x = input(p, "x", &[2, 5, 8])?;
        block.forward_masked(&x, &AttentionMask::causal(), &Pass::train(1, 2))
    }),
    ("lstm", |p| {
        let x = input(p, "x", &[3, 4, 3])?;
        let layer = Lstm::new(p, 3, 5, recurrent())?;
        let (y, state) = layer.forward_from(&x, Some(&[4, 0, 2]), None, &Pass::train(1, 2))?;
        Ok(Tensor::cat(&[y.flatten_all()?, state.cell.flatten_all()?], 0)?)
    }),
    ("gru", |p| run(Gru::new(p, 3, 5, recurrent())?, p, &[3, 4, 3])),
    ("lstm from a state", |p| {
        let state = LstmState {
            hidden: input(p, "hidden", &[1, 3, 5])?,
            cell: input(p, "cell", &[1, 3, 5])?,
        };
        let (x, layer) = (input(p, "x", &[3, 4, 3])?, Lstm::new(p, 3, 5, Default::default())?);
        let (y, state) = layer.forward_from(&x, None, Some(&state), &Pass::train(1, 2))?;
        let [y, hidden, cell] = [y, state.hidden, state.cell].map(|t| t.flatten_all());
        Ok(Tensor::cat(&[y?, hidden?, cell?], 0)?)
    }),
    ("gru from a state", |p| {
        let (x, state) = (input(p, "x", &[3, 4, 3])?, input(p, "state", &[4, 3, 5])?);
        let layer = Gru::new(p, 3, 5, recurrent())?;
        let lengths = Some(&[4, 0, 2][..]);
        let (y, state) = layer.forward_from(&x, lengths, Some(&state), &Pass::train(1, 2))?;
        Ok(Tensor::cat(&[y.flatten_all()?, state.flatten_all()?], 0)?)
    }),
];

fn run(layer: impl Module, params: &Params, shape: &[usize]) -> Result<Tensor> {
    shake(params)?;
    layer.forward(&input(params, "x", shape)?, &Pass::train(1, 2))
}

/// Adds something to what there is: ones and zeros would hide what they multiply.
fn shake(params: &Params) -> Result<()> {
    for (_, var) in params.state() {
        let more =
            (0..var.elem_count()).map(|at| (at as f64 + 1.0).sin().abs() / 2.0).collect::<Vec<_>>();
        let more = Tensor::from_vec(more, var.shape(), params.device())?;
        var.set(&(var.as_tensor() + more.to_dtype(var.dtype())?)?)?;
    }
    Ok(())
}

fn activate(params: &Params, activation: Activation) -> Result<Tensor> {
    activation.forward(&extremes(params, &[3, 4])?)
}

pub(super) fn input(params: &Params, name: &str, shape: &[usize]) -> Result<Tensor> {
    params.get(shape, name, Init::Normal { mean: 0.0, std: 1.0 })
}

/// Some are 0, and get a gradient all the same; some are so large that their exponentials are not
/// finite.
pub(super) fn extremes(params: &Params, shape: &[usize]) -> Result<Tensor> {
    let x = input(params, "x", shape)?;
    let by_place = |of: [f64; 4]| {
        let values = (0..x.elem_count()).map(|at| of[at % 4]).collect();
        Tensor::from_vec(values, x.shape(), params.device())
    };
    let scaled = (&x * by_place([1.0, 1.0, 4.0, 4000.0])?)?;
    Ok((&scaled - (x.detach() * by_place([0.0, 1.0, 0.0, 0.0])?)?)?)
}

fn indices(params: &Params) -> Result<Tensor> {
    Ok(Tensor::new(&[[4i64, 1, 0], [4, 2, 4]], params.device())?)
}

fn batch_norm(params: &Params) -> Result<BatchNorm> {
    let norm = BatchNorm::new(params, 3, BatchNormOptions::default())?;
    shake(params)?;
    Ok(norm.with_activation(Activation::Relu))
}

fn recurrent() -> RecurrentOptions {
    RecurrentOptions { layers: 2, bidirectional: true, dropout: 0.3 }
}
