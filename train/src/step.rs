//! One step of all ranks: loss and gradients of each one's rows, their sum, the same update
//! everywhere.

use crate::buffers::{BufferSums, Buffers};
use crate::optim::add;
use crate::overlap::EarlySums;
use crate::share::Share;
use crate::sync::BatchSum;
use crate::{Error, Result, TrainState, WorkerContext};
use candle_core::{DType, Tensor};
use mobula_core::{Batch, BoxError};
use mobula_nn::{Gradients, Model, Pass, Precision, loss::LossSum};
use std::sync::Arc;

/// What a training function computes of some rows.
#[derive(Clone, Debug)]
pub enum Loss {
    /// The mean over the rows. That of a step is the mean over the rows of all ranks.
    Mean(Tensor),
    /// A sum and its weight, such as the number of tokens that count. That of a step is the sum
    /// over all ranks, divided by the weights of all. Where nothing has a weight, the step has a loss of
    /// 0 and gradients of 0, by which the optimizer updates: weights may still decay.
    Sum(LossSum),
}

impl From<Tensor> for Loss {
    fn from(mean: Tensor) -> Self {
        Self::Mean(mean)
    }
}

impl From<LossSum> for Loss {
    fn from(sum: LossSum) -> Self {
        Self::Sum(sum)
    }
}

/// Some rows of a batch that one pass is over.
struct Part {
    batch: Batch,
    /// The place of its first row among those of the step.
    first_row: u64,
}

/// What the passes of a step have in common.
#[derive(Clone, Copy)]
struct Passes {
    seed: u64,
    step: u64,
    precision: Precision,
    loss_scale: f32,
    /// Rows of the step on all ranks.
    global_rows: usize,
}

/// What is called for each pass.
type LossFn<'a> = dyn FnMut(&Model, &Pass, &Batch) -> Result<Loss> + 'a;

/// What a pass gives to the sums over all ranks.
struct Branch {
    gradients: Gradients,
    buffers: BufferSums,
}

impl WorkerContext<'_> {
    /// One step of all ranks: loss and gradients of this rank's rows, averaged over the rows of
    /// all ranks, then the same update everywhere. Gives the global mean loss.
    ///
    /// `loss` is called with the model, the pass and the rows, and gives the mean over these rows,
    /// or a [`LossSum`] where rows do not count alike. It is called once for each virtual shard of
    /// this rank, with its rows, and not for none. Buffers, such as the running statistics of a batch
    /// norm, become the means of what the ranks have, weighted by their rows. With a
    /// [`LossScale`](crate::optim::LossScale) a step whose gradients overflow counts as a step and
    /// leaves weights and optimizer as they are. With [`LocalSgd`](crate::LocalSgd) the step is over
    /// the rows of this rank alone, and gives their mean loss.
    pub fn step<L: Into<Loss>, E: Into<BoxError>>(
        &mut self,
        state: &mut TrainState,
        batch: &Batch,
        loss: impl FnMut(&Model, &Pass, &Batch) -> Result<L, E>,
    ) -> Result<f64> {
        self.step_accumulated(state, std::slice::from_ref(batch), loss)
    }

    /// One step over several batches, whose gradients are accumulated: the same step as over one
    /// batch with all their rows, in the memory of the largest. Takes the batches in their order,
    /// and gives the mean loss over the rows of all of them on all ranks. A batch norm has the
    /// statistics of each batch by itself.
    ///
    /// The batches of a step must be as many, and of the same global rows, on all ranks, as those of
    /// a stream are.
    pub fn step_accumulated<L: Into<Loss>, E: Into<BoxError>>(
        &mut self,
        state: &mut TrainState,
        batches: &[Batch],
        loss: impl FnMut(&Model, &Pass, &Batch) -> Result<L, E>,
    ) -> Result<f64> {
        self.step_with(state, batches, loss, |_, _| Ok(()))
    }

    /// The same, of which `hears` hears before it is remembered and saved.
    pub(crate) fn step_with<L: Into<Loss>, E: Into<BoxError>>(
        &mut self,
        state: &mut TrainState,
        batches: &[Batch],
        mut loss: impl FnMut(&Model, &Pass, &Batch) -> Result<L, E>,
        hears: impl FnOnce(&mut TrainState, f64) -> Result<()>,
    ) -> Result<f64> {
        let mut loss = |model: &Model, pass: &Pass, batch: &Batch| {
            loss(model, pass, batch).map(Into::into).map_err(Error::program)
        };
        self.before_step()?;
        self.prepare(state)?;
        let passes = state.passes(batches.iter().map(Batch::global_rows).sum());
        let shards = self.shards(batches, passes.global_rows)?;
        let before = match state.may_skip() {
            true => Some(Buffers::of(state.model.params())?),
            false => None,
        };
        let mut early = self.early_sums.take();
        let added = match self.setup.virtual_shards {
            None => self.add_batches(state, &passes, &shards[0], early.as_mut(), &mut loss),
            Some(_) => self.add_shards(state, &passes, &shards, &mut loss),
        };
        if let Some(early) = early.as_mut().filter(|_| added.is_err()) {
            early.reset(&mut state.gradients);
        }
        self.early_sums = early;
        added?;
        let position = batches.last().and_then(Batch::position).cloned();
        let done = self.finish_step(state, passes.global_rows, before.as_ref())?;
        state.count_step(position);
        hears(state, done.loss)?;
        if done.is_taken {
            self.gather(state)?;
        }
        self.synchronise_if_due(state)?;
        self.after_step(state)?;
        Ok(done.loss)
    }

    /// The rows of each pass, by shard of this rank and by batch.
    fn shards(&self, batches: &[Batch], global_rows: usize) -> Result<Vec<Vec<Part>>> {
        let own = self.own_shards();
        let mut shards: Vec<Vec<Part>> = own.clone().map(|_| Vec::new()).collect();
        // Disjoint rows for the random numbers of all shards. Where a stream deals rows out in turns
        // these are not the rows' places in the global batch: with dropout, worlds of different sizes
        // draw different masks.
        let mut first_rows: Vec<_> = own.map(|shard| (shard * global_rows) as u64).collect();
        for batch in batches {
            let parts = match self.setup.virtual_shards {
                None => vec![batch.clone()],
                Some(_) if batch.is_in_parts() => batch.parts()?,
                Some(virtual_shards) => return Err(Error::NotInShards { virtual_shards }),
            };
            for ((shard, first_row), batch) in shards.iter_mut().zip(&mut first_rows).zip(parts) {
                let rows = batch.rows() as u64;
                shard.push(Part { batch, first_row: *first_row });
                *first_row += rows;
            }
        }
        Ok(shards)
    }

    /// This rank's part of the gradients, and after each batch the same buffers everywhere.
    fn add_batches(
        &self,
        state: &mut TrainState,
        passes: &Passes,
        parts: &[Part],
        mut early: Option<&mut EarlySums>,
        loss: &mut LossFn<'_>,
    ) -> Result<()> {
        let TrainState { model, gradients, .. } = state;
        start(gradients, parts);
        for (at, part) in parts.iter().enumerate() {
            let rows = part.batch.rows();
            let mut early = early.as_mut().filter(|_| at + 1 == parts.len());
            if let Some(early) = &mut early {
                early.begin(gradients);
            }
            match self.sync(rows)? {
                None if rows == 0 => {}
                None => passes.add(model, gradients, part, None, loss)?,
                Some(sum) if rows == 0 => sum.follow()?,
                Some(sum) => {
                    let added = passes.add(model, gradients, part, Some(&sum), loss);
                    sum.first_error().map_or(added, Err)?;
                    sum.end()?;
                }
            }
            if let Some(early) = early {
                self.meter.waiting(|| early.finish(gradients))?;
            }
            if self.shard().world > 1 && self.setup.local_sgd.is_none() {
                let sums = BufferSums::of(model.params(), rows)?;
                sums.average(model.params(), self.collective())?;
            }
        }
        Ok(())
    }

    /// The same for the virtual shards of this rank, which are added up two by two. Each has its
    /// buffers to itself until the end of the step.
    fn add_shards(
        &self,
        state: &mut TrainState,
        passes: &Passes,
        shards: &[Vec<Part>],
        loss: &mut LossFn<'_>,
    ) -> Result<()> {
        let before = Buffers::of(state.model.params())?;
        let Branch { mut gradients, buffers } = passes.branch(state, shards, &before, loss)?;
        std::mem::swap(&mut state.gradients, &mut gradients);
        state.spare.push(gradients);
        buffers.average(state.model.params(), self.collective())
    }

    /// What sums over the ranks within the passes of one batch, if that is asked for.
    fn sync(&self, rows: usize) -> Result<Option<Arc<BatchSum>>> {
        let wanted = self.setup.sync_batch_norm && self.shard().world > 1;
        wanted.then(|| Ok(Arc::new(BatchSum::begin(&self.collective, rows)?))).transpose()
    }

    /// Sums gradients, loss and weight over all ranks, as far as that is not done.
    fn reduce(&mut self, state: &mut TrainState) -> Result<()> {
        if state.outer.is_some() {
            return state.part();
        }
        if let Some(sums) = &mut self.device_sums {
            sums.meet(self.collective.as_ref(), &mut state.gradients)?;
            self.meter.waiting(|| sums.sum(&mut state.gradients))?;
            return state.bring_gradients();
        }
        if state.gradients.elsewhere().is_some() {
            return Ok(());
        }
        let len = state.gradients.values().len();
        match (state.updater.shared(), &self.early_sums) {
            (Some(share), _) => share.reduce(&mut state.gradients),
            (None, early) => {
                let done = if early.is_some() { len } else { 0 };
                // Loss and weight are never rounded: a number of tokens is no gradient.
                let exact = state.gradients.as_reduced().len() - len;
                let rest = &mut state.gradients.as_reduced_mut()[done..];
                self.collective.sum_gradients(rest, exact)
            }
        }
    }

    /// What all ranks do alike once each has the gradients of its rows.
    fn finish_step(
        &mut self,
        state: &mut TrainState,
        global_rows: usize,
        before: Option<&Buffers>,
    ) -> Result<Done> {
        self.reduce(state)?;
        if self.setup.elsewhere {
            state.send_gradients()?;
        }
        let rescale = rescale(&state.gradients, global_rows);
        // After the sum all ranks hold the same bits, so all come to the same conclusion.
        let loss = f64::from(state.gradients.loss() * rescale);
        state.gradients.set_loss(loss as f32);
        let weight = state.gradients.weight().into();
        let checked = match check(state, loss, rescale) {
            Err(error) if !error.is_of_numbers() => return Err(error),
            checked => checked,
        };
        let is_taken = matches!(checked, Ok(true));
        self.commit(state, is_taken)?;
        if let Some(before) = before.filter(|_| !is_taken) {
            before.put_back(state.model.params())?;
        }
        if is_taken {
            state.end_skips();
            self.before_update(state);
            state.update()?;
        } else {
            state.count_unchanged();
        }
        match checked {
            Ok(_) => {
                self.meter.count(&mut state.tally, global_rows, weight, loss);
            }
            Err(error) => self.leave_out_or_roll_back(state, error)?,
        }
        Ok(Done { loss, is_taken })
    }

    /// All ranks have what they need to take the step, and know whether they do. Only then does one begin:
    /// where parts of the optimizer's state are to survive a loss, those of all ranks have to be of the
    /// same step, and who has not heard of the others can take it later.
    fn commit(&mut self, state: &mut TrainState, is_taken: bool) -> Result<()> {
        if !state.updater.shared().is_some_and(Share::is_mirrored) {
            return Ok(());
        }
        let met = self.collective().barrier();
        if let Some(keeper) = self.keeper().filter(|_| met.is_err()) {
            keeper.keep_gradients(state, is_taken);
        }
        met
    }

    /// Gives and takes weights, where each rank has updated some, and has averages take them in.
    fn gather(&mut self, state: &mut TrainState) -> Result<()> {
        if state.updater.shared().is_some_and(Share::is_mirrored) {
            if let Some(keeper) = self.keeper() {
                keeper.remember_part(state)?;
            }
            state.updater.gather(state.model.params(), &mut state.gradients)?;
            self.before_update(state);
        } else {
            state.updater.gather(state.model.params(), &mut state.gradients)?;
        }
        state.updater.average_in(state.model.params())
    }
}

/// What a step has come to.
struct Done {
    loss: f64,
    is_taken: bool,
}

/// Whether the step is not to be left out.
fn check(state: &mut TrainState, loss: f64, rescale: f32) -> Result<bool> {
    match loss.is_finite() {
        true => state.check(rescale),
        false => Err(Error::NonFiniteLoss { step: state.step(), loss }),
    }
}

impl TrainState {
    fn passes(&self, global_rows: usize) -> Passes {
        let (seed, step, precision) = (self.seed(), self.step(), self.precision());
        Passes { seed, step, precision, loss_scale: self.loss_scale(), global_rows }
    }
}

impl Passes {
    /// Neighbouring shards in a tree: two halves, each of which is one. What the ranks have are
    /// branches of one tree, so the order of additions does not depend on their number.
    fn branch(
        &self,
        state: &mut TrainState,
        shards: &[Vec<Part>],
        before: &Buffers,
        loss: &mut LossFn<'_>,
    ) -> Result<Branch> {
        if let [parts] = shards {
            return self.leaf(state, parts, before, loss);
        }
        let (low, high) = shards.split_at(shards.len() / 2);
        let mut sum = self.branch(state, low, before, loss)?;
        let other = self.branch(state, high, before, loss)?;
        add(sum.gradients.as_reduced_mut(), other.gradients.as_reduced());
        sum.buffers.add(&other.buffers);
        state.spare.push(other.gradients);
        Ok(sum)
    }

    /// One shard, from the buffers that all shards have.
    fn leaf(
        &self,
        state: &mut TrainState,
        parts: &[Part],
        before: &Buffers,
        loss: &mut LossFn<'_>,
    ) -> Result<Branch> {
        let model = &state.model;
        let spare = state.spare.pop();
        let mut gradients = spare.unwrap_or_else(|| Gradients::zeros(model.params()));
        before.put_back(model.params())?;
        start(&mut gradients, parts);
        for part in parts.iter().filter(|part| part.batch.rows() > 0) {
            self.add(model, &mut gradients, part, None, loss)?;
        }
        let rows = parts.iter().map(|part| part.batch.rows()).sum();
        Ok(Branch { gradients, buffers: BufferSums::of(model.params(), rows)? })
    }

    /// Adds loss and gradients of some rows, divided by the rows of the step.
    fn add(
        &self,
        model: &Model,
        gradients: &mut Gradients,
        part: &Part,
        sum: Option<&Arc<BatchSum>>,
        loss: &mut LossFn<'_>,
    ) -> Result<()> {
        let pass = Pass::train(self.seed, self.step)
            .with_row_offset(part.first_row)
            .with_precision(self.precision);
        let pass = match sum {
            Some(sum) => pass.with_sync(Arc::clone(sum) as _),
            None => pass,
        };
        let rows = part.batch.rows() as f64;
        let (value, factor, weight) = match loss(model, &pass, &part.batch)? {
            Loss::Mean(mean) => (mean, rows, rows),
            Loss::Sum(LossSum { sum, weight }) => (sum, 1.0, weight),
        };
        self.add_backward(gradients, &value, factor / self.global_rows.max(1) as f64, weight)
    }

    fn add_backward(
        &self,
        gradients: &mut Gradients,
        loss: &Tensor,
        share: f64,
        weight: f64,
    ) -> Result<()> {
        if loss.elem_count() != 1 {
            return Err(Error::LossShape { shape: loss.dims().to_vec() });
        }
        // The loss that travels with the gradients is not scaled: the scale must not make it overflow.
        let value = loss.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?[0];
        let (before, weight_before) = (gradients.loss(), gradients.weight());
        // The gradients of a loss that is no number are none either; the sum will tell all ranks.
        gradients.add_backward(loss, share * f64::from(self.loss_scale))?;
        gradients.set_loss(before + value * share as f32);
        gradients.set_weight(weight_before + weight as f32);
        match gradients.missing() {
            missing if missing.is_empty() => Ok(()),
            names => Err(Error::NoGradient { names }),
        }
    }
}

/// Has the first pass overwrite them, where there is one: cheaper than zeros.
fn start(gradients: &mut Gradients, parts: &[Part]) {
    // That of a step that has failed.
    gradients.set_listener(None);
    match parts.first() {
        Some(part) if part.batch.rows() > 0 => gradients.start(),
        _ => gradients.clear(),
    }
}

/// Of a sum over all ranks that is divided by the rows of the step: what makes it one that is divided
/// by the weights. 1 where rows are the weights, and where nothing has a weight: then all of it is zero.
fn rescale(gradients: &Gradients, global_rows: usize) -> f32 {
    match f64::from(gradients.weight()) {
        weight if weight > 0.0 => (global_rows as f64 / weight) as f32,
        _ => 1.0,
    }
}
