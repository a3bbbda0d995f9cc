//! Recurrent layers that read a sequence, and a linear one that says what it was.

use super::positive;
use crate::layers::{Dropout, Kind, Linear, RecurrentOptions, Sequences, Stack};
use crate::{Architecture, Module, Params, Pass, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The kind of a recurrent layer's cells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CellKind {
    /// Those of [`layers::Lstm`](crate::layers::Lstm).
    #[default]
    Lstm,
    /// Those of [`layers::Gru`](crate::layers::Gru).
    Gru,
}

/// The options of [`Lstm`]: architecture `"lstm"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LstmOptions {
    /// Features of a step.
    pub inputs: usize,
    /// Steps of a row.
    pub length: usize,
    /// Hidden units of each layer, in each direction.
    pub hidden: usize,
    /// Numbers that come out for a row, such as one logit per class.
    pub outputs: usize,
    /// Recurrent layers, each on the outputs of the one before; 1 unless said otherwise.
    #[serde(default = "one")]
    pub layers: usize,
    /// Whether each layer also reads from the end; `false` unless said otherwise.
    #[serde(default)]
    pub bidirectional: bool,
    /// The rate of dropout after each recurrent layer, in `[0, 1)`.
    #[serde(default)]
    pub dropout: f64,
    /// The kind of the cells; LSTM unless said otherwise.
    #[serde(default)]
    pub cell: CellKind,
}

fn one() -> usize {
    1
}

impl LstmOptions {
    /// These sizes, one LSTM layer, no dropout; change the rest with `..LstmOptions::new(..)`.
    pub fn new(inputs: usize, length: usize, hidden: usize, outputs: usize) -> Self {
        Self {
            inputs,
            length,
            hidden,
            outputs,
            layers: 1,
            bidirectional: false,
            dropout: 0.0,
            cell: CellKind::default(),
        }
    }
}

/// LSTM or GRU layers, and a linear one on what the last of them gives out in the last step of each
/// direction: `[rows, length, inputs]` to `[rows, outputs]`.
///
/// Parameters `rnn.weight_ih_l0` and so on, `fc.weight`, `fc.bias`.
#[derive(Clone, Debug)]
pub struct Lstm {
    layers: Stack,
    dropout: Dropout,
    output: Linear,
}

impl Lstm {
    /// Creates the layers in `params`.
    pub fn new(options: &LstmOptions, params: &Params) -> Result<Self> {
        let LstmOptions { inputs, length, hidden, outputs, dropout, .. } = *options;
        positive(&[("length", length), ("outputs", outputs)])?;
        let kind = match options.cell {
            CellKind::Lstm => Kind::Lstm,
            CellKind::Gru => Kind::Gru,
        };
        let LstmOptions { layers, bidirectional, .. } = *options;
        let recurrent = RecurrentOptions { layers, bidirectional, dropout };
        let layers = Stack::new(kind, &params.scope("rnn"), inputs, hidden, recurrent)?;
        let width = layers.directions() * hidden;
        Ok(Self {
            layers,
            dropout: Dropout::new(&params.scope("dropout"), dropout)?,
            output: Linear::new(&params.scope("fc"), width, outputs)?,
        })
    }
}

impl Module for Lstm {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let sequences = Sequences { wants_outputs: false, ..Sequences::of(x) };
        let (_, states) = self.layers.read(sequences, pass)?;
        let last = &states[states.len() - self.layers.directions()..];
        let last = match last {
            [one] => one[0].clone(),
            both => Tensor::cat(&both.iter().map(|state| &state[0]).collect::<Vec<_>>(), 1)?,
        };
        self.output.forward(&self.dropout.forward(&last, pass)?, pass)
    }
}

impl Architecture for LstmOptions {
    fn input_shape(&self) -> Vec<usize> {
        vec![self.length, self.inputs]
    }

    fn output_shape(&self) -> Vec<usize> {
        vec![self.outputs]
    }

    fn build(&self, params: &Params) -> Result<Box<dyn Module>> {
        Ok(Box::new(Lstm::new(self, params)?))
    }
}
