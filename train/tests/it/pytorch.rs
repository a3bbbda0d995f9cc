//! Optimizers, schedules and clipping against PyTorch's, from a file that
//! `bench/fixtures/optim.py` writes.

use crate::Test;
use candle_core::{Device, Tensor};
use mobula_core::Runtime;
use mobula_nn::{Init, Params};
use mobula_train::Gradients;
use mobula_train::optim::{Clip, Ema, Optimizer, OptimizerSpec, Plateau, PlateauOptions, Schedule};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

pub(crate) const TESTS: &[Test] = &[
    ("pytorch::optimizers_agree_after_1_10_and_100_steps", optimizers),
    ("pytorch::every_option_of_every_optimizer_matters", options_matter),
    ("pytorch::a_missing_bias_correction_shows", corrections_matter),
    ("pytorch::schedules_agree_over_100_steps", schedules),
    ("pytorch::plateaus_agree_over_60_epochs", plateaus),
    ("pytorch::clipping_agrees", clipping),
    ("pytorch::averages_of_weights_agree", averages),
];

/// Name, shape, scale of the values, scale of the gradients: as in the script.
const PARAMS: [(&str, &[usize], f32, f32); 5] = [
    ("block", &[2, 3, 4], 1.0, 0.125),
    ("matrix", &[4, 6], 1.0, 1.0),
    ("scalar", &[], 0.5, 0.25),
    ("tiny", &[5], 1.0 / 64.0, 1.0 / (1 << 26) as f32),
    ("vector", &[7], 0.25, 1.0 / 32.0),
];

/// The learning rate of the optimizers that schedules were tried with.
const LR: f64 = 0.1;

struct Fixture {
    about: Value,
    tensors: HashMap<String, Tensor>,
}

impl Fixture {
    fn read() -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/optim/pytorch.safetensors");
        let bytes = std::fs::read(path).expect("fixture");
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("header");
        let metadata = header.metadata().as_ref().expect("metadata");
        let about: Value = serde_json::from_str(&metadata["about"]).expect("about");
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).expect("tensors");
        assert!(about["torch"].as_str().is_some_and(|version| version.starts_with("2.")));
        Self { about, tensors }
    }

    fn cases<T: DeserializeOwned>(&self, kind: &str) -> BTreeMap<String, T> {
        let cases: BTreeMap<String, T> =
            serde_json::from_value(self.about[kind].clone()).expect("cases");
        assert!(!cases.is_empty());
        cases
    }

    fn f64s(&self, name: &str) -> Vec<f64> {
        let tensor = self.tensors[name].to_dtype(candle_core::DType::F64);
        tensor.and_then(|t| t.to_vec1()).expect("values")
    }
}

/// Numbers from -1 to 1, the same as in the script.
fn noise(param: usize, step: u64, at: usize) -> f32 {
    let x = at as u64 * 7919 + param as u64 * 104_729 + step * 1_299_709 + 1;
    let x = (x * 2_654_435_761) % (1 << 32);
    let x = ((x ^ (x >> 15)) * 2_246_822_519) % (1 << 32);
    ((x >> 16) as f32 - 32768.0) / 32768.0
}

fn params() -> Params {
    let params = Params::new(0, &Device::Cpu);
    for (name, shape, ..) in PARAMS {
        params.get(shape, name, Init::Zeros).expect("parameter");
    }
    for (k, (_, var)) in params.vars().into_iter().enumerate() {
        let values = (0..var.elem_count()).map(|at| noise(k, 0, at) * PARAMS[k].2);
        let values = Tensor::from_vec(values.collect(), var.shape(), &Device::Cpu);
        var.set(&values.expect("tensor")).expect("set");
    }
    params
}

fn fill(gradients: &mut Gradients, step: u64) {
    let places: Vec<_> = gradients.places().iter().map(|(_, range)| range.clone()).collect();
    for (k, range) in places.into_iter().enumerate() {
        for (at, g) in gradients.values_mut()[range].iter_mut().enumerate() {
            *g = noise(k, step, at) * PARAMS[k].3;
        }
    }
}

fn flat(params: &Params) -> Vec<f64> {
    let values = |(_, var): (String, candle_core::Var)| {
        let tensor = var.flatten_all().and_then(|t| t.to_dtype(candle_core::DType::F64));
        tensor.and_then(|t| t.to_vec1::<f64>()).expect("values")
    };
    params.vars().into_iter().flat_map(values).collect()
}

/// How far apart they are at most, in units of what is allowed.
fn distance(ours: &[f64], theirs: &[f64], relative: f64, absolute: f64) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let far = |(a, b): (&f64, &f64)| (a - b).abs() / (relative * b.abs() + absolute);
    ours.iter().zip(theirs).map(far).fold(0.0, f64::max)
}

/// The distance after 1, 10 and 100 steps, of which the first `skipped` count in its state only.
fn run(fixture: &Fixture, case: &str, optimizer: &dyn Optimizer, skipped: u64) -> f64 {
    let params = params();
    let mut gradients = Gradients::zeros(&params);
    let mut state = optimizer.init(&params).expect("state");
    state.params.iter_mut().for_each(|param| param.steps = skipped);
    let mut worst = 0.0f64;
    for step in 1..=100 {
        fill(&mut gradients, step);
        optimizer.update(&params, &gradients, &mut state).expect("update");
        if [1, 10, 100].contains(&step) {
            let theirs = fixture.f64s(&format!("{case}/{step}"));
            worst = worst.max(distance(&flat(&params), &theirs, 1e-5, 2e-7));
        }
    }
    worst
}

fn optimizers(_: &Runtime) {
    let fixture = Fixture::read();
    for (case, spec) in fixture.cases::<OptimizerSpec>("optimizers") {
        let optimizer = spec.build().expect(&case);
        let worst = run(&fixture, &case, optimizer.as_ref(), 0);
        assert!(worst <= 1.0, "{case}: {worst} times as far from PyTorch as allowed");
    }
}

/// An option that is a little off.
fn off(value: &Value) -> Value {
    match value {
        Value::Bool(value) => json!(!value),
        value => match value.as_f64().expect("a number") {
            0.0 => json!(0.01),
            x if (0.5..1.0).contains(&x) => json!(1.0 - (1.0 - x) * 1.1),
            x => json!(x * 1.1),
        },
    }
}

/// The control: with any option off, at least one case of that optimizer disagrees.
fn options_matter(_: &Runtime) {
    let fixture = Fixture::read();
    let mut noticed: BTreeMap<(String, String), bool> = BTreeMap::new();
    for (case, spec) in fixture.cases::<OptimizerSpec>("optimizers") {
        let Value::Object(options) = serde_json::to_value(spec).expect("options") else {
            panic!("options are an object")
        };
        let name = options["name"].as_str().expect("name").to_owned();
        for (option, value) in options.iter().filter(|(option, _)| *option != "name") {
            let mut options = options.clone();
            options.insert(option.clone(), off(value));
            let spec: OptimizerSpec = serde_json::from_value(options.into()).expect("options");
            // Some do not go together, such as Nesterov's momentum without any.
            let Ok(optimizer) = spec.build() else { continue };
            let found = run(&fixture, &case, optimizer.as_ref(), 0) > 1.0;
            *noticed.entry((name.clone(), option.clone())).or_default() |= found;
        }
    }
    assert!(noticed.len() > 35, "{}", noticed.len());
    let missed: Vec<_> = noticed.iter().filter(|(_, noticed)| !**noticed).collect();
    assert!(missed.is_empty(), "off and not noticed: {missed:?}");
}

/// The control: after very many steps nothing is corrected any more.
fn corrections_matter(_: &Runtime) {
    let fixture = Fixture::read();
    for case in ["adam", "adamw_options", "adafactor", "sgd_momentum", "adagrad_options"] {
        let spec = &fixture.cases::<OptimizerSpec>("optimizers")[case];
        let optimizer = spec.build().expect("optimizer");
        let worst = run(&fixture, case, optimizer.as_ref(), 1_000_000);
        assert!(worst > 100.0, "{case}: {worst}");
    }
}

fn schedules(_: &Runtime) {
    let fixture = Fixture::read();
    for (case, schedule) in fixture.cases::<Schedule>("schedules") {
        schedule.validate().expect(&case);
        let theirs = fixture.f64s(&format!("schedule/{case}"));
        let ours: Vec<_> = (0..theirs.len() as u64).map(|step| schedule.lr(LR, step)).collect();
        let worst = distance(&ours, &theirs, 1e-9, 1e-12);
        assert!(worst <= 1.0, "{case}: {ours:?}, PyTorch: {theirs:?}");
        // The control: one step late.
        let late: Vec<_> = (1..=theirs.len() as u64).map(|step| schedule.lr(LR, step)).collect();
        assert!(distance(&late, &theirs, 1e-9, 1e-12) > 1.0, "{case}");
    }
}

fn plateaus(_: &Runtime) {
    let fixture = Fixture::read();
    for (case, options) in fixture.cases::<PlateauOptions>("plateaus") {
        let theirs = fixture.f64s(&format!("{case}/lr"));
        let ours = |options: &PlateauOptions| -> Vec<f64> {
            let mut plateau = Plateau::new(options.clone()).expect("options");
            let lr = |metric| {
                // It is saved after every epoch.
                let text = serde_json::to_string(&plateau).expect("json");
                plateau = serde_json::from_str(&text).expect("json");
                plateau.observe(metric);
                plateau.lr(LR)
            };
            fixture.f64s(&format!("{case}/metric")).into_iter().map(lr).collect()
        };
        let worst = distance(&ours(&options), &theirs, 1e-9, 0.0);
        assert!(worst <= 1.0, "{case}: {:?}, PyTorch: {theirs:?}", ours(&options));
        let other = PlateauOptions { patience: options.patience + 1, ..options };
        assert!(distance(&ours(&other), &theirs, 1e-9, 0.0) > 1.0, "{case}");
    }
}

fn clipping(_: &Runtime) {
    let fixture = Fixture::read();
    let mut gradients = Gradients::zeros(&params());
    let clipped = |gradients: &mut Gradients, clip: Clip| -> (Option<f64>, Vec<f64>) {
        fill(gradients, 1);
        let norm = clip.apply(gradients);
        (norm, gradients.values().iter().map(|g| f64::from(*g)).collect())
    };
    let (norm, ours) = clipped(&mut gradients, Clip::Norm(0.5));
    let theirs = fixture.f64s("clip/norm");
    assert!(distance(&[norm.expect("a norm")], &theirs, 1e-6, 0.0) <= 1.0, "{norm:?} {theirs:?}");
    let theirs = fixture.f64s("clip/by_norm");
    assert!(distance(&ours, &theirs, 1e-6, 0.0) <= 1.0);
    let (_, other) = clipped(&mut gradients, Clip::Norm(0.501));
    assert!(distance(&other, &theirs, 1e-6, 0.0) > 1.0);
    // What is small stays to the bit.
    let (_, same) = clipped(&mut gradients, Clip::Norm(1e6));
    fill(&mut gradients, 1);
    assert!(same.iter().zip(gradients.values()).all(|(a, b)| *a == f64::from(*b)));

    let (norm, ours) = clipped(&mut gradients, Clip::Value(0.1));
    assert_eq!((norm, ours), (None, fixture.f64s("clip/by_value")));
}

fn averages(_: &Runtime) {
    let fixture = Fixture::read();
    let ours = |decay| {
        let params = params();
        let mut gradients = Gradients::zeros(&params);
        let mut ema = Ema::new(decay).expect("decay");
        let sgd: OptimizerSpec =
            serde_json::from_value(json!({"name": "sgd", "lr": 1.0})).expect("spec");
        let sgd = sgd.build().expect("sgd");
        let mut state = sgd.init(&params).expect("state");
        for step in 1..=10 {
            fill(&mut gradients, step);
            sgd.update(&params, &gradients, &mut state).expect("update");
            ema.update(&params).expect("average");
        }
        ema.averages().concat().into_iter().map(f64::from).collect::<Vec<_>>()
    };
    let theirs = fixture.f64s("ema/10");
    assert!(distance(&ours(0.9), &theirs, 2e-6, 1e-7) <= 1.0);
    assert!(distance(&ours(0.899), &theirs, 2e-6, 1e-7) > 1.0);
}
