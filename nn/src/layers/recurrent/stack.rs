//! Layers upon each other, of either kind.

use super::cell::{GruCell, LstmCell};
use super::op::{Direction, Input, Outputs, layer};
use super::{RecurrentOptions, composed};
use crate::cpu::unsupported;
use crate::layers::Dropout;
use crate::{Error, Init, Module, Params, Pass, Result};
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// The kind of the cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Lstm,
    Gru,
}

impl Kind {
    fn gates(self) -> usize {
        match self {
            Self::Lstm => 4,
            Self::Gru => 3,
        }
    }

    /// Tensors of a state: hidden state, memory.
    pub(super) fn states(self) -> usize {
        match self {
            Self::Lstm => 2,
            Self::Gru => 1,
        }
    }
}

/// The parameters of one direction of a layer, with PyTorch's names.
#[derive(Clone, Debug)]
pub(super) struct Weights {
    /// `[gates · hidden, inputs]`.
    pub(super) weight_ih: Tensor,
    /// `[gates · hidden, hidden]`.
    pub(super) weight_hh: Tensor,
    /// `[gates · hidden]`.
    pub(super) bias_ih: Tensor,
    /// `[gates · hidden]`.
    pub(super) bias_hh: Tensor,
}

impl Weights {
    fn new(params: &Params, of: &str, inputs: usize, hidden: usize, kind: Kind) -> Result<Self> {
        let width = kind.gates() * hidden;
        let bound = 1.0 / (hidden as f64).sqrt();
        let init = Init::Uniform { low: -bound, high: bound };
        Ok(Self {
            weight_ih: params.get((width, inputs), &format!("weight_ih_{of}"), init)?,
            weight_hh: params.get((width, hidden), &format!("weight_hh_{of}"), init)?,
            bias_ih: params.get(width, &format!("bias_ih_{of}"), init)?,
            bias_hh: params.get(width, &format!("bias_hh_{of}"), init)?,
        })
    }

    pub(super) fn all(&self) -> [&Tensor; 4] {
        [&self.weight_ih, &self.weight_hh, &self.bias_ih, &self.bias_hh]
    }

    pub(super) fn hidden(&self) -> usize {
        self.weight_hh.dims()[1]
    }
}

/// Recurrent layers, each on the outputs of the one before.
#[derive(Clone, Debug)]
pub(crate) struct Stack {
    kind: Kind,
    inputs: usize,
    hidden: usize,
    /// The directions of each, and the dropout before it.
    layers: Vec<(Vec<Weights>, Option<Dropout>)>,
    name: String,
}

/// What a stack reads.
#[derive(Clone, Copy)]
pub(crate) struct Sequences<'a> {
    /// `[rows, length, inputs]`.
    pub(crate) x: &'a Tensor,
    pub(crate) lengths: Option<&'a [usize]>,
    /// `[layers · directions, rows, hidden]` each; none for zeros.
    pub(crate) state: &'a [&'a Tensor],
    pub(crate) wants_outputs: bool,
}

impl<'a> Sequences<'a> {
    /// All of `x` from zeros, for the outputs.
    pub(crate) fn of(x: &'a Tensor) -> Self {
        Self { x, lengths: None, state: &[], wants_outputs: true }
    }
}

/// Outputs, and the final states `[rows, hidden]` of each layer and direction.
pub(crate) type Read = (Tensor, Vec<Vec<Tensor>>);

impl Stack {
    pub(crate) fn new(
        kind: Kind,
        params: &Params,
        inputs: usize,
        hidden: usize,
        options: RecurrentOptions,
    ) -> Result<Self> {
        let sizes = [("inputs", inputs), ("hidden", hidden), ("layers", options.layers)];
        if let Some((option, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::option(option, 0, "at least 1"));
        }
        let directions: &[&str] = if options.bidirectional { &["", "_reverse"] } else { &[""] };
        let mut layers = Vec::new();
        for index in 0..options.layers {
            let inputs = if index == 0 { inputs } else { directions.len() * hidden };
            let of = |direction| format!("l{index}{direction}");
            let weights = directions
                .iter()
                .map(|direction| Weights::new(params, &of(direction), inputs, hidden, kind))
                .collect::<Result<_>>()?;
            let dropout = Dropout::new(&params.scope(&format!("dropout{index}")), options.dropout)?;
            layers.push((weights, (index > 0).then_some(dropout)));
        }
        Ok(Self { kind, inputs, hidden, layers, name: params.path().to_owned() })
    }

    /// How many directions there are.
    pub(crate) fn directions(&self) -> usize {
        self.layers[0].0.len()
    }

    pub(crate) fn read(&self, sequences: Sequences<'_>, pass: &Pass) -> Result<Read> {
        self.read_by(crate::cpu::has_kernels(sequences.x), sequences, pass)
    }

    fn read_by(&self, is_fused: bool, sequences: Sequences<'_>, pass: &Pass) -> Result<Read> {
        self.check(sequences)?;
        let Sequences { x, lengths, state, wants_outputs } = sequences;
        let lengths = lengths.map(Arc::from);
        let (mut x, mut states) = (x.clone(), Vec::new());
        for (index, (weights, dropout)) in self.layers.iter().enumerate() {
            if let Some(dropout) = dropout {
                x = dropout.forward(&x, pass)?;
            }
            let wants_outputs = wants_outputs || index + 1 < self.layers.len();
            let precision = pass.precision();
            let input = Input { x: &x, lengths: lengths.as_ref(), wants_outputs, precision };
            let direction = |(at, weights)| {
                let place = index * self.directions() + at;
                let initial = state.iter().map(|state| state.get(place));
                Ok(Direction { weights, initial: initial.collect::<Result<_, _>>()? })
            };
            let directions = weights.iter().enumerate().map(direction);
            let directions = directions.collect::<Result<Vec<_>>>()?;
            let read = match is_fused {
                true => self.fused(&input, &directions)?,
                false => composed::layer(self.kind, &input, &directions)?,
            };
            x = read.outputs;
            states.extend(read.states);
        }
        Ok((x, states))
    }

    fn fused(&self, input: &Input<'_>, directions: &[Direction<'_>]) -> Result<Outputs> {
        Ok(match (self.kind, input.x.dtype()) {
            (Kind::Lstm, DType::F32) => layer::<LstmCell, f32>(input, directions)?,
            (Kind::Lstm, DType::F64) => layer::<LstmCell, f64>(input, directions)?,
            (Kind::Gru, DType::F32) => layer::<GruCell, f32>(input, directions)?,
            (Kind::Gru, DType::F64) => layer::<GruCell, f64>(input, directions)?,
            (_, other) => return Err(unsupported(other, "recurrent layer").into()),
        })
    }

    fn check(&self, Sequences { x, lengths, state, .. }: Sequences<'_>) -> Result<()> {
        let [rows, length, inputs] = *x.dims() else {
            return Err(self.input_shape(x));
        };
        if inputs != self.inputs {
            return Err(self.input_shape(x));
        }
        if let Some(lengths) = lengths {
            self.check_lengths(lengths, rows, length)?;
        }
        let expected = [self.layers.len() * self.directions(), rows, self.hidden];
        match state.iter().find(|state| state.dims() != expected) {
            None => Ok(()),
            Some(state) => {
                let what = format!("the initial state of recurrent layer {:?}", self.name);
                Err(Error::shape(what, format!("{expected:?}"), state.dims()))
            }
        }
    }

    fn check_lengths(&self, lengths: &[usize], rows: usize, length: usize) -> Result<()> {
        if lengths.len() != rows {
            let what = format!("the lengths for recurrent layer {:?}", self.name);
            return Err(Error::shape(what, format!("[{rows}], one per row"), &[lengths.len()]));
        }
        match lengths.iter().find(|one| **one > length) {
            None => Ok(()),
            Some(one) => {
                Err(Error::option("lengths", one, format!("at most {length}, the steps of x")))
            }
        }
    }

    fn input_shape(&self, x: &Tensor) -> Error {
        let what = format!("the input of recurrent layer {:?}", self.name);
        Error::shape(what, format!("[rows, length, {}]", self.inputs), x.dims())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use mobula_core::random::Stream;

    const ROWS: usize = 3;
    const LENGTH: usize = 4;

    fn normal(purpose: &str, shape: &[usize]) -> Tensor {
        let mut draws = Stream::new(1, purpose).at(0, 0);
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| draws.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).expect("tensor")
    }

    /// Outputs, states, and the gradients of everything.
    fn all(kind: Kind, is_fused: bool, lengths: Option<&[usize]>) -> Vec<Vec<f64>> {
        let params = Params::with_dtype(3, &Device::Cpu, DType::F64);
        let options = RecurrentOptions { layers: 2, bidirectional: true, dropout: 0.3 };
        let stack = Stack::new(kind, &params, 3, 5, options).expect("stack");
        let unit = Init::Normal { mean: 0.0, std: 1.0 };
        let x = params.get((ROWS, LENGTH, 3), "x", unit).expect("x");
        let state = ["h", "c"].map(|name| params.get((4, ROWS, 5), name, unit).expect("state"));
        let state: Vec<_> = state.iter().take(kind.states()).collect();
        let sequences = Sequences { x: &x, lengths, state: &state, wants_outputs: true };
        let read = stack.read_by(is_fused, sequences, &Pass::train(1, 1)).expect("read");
        let mut results: Vec<Tensor> = read.1.concat();
        results.push(read.0);
        let weigh = |(at, one): (usize, &Tensor)| {
            (one * normal(&format!("weights {at}"), one.dims())).and_then(|one| one.sum_all())
        };
        let terms: Vec<_> =
            results.iter().enumerate().map(|one| weigh(one).expect("term")).collect();
        let loss = Tensor::stack(&terms, 0).and_then(|terms| terms.sum_all()).expect("loss");
        let gradients = loss.backward().expect("backward");
        let vars = params.vars();
        let gradients = vars.iter().filter_map(|(_, var)| gradients.get(var.as_tensor()).cloned());
        results.extend(gradients);
        let flat = |one: Tensor| one.flatten_all().and_then(|one| one.to_vec1()).expect("values");
        results.into_iter().map(flat).collect()
    }

    #[test]
    fn the_operation_and_the_composition_agree() {
        for kind in [Kind::Lstm, Kind::Gru] {
            for lengths in [None, Some([4, 1, 3].as_slice()), Some(&[0, 2, 4])] {
                let (fused, composed) = (all(kind, true, lengths), all(kind, false, lengths));
                // States, outputs, gradients of sixteen weights, of x, of the initial state.
                let count = 4 * kind.states() + 1 + 16 + 1 + kind.states();
                assert_eq!((fused.len(), composed.len()), (count, count));
                for (at, (a, b)) in fused.iter().zip(&composed).enumerate() {
                    assert_eq!(a.len(), b.len());
                    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                    assert!(off < 1e-12, "{kind:?} {lengths:?} {at}: {off:e}");
                }
            }
        }
    }
}
