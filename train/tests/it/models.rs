//! Whole models against PyTorch's, from files that `bench/fixtures/models.py` writes: what comes
//! out, every gradient, and the weights after 1, 10 and 100 steps on batches of unequal size.

use crate::Test;
use candle_core::{DType, Device, Tensor};
use mobula_core::{Batch, Flow, Runtime};
use mobula_nn::{Gradients, Model, ModelSpec, Pass, loss::cross_entropy};
use mobula_train::{AdamW, AdamWOptions, TrainState, WorkerContext};
use std::collections::HashMap;
use std::path::PathBuf;

pub(crate) const TESTS: &[Test] = &[
    ("models::outputs_and_gradients_are_pytorchs", outputs),
    ("models::weights_are_pytorchs_after_1_10_and_100_steps", weights),
    ("models::a_small_mistake_shows", mistakes),
];

const NAMES: [&str; 6] = ["mlp", "mlp-silu", "cnn", "encoder", "decoder", "resnet"];
const LOGITS: f32 = 2e-5;

/// The bias of the keys has a gradient of 0, of which Adam divides the rounding by its ε.
const ONE_STEP: f32 = 1e-4;

/// The settings of the script.
fn settings() -> AdamWOptions {
    AdamWOptions { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 }
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
        let labels = self.tensors[&format!("y.{index}")].to_dtype(DType::U32).expect("labels");
        let x = self.tensors[&format!("x.{index}")].clone();
        Batch::new(vec![("x".to_owned(), x), ("y".to_owned(), labels)]).expect("batch")
    }

    /// The weights after some steps.
    fn train(&self, options: AdamWOptions, steps: usize) -> Model {
        let optimizer = AdamW::new(options).expect("options");
        let mut state = TrainState::new(self.model(), optimizer, 1, 1);
        let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
        for step in 0..steps {
            let batch = self.batch(step % 5);
            let step = context.step(&mut state, &batch, |model, pass| {
                cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
            });
            step.expect("step");
        }
        state.model
    }
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
        let loss = cross_entropy(&logits, batch.get("y").expect("y")).expect("loss");
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
        for (steps, most) in [(1, ONE_STEP), (10, 1e-3), (100, 1e-2)] {
            let model = fixture.train(settings(), steps);
            let (parameter, off) = furthest(&model, &fixture.under(&format!("{steps}.")));
            assert!(off < most, "{name}, {steps} steps: {parameter} is off by {off}");
        }
    }
}

/// What the comparison must not let pass.
fn mistakes(_: &Runtime) {
    for name in NAMES {
        let fixture = Fixture::read(name);
        let no_decay = AdamWOptions { weight_decay: 0.0, ..settings() };
        let large_eps = AdamWOptions { eps: 1e-4, ..settings() };
        for options in [no_decay, large_eps] {
            let (_, off) = furthest(&fixture.train(options, 1), &fixture.under("1."));
            assert!(off > 3.0 * ONE_STEP, "{name}: {options:?} is off by {off} only");
        }
    }
}
