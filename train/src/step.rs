//! One step of all ranks: loss and gradients of each one's rows, their sum, the same update
//! everywhere.

use crate::collective::ReduceOp;
use crate::sync::{BatchSum, average_buffers};
use crate::{Error, Result, TrainState, WorkerContext};
use candle_core::{DType, Tensor};
use mobula_core::{Batch, BoxError};
use mobula_nn::{Model, Pass};
use std::sync::Arc;

/// This rank's part of one batch.
struct Part {
    rows: usize,
    /// The place of its first row among those of the step.
    first_row: u64,
    /// What part of the rows of the step it is.
    share: f32,
}

impl WorkerContext<'_> {
    /// One step of all ranks: loss and gradients of this rank's rows, averaged over the rows of
    /// all ranks, then the same update everywhere. Gives the global mean loss.
    ///
    /// `loss` is called with the model and the pass, and gives the mean over this rank's rows. It
    /// is not called on a rank without rows. Buffers, such as the running statistics of a batch
    /// norm, become the means of what the ranks have, weighted by their rows. With a
    /// [`LossScale`](crate::optim::LossScale) a step whose gradients overflow counts as a step and
    /// leaves weights and optimizer as they are.
    pub fn step<E: Into<BoxError>>(
        &mut self,
        state: &mut TrainState,
        batch: &Batch,
        loss: impl FnOnce(&Model, &Pass) -> Result<Tensor, E>,
    ) -> Result<f64> {
        match batch.rows() {
            0 => state.gradients_mut().clear(),
            _ => state.gradients_mut().start(),
        }
        // Disjoint rows for the ranks' random numbers. Where a stream deals rows out in turns
        // these are not the rows' places in the global batch: with dropout, worlds of different
        // sizes draw different masks.
        let first_row = self.shard().rank as u64 * batch.global_rows() as u64;
        let share = batch.rows() as f32 / batch.global_rows().max(1) as f32;
        self.add_batch(state, &Part { rows: batch.rows(), first_row, share }, loss)?;
        self.finish_step(state, batch.global_rows())
    }

    /// One step over several batches, whose gradients are accumulated: the same step as over one
    /// batch with all their rows, in the memory of the largest. Takes the batches in their order,
    /// and gives the mean loss over the rows of all of them on all ranks. A batch norm has the
    /// statistics of each batch by itself.
    ///
    /// `loss` gives the mean over this rank's rows of one batch. The batches of a step must be as
    /// many, and of the same global rows, on all ranks, as those of a stream are.
    pub fn step_accumulated<E: Into<BoxError>>(
        &mut self,
        state: &mut TrainState,
        batches: &[Batch],
        mut loss: impl FnMut(&Model, &Pass, &Batch) -> Result<Tensor, E>,
    ) -> Result<f64> {
        let global_rows: usize = batches.iter().map(Batch::global_rows).sum();
        let mut first_row = self.shard().rank as u64 * global_rows as u64;
        state.gradients_mut().clear();
        for batch in batches {
            let share = batch.rows() as f32 / global_rows.max(1) as f32;
            let part = Part { rows: batch.rows(), first_row, share };
            self.add_batch(state, &part, |model, pass| loss(model, pass, batch))?;
            first_row += batch.rows() as u64;
        }
        self.finish_step(state, global_rows)
    }

    /// One batch on all ranks: this rank's part of the gradients, and the same buffers everywhere.
    fn add_batch<E: Into<BoxError>>(
        &self,
        state: &mut TrainState,
        part: &Part,
        loss: impl FnOnce(&Model, &Pass) -> Result<Tensor, E>,
    ) -> Result<()> {
        match self.sync(part.rows)? {
            None if part.rows == 0 => {}
            None => add_part(state, part, None, loss)?,
            Some(sum) if part.rows == 0 => sum.follow()?,
            Some(sum) => {
                let added = add_part(state, part, Some(&sum), loss);
                sum.first_error().map_or(added, Err)?;
                sum.end()?;
            }
        }
        average_buffers(state.model.params(), part.rows, self.collective.as_ref())
    }

    /// What sums over the ranks within the passes of one batch, if that is asked for.
    fn sync(&self, rows: usize) -> Result<Option<Arc<BatchSum>>> {
        let wanted = self.setup.sync_batch_norm && self.shard().world > 1;
        wanted.then(|| Ok(Arc::new(BatchSum::begin(&self.collective, rows)?))).transpose()
    }

    /// What all ranks do alike once each has the gradients of its rows.
    fn finish_step(&mut self, state: &mut TrainState, global_rows: usize) -> Result<f64> {
        self.collective.all_reduce(state.gradients_mut().as_reduced_mut(), ReduceOp::Sum)?;
        let loss = finite_loss(state)?;
        state.update()?;
        state.count_step();
        self.meter.count(global_rows, loss);
        self.report_progress(state)?;
        Ok(loss)
    }
}

/// Adds loss and gradients of this rank's rows, scaled by their share of all rows.
fn add_part<E: Into<BoxError>>(
    state: &mut TrainState,
    part: &Part,
    sum: Option<&Arc<BatchSum>>,
    loss: impl FnOnce(&Model, &Pass) -> Result<Tensor, E>,
) -> Result<()> {
    let pass = Pass::train(state.seed(), state.step())
        .with_row_offset(part.first_row)
        .with_precision(state.precision());
    let pass = match sum {
        Some(sum) => pass.with_sync(Arc::clone(sum) as _),
        None => pass,
    };
    let loss = loss(&state.model, &pass).map_err(Error::program)?;
    add_backward(&loss, part.share, state)
}

fn add_backward(loss: &Tensor, share: f32, state: &mut TrainState) -> Result<()> {
    if loss.elem_count() != 1 {
        return Err(Error::LossShape { shape: loss.dims().to_vec() });
    }
    // The loss that travels with the gradients is not scaled: the scale must not make it overflow.
    let value = loss.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?[0] * share;
    let scale = f64::from(share) * f64::from(state.loss_scale());
    // The gradients of a loss that is no number are none either; the sum will tell all ranks.
    let gradients = state.gradients_mut();
    let before = gradients.loss();
    gradients.add_backward(loss, scale)?;
    gradients.set_loss(before + value);
    match gradients.missing() {
        missing if missing.is_empty() => Ok(()),
        names => Err(Error::NoGradient { names }),
    }
}

/// After the sum all ranks hold the same bits, so all come to the same conclusion.
fn finite_loss(state: &TrainState) -> Result<f64> {
    match f64::from(state.gradients().loss()) {
        loss if loss.is_finite() => Ok(loss),
        loss => Err(Error::NonFiniteLoss { step: state.step(), loss }),
    }
}
