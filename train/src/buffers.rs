//! Buffers, such as the running statistics of batch norms: after a batch all ranks have the same,
//! the means of what each part of the batch made of them, weighted by its rows.

use crate::Result;
use crate::collective::{Collective, ReduceOp};
use candle_core::{DType, Tensor, Var};
use mobula_nn::Params;

/// How many rows there are, and the sums over them. In `f64`, so that what is the same on all ranks
/// stays as it is. Empty where there are no buffers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct BufferSums(Vec<f64>);

impl BufferSums {
    /// What a pass over so many rows has left.
    pub(crate) fn of(params: &Params, rows: usize) -> Result<Self> {
        let buffers = params.buffers();
        if buffers.is_empty() {
            return Ok(Self::default());
        }
        let rows = rows as f64;
        let mut sums = vec![rows];
        for (_, buffer) in &buffers {
            let values = buffer.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            sums.extend(values.into_iter().map(|value| value * rows));
        }
        Ok(Self(sums))
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(sum, other)| *sum += other);
    }

    /// Sets the buffers to the means over all ranks.
    pub(crate) fn average(mut self, params: &Params, collective: &dyn Collective) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        collective.all_reduce(&mut self.0, ReduceOp::Sum)?;
        let (all_rows, mut sums) = (self.0[0], &self.0[1..]);
        if all_rows == 0.0 {
            return Ok(());
        }
        for (_, buffer) in params.buffers() {
            let (own, rest) = sums.split_at(buffer.elem_count());
            set(&buffer, own.iter().map(|sum| sum / all_rows).collect())?;
            sums = rest;
        }
        Ok(())
    }
}

fn set(buffer: &Var, values: Vec<f64>) -> Result<()> {
    let values = Tensor::from_vec(values, buffer.shape(), buffer.device())?;
    Ok(buffer.set(&values.to_dtype(buffer.dtype())?)?)
}

/// Buffers as they were.
#[derive(Debug)]
pub(crate) struct Buffers(Vec<Tensor>);

impl Buffers {
    pub(crate) fn of(params: &Params) -> Result<Self> {
        let copies =
            params.buffers().into_iter().map(|(_, buffer)| buffer.as_detached_tensor().copy());
        Ok(Self(copies.collect::<candle_core::Result<_>>()?))
    }

    pub(crate) fn put_back(&self, params: &Params) -> Result<()> {
        for ((_, buffer), before) in params.buffers().iter().zip(&self.0) {
            buffer.set(before)?;
        }
        Ok(())
    }
}
