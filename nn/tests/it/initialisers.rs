//! Seeded initial values: their distributions, and what they depend on.

use crate::{CPU, bits};
use candle_core::{DType, Tensor};
use mobula_nn::layers::{Activation, Conv2d, Conv2dOptions, Linear};
use mobula_nn::{Error, Fan, Init, Params};

fn create(seed: u64, name: &str, init: Init) -> Tensor {
    Params::new(seed, &CPU).get((200, 100), name, init).expect("parameter")
}

/// Mean, standard deviation, least and greatest value.
fn statistics(tensor: &Tensor) -> [f64; 4] {
    let tensor = tensor.flatten_all().and_then(|t| t.to_dtype(DType::F64)).expect("f64");
    let values: Vec<f64> = tensor.to_vec1().expect("values");
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    [mean, variance.sqrt(), least, greatest]
}

/// Within six standard errors of a uniform distribution on ±bound, and filling it.
fn assert_uniform(tensor: &Tensor, bound: f64) {
    let [mean, std, least, greatest] = statistics(tensor);
    let error = 6.0 * bound / 3f64.sqrt() / (tensor.elem_count() as f64).sqrt();
    assert!(mean.abs() < error, "mean {mean}");
    assert!((std - bound / 3f64.sqrt()).abs() < error, "std {std}, bound {bound}");
    assert!(
        least >= -bound * 1.000001 && greatest <= bound * 1.000001,
        "{least} {greatest} {bound}"
    );
    assert!(least < -0.95 * bound && greatest > 0.95 * bound, "{least} {greatest} {bound}");
}

#[test]
fn distributions() {
    assert_eq!(statistics(&create(1, "w", Init::Zeros)), [0.0; 4]);
    assert_eq!(statistics(&create(1, "w", Init::Ones)), [1.0, 0.0, 1.0, 1.0]);
    assert_eq!(statistics(&create(1, "w", Init::Const(0.5)))[0], 0.5);
    assert_uniform(&create(1, "w", Init::Uniform { low: -2.0, high: 2.0 }), 2.0);
    let gain = Activation::Relu.gain();
    let kaiming = |fan| create(1, "w", Init::KaimingUniform { fan, gain });
    assert_uniform(&kaiming(Fan::In), 0.06f64.sqrt());
    assert_uniform(&kaiming(Fan::Out), 0.03f64.sqrt());
    assert_uniform(&create(1, "w", Init::XavierUniform { gain: 2.0 }), 2.0 * 0.02f64.sqrt());
    let [mean, std, ..] = statistics(&create(1, "w", Init::Normal { mean: 3.0, std: 2.0 }));
    assert!((mean - 3.0).abs() < 0.08 && (std - 2.0).abs() < 0.06, "{mean} {std}");
}

/// PyTorch's `Linear` and `Conv2d`: all within ±1/√fan_in.
#[test]
fn layer_defaults_are_pytorchs() {
    let params = Params::new(1, &CPU);
    let linear = Linear::new(&params.scope("fc"), 100, 400).expect("layer");
    assert_uniform(linear.weight(), 0.1);
    assert_uniform(linear.bias(), 0.1);
    Conv2d::new(&params.scope("conv"), 4, 300, 5, Conv2dOptions::default()).expect("layer");
    for (name, var) in params.scope("conv").vars() {
        assert_uniform(&var, 0.1);
        assert!(name.starts_with("conv."));
    }
}

#[test]
fn values_depend_on_seed_and_name_alone() {
    let init = Init::default_weight();
    let one = bits(&create(1, "w", init));
    assert_eq!(one, bits(&create(1, "w", init)));
    assert_ne!(one, bits(&create(2, "w", init)));
    assert_ne!(one, bits(&create(1, "v", init)));
    let params = Params::new(1, &CPU);
    params.get(7, "something before", init).expect_err("no fan");
    params.get((7, 3), "something before", init).expect("parameter");
    assert_eq!(one, bits(&params.get((200, 100), "w", init).expect("parameter")));
    let scoped = params.scope("w").get((200, 100), "w", init).expect("parameter");
    assert_ne!(one, bits(&scoped));
}

/// The numbers of a saved seed must not change from one release to the next.
#[test]
fn values_are_pinned() {
    let params = Params::with_dtype(7, &CPU, DType::F64);
    let values = params.get((1, 3), "fc1.weight", Init::default_weight()).expect("parameter");
    let values: Vec<Vec<f64>> = values.to_vec2().expect("values");
    let expected = [0.5760904859589251, 0.5326384341155403, 0.24636634986384776];
    for (value, expected) in values[0].iter().zip(expected) {
        assert!((value - expected).abs() < 1e-12, "{values:?}");
    }
}

#[test]
fn names_are_sorted_scoped_and_unique() {
    let params = Params::new(1, &CPU);
    let encoder = params.scope("encoder");
    encoder.scope("b").get(2, "bias", Init::Zeros).expect("parameter");
    encoder.scope("a").get((2, 3), "weight", Init::Zeros).expect("parameter");
    params.get(1, "encoder2", Init::Zeros).expect("parameter");
    assert_eq!(params.names(), ["encoder.a.weight", "encoder.b.bias", "encoder2"]);
    assert_eq!(encoder.names(), ["encoder.a.weight", "encoder.b.bias"]);
    assert_eq!((params.num_elements(), encoder.num_elements()), (9, 8));
    let again = encoder.scope("b").get(2, "bias", Init::Zeros);
    let message = again.expect_err("taken").to_string();
    assert!(message.contains("\"encoder.b.bias\" exists"), "{message}");
}

#[test]
fn fans_need_two_dimensions_that_are_not_0() {
    let params = Params::new(1, &CPU);
    for shape in [vec![3], vec![], vec![3, 0], vec![0, 3]] {
        let error = params.get(shape, "w", Init::XavierUniform { gain: 1.0 });
        assert!(matches!(error, Err(Error::Initialiser { .. })), "{error:?}");
    }
    assert!(params.names().is_empty());
}

/// An update of the variable is what the layer computes with.
#[test]
fn updates_reach_the_layers() {
    let params = Params::new(1, &CPU);
    let layer = Linear::new(&params, 2, 1).expect("layer");
    for (_, var) in params.vars() {
        var.set(&var.ones_like().expect("ones")).expect("set");
    }
    assert_eq!(layer.weight().to_vec2::<f32>().expect("values"), [[1.0, 1.0]]);
    assert_eq!(layer.bias().to_vec1::<f32>().expect("values"), [1.0]);
}

/// Within six standard errors of a normal distribution around 0.
fn assert_normal(tensor: &Tensor, expected: f64) {
    let [mean, std, least, greatest] = statistics(tensor);
    let error = 6.0 * expected / (tensor.elem_count() as f64).sqrt();
    assert!(mean.abs() < error, "mean {mean}");
    assert!((std - expected).abs() < error, "std {std}, expected {expected}");
    // Four deviations are to be found among 20 000 numbers, six are not.
    let far = least.abs().min(greatest) / expected;
    assert!(far > 3.0 && least.abs().max(greatest) < 6.0 * expected, "{least} {greatest}");
}

#[test]
fn normal_distributions_by_fan() {
    let kaiming = |fan, gain| create(1, "w", Init::KaimingNormal { fan, gain });
    assert_normal(&kaiming(Fan::In, 2.0), 0.2);
    assert_normal(&kaiming(Fan::Out, 1.0), 200f64.sqrt().recip());
    assert_normal(&create(1, "w", Init::XavierNormal { gain: 0.5 }), 0.5 * (2.0 / 300f64).sqrt());
    // A convolution's fans count the kernel: 30 in, 60 out.
    let params = Params::new(1, &CPU);
    let init = |fan| Init::KaimingNormal { fan, gain: 1.0 };
    let get = |name, fan| params.get((600, 10, 3, 1), name, init(fan)).expect("parameter");
    assert_normal(&get("in", Fan::In), 30f64.sqrt().recip());
    assert_normal(&get("out", Fan::Out), 1800f64.sqrt().recip());
}

#[test]
fn gains_are_pytorchs() {
    let gains = [
        (Activation::Identity, 1.0),
        (Activation::Sigmoid, 1.0),
        (Activation::Tanh, 5.0 / 3.0),
        (Activation::Relu, 2f64.sqrt()),
        (Activation::LeakyRelu, (2.0 / 1.0001f64).sqrt()),
    ];
    for (activation, gain) in gains {
        assert!((activation.gain() - gain).abs() < 1e-15, "{activation:?}");
    }
    assert!((Init::rectifier_gain(5f64.sqrt()) - (1.0 / 3f64).sqrt()).abs() < 1e-15);
}

/// Cut at one deviation below and two above: the moments of that distribution, from its density.
#[test]
fn truncated_normal_numbers_stay_within_their_bounds() {
    let init = Init::TruncatedNormal { mean: 1.0, std: 0.5, low: 0.5, high: 2.0 };
    let [mean, std, least, greatest] = statistics(&create(1, "w", init));
    assert!(least >= 0.5 && greatest <= 2.0 && least < 0.501 && greatest > 1.99);
    let density = |z: f64| (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt();
    let within = 0.818_594_614; // Φ(2) − Φ(−1)
    let shift = (density(-1.0) - density(2.0)) / within;
    let variance = 1.0 + (-density(-1.0) - 2.0 * density(2.0)) / within - shift * shift;
    let error = 6.0 * 0.5 / 20_000f64.sqrt();
    assert!((mean - (1.0 + 0.5 * shift)).abs() < error, "{mean}");
    assert!((std - 0.5 * variance.sqrt()).abs() < error, "{std}");
    assert!((std - 0.5).abs() > 3.0 * error, "as if nothing were cut off");
    let params = Params::new(1, &CPU);
    for (std, low, high) in
        [(1.0, 5.0, 6.0), (1.0, 1.0, -1.0), (0.0, -1.0, 1.0), (f64::NAN, -1.0, 1.0)]
    {
        let init = Init::TruncatedNormal { mean: 0.0, std, low, high };
        let error = params.get(3, "w", init).expect_err("refused").to_string();
        assert!(error.contains("\"w\"") && error.contains("1 % of it"), "{error}");
    }
}

#[test]
fn orthogonal_matrices_are() {
    let params = Params::with_dtype(1, &CPU, DType::F64);
    for (shape, gain) in [
        (vec![70, 100], 1.0),
        (vec![100, 70], 2.0),
        (vec![40, 8, 5], 0.5),
        (vec![1, 9], 1.0),
        (vec![9, 1], 1.0),
    ] {
        let q = params.get(shape.as_slice(), &format!("{shape:?}"), Init::Orthogonal { gain });
        let q = q.and_then(|q| Ok(q.flatten_from(1)?)).expect("matrix");
        let (rows, columns) = q.dims2().expect("matrix");
        let q = if rows <= columns { q } else { q.t().expect("transposed") };
        let product =
            q.t().and_then(|t| q.contiguous()?.matmul(&t.contiguous()?)).expect("product");
        let product: Vec<Vec<f64>> = product.to_vec2().expect("values");
        for (i, row) in product.iter().enumerate() {
            for (j, value) in row.iter().enumerate() {
                let expected = if i == j { gain * gain } else { 0.0 };
                assert!((value - expected).abs() < 1e-12, "{shape:?} {i} {j} {value}");
            }
        }
    }
    // Uniformly distributed: the elements of a large one look normal, of either sign.
    let square = params.get((130, 130), "square", Init::Orthogonal { gain: 1.0 });
    assert_normal(&square.expect("matrix"), 130f64.sqrt().recip());
    let error = params.get(3, "flat", Init::Orthogonal { gain: 1.0 }).expect_err("refused");
    assert!(error.to_string().contains("two dimensions"), "{error}");
    assert!(params.get((0, 3), "none", Init::Orthogonal { gain: 1.0 }).is_ok());
}

#[test]
fn values_do_not_depend_on_the_number_of_threads() {
    let all = [
        Init::Orthogonal { gain: 1.0 },
        Init::TruncatedNormal { mean: 0.0, std: 0.02, low: -0.04, high: 0.04 },
        Init::KaimingNormal { fan: Fan::In, gain: 1.0 },
    ];
    crate::assert_same_in_every_pool(|| all.map(|init| bits(&create(1, "w", init))));
}
