//! The multilayer perceptron.

use super::positive;
use crate::layers::{Activation, Dropout, Linear};
use crate::{Architecture, Module, Params, Pass, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The options of [`Mlp`]: architecture `"mlp"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpOptions {
    /// Features of a row.
    pub inputs: usize,
    /// The width of each hidden layer, first to last; empty for a linear model.
    #[serde(default)]
    pub hidden: Vec<usize>,
    /// Numbers that come out for a row, such as one logit per class.
    pub outputs: usize,
    /// The rate of dropout after each hidden layer, in `[0, 1)`.
    #[serde(default)]
    pub dropout: f64,
    /// What follows each hidden layer; ReLU unless said otherwise.
    #[serde(default)]
    pub activation: Activation,
}

impl MlpOptions {
    /// These sizes, no dropout, ReLU; change the rest with `..MlpOptions::new(..)`.
    pub fn new(inputs: usize, hidden: impl Into<Vec<usize>>, outputs: usize) -> Self {
        Self {
            inputs,
            hidden: hidden.into(),
            outputs,
            dropout: 0.0,
            activation: Activation::default(),
        }
    }
}

/// Linear layers with an activation and dropout between them: `[rows, inputs]` to
/// `[rows, outputs]`.
///
/// Parameters `fc1.weight`, `fc1.bias`, `fc2.weight` and so on.
#[derive(Clone, Debug)]
pub struct Mlp {
    hidden: Vec<(Linear, Dropout)>,
    output: Linear,
}

impl Mlp {
    /// Creates the layers in `params`.
    pub fn new(options: &MlpOptions, params: &Params) -> Result<Self> {
        positive(&[("inputs", options.inputs), ("outputs", options.outputs)])?;
        let (mut hidden, mut inputs) = (Vec::new(), options.inputs);
        for (index, &width) in options.hidden.iter().enumerate() {
            positive(&[("hidden", width)])?;
            let number = index + 1;
            let linear = Linear::new(&params.scope(&format!("fc{number}")), inputs, width)?
                .with_activation(options.activation);
            let dropout =
                Dropout::new(&params.scope(&format!("dropout{number}")), options.dropout)?;
            hidden.push((linear, dropout));
            inputs = width;
        }
        let output = params.scope(&format!("fc{}", hidden.len() + 1));
        Ok(Self { output: Linear::new(&output, inputs, options.outputs)?, hidden })
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut x = x.clone();
        for (linear, dropout) in &self.hidden {
            x = dropout.forward(&linear.forward(&x, pass)?, pass)?;
        }
        self.output.forward(&x, pass)
    }
}

impl Architecture for MlpOptions {
    fn input_shape(&self) -> Vec<usize> {
        vec![self.inputs]
    }

    fn output_shape(&self) -> Vec<usize> {
        vec![self.outputs]
    }

    fn build(&self, params: &Params) -> Result<Box<dyn Module>> {
        Ok(Box::new(Mlp::new(self, params)?))
    }
}
