//! What is compared.

use crate::layers::*;
use crate::loss::{self, CrossEntropyOptions};
use crate::{Init, Module, Params, Pass, Result};
use candle_core::{Device, Tensor};
use mobula_core::random::Stream;

/// Makes a layer and its inputs in some parameters, and gives its output.
pub(super) type Build = fn(&Params) -> Result<Tensor>;

/// Every layer and loss.
pub(super) const TABLE: &[(&str, Build)] = &[
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
    ("embedding", |p| Embedding::new(p, 5, 3)?.forward(&indices(p)?)),
    ("embedding with padding", |p| Embedding::new(p, 5, 3)?.with_padding(1)?.forward(&indices(p)?)),
    ("layer norm", |p| run(LayerNorm::new(p, 6)?, p, &[4, 6])),
    ("RMS norm", |p| run(RmsNorm::new(p, 6)?, p, &[2, 3, 6])),
    ("group norm", |p| run(GroupNorm::new(p, 2, 6)?, p, &[3, 6, 2, 2])),
    ("batch norm", |p| run(batch_norm(p)?, p, &[5, 3, 2, 2])),
    ("batch norm and a sum", |p| {
        let (x, skip) = (input(p, "x", &[5, 3])?, input(p, "skip", &[5, 3])?);
        batch_norm(p)?.forward_residual(&x, &skip, &Pass::train(1, 2))
    }),
    ("batch norm in evaluation", |p| {
        batch_norm(p)?.forward(&input(p, "x", &[5, 3])?, &Pass::eval())
    }),
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
    ("max-pooling", |p| max_pool2d(&input(p, "x", &[2, 3, 7, 5])?, 2)),
    ("max-pooling that overlaps", |p| {
        let options = PoolOptions { stride: 1, padding: 1, ..PoolOptions::new(3) };
        max_pool2d(&input(p, "x", &[2, 3, 7, 5])?, options)
    }),
    ("max-pooling of what is no number", |p| {
        let nan = Tensor::new(&[0.0, f64::NAN, 0.0, 0.0], p.device())?;
        max_pool1d(&input(p, "x", &[1, 1, 4])?.broadcast_add(&nan)?, 2)
    }),
    ("average-pooling", |p| avg_pool2d(&input(p, "x", &[2, 3, 7, 5])?, 2)),
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
    ("rotary embedding", |p| Rotary::new(4, 100.0)?.forward(&input(p, "x", &[2, 3, 8])?, 2)),
    ("transformer block", |p| {
        run(TransformerBlock::new(p, 8, 2, 6, Activation::Gelu, 0.2)?, p, &[2, 5, 8])
    }),
    ("lstm", |p| {
        let x = input(p, "x", &[3, 4, 3])?;
        let layer = Lstm::new(p, 3, 5, recurrent())?;
        let (y, state) = layer.forward_from(&x, Some(&[4, 0, 2]), None, &Pass::train(1, 2))?;
        Ok(Tensor::cat(&[y.flatten_all()?, state.cell.flatten_all()?], 0)?)
    }),
    ("gru", |p| run(Gru::new(p, 3, 5, recurrent())?, p, &[3, 4, 3])),
    ("mse", |p| loss::mse(&input(p, "x", &[4, 3])?, &input(p, "target", &[4, 3])?)),
    ("l1", |p| loss::l1(&input(p, "x", &[4, 3])?, &input(p, "target", &[4, 3])?)),
    ("huber", |p| loss::huber(&input(p, "x", &[4, 3])?, &input(p, "target", &[4, 3])?, 0.5)),
    ("smooth l1", |p| {
        let (x, target) = (input(p, "x", &[4, 3])?, input(p, "target", &[4, 3])?);
        let weights = Tensor::new(&[1.0, 0.5, 2.0, 0.0], p.device())?;
        loss::smooth_l1_sum(&x, &target, 0.5, Some(&weights))?.mean()
    }),
    ("binary cross-entropy", |p| {
        let positive = Tensor::new(&[1.0, 2.0, 0.5], p.device())?;
        let targets = input(p, "target", &[4, 3])?.detach().gt(0.0)?;
        let (logits, targets) = (extremes(p, &[4, 3])?, targets.to_dtype(p.dtype())?);
        loss::bce_with_logits_sum(&logits, &targets, Some(&positive), None)?.mean()
    }),
    ("divergence", |p| {
        let probabilities = p.get((4, 3), "target", Init::Uniform { low: 0.0, high: 1.0 })?;
        loss::kl_div(&input(p, "x", &[4, 3])?, &probabilities)
    }),
    ("cross-entropy", |p| loss::cross_entropy(&input(p, "x", &[4, 3])?, &labels(p, [2, 0, 1, 1])?)),
    ("cross-entropy with options", |p| {
        let options = CrossEntropyOptions {
            label_smoothing: 0.1,
            class_weights: Some(vec![1.0, 0.5, 2.0]),
            ignored_label: Some(9),
        };
        let (x, labels) = (input(p, "x", &[4, 3])?, labels(p, [2, 9, 1, 1])?);
        loss::cross_entropy_with(&x, &labels, None, &options)?.mean()
    }),
    ("cross-entropy of nothing", |p| {
        let options = CrossEntropyOptions { ignored_label: Some(9), ..Default::default() };
        let (x, labels) = (input(p, "x", &[4, 3])?, labels(p, [9; 4])?);
        Ok(loss::cross_entropy_with(&x, &labels, None, &options)?.sum)
    }),
    ("negative log-likelihood", |p| loss::nll(&input(p, "x", &[4, 3])?, &labels(p, [2, 0, 1, 1])?)),
];

/// An architecture with options of three classes.
pub(super) struct Sample {
    pub(super) name: &'static str,
    pub(super) options: &'static str,
    /// Of an input.
    pub(super) shape: &'static [usize],
}

/// Every architecture, in the order of their names.
pub(super) const MODELS: &[Sample] = &[
    Sample {
        name: "cnn",
        options: r#"{"channels": 2, "height": 7, "width": 6, "conv": [3, 4], "hidden": 5,
            "outputs": 3, "dropout": 0.3}"#,
        shape: &[4, 2, 7, 6],
    },
    Sample {
        name: "lstm",
        options: r#"{"inputs": 3, "length": 4, "hidden": 5, "layers": 2, "outputs": 3,
            "bidirectional": true, "dropout": 0.3}"#,
        shape: &[4, 4, 3],
    },
    Sample {
        name: "mlp",
        options: r#"{"inputs": 6, "hidden": [5, 4], "outputs": 3, "dropout": 0.3}"#,
        shape: &[4, 6],
    },
    Sample {
        name: "resnet",
        options: r#"{"channels": 2, "height": 6, "width": 5, "base": 3, "blocks": [1, 1],
            "outputs": 3}"#,
        shape: &[4, 2, 6, 5],
    },
    Sample {
        name: "tabular",
        options: r#"{"numeric": 6, "outputs": 3, "width": 8, "hidden": 10}"#,
        shape: &[4, 6],
    },
    Sample {
        name: "transformer",
        options: r#"{"length": 5, "inputs": 3, "features": 8, "heads": 2, "layers": 2,
            "hidden": 6, "outputs": 3, "dropout": 0.2, "attention_dropout": 0.2, "causal": true}"#,
        shape: &[4, 5, 3],
    },
];

fn run(layer: impl Module, params: &Params, shape: &[usize]) -> Result<Tensor> {
    layer.forward(&input(params, "x", shape)?, &Pass::train(1, 2))
}

fn activate(params: &Params, activation: Activation) -> Result<Tensor> {
    activation.forward(&extremes(params, &[3, 4])?)
}

fn input(params: &Params, name: &str, shape: &[usize]) -> Result<Tensor> {
    params.get(shape, name, Init::Normal { mean: 0.0, std: 1.0 })
}

/// Some are 0, and get a gradient all the same; some are so large that their exponentials are not
/// finite.
fn extremes(params: &Params, shape: &[usize]) -> Result<Tensor> {
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

fn labels(params: &Params, labels: [u32; 4]) -> Result<Tensor> {
    Ok(Tensor::new(&labels, params.device())?)
}

fn batch_norm(params: &Params) -> Result<BatchNorm> {
    let norm = BatchNorm::new(params, 3, BatchNormOptions::default())?;
    Ok(norm.with_activation(Activation::Relu))
}

fn recurrent() -> RecurrentOptions {
    RecurrentOptions { layers: 2, bidirectional: true, dropout: 0.3 }
}

/// Standard normal numbers on the CPU.
pub(super) fn normal(shape: &[usize]) -> Result<Tensor> {
    let mut draws = Stream::new(1, "agreement").at(0, 0);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| draws.normal()).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}
