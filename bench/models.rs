//! The models that are measured, and what they are trained on.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use mobula_core::Batch;
use mobula_core::random::Stream;
use mobula_nn::{Model, ModelSpec};
use mobula_train::{AdamW, AdamWOptions};
use std::collections::HashMap;
use std::path::Path;

/// Of everything random.
pub const SEED: u64 = 1;

const MLP: &str =
    r#"{"architecture": "mlp", "options": {"inputs": 784, "hidden": [512, 512], "outputs": 10}}"#;
const TRANSFORMER: &str = r#"{"architecture": "transformer", "options": {"length": 128, "inputs": 256, "features": 256, "heads": 4, "layers": 4, "outputs": 10}}"#;

/// One model, and its batches.
pub struct Case {
    spec: ModelSpec,
    rows: usize,
    /// Enough that a round hardly sees one twice: once learnt by heart, losses are tiny and twitch.
    pub batches: usize,
}

/// The model of this name.
pub fn case(name: &str) -> Result<Case> {
    let (rows, batches, spec) = match name {
        "mlp" => (256, 64, MLP),
        "mlp-32" => (32, 64, MLP),
        // Of 10 million parameters, for the optimizer alone.
        "wide" => (
            64,
            16,
            r#"{"architecture": "mlp", "options": {"inputs": 2236, "hidden": [2236, 2236], "outputs": 10}}"#,
        ),
        "transformer-32" => (32, 8, TRANSFORMER),
        "cnn" => (256, 16, r#"{"architecture": "cnn"}"#),
        "resnet" => (64, 4, r#"{"architecture": "resnet"}"#),
        "transformer" => (16, 8, TRANSFORMER),
        "lstm" => (
            32,
            16,
            r#"{"architecture": "lstm", "options": {"inputs": 256, "length": 64, "hidden": 256, "outputs": 10}}"#,
        ),
        _ => bail!("no model is called {name:?}"),
    };
    Ok(Case { spec: serde_json::from_str(spec)?, rows, batches })
}

impl Case {
    /// The model, on a device.
    pub fn model(&self, device: &Device) -> Result<Model> {
        Ok(Model::build(&self.spec, SEED, device)?)
    }

    /// What [`write_fixture`](Self::write_fixture) wrote.
    pub fn read_fixture(&self, path: &Path) -> Result<Fixture> {
        let tensors = candle_core::safetensors::load(path, &Device::Cpu);
        let mut weights = tensors.with_context(|| format!("reading {}", path.display()))?;
        let batches = (0..self.batches).map(|index| batch(&mut weights, index));
        let batches = batches.collect::<Result<_>>()?;
        // What is left are the weights.
        Ok(Fixture { weights, batches })
    }

    /// Weights as nn initialises them, and batches whose labels a linear map of the inputs decides,
    /// so that there is something to learn.
    pub fn write_fixture(&self, path: &Path) -> Result<()> {
        let model = self.model(&Device::Cpu)?;
        let mut tensors = HashMap::new();
        for (name, var) in model.params().state() {
            tensors.insert(name, var.as_tensor().clone());
        }
        let shape = [&[self.rows], model.input_shape()].concat();
        let inputs = model.input_shape().iter().product::<usize>();
        let classes = *model.output_shape().last().context("a model with outputs")?;
        let teacher = normal("teacher", 0, &[inputs, classes])?;
        for batch in 0..self.batches {
            let x = normal("x", batch, &shape)?;
            let scores = x.reshape((self.rows, inputs))?.matmul(&teacher)?;
            tensors.insert(format!("x.{batch}"), x);
            tensors.insert(format!("y.{batch}"), scores.argmax(1)?.to_dtype(DType::I64)?);
        }
        candle_core::safetensors::save(&tensors, path)
            .with_context(|| format!("writing {}", path.display()))
    }
}

/// What a side trains, and on what.
pub struct Fixture {
    /// At the start.
    pub weights: HashMap<String, Tensor>,
    /// With `x` and `y`.
    pub batches: Vec<Batch>,
}

fn batch(tensors: &mut HashMap<String, Tensor>, index: usize) -> Result<Batch> {
    let mut take = |name: String| tensors.remove(&name).with_context(|| format!("no {name}"));
    let (x, y) = (take(format!("x.{index}"))?, take(format!("y.{index}"))?.to_dtype(DType::U32)?);
    Ok(Batch::new(vec![("x".to_owned(), x), ("y".to_owned(), y)])?)
}

/// The same as the peers'.
pub fn optimizer() -> Result<AdamW> {
    Ok(AdamW::new(AdamWOptions {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
    })?)
}

fn normal(purpose: &str, index: usize, shape: &[usize]) -> Result<Tensor> {
    let mut numbers = Stream::new(SEED, purpose).at(index as u64, 0);
    let values = (0..shape.iter().product()).map(|_| numbers.normal() as f32).collect();
    Ok(Tensor::from_vec::<_, f32>(values, shape, &Device::Cpu)?)
}
