//! Optimizers by themselves.

use crate::Test;
use candle_core::{Device, Tensor};
use mobula_core::Runtime;
use mobula_nn::{Init, Params};
use mobula_train::optim::{
    AdamW, AdamWOptions, Clip, Grouped, Now, Optimizer, OptimizerSpec, OptimizerState, ParamGroup,
    ParamState, Slot, Updater, UpdaterOptions,
};
use mobula_train::{Error, Gradients};
use serde_json::json;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(crate) const TESTS: &[Test] = &[
    ("optim::bits_do_not_depend_on_the_number_of_threads", threads),
    ("optim::state_survives_a_round_trip_bit_by_bit", round_trip),
    ("optim::a_checkpoint_of_before_is_loaded", old_file),
    ("optim::state_of_another_optimizer_or_model_is_refused", foreign_state),
    ("optim::state_that_does_not_fit_is_an_error", odd_state),
    ("optim::groups_scale_exempt_and_freeze", groups),
    ("optim::a_parameter_that_thaws_starts_anew", thawing),
    ("optim::bad_options_are_refused_by_name", bad_options),
    ("optim::one_parameter_is_locked_at_a_time", one_lock),
];

const NAMES: [&str; 7] = ["adafactor", "adagrad", "adam", "adamw", "lion", "rmsprop", "sgd"];

fn spec(value: serde_json::Value) -> OptimizerSpec {
    serde_json::from_value(value).expect("spec")
}

pub(crate) fn build(name: &str) -> Box<dyn Optimizer> {
    spec(json!({ "name": name })).build().expect("optimizer")
}

/// Large enough for several chunks, of sizes that no chunk divides.
pub(crate) fn some_params() -> Params {
    let params = Params::new(3, &Device::Cpu);
    params.get((301, 203), "fc.weight", Init::default_weight()).expect("parameter");
    params.get(40_001, "fc.bias", Init::default_bias(9)).expect("parameter");
    params
}

pub(crate) fn some_gradients(params: &Params, step: u64) -> Gradients {
    let mut gradients = Gradients::zeros(params);
    let values = gradients.values_mut().iter_mut().enumerate();
    values.for_each(|(at, g)| *g = ((at as u64 * 7919 + step * 31) % 1000) as f32 / 1e3 - 0.5);
    gradients
}

pub(crate) fn values(params: &Params) -> HashMap<String, Vec<f32>> {
    let values = |var: &candle_core::Var| var.flatten_all().and_then(|t| t.to_vec1::<f32>());
    let vars = params.vars().into_iter();
    vars.map(|(name, var)| (name, values(&var).expect("values"))).collect()
}

fn steps(optimizer: &dyn Optimizer, steps: u64) -> (Params, OptimizerState) {
    let params = some_params();
    let mut state = optimizer.init(&params).expect("state");
    for step in 0..steps {
        let gradients = some_gradients(&params, step);
        optimizer.update(&params, &gradients, &mut state).expect("update");
    }
    (params, state)
}

fn threads(_: &Runtime) {
    for name in NAMES {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
            pool.install(|| {
                let (params, mut updater) = (some_params(), Updater::new(build(name)));
                updater = updater.with_clip(Clip::Norm(1.0)).expect("clip");
                updater = updater.with_ema(0.9).expect("ema");
                for step in 0..3 {
                    let mut gradients = some_gradients(&params, step);
                    updater.step(&params, &mut gradients).expect("step");
                }
                let averages = updater.ema().expect("averages").averages().to_vec();
                (
                    values(&params),
                    updater.state().expect("state"),
                    updater.gradient_norm(),
                    averages,
                )
            })
        };
        let one = run(1);
        assert!(one.2.expect("a norm") > 1.0, "the gradients were clipped");
        assert!(run(2) == one && run(3) == one, "{name}");
    }
}

fn round_trip(_: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("optimizer.safetensors");
    let more = [
        json!({"name": "sgd", "momentum": 0.9}),
        json!({"name": "rmsprop", "momentum": 0.9, "centered": true}),
        json!({"name": "adagrad", "initial_accumulator_value": 0.5}),
    ];
    let specs = NAMES.map(|name| json!({ "name": name })).into_iter().chain(more);
    for optimizer in specs.map(|value| spec(value).build().expect("optimizer")) {
        for taken in [0, 2] {
            let (params, state) = steps(optimizer.as_ref(), taken);
            state.save(optimizer.as_ref(), &path).expect("save");
            let mut restored = optimizer.init(&params).expect("state");
            restored.load(optimizer.as_ref(), &path).expect("load");
            assert_eq!(restored, state, "{optimizer:?}");
        }
    }
}

/// A file as it was written before there was more than AdamW.
fn old_file(_: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("optimizer.safetensors");
    let params = Params::new(0, &Device::Cpu);
    params.get(2, "w", Init::Zeros).expect("parameter");
    let tensor = |values: [f32; 2]| Tensor::new(&values, &Device::Cpu).expect("tensor");
    let tensors = [("w.exp_avg", tensor([0.25, -1.0])), ("w.exp_avg_sq", tensor([0.5, 1.0 / 3.0]))];
    let options = r#"{"lr":0.001,"beta1":0.9,"beta2":0.999,"eps":1e-8,"weight_decay":0.01}"#;
    let metadata = [("optimizer", "adamw"), ("step", "12"), ("options", options)];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned()));
    safetensors::serialize_to_file(tensors, Some(metadata.into()), &path).expect("file");

    let adamw = build("adamw");
    let mut state = adamw.init(&params).expect("state");
    state.load(adamw.as_ref(), &path).expect("load");
    let param = &state.params[0];
    assert_eq!((state.step, param.steps), (12, 12));
    assert_eq!(param.slots[0].values, [0.25, -1.0]);
    assert_eq!(param.slots[1].values, [0.5, 1.0 / 3.0]);
}

fn foreign_state(_: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("optimizer.safetensors");
    let (adam, adamw) = (build("adam"), build("adamw"));
    let (_, mut state) = steps(adamw.as_ref(), 1);
    state.save(adamw.as_ref(), &path).expect("save");
    let error = state.load(adam.as_ref(), &path).expect_err("adam").to_string();
    assert!(error.contains("it is of the optimizer adamw, expected adam"), "{error}");

    let other = Params::new(0, &Device::Cpu);
    other.get(3, "fc.weight", Init::Zeros).expect("parameter");
    let mut fresh = adamw.init(&other).expect("state");
    let error = fresh.load(adamw.as_ref(), &path).expect_err("another shape").to_string();
    assert!(error.contains("fc.weight.exp_avg has shape [301, 203], expected [3]"), "{error}");
    assert_eq!(fresh, adamw.init(&other).expect("state"), "nothing has changed");

    let before = values(&other);
    let gradients = some_gradients(&other, 0);
    let error = adamw.update(&other, &gradients, &mut state).expect_err("another model");
    assert!(matches!(error, Error::OptimizerModel { .. }), "{error}");
    assert_eq!(values(&other), before);

    // As many values, but in other places.
    let (params, mut state) = steps(adamw.as_ref(), 1);
    let swapped = Params::new(0, &Device::Cpu);
    swapped.get((301, 203), "fc.bias", Init::Zeros).expect("parameter");
    swapped.get(40_001, "fc.weight", Init::Zeros).expect("parameter");
    let gradients = some_gradients(&swapped, 0);
    let error = adamw.update(&params, &gradients, &mut state).expect_err("other places");
    assert!(matches!(error, Error::OptimizerModel { .. }), "{error}");
    assert_eq!(state.step, 1, "it was noticed before anything changed");
}

fn groups(_: &Runtime) {
    let decayed = AdamWOptions { weight_decay: 0.5, ..AdamWOptions::default() };
    let plain = AdamWOptions { weight_decay: 0.0, ..decayed };
    let adamw = |options| AdamW::new(options).expect("options");
    let grouped = |groups: Vec<ParamGroup>| Grouped::new(adamw(decayed), groups).expect("groups");
    let of = |optimizer: &dyn Optimizer, name: &str| values(&steps(optimizer, 3).0).remove(name);
    let (with, without) = (adamw(decayed), adamw(plain));
    assert_ne!(of(&with, "fc.bias"), of(&without, "fc.bias"), "decay does something");

    let no_decay = grouped(vec![ParamGroup::no_decay()]);
    assert_eq!(of(&no_decay, "fc.bias"), of(&without, "fc.bias"));
    assert_eq!(of(&no_decay, "fc.weight"), of(&with, "fc.weight"));

    let slow = ParamGroup { lr_scale: 0.5, ..ParamGroup::named(["*.bias"]) };
    let half = adamw(AdamWOptions { lr: decayed.lr / 2.0, ..decayed });
    let slow = grouped(vec![slow]);
    assert_eq!(of(&slow, "fc.bias"), of(&half, "fc.bias"));
    assert_eq!(of(&slow, "fc.weight"), of(&with, "fc.weight"));

    let frozen = ParamGroup { frozen: true, ..ParamGroup::named(["fc.w*"]) };
    // The first group that holds a parameter counts.
    let frozen =
        grouped(vec![frozen, ParamGroup { lr_scale: 9.0, ..ParamGroup::named(["fc.w*"]) }]);
    let (params, state) = steps(&frozen, 3);
    assert_eq!(values(&params)["fc.weight"], values(&some_params())["fc.weight"]);
    assert_eq!(values(&params)["fc.bias"], of(&with, "fc.bias").expect("bias"));
    assert!(state.params[1].slots.is_empty() && state.params[1].name == "fc.weight");

    // The gradients of what is frozen are not part of the norm that others are clipped by.
    let norm = |groups| {
        let mut updater = Updater::new(grouped(groups)).with_clip(Clip::Norm(1.0)).expect("clip");
        let params = some_params();
        updater.step(&params, &mut some_gradients(&params, 0)).expect("step");
        updater.gradient_norm().expect("norm")
    };
    let freeze = |name| vec![ParamGroup { frozen: true, ..ParamGroup::named([name]) }];
    let (all, weight, bias) = (norm(vec![]), norm(freeze("fc.bias")), norm(freeze("fc.weight")));
    assert!((all.hypot(0.0) - weight.hypot(bias)).abs() < 1e-9 * all && weight < all);

    let misspelt = grouped(vec![ParamGroup::named(["fc.wieght"])]);
    let error = misspelt.init(&some_params()).expect_err("misspelt").to_string();
    assert_eq!(error, "no parameter is like \"fc.wieght\"; the model has fc.bias, fc.weight");
}

/// A bias correction counts the updates of the parameter, not those of the others.
fn thawing(_: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("optimizer.safetensors");
    let adamw = || AdamW::new(AdamWOptions::default()).expect("options");
    let freeze = ParamGroup { frozen: true, ..ParamGroup::named(["fc.weight"]) };
    let frozen = Grouped::new(adamw(), [freeze]).expect("groups");
    let (params, state) = steps(&frozen, 3);
    state.save(&frozen, &path).expect("save");

    let thawed = adamw();
    let mut state = thawed.init(&params).expect("state");
    state.load(&thawed, &path).expect("load");
    let counts: Vec<_> = state.params.iter().map(|param| param.steps).collect();
    assert_eq!((state.step, counts), (3, vec![3, 0]));
    thawed.update(&params, &some_gradients(&params, 0), &mut state).expect("update");
    let (first, _) = steps(&thawed, 1);
    assert_eq!(values(&params)["fc.weight"], values(&first)["fc.weight"]);

    // Frozen again, what it remembered is gone.
    state.save(&thawed, &path).expect("save");
    let mut again = frozen.init(&params).expect("state");
    again.load(&frozen, &path).expect("load");
    again.save(&frozen, &path).expect("save");
    state.load(&thawed, &path).expect("load");
    let counts: Vec<_> = state.params.iter().map(|param| param.steps).collect();
    assert_eq!((state.step, counts), (4, vec![4, 0]));
}

fn bad_options(_: &Runtime) {
    let bad = [
        (json!({"name": "adamw", "lr": -1.0}), "option lr is -1, expected a finite number above 0"),
        (json!({"name": "adam", "beta2": 1.0}), "option beta2 is 1, expected from 0 to below 1"),
        (
            json!({"name": "sgd", "momentum": 2.0}),
            "option momentum is 2, expected from 0 to below 1",
        ),
        (
            json!({"name": "sgd", "nesterov": true}),
            "option nesterov is true, expected false, or true with a momentum and no dampening",
        ),
        (
            json!({"name": "rmsprop", "eps": 0.0}),
            "option eps is 0, expected a finite number above 0",
        ),
        (
            json!({"name": "lion", "beta1": -0.1}),
            "option beta1 is -0.1, expected from 0 to below 1",
        ),
        (
            json!({"name": "adafactor", "d": 0.5}),
            "option d is 0.5, expected a finite number, 1 or above",
        ),
        (
            json!({"name": "adagrad", "lr_decay": -1.0}),
            "option lr_decay is -1, expected a finite number, 0 or above",
        ),
    ];
    for (options, expected) in bad {
        let error = spec(options).build().expect_err("out of range").to_string();
        assert_eq!(error, expected);
    }
    for unknown in [json!({"name": "adamw", "momentum": 0.9}), json!({"name": "adamx"})] {
        let error = serde_json::from_value::<OptimizerSpec>(unknown).expect_err("unknown");
        assert!(error.to_string().starts_with("unknown "), "{error}");
    }
    for unknown in [
        json!({"schedule": {"name": "constant", "steps": 3}}),
        json!({"schedule": {"name": "cosine", "steps": 3, "eta_min": 0}}),
        json!({"clip": {"nrom": 1.0}}),
        json!({"emma": 0.9}),
    ] {
        let error = serde_json::from_value::<UpdaterOptions>(unknown).expect_err("unknown");
        assert!(error.to_string().starts_with("unknown "), "{error}");
    }
    for bad in [
        json!({"clip": {"norm": 0.0}}),
        json!({"ema": 1.0}),
        json!({"groups": [{"lr_scale": -1.0}]}),
        json!({"plateau": {"factor": 1.0}}),
        json!({"schedule": {"name": "cosine", "steps": 0}}),
        json!({"schedule": {"name": "multi_step", "milestones": [9, 3]}}),
    ] {
        let options: UpdaterOptions = serde_json::from_value(bad).expect("known");
        assert!(matches!(options.build(), Err(Error::Option { .. })), "{options:?}");
    }
}

/// While it has a parameter, the pool has this thread do whatever else there is to do.
#[derive(Debug, Default)]
struct Yielding(AtomicUsize);

impl Optimizer for Yielding {
    fn name(&self) -> &str {
        "yielding"
    }

    fn options(&self) -> serde_json::Value {
        json!({})
    }

    fn lr(&self) -> f64 {
        0.1
    }

    fn weight_decay(&self) -> f64 {
        0.0
    }

    fn slots(&self, _: &[usize]) -> Vec<Slot> {
        Vec::new()
    }

    fn update_param(
        &self,
        _: Now,
        _: &mut [f32],
        _: &[f32],
        _: &mut ParamState,
    ) -> Result<(), Error> {
        assert_eq!(self.0.fetch_add(1, Ordering::SeqCst), 0, "another parameter is locked");
        while rayon::yield_now() == Some(rayon::Yield::Executed) {}
        self.0.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Two at once, and an evaluation that has one and waits for the other would wait forever.
fn one_lock(_: &Runtime) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("pool");
    pool.install(|| {
        let params = some_params();
        let optimizer = Yielding::default();
        let mut state = optimizer.init(&params).expect("state");
        optimizer.update(&params, &some_gradients(&params, 0), &mut state).expect("update");
    });
}

/// State that a program has put together from other optimizers' is an error, not a panic.
fn odd_state(_: &Runtime) {
    let params = some_params();
    let gradients = some_gradients(&params, 0);
    for name in NAMES.into_iter().filter(|name| *name != "sgd") {
        let optimizer = build(name);
        for spoil in [
            |param: &mut ParamState| param.slots.push(Slot::zeros("more", &[1])),
            |param: &mut ParamState| param.slots.truncate(0),
            |param: &mut ParamState| param.slots[0].values.truncate(7),
        ] {
            let mut state = optimizer.init(&params).expect("state");
            spoil(&mut state.params[1]);
            let error = optimizer.update(&params, &gradients, &mut state).expect_err(name);
            let Error::OptimizerSlots { parameter, .. } = error else { panic!("{error}") };
            assert_eq!(parameter, "fc.weight");
        }
    }
}
