//! Workers that train by themselves and meet now and then: local SGD (Stich 2019, arXiv 1805.09767) and
//! DiLoCo (Douillard et al. 2023, arXiv 2311.08105).
//!
//! When they meet, the way from where they parted to the mean of where they are is the gradient of
//! an outer optimizer. What the inner optimizers remember is averaged too, which DiLoCo does not do: so all
//! ranks are the same then, and a checkpoint is that of any of them.

use crate::buffers::BufferSums;
use crate::collective::{Collective, ReduceOp};
use crate::optim::{
    Optimizer, OptimizerSpec, OptimizerState, SgdOptions, in_place, read, update_by,
};
use crate::state::{EpochTally, TrainState};
use crate::{Error, Result, WorkerContext};
use mobula_nn::{Gradients, Params};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

pub(crate) const OUTER: &str = "outer.safetensors";

/// Workers that take steps of their own and meet every so many.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalSgd {
    /// Global steps between two meetings, at least 1. At the end of an epoch, and before a validation of
    /// a [`TrainLoop`](crate::TrainLoop), they meet in any case.
    pub every_steps: u64,
    /// What takes the mean of their ways as its gradient.
    pub outer: OptimizerSpec,
}

impl LocalSgd {
    /// All go on from the mean of their weights.
    pub fn average(every_steps: u64) -> Self {
        let sgd = SgdOptions { lr: 1.0, ..SgdOptions::default() };
        Self { every_steps, outer: OptimizerSpec::Sgd(sgd) }
    }

    /// DiLoCo's outer optimizer: SGD with a learning rate of 0.7 and a Nesterov momentum of 0.9.
    pub fn diloco(every_steps: u64) -> Self {
        let sgd = SgdOptions { lr: 0.7, momentum: 0.9, nesterov: true, ..SgdOptions::default() };
        Self { every_steps, outer: OptimizerSpec::Sgd(sgd) }
    }
}

/// What a rank has of it.
#[derive(Debug)]
pub(crate) struct Outer {
    every_steps: u64,
    optimizer: Box<dyn Optimizer>,
    /// Shared while it is copied.
    state: Arc<OptimizerState>,
    /// Where the ranks have parted, and what had been counted until then; `None` while all are the same.
    parted: Option<(Vec<f32>, EpochTally)>,
    /// The memory of the meeting before.
    spare: Vec<f32>,
}

impl Outer {
    fn new(options: &LocalSgd, params: &Params) -> Result<Self> {
        let (every_steps, optimizer) = (options.every_steps, options.outer.build()?);
        let state = Arc::new(optimizer.init(params)?);
        Ok(Self { every_steps, optimizer, state, parted: None, spare: Vec::new() })
    }

    pub(crate) fn optimizer(&self) -> &dyn Optimizer {
        self.optimizer.as_ref()
    }

    pub(crate) fn state(&self) -> Arc<OptimizerState> {
        Arc::clone(&self.state)
    }

    /// Goes on from what a checkpoint has of it: nothing, if that run had none.
    pub(crate) fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(OUTER);
        match path.exists() {
            true => Arc::make_mut(&mut self.state).load(self.optimizer.as_ref(), &path),
            false => Ok(()),
        }
    }

    fn part(&mut self, params: &Params, tally: &EpochTally) -> Result<()> {
        if self.parted.is_some() {
            return Ok(());
        }
        let mut weights = std::mem::take(&mut self.spare);
        weights.clear();
        for (_, var) in params.vars() {
            read(&var, |values| {
                weights.extend_from_slice(values);
                Ok(())
            })?;
        }
        self.parted = Some((weights, tally.clone()));
        Ok(())
    }

    /// Takes a step of the outer optimizer from where the ranks had parted. Their gradients lend their memory.
    fn meet(
        &mut self,
        params: &Params,
        inner: &dyn Optimizer,
        gradients: &mut Gradients,
        start: &[f32],
        collective: &dyn Collective,
    ) -> Result<()> {
        let places: Vec<_> = gradients.places().iter().map(|(_, range)| range.clone()).collect();
        let vars = params.vars();
        let ways = gradients.values_mut();
        for ((_, var), place) in vars.iter().zip(&places) {
            in_place(var, |weights| {
                ways[place.clone()].copy_from_slice(weights);
                weights.copy_from_slice(&start[place.clone()]);
                Ok(())
            })?;
        }
        collective.all_reduce(ways, ReduceOp::Mean)?;
        ways.iter_mut().zip(start).for_each(|(way, start)| *way = start - *way);
        let state = Arc::make_mut(&mut self.state);
        state.lr = self.optimizer.lr();
        let outer = self.optimizer.as_ref();
        // What the inner one leaves alone stays what it is: a mean of equal numbers may be another.
        update_by(outer, params, gradients, state, &|name, shape| {
            inner.param_options(name, shape)?;
            outer.param_options(name, shape)
        })
    }
}

impl TrainState {
    /// Whether all ranks have the same weights: always, but between the meetings of [`LocalSgd`].
    pub fn is_synchronised(&self) -> bool {
        self.outer.as_ref().is_none_or(|outer| outer.parted.is_none())
    }

    /// Errors when what it is set to does not go with ranks that take steps of their own.
    pub(crate) fn add_outer(&mut self, options: &LocalSgd) -> Result<()> {
        if self.may_skip() {
            let (option, got) = ("local_sgd", "some".to_owned());
            let expected = "none where steps may be left out: with a scaled loss, `NonFinite::Skip` or `RollBack`";
            return Err(Error::Option { option, got, expected });
        }
        self.outer = Some(Outer::new(options, self.model.params())?);
        Ok(())
    }

    /// This rank takes a step of its own.
    pub(crate) fn part(&mut self) -> Result<()> {
        let (params, tally) = (self.model.params(), &self.tally);
        self.outer.as_mut().map_or(Ok(()), |outer| outer.part(params, tally))
    }

    fn meet(&mut self, collective: &dyn Collective) -> Result<()> {
        let Some(outer) = &mut self.outer else {
            return Ok(());
        };
        let Some((start, counted)) = outer.parted.take() else {
            return Ok(());
        };
        let params = self.model.params();
        self.updater.average(collective)?;
        let inner = self.updater.optimizer();
        outer.meet(params, inner, &mut self.gradients, &start, collective)?;
        outer.spare = start;
        BufferSums::of(params, 1)?.average(params, collective)?;
        let weight = self.tally.weight - counted.weight;
        let mut sums = [weight, self.tally.weighted_loss - counted.weighted_loss];
        collective.all_reduce(&mut sums, ReduceOp::Sum)?;
        self.tally.weight = counted.weight + sums[0];
        self.tally.weighted_loss = counted.weighted_loss + sums[1];
        Ok(())
    }

    fn meeting_is_due(&self) -> bool {
        self.outer.as_ref().is_some_and(|outer| self.step().is_multiple_of(outer.every_steps))
    }
}

impl WorkerContext<'_> {
    /// Has workers that take steps of their own meet now, see [`LocalSgd`]: before a validation, say.
    /// All ranks must call it alike. Does nothing where they are the same.
    pub fn synchronise(&mut self, state: &mut TrainState) -> Result<()> {
        if state.is_synchronised() {
            return Ok(());
        }
        // The weights are about to change.
        self.before_update(state);
        state.meet(self.collective.as_ref())
    }

    /// A step is counted.
    pub(crate) fn synchronise_if_due(&mut self, state: &mut TrainState) -> Result<()> {
        if state.meeting_is_due() { self.synchronise(state) } else { Ok(()) }
    }
}
