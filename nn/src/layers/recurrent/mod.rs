//! Recurrent layers.

mod cell;
mod composed;
mod op;
mod stack;
mod steps;

pub(crate) use stack::{Kind, Sequences, Stack};

use crate::{Module, Params, Pass, Result};
use candle_core::Tensor;
use stack::Weights;

/// Options of [`Lstm`] and [`Gru`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RecurrentOptions {
    /// Layers, each on the outputs of the one before; 1 unless said otherwise.
    pub layers: usize,
    /// Whether each layer also reads from the end, with other weights; its outputs stand behind
    /// those of the first direction. `false` unless said otherwise.
    pub bidirectional: bool,
    /// The rate of dropout between layers, in `[0, 1)`; 0 unless said otherwise.
    pub dropout: f64,
}

impl Default for RecurrentOptions {
    fn default() -> Self {
        Self { layers: 1, bidirectional: false, dropout: 0.0 }
    }
}

/// Long short-term memory, as PyTorch's `nn.LSTM` with `batch_first`: `[rows, length, inputs]` to
/// `[rows, length, directions · hidden]`.
///
/// Parameters `weight_ih_l0 [4 · hidden, inputs]`, `weight_hh_l0 [4 · hidden, hidden]`,
/// `bias_ih_l0` and `bias_hh_l0 [4 · hidden]` and so on for each layer, with `_reverse` behind them
/// for the second direction; gates in the order input, forget, candidate, output; all uniform
/// within ±1/√hidden.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mobula_nn::layers::{Lstm, RecurrentOptions};
/// use mobula_nn::{Params, Pass};
///
/// let lstm = Lstm::new(&Params::new(7, &Device::Cpu), 3, 8, RecurrentOptions::default())?;
/// let x = Tensor::zeros((2, 5, 3), DType::F32, &Device::Cpu)?;
/// // The second row ends after two steps.
/// let (y, state) = lstm.forward_from(&x, Some(&[5, 2]), None, &Pass::eval())?;
/// assert_eq!(y.dims(), [2, 5, 8]);
/// assert_eq!(state.cell.dims(), [1, 2, 8]);
/// # Ok::<(), mobula_nn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lstm(Stack);

/// The state of an [`Lstm`] between steps: for each layer, and each direction of it,
/// `[layers · directions, rows, hidden]`.
#[derive(Clone, Debug)]
pub struct LstmState {
    /// What the last step gave out.
    pub hidden: Tensor,
    /// What the cells remember.
    pub cell: Tensor,
}

impl Lstm {
    /// Creates the parameters in `params`. Errors for sizes of 0, or a rate out of `[0, 1)`.
    pub fn new(
        params: &Params,
        inputs: usize,
        hidden: usize,
        options: RecurrentOptions,
    ) -> Result<Self> {
        Ok(Self(Stack::new(Kind::Lstm, params, inputs, hidden, options)?))
    }

    /// The outputs of all steps and the state after the last one, from `state` or from zeros.
    ///
    /// With `lengths`, one per row, a row is over after that many steps: its outputs from there on
    /// are 0, its final state is that of its own end, and the second direction begins there, as
    /// with PyTorch's packed sequences. They may come in any order, and be 0.
    pub fn forward_from(
        &self,
        x: &Tensor,
        lengths: Option<&[usize]>,
        state: Option<&LstmState>,
        pass: &Pass,
    ) -> Result<(Tensor, LstmState)> {
        let state: Vec<_> = state.iter().flat_map(|state| [&state.hidden, &state.cell]).collect();
        let sequences = Sequences { x, lengths, state: &state, wants_outputs: true };
        let (outputs, states) = self.0.read(sequences, pass)?;
        let state = LstmState { hidden: stacked(&states, 0)?, cell: stacked(&states, 1)? };
        Ok((outputs, state))
    }
}

impl Module for Lstm {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        Ok(self.0.read(Sequences::of(x), pass)?.0)
    }
}

/// Gated recurrent units, as PyTorch's `nn.GRU` with `batch_first`: `[rows, length, inputs]` to
/// `[rows, length, directions · hidden]`.
///
/// Parameters as [`Lstm`]'s, but of three gates, in the order reset, update, candidate.
#[derive(Clone, Debug)]
pub struct Gru(Stack);

impl Gru {
    /// Creates the parameters in `params`. Errors for sizes of 0, or a rate out of `[0, 1)`.
    pub fn new(
        params: &Params,
        inputs: usize,
        hidden: usize,
        options: RecurrentOptions,
    ) -> Result<Self> {
        Ok(Self(Stack::new(Kind::Gru, params, inputs, hidden, options)?))
    }

    /// The outputs of all steps and the hidden state `[layers · directions, rows, hidden]` after the
    /// last one, from `state` or from zeros; `lengths` as for [`Lstm::forward_from`].
    pub fn forward_from(
        &self,
        x: &Tensor,
        lengths: Option<&[usize]>,
        state: Option<&Tensor>,
        pass: &Pass,
    ) -> Result<(Tensor, Tensor)> {
        let state: Vec<_> = state.into_iter().collect();
        let sequences = Sequences { x, lengths, state: &state, wants_outputs: true };
        let (outputs, states) = self.0.read(sequences, pass)?;
        Ok((outputs, stacked(&states, 0)?))
    }
}

impl Module for Gru {
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        Ok(self.0.read(Sequences::of(x), pass)?.0)
    }
}

/// A part of all final states: `[layers · directions, rows, hidden]`.
fn stacked(states: &[Vec<Tensor>], part: usize) -> Result<Tensor> {
    let states: Vec<_> = states.iter().map(|state| &state[part]).collect();
    Ok(Tensor::stack(&states, 0)?)
}
