//! Convolutions along one axis, and transposed ones.

use crate::{CPU, bits, normal, normal_f32};
use candle_core::{DType, Tensor, Var};
use mobula_nn::layers::{
    Activation, Conv1d, Conv1dOptions, Conv2d, Conv2dOptions, ConvTranspose1d, ConvTranspose2d,
    ConvTransposeOptions, Linear, flatten,
};
use mobula_nn::{Error, Gradients, Module, Params, Pass, Result, gradcheck};

fn params() -> Params {
    Params::with_dtype(3, &CPU, DType::F64)
}

fn forward(layer: &dyn Module, x: &Tensor) -> Tensor {
    layer.forward(x, &Pass::eval()).expect("forward")
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f64")
}

fn parameter(params: &Params, name: &str) -> Tensor {
    let vars = params.vars().into_iter();
    vars.filter(|(n, _)| n == name)
        .map(|(_, var)| var.as_tensor().clone())
        .next()
        .expect("parameter")
}

/// With respect to the input and the parameters.
fn check(layer: &dyn Module, params: &Params, shape: &[usize]) {
    let x = Var::from_tensor(&normal("x", shape)).expect("var");
    let mut vars = params.vars();
    vars.push(("x".to_owned(), x.clone()));
    gradcheck::check(&vars, || layer.forward(&x, &Pass::eval())).expect("right gradients");
}

const ALONG: [(usize, [usize; 4]); 5] =
    [(3, [1, 1, 1, 1]), (2, [2, 0, 1, 2]), (4, [3, 2, 2, 1]), (1, [1, 0, 1, 2]), (3, [2, 4, 1, 1])];

fn options1d(kernel: usize, [stride, padding, dilation, groups]: [usize; 4]) -> Conv1dOptions {
    Conv1dOptions { stride, padding, dilation, groups, bias: kernel != 2 }
}

#[test]
fn conv1d_is_its_definition() {
    for (kernel, numbers) in ALONG {
        let [stride, padding, dilation, groups] = numbers;
        let params = params();
        let layer = Conv1d::new(&params, 2, 4, kernel, options1d(kernel, numbers)).expect("layer");
        let x = normal("x", &[3, 2, 9]);
        let y = forward(&layer, &x);
        let out = (9 + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
        assert_eq!(y.dims(), [3, 4, out]);
        let x: Vec<Vec<Vec<f64>>> = x.to_vec3().expect("x");
        let w: Vec<Vec<Vec<f64>>> = parameter(&params, "weight").to_vec3().expect("weight");
        let bias = if kernel == 2 { vec![0.0; 4] } else { values(&parameter(&params, "bias")) };
        let y: Vec<Vec<Vec<f64>>> = y.to_vec3().expect("y");
        for (row, output, at) in
            (0..3).flat_map(|r| (0..4).flat_map(move |o| (0..out).map(move |a| (r, o, a))))
        {
            let mut expected = bias[output];
            for (channel, kernel) in w[output].iter().enumerate() {
                let input = &x[row][output / (4 / groups) * (2 / groups) + channel];
                for (tap, weight) in kernel.iter().enumerate() {
                    let from = (at * stride + tap * dilation).wrapping_sub(padding);
                    expected += weight * input.get(from).copied().unwrap_or(0.0);
                }
            }
            assert!((y[row][output][at] - expected).abs() < 1e-12);
        }
    }
}

#[test]
fn gradients_along_one_axis() {
    for (kernel, numbers) in ALONG {
        let params = params();
        let layer = Conv1d::new(&params, 2, 4, kernel, options1d(kernel, numbers)).expect("layer");
        check(&layer, &params, &[3, 2, 9]);
        check(&layer.with_activation(Activation::Tanh), &params, &[1, 2, 7]);
    }
    let params = params();
    let layer = Conv1d::new(&params, 2, 3, 3, Conv1dOptions::default()).expect("layer");
    let layer = layer.with_activation(Activation::Gelu);
    let vars = [("x".to_owned(), Var::from_tensor(&normal("x", &[2, 5, 2])).expect("var"))];
    let across = || layer.forward(&vars[0].1.transpose(1, 2)?, &Pass::eval());
    gradcheck::check(&vars, across).expect("not contiguous");
    let up = ConvTranspose1d::new(&params.scope("up"), 2, 3, 3, Default::default()).expect("layer");
    let across = || up.forward(&vars[0].1.transpose(1, 2)?, &Pass::eval());
    gradcheck::check(&vars, across).expect("not contiguous");
}

/// Stride, padding, output padding, dilation and groups.
const TRANSPOSED: [(usize, [usize; 5]); 6] = [
    (3, [1, 1, 0, 1, 1]),
    (2, [2, 0, 0, 1, 2]),
    (3, [2, 1, 1, 1, 1]),
    (4, [3, 2, 2, 2, 2]),
    (1, [2, 0, 1, 1, 1]),
    (2, [1, 0, 1, 2, 2]),
];

fn transposed(kernel: usize, numbers: [usize; 5]) -> ConvTransposeOptions {
    let [stride, padding, output_padding, dilation, groups] = numbers;
    let bias = kernel != 2;
    ConvTransposeOptions { stride, padding, output_padding, dilation, groups, bias }
}

#[test]
fn gradients_of_transposed_convolutions() {
    for (kernel, numbers) in TRANSPOSED {
        let params = params();
        let options = transposed(kernel, numbers);
        let layer = ConvTranspose2d::new(&params.scope("a"), 2, 4, kernel, options).expect("layer");
        check(&layer, &params, &[2, 2, 4, 3]);
        check(&layer.with_activation(Activation::Silu), &params, &[1, 2, 3, 3]);
        let layer = ConvTranspose1d::new(&params.scope("b"), 4, 2, kernel, options).expect("layer");
        let params = params.scope("b");
        check(&layer, &params, &[3, 4, 5]);
        check(&layer.with_activation(Activation::Relu), &params, &[1, 4, 3]);
    }
}

/// Each input is a kernel, scaled, in the output: PyTorch's definition.
#[test]
fn transposed_convolutions_are_their_definition() {
    for (kernel, numbers) in TRANSPOSED {
        let [stride, padding, output_padding, dilation, groups] = numbers;
        let params = params();
        let layer = ConvTranspose1d::new(&params, 2, 4, kernel, transposed(kernel, numbers));
        let layer = layer.expect("layer");
        let x = normal("x", &[2, 2, 5]);
        let y = forward(&layer, &x);
        let out = 4 * stride + dilation * (kernel - 1) + output_padding + 1 - 2 * padding;
        assert_eq!(y.dims(), [2, 4, out]);
        let bias = if kernel == 2 { vec![0.0; 4] } else { values(&parameter(&params, "bias")) };
        let w: Vec<Vec<Vec<f64>>> = parameter(&params, "weight").to_vec3().expect("weight");
        let x: Vec<Vec<Vec<f64>>> = x.to_vec3().expect("x");
        let y: Vec<Vec<Vec<f64>>> = y.to_vec3().expect("y");
        for (x, y) in x.iter().zip(y) {
            let mut expected: Vec<Vec<f64>> = bias.iter().map(|b| vec![*b; out]).collect();
            for (input, (channel, w)) in x.iter().zip(&w).enumerate() {
                let first = input / (2 / groups) * (4 / groups);
                for ((at, value), (output, kernel)) in channel
                    .iter()
                    .enumerate()
                    .flat_map(|x| w.iter().enumerate().map(move |kernel| (x, kernel)))
                {
                    for (tap, weight) in kernel.iter().enumerate() {
                        let to = (at * stride + tap * dilation).wrapping_sub(padding);
                        if let Some(y) = expected[first + output].get_mut(to) {
                            *y += value * weight;
                        }
                    }
                }
            }
            for (got, expected) in y.concat().into_iter().zip(expected.concat()) {
                assert!((got - expected).abs() < 1e-12, "{numbers:?}");
            }
        }
    }
}

/// ⟨C x, y⟩ = ⟨x, Cᵀ y⟩ for a convolution and its transpose of one weight; and not for another.
#[test]
fn it_is_the_transpose_of_a_convolution() {
    let params = params();
    let (a, b) = (params.scope("a"), params.scope("b"));
    let options = Conv2dOptions { stride: 2, padding: 1, bias: false, ..Default::default() };
    let convolution = Conv2d::new(&a, 3, 5, 3, options).expect("layer");
    let options = ConvTransposeOptions {
        stride: 2,
        padding: 1,
        output_padding: 1,
        bias: false,
        ..Default::default()
    };
    let transposed = ConvTranspose2d::new(&b, 5, 3, 3, options).expect("layer");
    let (x, y) = (normal("x", &[2, 3, 8, 8]), normal("y", &[2, 5, 4, 4]));
    let dot = |a: &Tensor, b: &Tensor| {
        (a * b).and_then(|c| c.sum_all()?.to_scalar::<f64>()).expect("dot")
    };
    let gap = || dot(&forward(&convolution, &x), &y) - dot(&x, &forward(&transposed, &y));
    assert!(gap().abs() > 1e-3, "other weights");
    b.vars()[0].1.set(a.vars()[0].1.as_tensor()).expect("one weight");
    assert!(gap().abs() < 1e-10, "{}", gap());
}

/// In a chain, gradients past candle; collected flat as well, and for a layer used twice.
#[test]
fn a_chain_of_layers() {
    let params = Params::new(3, &CPU);
    let down = Conv1d::new(
        &params.scope("down"),
        2,
        2,
        3,
        Conv1dOptions { stride: 2, padding: 1, ..Default::default() },
    )
    .expect("layer");
    let options =
        ConvTransposeOptions { stride: 2, padding: 1, output_padding: 1, ..Default::default() };
    let up = ConvTranspose1d::new(&params.scope("up"), 2, 2, 3, options).expect("layer");
    let out = Linear::without_bias(&params.scope("out"), 16, 3).expect("layer");
    let x = normal_f32("x", &[4, 2, 8]);
    let y = forward(&up, &forward(&down, &forward(&up, &forward(&down, &x))));
    let y = forward(&out, &flatten(&y).expect("flat"));
    let loss = y.sqr().and_then(|y| y.sum_all()).expect("loss");
    let store = loss.backward().expect("backward");
    let mut gradients = Gradients::zeros(&params);
    gradients.backward(&loss, 1.0).expect("backward");
    assert!(gradients.missing().is_empty());
    let expected = params.vars().into_iter().flat_map(|(_, var)| {
        store.get(&var).and_then(|g| g.flatten_all().ok()?.to_vec1::<f32>().ok()).expect("gradient")
    });
    for (got, expected) in gradients.values().iter().zip(expected) {
        assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{got} {expected}");
    }
    assert_eq!(params.names(), ["down.bias", "down.weight", "out.weight", "up.bias", "up.weight"]);
}

/// PyTorch's, whose fan in of a transposed convolution is that of its outputs.
#[test]
fn initial_values_are_pytorchs() {
    let params = params();
    Conv1d::new(&params.scope("conv"), 4, 300, 25, Conv1dOptions::default()).expect("layer");
    ConvTranspose2d::new(&params.scope("up"), 300, 4, 5, ConvTransposeOptions::default())
        .expect("layer");
    for (name, var) in params.vars() {
        let greatest = values(&var).into_iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        let enough = var.elem_count() > 100;
        assert!(greatest <= 0.1 && (!enough || greatest > 0.098), "{name} {greatest}");
    }
    assert_eq!(parameter(&params, "conv.weight").dims(), [300, 4, 25]);
    assert_eq!(parameter(&params, "up.weight").dims(), [300, 4, 5, 5]);
    assert_eq!(parameter(&params, "up.bias").dims(), [4]);
}

#[test]
fn no_rows_give_no_rows() {
    let params = Params::new(1, &CPU);
    let conv = Conv1d::new(&params.scope("a"), 2, 3, 3, Conv1dOptions::default()).expect("layer");
    let up = ConvTranspose2d::new(&params.scope("b"), 2, 3, 3, Default::default()).expect("layer");
    for (layer, shape, out) in [
        (&conv as &dyn Module, vec![0, 2, 5], vec![0, 3, 3]),
        (&up, vec![0, 2, 4, 4], vec![0, 3, 6, 6]),
    ] {
        let x = Var::zeros(shape.as_slice(), DType::F32, &CPU).expect("var");
        let y = forward(layer, &x);
        assert_eq!(y.dims(), out);
        let gradients = y.sum_all().and_then(|y| y.backward()).expect("backward");
        assert_eq!(gradients.get(&x).expect("gradient").dims(), shape);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let params = params();
    let options = Conv1dOptions { groups: 2, dilation: 2, ..Default::default() };
    let conv = Conv1d::new(&params.scope("conv"), 4, 2, 3, options).expect("layer");
    let text = |result: Result<Tensor>| result.expect_err("refused").to_string();
    let with = |layer: &dyn Module, shape: &[usize]| {
        text(layer.forward(&normal("x", shape), &Pass::eval()))
    };
    assert_eq!(
        with(&conv, &[1, 4, 4]),
        "the input of convolution \"conv\" must have shape [rows, 4, length ≥ 5], got [1, 4, 4]"
    );
    assert!(with(&conv, &[1, 3, 9]).contains("got [1, 3, 9]"));
    assert!(with(&conv, &[1, 4, 9, 9]).contains("[rows, 4, length"));
    let options = ConvTransposeOptions { padding: 2, ..Default::default() };
    let up = ConvTranspose2d::new(&params.scope("up"), 2, 3, 3, options).expect("layer");
    assert_eq!(forward(&up, &normal("x", &[1, 2, 3, 3])).dims(), [1, 3, 1, 1]);
    assert_eq!(
        with(&up, &[1, 2, 2, 3]),
        "the input of transposed convolution \"up\" must have shape [rows, 2, height ≥ 3, width ≥ 3], got [1, 2, 2, 3]"
    );
    let bad = |options| {
        ConvTranspose1d::new(&params.scope("bad"), 4, 6, 3, options)
            .expect_err("refused")
            .to_string()
    };
    let options = ConvTransposeOptions::default;
    let message = bad(ConvTransposeOptions { output_padding: 2, stride: 2, ..options() });
    assert_eq!(
        message,
        "option output_padding is 2, expected less than a stride of 2 or a dilation of 1"
    );
    let message = bad(ConvTransposeOptions { groups: 4, ..options() });
    assert_eq!(message, "option groups is 4, expected a divisor of 4 inputs and 6 outputs");
    let message = bad(ConvTransposeOptions { dilation: 0, ..options() });
    assert_eq!(message, "option dilation is 0, expected at least 1");
    assert!(params.scope("bad").names().is_empty());
    let bytes = normal("x", &[1, 2, 3, 3]).to_dtype(DType::U8).expect("cast");
    assert!(matches!(up.forward(&bytes, &Pass::eval()), Err(Error::Tensor(_))));
}

#[test]
fn a_linear_layer_without_bias_is_a_product() {
    let params = params();
    let layer = Linear::without_bias(&params, 4, 3).expect("layer");
    assert_eq!(params.names(), ["weight"]);
    let x = normal("x", &[5, 4]);
    let product = layer.weight().t().and_then(|w| x.matmul(&w)).expect("product");
    for (got, expected) in values(&forward(&layer, &x)).into_iter().zip(values(&product)) {
        assert!((got - expected).abs() < 1e-14);
    }
    check(&layer, &params, &[5, 4]);
    check(&layer.with_activation(Activation::Gelu), &params, &[2, 3, 4]);
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let params = Params::new(1, &CPU);
    let conv = Conv1d::new(&params.scope("a"), 3, 8, 5, Conv1dOptions::default()).expect("layer");
    let up = ConvTranspose2d::new(&params.scope("b"), 3, 8, 3, Default::default()).expect("layer");
    let inputs = [normal_f32("x", &[70, 3, 500]), normal_f32("x", &[40, 3, 33, 31])];
    crate::assert_same_in_every_pool(|| {
        let mut all = Vec::new();
        for (layer, x) in [&conv as &dyn Module, &up].into_iter().zip(&inputs) {
            let x = Var::from_tensor(x).expect("var");
            let y = forward(layer, &x);
            let gradients = y.sqr().and_then(|y| y.sum_all()?.backward()).expect("backward");
            all.extend([bits(&y), bits(gradients.get(&x).expect("gradient"))].concat());
            for (_, var) in params.vars() {
                all.extend(gradients.get(&var).map(bits).unwrap_or_default());
            }
        }
        all
    });
}
