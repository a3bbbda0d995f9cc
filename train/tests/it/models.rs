//! Whole models against PyTorch's, from files that `bench/fixtures/models.py` writes: what comes
//! out, every gradient, and the weights after 1, 10 and 100 steps on batches of unequal size, with
//! what they then predict.

use crate::Test;
use candle_core::{Device, Tensor};
use mobula_core::{Batch, BoxError, Flow, GroupOptions, Member, Placement, Runtime, Shard, remote};
use mobula_nn::loss::{CrossEntropyOptions, cross_entropy_with};
use mobula_nn::{Gradients, Model, ModelSpec, Pass};
use mobula_train::optim::{Now, ParamState, Slot};
use mobula_train::{AdamW, AdamWOptions, Optimizer, TrainState, WorkerContext};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("models::outputs_and_gradients_are_pytorchs", outputs),
    ("models::weights_are_pytorchs_after_1_10_and_100_steps", weights),
    ("models::three_workers_train_to_pytorchs_weights", three_workers),
    ("models::predictions_are_pytorchs_after_100_steps", predictions),
    ("models::a_small_mistake_shows", mistakes),
    ("models::a_missing_bias_correction_shows", corrections_matter),
    ("models::another_option_shows", options_matter),
];

const NAMES: [&str; 11] = [
    "mlp",
    "mlp-silu",
    "cnn",
    "encoder",
    "decoder",
    "resnet",
    "language-model",
    "language-model-rotary",
    "bag-of-words",
    "tabular",
    "tabular-categories",
];
const LOGITS: f32 = 2e-6;
const ONE_STEP: f32 = 1e-5;
const TEN_STEPS: f32 = 2e-5;

/// The label of padding: PyTorch's default.
const IGNORED: i64 = -100;

/// The settings of the script.
fn settings() -> AdamWOptions {
    AdamWOptions { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-3, weight_decay: 0.1 }
}

struct Fixture {
    spec: ModelSpec,
    tensors: HashMap<String, Tensor>,
}

impl Fixture {
    fn read(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
        let bytes = std::fs::read(folder.join(format!("{name}.safetensors"))).expect("fixture");
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("header");
        let metadata = header.metadata().as_ref().expect("metadata");
        let spec = serde_json::from_str(&metadata["model"]).expect("a model");
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).expect("tensors");
        assert!(metadata["torch"].starts_with("2."));
        Self { spec, tensors }
    }

    /// What starts with `prefix`, without it.
    fn under(&self, prefix: &str) -> HashMap<String, Tensor> {
        let tensors = self.tensors.iter().filter_map(|(name, tensor)| {
            Some((name.strip_prefix(prefix)?.to_owned(), tensor.clone()))
        });
        tensors.collect()
    }

    fn model(&self) -> Model {
        let model = Model::build(&self.spec, 1, &Device::Cpu).expect("model");
        model.params().load_tensors("the fixture", &self.under("w.")).expect("weights");
        model
    }

    fn batch(&self, index: usize) -> Batch {
        let tensor = |name: &str| self.tensors[&format!("{name}.{index}")].clone();
        let tensors = ["x", "y"].map(|name| (name.to_owned(), tensor(name)));
        Batch::new(tensors.into()).expect("batch")
    }

    /// The weights after some steps.
    fn train(&self, optimizer: impl Optimizer + 'static, steps: usize) -> Model {
        let mut state = TrainState::new(self.model(), optimizer, 1, 1);
        let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
        for step in 0..steps {
            let batch = self.batch(step % 5);
            let step = context.step(&mut state, &batch, |model, pass, batch| {
                cost(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
            });
            step.expect("step");
        }
        state.model
    }
}

/// The mean over the labels that count.
fn cost(logits: &Tensor, labels: &Tensor) -> mobula_nn::Result<Tensor> {
    let options = CrossEntropyOptions { ignored_label: Some(IGNORED), ..Default::default() };
    cross_entropy_with(logits, labels, None, &options)?.mean()
}

fn adamw(options: AdamWOptions) -> AdamW {
    AdamW::new(options).expect("options")
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().expect("flat").to_vec1().expect("f32")
}

/// The largest difference, by the size of the largest of theirs.
fn distance(ours: &[f32], theirs: &Tensor) -> f32 {
    let theirs = values(theirs);
    assert_eq!(ours.len(), theirs.len());
    let scale = theirs.iter().fold(1e-3f32, |max, value| max.max(value.abs()));
    let largest = ours.iter().zip(&theirs).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
    assert!(!ours.iter().any(|value| value.is_nan()));
    largest / scale
}

/// Of all parameters, the one that is furthest off.
fn furthest(model: &Model, expected: &HashMap<String, Tensor>) -> (String, f32) {
    let state = model.params().state();
    assert_eq!(state.len(), expected.len());
    let far = |(name, var): (String, candle_core::Var)| {
        let distance = distance(&values(&var), &expected[&name]);
        (name, distance)
    };
    state.into_iter().map(far).max_by(|a, b| a.1.total_cmp(&b.1)).expect("parameters")
}

fn outputs(_: &Runtime) {
    for name in NAMES {
        let fixture = Fixture::read(name);
        let (model, batch) = (fixture.model(), fixture.batch(0));
        let x = batch.get("x").expect("x");
        let logits = model.forward(x, &Pass::train(1, 0)).expect("forward");
        let off = distance(&values(&logits), &fixture.tensors["logits"]);
        assert!(off < LOGITS, "{name}: logits off by {off}");
        let loss = cost(&logits, batch.get("y").expect("y")).expect("loss");
        let off = distance(&values(&loss), &fixture.tensors["loss"]);
        assert!(off < 1e-6, "{name}: loss off by {off}");
        let mut gradients = Gradients::zeros(model.params());
        gradients.backward(&loss, 1.0).expect("backward");
        let expected = fixture.under("g.");
        assert_eq!(gradients.places().len(), expected.len());
        for (parameter, range) in gradients.places() {
            let off = distance(&gradients.values()[range.clone()], &expected[parameter]);
            assert!(off < 5e-5, "{name}: the gradient of {parameter} is off by {off}");
        }
    }
}

fn weights(_: &Runtime) {
    for name in NAMES {
        let fixture = Fixture::read(name);
        for (steps, most) in [(1, ONE_STEP), (10, TEN_STEPS), (100, 1e-3)] {
            let model = fixture.train(adamw(settings()), steps);
            let (parameter, off) = furthest(&model, &fixture.under(&format!("{steps}.")));
            assert!(off < most, "{name}, {steps} steps: {parameter} is off by {off}");
        }
    }
}

/// A third of the rows, whatever their number, and what of it counts: PyTorch's
/// `DistributedDataParallel` gives the mean over ranks instead, which is another one for unequal shares.
#[remote(crate = mobula_core)]
fn third(
    member: Member,
    name: String,
    steps: usize,
) -> Result<HashMap<String, Vec<f32>>, BoxError> {
    let mut context = WorkerContext::join(member)?;
    let fixture = Fixture::read(&name);
    let mut state = TrainState::new(fixture.model(), adamw(settings()), 1, 1);
    let options = CrossEntropyOptions { ignored_label: Some(IGNORED), ..Default::default() };
    for step in 0..steps {
        let (batch, Shard { rank, world }) = (fixture.batch(step % 5), context.shard());
        let rows = batch.rows();
        let (first, end) = (rows * rank / world, rows * (rank + 1) / world);
        let mine = batch.slice(first, end - first)?.with_global_rows(rows);
        context.step(&mut state, &mine, |model, pass, batch| {
            let logits = model.forward(batch.get("x")?, pass)?;
            cross_entropy_with(&logits, batch.get("y")?, None, &options)
        })?;
    }
    let state = state.model.params().state();
    Ok(state.into_iter().map(|(name, var)| (name, values(&var))).collect())
}

/// What one process of PyTorch's computes of the whole batches, statistics of batch norms included.
fn three_workers(runtime: &Runtime) {
    let setup = serde_json::json!({"sync_batch_norm": true});
    for name in NAMES {
        let options =
            GroupOptions { placement: Placement::Thread, ..GroupOptions::new("third", 3) };
        let options = options.with_context(&setup).expect("context");
        let group = runtime.group(&options, &third::remote(name.to_owned(), 100)).expect("group");
        let ranks = group.join(Duration::from_secs(120)).expect("join");
        assert!(ranks.iter().all(|rank| *rank == ranks[0]), "{name}");
        let expected = Fixture::read(name).under("100.");
        assert_eq!(ranks[0].len(), expected.len());
        for (parameter, ours) in &ranks[0] {
            let off = distance(ours, &expected[parameter]);
            assert!(off < 1e-3, "{name}: {parameter} is off by {off}");
        }
    }
}

/// In evaluation, where batch norms take the running statistics; the control takes the batch's.
fn predictions(_: &Runtime) {
    for name in NAMES {
        let fixture = Fixture::read(name);
        let (model, batch) = (fixture.train(adamw(settings()), 100), fixture.batch(0));
        let off = |pass: &Pass| {
            let y = model.forward(batch.get("x").expect("x"), pass).expect("forward");
            distance(&values(&y), &fixture.tensors["predicted"])
        };
        assert!(off(&Pass::eval()) < 1e-3, "{name}: off by {}", off(&Pass::eval()));
        if !model.params().buffers().is_empty() {
            assert!(off(&Pass::train(1, 100)) > 1e-2, "{name}");
        }
    }
}

/// What the comparison must not let pass.
fn mistakes(_: &Runtime) {
    for name in NAMES {
        let fixture = Fixture::read(name);
        let no_decay = AdamWOptions { weight_decay: 0.0, ..settings() };
        let other_eps = AdamWOptions { eps: 1.1e-3, ..settings() };
        for options in [no_decay, other_eps] {
            let (_, off) = furthest(&fixture.train(adamw(options), 1), &fixture.under("1."));
            assert!(off > 3.0 * ONE_STEP, "{name}: {options:?} is off by {off} only");
        }
    }
}

/// Moments after very many steps are not corrected any more.
#[derive(Debug)]
struct Uncorrected(AdamW);

impl Optimizer for Uncorrected {
    fn name(&self) -> &str {
        "uncorrected"
    }

    fn options(&self) -> Value {
        self.0.options()
    }

    fn lr(&self) -> f64 {
        self.0.lr()
    }

    fn weight_decay(&self) -> f64 {
        self.0.weight_decay()
    }

    fn slots(&self, shape: &[usize]) -> Vec<Slot> {
        self.0.slots(shape)
    }

    fn update_param(
        &self,
        now: Now,
        values: &mut [f32],
        gradient: &[f32],
        state: &mut ParamState,
    ) -> mobula_train::Result<()> {
        state.steps += 1_000_000;
        self.0.update_param(now, values, gradient, state)
    }
}

/// In one step of these betas the corrections cancel out.
fn corrections_matter(_: &Runtime) {
    for name in NAMES {
        let fixture = Fixture::read(name);
        let model = fixture.train(Uncorrected(adamw(settings())), 10);
        let (_, off) = furthest(&model, &fixture.under("10."));
        assert!(off > 10.0 * TEN_STEPS, "{name}: off by {off} only");
    }
}

/// With the same weights, each of these is another model.
fn options_matter(_: &Runtime) {
    let others = [
        ("language-model", "causal", json!(false)),
        ("language-model", "heads", json!(4)),
        ("language-model-rotary", "positions", json!("none")),
        ("language-model-rotary", "activation", json!("gelu")),
        ("bag-of-words", "causal", json!(true)),
        ("tabular", "dropout", json!(0.1)),
        ("tabular-categories", "residual_dropout", json!(0.1)),
    ];
    for (name, option, value) in others {
        let mut fixture = Fixture::read(name);
        fixture.spec.options.insert(option.to_owned(), value);
        let batch = fixture.batch(0);
        let x = batch.get("x").expect("x");
        let logits = fixture.model().forward(x, &Pass::train(1, 0)).expect("forward");
        let off = distance(&values(&logits), &fixture.tensors["logits"]);
        assert!(off > 3.0 * LOGITS, "{name}: another {option} is off by {off} only");
    }
}
