//! Updates where parameters and gradients are, of which the CPU is a place like others.

use crate::Test;
use crate::digits::{self, CLASSES, Config, FEATURES, Harm, Outcome, Rows};
use crate::optim::{build, some_gradients, values};
use candle_core::{DType, Device, Tensor};
use mobula_core::{BatchStream, BoxError, Flow, RunDir, Runtime, Shard};
use mobula_nn::models::MlpOptions;
use mobula_nn::{Init, Model, ModelSpec, Params};
use mobula_train::optim::{
    Clip, Grouped, LossScaleOptions, Optimizer, OptimizerSpec, OptimizerState, ParamGroup, Updater,
    UpdaterOptions,
};
use mobula_train::{
    CheckpointConfig, Gradients, NonFinite, ScalingConfig, TrainState, Trainer, TrainingResult,
    WorkerContext,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) const TESTS: &[Test] = &[
    ("elsewhere::every_optimizer_gives_the_same_bits", same_bits),
    ("elsewhere::updates_here_and_there_take_turns", turns),
    ("elsewhere::an_optimizer_without_a_rule_works_here", without_rule),
    ("elsewhere::norms_are_clipped_alike", norms),
    ("elsewhere::an_optimizer_by_itself_says_that_gradients_are_missing", by_itself),
    ("elsewhere::trainings_come_to_the_same_bits", trainings),
    ("elsewhere::a_lost_worker_gets_what_the_other_has", healed),
    ("elsewhere::a_run_goes_on_from_its_checkpoints", resumed),
    ("elsewhere::gradients_have_to_be_of_the_model", by_piece),
    ("elsewhere::a_gradient_that_is_not_finite_has_its_name", named),
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

/// What a training leaves, in bits.
#[derive(Debug, PartialEq)]
struct Left {
    values: BTreeMap<String, Vec<u32>>,
    slots: Vec<Vec<u32>>,
    state: Option<Arc<OptimizerState>>,
}

impl Left {
    fn of(params: &Params, state: Option<Arc<OptimizerState>>) -> Self {
        let values = values(params).into_iter().map(|(name, values)| (name, bits(&values)));
        let slots = state.iter().flat_map(|state| &state.params).flat_map(|param| &param.slots);
        let slots = slots.map(|slot| bits(&slot.values)).collect();
        Self { values: values.collect(), slots, state }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
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
        let has_rule = updater.optimizer().name() != "adafactor";
        assert_eq!(gradients.elsewhere().is_some(), is_there(step) && has_rule);
        assert_eq!(updater.state().expect("state").expect("steps").step, step + 1);
    }
    let state = updater.state().expect("state");
    (Left::of(&params, state), updater.gradient_norm())
}

fn grouped(optimizer: Box<dyn Optimizer>) -> Updater {
    let updater = Updater::new(Grouped::new(optimizer, groups()).expect("groups"));
    updater.with_clip(Clip::Value(0.4)).expect("clip")
}

fn same_bits(_: &Runtime) {
    for ((name, here), (_, there)) in optimizers().into_iter().zip(optimizers()) {
        let (here, _) = train(grouped(here), |_| false);
        assert_ne!(
            here.values,
            Left::of(&params(&Device::Cpu), None).values,
            "{name} does something"
        );
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
    for ((name, here), (_, there)) in optimizers().into_iter().zip(optimizers()) {
        let (here, _) = train(grouped(here), |_| false);
        assert!(here == train_on(device, grouped(there), |_| true).0, "{name}");
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
        let pairs = pairs.map(|(a, b)| (f32::from_bits(*a), f32::from_bits(*b)));
        assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-6, "{name}");
    }
}

fn by_itself(_: &Runtime) {
    let (params, optimizer) = (params(&Device::Cpu), build("sgd"));
    let mut state = optimizer.init(&params).expect("state");
    let mut gradients = some_gradients(&params, 0);
    let before = Left::of(&params, None);
    move_to(&mut gradients, &Device::Cpu);
    let error = optimizer.update(&params, &gradients, &mut state).expect_err("elsewhere");
    assert!(error.to_string().contains("`Gradients::bring_here`"), "{error}");
    assert!(Left::of(&params, None) == before);
    gradients.bring_here().expect("here");
    optimizer.update(&params, &gradients, &mut state).expect("update");
    assert!(Left::of(&params, None) != before);
}

fn trainer(config: Config) -> Trainer<Outcome> {
    let trainer = Trainer::new(digits::train::remote(config)).with_logs_shown(false);
    trainer.with_scaling(ScalingConfig::workers(2))
}

/// The same with gradients here and elsewhere.
fn both(
    config: &Config,
    fit: impl Fn(Trainer<Outcome>) -> TrainingResult<Outcome>,
) -> TrainingResult<Outcome> {
    let [here, there] =
        [false, true].map(|elsewhere| fit(trainer(Config { elsewhere, ..config.clone() })));
    let left = |fit: &TrainingResult<Outcome>| {
        let ranks = fit.values.iter();
        ranks.map(|rank| (bits(&rank.weights), rank.optimizer_values)).collect::<Vec<_>>()
    };
    assert!(left(&here) == left(&there), "{config:?}");
    assert_eq!(here.restarts, there.restarts);
    there
}

fn clipped() -> UpdaterOptions {
    let groups = vec![ParamGroup::no_decay()];
    UpdaterOptions { groups, clip: Some(Clip::Value(0.02)), ema: Some(0.9), ..Default::default() }
}

/// Also of those whose steps are left out, or which go back to a checkpoint.
fn trainings(runtime: &Runtime) {
    let updater = Some(clipped());
    let plain = Config { updater: updater.clone(), ..Config::new(3) };
    both(&plain, |trainer| trainer.fit(runtime).expect("fit"));

    let harm = Harm::NanLosses { steps: vec![4, 5, 9] };
    let skip = NonFinite::Skip { in_a_row: 2 };
    let left_out = Config { harm, non_finite: skip, ..plain.clone() };
    let fit = both(&left_out, |trainer| trainer.fit(runtime).expect("fit"));
    assert_eq!(fit.metrics["non_finite_steps"], 3.0);

    let scale = LossScaleOptions { init_scale: 16_777_216.0, ..Default::default() };
    let updater = Some(UpdaterOptions { loss_scale: Some(scale), ..clipped() });
    let scaled = Config { updater, harm: Harm::Half, ..Config::new(3) };
    let fit = both(&scaled, |trainer| trainer.fit(runtime).expect("fit"));
    assert!(fit.metrics["skipped_steps"] >= 3.0);

    let back = NonFinite::RollBack { in_a_row: 0, at_most: 3 };
    let harm = Harm::NanLosses { steps: vec![9] };
    let rolled_back = Config { harm, non_finite: back, ..plain };
    let fit = both(&rolled_back, |trainer| {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "back", 5, &()).expect("run");
        let checkpoints = CheckpointConfig { every_steps: Some(4), ..Default::default() };
        trainer.with_run(&run).with_checkpoints(checkpoints).fit(runtime).expect("fit")
    });
    assert_eq!(fit.metrics["rollbacks"], 1.0);
}

/// From memory, where it was after the last step.
fn healed(runtime: &Runtime) {
    let undisturbed = Config { updater: Some(clipped()), ..Config::new(5) };
    let whole = both(&undisturbed, |trainer| trainer.fit(runtime).expect("fit"));
    let root = tempfile::tempdir().expect("temporary folder");
    for at_step in [1, 15] {
        let harm = Harm::KillOnce { at_step, marker: root.path().join(at_step.to_string()) };
        let config = Config { harm, elsewhere: true, ..undisturbed.clone() };
        let killed = trainer(config).fit(runtime).expect("recovers");
        assert_eq!((killed.restarts, killed.values[0].began_at), (1, at_step));
        for (killed, whole) in killed.values.iter().zip(&whole.values) {
            assert_eq!(bits(&killed.weights), bits(&whole.weights));
        }
    }
}

fn resumed(runtime: &Runtime) {
    let config = |epochs| Config { updater: Some(clipped()), ..Config::new(epochs) };
    let whole = both(&config(4), |trainer| trainer.fit(runtime).expect("fit"));
    for elsewhere in [[true, true], [true, false], [false, true]] {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "stopped", 5, &()).expect("run");
        let [_, second] = [(2, elsewhere[0]), (4, elsewhere[1])].map(|(epochs, elsewhere)| {
            let config = Config { elsewhere, ..config(epochs) };
            trainer(config).with_run(&run).fit(runtime).expect("fit")
        });
        assert!(second.values[0].began_at > 0);
        assert_eq!(bits(&second.values[0].weights), bits(&whole.values[0].weights));
    }
}

fn by_piece(_: &Runtime) {
    let params = params(&Device::Cpu);
    let mut gradients = some_gradients(&params, 0);
    let len = gradients.values().len();
    let short = Tensor::zeros(len - 1, DType::F32, &Device::Cpu).expect("zeros");
    let wide = Tensor::zeros(len, DType::F64, &Device::Cpu).expect("zeros");
    for (wrong, got) in [(short, "F32"), (wide, "F64")] {
        let error = gradients.put_elsewhere(wrong).expect_err("no gradients").to_string();
        assert!(error.contains(got) && error.contains(&format!("[{len}] of F32")), "{error}");
    }
}

/// The loss is finite: only its root is steep.
fn named(_: &Runtime) {
    for elsewhere in [false, true] {
        let context = WorkerContext::alone(|_| Ok(Flow::Continue));
        let mut context = if elsewhere { context.with_gradients_elsewhere() } else { context };
        let spec = ModelSpec::new("mlp", &MlpOptions::new(FEATURES, [16], CLASSES)).expect("spec");
        let model = Model::build(&spec, 5, &Device::Cpu).expect("model");
        let mut state = TrainState::new(model, Updater::new(build("adamw")), 5, 1);
        let batch = Rows::open(Shard::ALL, 8).next_batch().expect("batch").expect("rows");
        let stepped = context.step(&mut state, &batch, |model, pass, batch| {
            let logits = model.forward(batch.get("x")?, pass)?;
            Ok::<_, BoxError>((logits.sum_all()? - logits.sum_all()?)?.sqrt()?)
        });
        let error = stepped.expect_err("not finite").to_string();
        assert!(error.contains("fc1.bias") && error.contains("step 0"), "{error}");
    }
}
