//! The same layers in candle's own operations, for devices that this crate has no kernel for.

use super::op::{Direction, Input, Outputs};
use super::{Kind, Weights};
use crate::Precision;
use crate::cpu::matmul;
use crate::layers::Activation;
use candle_core::{Result, Tensor};

/// As [`layer`](super::op::layer).
pub(super) fn layer(
    kind: Kind,
    input: &Input<'_>,
    directions: &[Direction<'_>],
) -> Result<Outputs> {
    let runs = directions.iter().enumerate();
    let runs = runs.map(|(at, one)| direction(kind, input, one, at == 1));
    let (outputs, states): (Vec<_>, Vec<_>) = runs.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let outputs = Tensor::cat(&outputs, 2)?;
    let outputs = if input.wants_outputs { outputs } else { outputs.narrow(1, 0, 0)? };
    Ok(Outputs { outputs, states })
}

fn direction(
    kind: Kind,
    Input { x, lengths, precision, .. }: &Input<'_>,
    Direction { weights, initial }: &Direction<'_>,
    is_reverse: bool,
) -> Result<(Tensor, Vec<Tensor>)> {
    let (rows, length, inputs) = x.dims3()?;
    let zeros = || Tensor::zeros((rows, weights.hidden()), x.dtype(), x.device());
    let mut state = initial.clone();
    while state.len() < kind.states() {
        state.push(zeros()?);
    }
    let x = x.reshape((rows * length, inputs))?;
    let projected = matmul(&x, &weights.weight_ih.t()?, *precision)?;
    let projected = projected.broadcast_add(&weights.bias_ih)?.reshape((rows, length, ()))?;
    let mut outputs = vec![zeros()?; length];
    for step in 0..length {
        let place = if is_reverse { length - 1 - step } else { step };
        let x = projected.narrow(1, place, 1)?.squeeze(1)?;
        let next = next(kind, &x, &state, weights, *precision)?;
        (outputs[place], state) = match lengths {
            None => (next[0].clone(), next),
            Some(lengths) => {
                let live = lengths.iter().map(|length| f64::from(u8::from(place < *length)));
                let live = Tensor::from_iter(live, x.device())?.to_dtype(x.dtype())?;
                stopped(&live.reshape((rows, 1))?, &state, next)?
            }
        };
    }
    let outputs = match length {
        0 => Tensor::zeros((rows, 0, weights.hidden()), x.dtype(), x.device())?,
        _ => Tensor::stack(&outputs, 1)?,
    };
    Ok((outputs, state))
}

/// The output and the state where rows that have ended stay as they are.
fn stopped(live: &Tensor, before: &[Tensor], next: Vec<Tensor>) -> Result<(Tensor, Vec<Tensor>)> {
    let output = next[0].broadcast_mul(live)?;
    let state = before
        .iter()
        .zip(next)
        .map(|(before, next)| before + (next - before)?.broadcast_mul(live)?);
    Ok((output, state.collect::<Result<_>>()?))
}

/// The state after a step whose input gives `x` to the gates.
fn next(
    kind: Kind,
    x: &Tensor,
    state: &[Tensor],
    weights: &Weights,
    precision: Precision,
) -> Result<Vec<Tensor>> {
    let hidden = matmul(&state[0], &weights.weight_hh.t()?, precision)?;
    let hidden = hidden.broadcast_add(&weights.bias_hh)?;
    let sigmoid = |x: &Tensor| Activation::Sigmoid.composed(x);
    match kind {
        Kind::Lstm => {
            let gates = (x + hidden)?.chunk(4, 1)?;
            let (i, f, o) = (sigmoid(&gates[0])?, sigmoid(&gates[1])?, sigmoid(&gates[3])?);
            let c = ((f * &state[1])? + (i * gates[2].tanh()?)?)?;
            Ok(vec![(o * c.tanh()?)?, c])
        }
        Kind::Gru => {
            let (x, hidden) = (x.chunk(3, 1)?, hidden.chunk(3, 1)?);
            let r = sigmoid(&(&x[0] + &hidden[0])?)?;
            let z = sigmoid(&(&x[1] + &hidden[1])?)?;
            let n = (&x[2] + (r * &hidden[2])?)?.tanh()?;
            Ok(vec![(&n + (z * (&state[0] - &n)?)?)?])
        }
    }
}
