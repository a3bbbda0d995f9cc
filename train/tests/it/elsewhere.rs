//! Updates where parameters and gradients are, of which the CPU is a place like others.

use crate::Test;
use crate::optim::{build, some_gradients, values};
use candle_core::{Device, Tensor};
use mobula_core::Runtime;
use mobula_nn::{Init, Params};
use mobula_train::Gradients;
use mobula_train::optim::{
    Clip, Grouped, Optimizer, OptimizerSpec, OptimizerState, ParamGroup, Updater,
};
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;

pub(crate) const TESTS: &[Test] = &[
    ("elsewhere::every_optimizer_gives_the_same_bits", same_bits),
    ("elsewhere::updates_here_and_there_take_turns", turns),
    ("elsewhere::an_optimizer_without_a_rule_works_here", without_rule),
    ("elsewhere::norms_are_clipped_alike", norms),
];

fn optimizers() -> Vec<(String, Box<dyn Optimizer>)> {
    let named =
        ["adagrad", "adam", "adamw", "lion", "rmsprop", "sgd"].map(|name| json!({ "name": name }));
    let others = [
        json!({"name": "adagrad", "weight_decay": 0.1, "lr_decay": 0.1}),
        json!({"name": "adam", "weight_decay": 0.1}),
        json!({"name": "rmsprop", "momentum": 0.9, "weight_decay": 0.1}),
        json!({"name": "rmsprop", "centered": true}),
        json!({"name": "rmsprop", "momentum": 0.9, "centered": true}),
        json!({"name": "sgd", "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
        json!({"name": "sgd", "momentum": 0.9, "nesterov": true}),
    ];
    let build = |spec: serde_json::Value| {
        let optimizer: OptimizerSpec = serde_json::from_value(spec.clone()).expect("spec");
        (spec.to_string(), optimizer.build().expect("optimizer"))
    };
    named.into_iter().chain(others).map(build).collect()
}

/// Two are alike, one is by itself, and one is frozen.
fn groups() -> [ParamGroup; 3] {
    let of = |pattern: &str| ParamGroup { params: vec![pattern.to_owned()], ..Default::default() };
    [
        ParamGroup { frozen: true, ..of("frozen.*") },
        ParamGroup { lr_scale: 0.1, weight_decay: Some(0.0), ..of("*.bias") },
        ParamGroup { lr_scale: 2.0, ..of("head.weight") },
    ]
}

/// Of more than one row of a sum, and of few numbers.
fn params(device: &Device) -> Params {
    let params = Params::new(3, device);
    let named = [
        (&[301, 203][..], "fc.weight"),
        (&[40_001], "fc.bias"),
        (&[7, 3], "head.weight"),
        (&[7], "head.bias"),
        (&[5, 5], "frozen.weight"),
        (&[2, 2], "a.weight"),
    ];
    for (shape, name) in named {
        params.get(shape, name, Init::Normal { mean: 0.0, std: 1.0 }).expect("parameter");
    }
    params
}

/// What a training leaves.
#[derive(Debug, PartialEq)]
struct Left {
    values: HashMap<String, Vec<f32>>,
    state: Option<Arc<OptimizerState>>,
}

fn move_to(gradients: &mut Gradients, device: &Device) {
    let values = Tensor::new(gradients.values(), device).expect("gradients");
    gradients.values_mut().fill(f32::NAN);
    gradients.put_elsewhere(values).expect("as many");
}

/// Steps of which `is_elsewhere` says where each takes place.
fn train(updater: Updater, is_elsewhere: impl Fn(u64) -> bool) -> (Left, Option<f64>) {
    train_on(&Device::Cpu, updater, is_elsewhere)
}

/// Steps of which `is_there` says whether the gradients are on the device of the parameters.
fn train_on(
    device: &Device,
    mut updater: Updater,
    is_there: impl Fn(u64) -> bool,
) -> (Left, Option<f64>) {
    let params = params(device);
    for step in 0..4 {
        let mut gradients = some_gradients(&params, step);
        if is_there(step) {
            move_to(&mut gradients, device);
        }
        updater.step(&params, &mut gradients).expect("step");
        assert_eq!(updater.state().expect("state").expect("steps").step, step + 1);
    }
    let state = updater.state().expect("state");
    (Left { values: values(&params), state }, updater.gradient_norm())
}

fn grouped(optimizer: Box<dyn Optimizer>) -> Updater {
    let updater = Updater::new(Grouped::new(optimizer, groups()).expect("groups"));
    updater.with_clip(Clip::Value(0.4)).expect("clip")
}

fn same_bits(_: &Runtime) {
    for ((name, here), (_, there)) in optimizers().into_iter().zip(optimizers()) {
        let (here, _) = train(grouped(here), |_| false);
        assert_ne!(here.values, values(&params(&Device::Cpu)), "{name} does something");
        assert!(here == train(grouped(there), |_| true).0, "{name}");
    }
}

/// Gradients may come from the CPU, or never have been there.
#[cfg(feature = "cuda")]
pub(crate) fn assert_same_bits_on(device: &Device) {
    for name in ["adagrad", "adam", "adamw", "lion", "rmsprop", "sgd"] {
        let (here, _) = train(grouped(build(name)), |_| false);
        for is_there in [|_| false, |_| true, |step| step % 2 == 0] {
            assert!(here == train_on(device, grouped(build(name)), is_there).0, "{name}");
        }
    }
}

/// A state goes there and comes back as it was.
fn turns(_: &Runtime) {
    for name in ["adamw", "sgd"] {
        let (here, _) = train(grouped(build(name)), |_| false);
        for is_elsewhere in [|step| step % 2 == 0, |step| step % 2 == 1, |step| step >= 2] {
            assert!(here == train(grouped(build(name)), is_elsewhere).0, "{name}");
        }
    }
}

fn without_rule(_: &Runtime) {
    let here = train(grouped(build("adafactor")), |_| false);
    assert!(here == train(grouped(build("adafactor")), |_| true));
}

/// Sums are in another order, so that the last bit of the norm may be another one.
fn norms(_: &Runtime) {
    let run = |is_elsewhere: bool| {
        let updater = Updater::new(Grouped::new(build("sgd"), groups()).expect("groups"));
        train(updater.with_clip(Clip::Norm(1.0)).expect("clip"), |_| is_elsewhere)
    };
    let ((here, norm), (there, other)) = (run(false), run(true));
    let (norm, other) = (norm.expect("a norm"), other.expect("a norm"));
    assert!(norm > 10.0 && (norm / other - 1.0).abs() < 1e-12, "{norm} {other}");
    for (name, values) in &here.values {
        let pairs = values.iter().zip(&there.values[name]);
        assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-6, "{name}");
    }
}
