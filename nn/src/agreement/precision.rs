//! Products of `bf16`: by the kernels and on other devices, near those of `f32`, and not the same.

use super::models::MODELS;
use super::{Numbers, composed, numbers, train_in};
use crate::kernels::is_rounded;
use crate::layers::*;
use crate::{Init, Module, Params, Pass, Precision, Result};
use candle_core::{DType, Device, Tensor};
use mobula_core::random::Stream;

type Build = fn(&Params, &Pass) -> Result<Tensor>;

/// Every layer with products, for more than a few rows. The gradients of what is called a weight
/// come from products.
const LAYERS: &[(&str, Build)] = &[
    ("linear", |p, pass| run(Linear::new(p, 40, 30)?, p, &[50, 40], pass)),
    ("linear with an activation", |p, pass| {
        run(Linear::new(p, 40, 30)?.with_activation(Activation::Gelu), p, &[5, 10, 40], pass)
    }),
    ("convolution", |p, pass| {
        let options = Conv2dOptions { stride: 2, padding: 1, groups: 2, ..Default::default() };
        run(Conv2d::new(p, 8, 40, 3, options)?, p, &[3, 8, 9, 8], pass)
    }),
    ("convolution by tiles", |p, pass| {
        let options = Conv2dOptions { padding: 1, ..Default::default() };
        run(Conv2d::new(p, 16, 32, 3, options)?, p, &[4, 16, 8, 8], pass)
    }),
    ("convolution along one axis", |p, pass| {
        run(Conv1d::new(p, 6, 20, 3, Conv1dOptions::default())?, p, &[4, 6, 20], pass)
    }),
    ("transposed convolution", |p, pass| {
        let options = ConvTransposeOptions { stride: 2, padding: 1, ..Default::default() };
        run(ConvTranspose2d::new(p, 20, 18, 3, options)?, p, &[3, 20, 6, 5], pass)
    }),
    ("attention", |p, pass| run(MultiHeadAttention::new(p, 32, 2)?, p, &[2, 33, 32], pass)),
    ("lstm", |p, pass| {
        run(Lstm::new(p, 24, 20, RecurrentOptions::default())?, p, &[20, 6, 24], pass)
    }),
    ("gru", |p, pass| {
        run(Gru::new(p, 24, 20, RecurrentOptions::default())?, p, &[20, 6, 24], pass)
    }),
    ("a head tied to an embedding", |p, pass| {
        Embedding::new(p, 50, 24)?.attend(&input(p, &[40, 24])?, pass)
    }),
];

/// Products apart, of numbers with errors of up to 2⁻⁹ that do not add up.
const NEAR: f64 = 0.02;
/// Many of them, and batch norms of a few rows, one after the other.
const FAR: f64 = 0.2;
/// What two ways to sum in `f32` differ by, at most.
const SAME: f64 = 1e-5;

fn run(layer: impl Module, params: &Params, shape: &[usize], pass: &Pass) -> Result<Tensor> {
    layer.forward(&input(params, shape)?, pass)
}

fn input(params: &Params, shape: &[usize]) -> Result<Tensor> {
    params.get(shape, "x weight", Init::Normal { mean: 0.0, std: 1.0 })
}

fn normal(shape: &[usize]) -> Result<Tensor> {
    let mut draws = Stream::new(1, "precision").at(0, 0);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| draws.normal()).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// The value and the gradients of all parameters.
fn evaluate(build: Build, precision: Precision, dtype: DType) -> Result<Numbers> {
    let params = Params::with_dtype(3, &Device::Cpu, dtype);
    let y = build(&params, &Pass::train(1, 2).with_precision(precision))?;
    let gradients = (&y * normal(y.dims())?.to_dtype(dtype)?)?.backward()?;
    let mut all = vec![("the value and weight".to_owned(), numbers(&y)?)];
    for (name, var) in params.vars() {
        let gradient = gradients.get(&var).map(numbers).transpose()?;
        all.push((name, gradient.unwrap_or_default()));
    }
    Ok(all)
}

/// How far apart numbers are, by the norms of their difference and of the second ones.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-9)
}

/// Near and, of what products give, not the same.
fn assert_rounded(name: &str, rounded: &Numbers, exact: &Numbers) {
    assert_eq!(rounded.len(), exact.len());
    for ((of, rounded), (_, exact)) in rounded.iter().zip(exact) {
        let distance = distance(rounded, exact);
        assert!(distance < NEAR, "{name}, {of}: {distance}");
        assert!(
            !of.contains("weight") || distance > SAME,
            "{name}, {of} was not rounded: {distance}"
        );
    }
}

#[test]
fn products_of_the_kernels_are_rounded() {
    for (name, build) in LAYERS {
        let of = |precision| evaluate(*build, precision, DType::F32).expect("evaluate");
        match is_rounded(Precision::Bf16) {
            true => assert_rounded(name, &of(Precision::Bf16), &of(Precision::F32)),
            // Never less exact than asked.
            false => assert_eq!(of(Precision::Bf16), of(Precision::F32)),
        }
    }
}

#[test]
fn products_on_other_devices_are_rounded() {
    for (name, build) in LAYERS {
        let of =
            |precision| composed(|| evaluate(*build, precision, DType::F32).expect("evaluate"));
        assert_rounded(name, &of(Precision::Bf16), &of(Precision::F32));
    }
}

#[test]
fn models_in_f64_take_no_notice() {
    for (name, build) in LAYERS {
        let of = |precision| evaluate(*build, precision, DType::F64).expect("evaluate");
        assert_eq!(of(Precision::Bf16), of(Precision::F32), "{name}");
        assert_eq!(composed(|| of(Precision::Bf16)), composed(|| of(Precision::F32)), "{name}");
    }
}

/// Each of a model's layers is told.
#[test]
fn a_training_step_of_every_architecture_is_rounded() {
    for model in MODELS {
        let step = |precision| train_in(precision, model, &Device::Cpu).expect("a step");
        for is_composed in [true, false] {
            let of = |precision| match is_composed {
                true => composed(|| step(precision)),
                false => step(precision),
            };
            let (way, is_expected) = match is_composed {
                true => ("composed", true),
                false => ("by the kernels", is_rounded(Precision::Bf16)),
            };
            let (rounded, exact) = (of(Precision::Bf16), of(Precision::F32));
            // Together: a batch norm of four rows makes much of little in some of its own.
            let all = |numbers: &Numbers| numbers.iter().flat_map(|(_, n)| n.clone()).collect();
            let (a, b): (Vec<f64>, Vec<f64>) = (all(&rounded), all(&exact));
            let distance = distance(&a, &b);
            assert!(distance < FAR, "{} {way}: {distance}", model.name);
            assert_eq!(rounded != exact, is_expected, "{} {way}", model.name);
        }
    }
}
