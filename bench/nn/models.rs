//! The models that are measured, and what they are trained on.

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use mobula_core::random::Stream;
use mobula_nn::{Model, ModelSpec};
use std::collections::HashMap;
use std::path::Path;

pub(crate) const SEED: u64 = 1;

/// One model, and its batches.
pub(crate) struct Case {
    spec: ModelSpec,
    rows: usize,
    /// Enough that a round hardly sees one twice: once learnt by heart, losses are tiny and twitch.
    pub(crate) batches: usize,
}

pub(crate) fn case(name: &str) -> Result<Case> {
    let (rows, batches, spec) = match name {
        "mlp" => (
            256,
            64,
            r#"{"architecture": "mlp", "options": {"inputs": 784, "hidden": [512, 512], "outputs": 10}}"#,
        ),
        "mlp-32" => (
            32,
            64,
            r#"{"architecture": "mlp", "options": {"inputs": 784, "hidden": [512, 512], "outputs": 10}}"#,
        ),
        // Of 10 million parameters, for the optimizer alone.
        "wide" => (
            64,
            16,
            r#"{"architecture": "mlp", "options": {"inputs": 2236, "hidden": [2236, 2236], "outputs": 10}}"#,
        ),
        "cnn" => (256, 16, r#"{"architecture": "cnn"}"#),
        "resnet" => (64, 4, r#"{"architecture": "resnet"}"#),
        "transformer" => (
            16,
            8,
            r#"{"architecture": "transformer", "options": {"length": 128, "inputs": 256, "features": 256, "heads": 4, "layers": 4, "outputs": 10}}"#,
        ),
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
    pub(crate) fn model(&self) -> Result<Model> {
        Ok(Model::build(&self.spec, SEED, &Device::Cpu)?)
    }

    /// Weights as nn initialises them, and batches whose labels a linear map of the inputs decides,
    /// so that there is something to learn.
    pub(crate) fn write_fixture(&self, path: &Path) -> Result<()> {
        let model = self.model()?;
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

fn normal(purpose: &str, index: usize, shape: &[usize]) -> Result<Tensor> {
    let mut numbers = Stream::new(SEED, purpose).at(index as u64, 0);
    let values = (0..shape.iter().product()).map(|_| numbers.normal() as f32).collect();
    Ok(Tensor::from_vec::<_, f32>(values, shape, &Device::Cpu)?)
}
