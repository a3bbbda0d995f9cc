//! A ready-made loop, for those who need none of their own.

mod callback;

pub use callback::{Callback, EarlyStopping, StepReport, TimeBudget};

use crate::optim::Mode;
use crate::{Error, Loss, Result, TrainState, WorkerContext};
use mobula_core::{Batch, BatchStream, BoxError, Flow};
use mobula_nn::{Model, Pass};
use std::collections::{BTreeMap, BTreeSet};

/// Trains for all epochs of a state: steps, validation, epochs, and checkpoints when they are due.
/// [`Callback`]s hear of each step and epoch, and may end the training. The
/// guide to training, `docs/guides/train.md`, has an example.
pub struct TrainLoop<'a> {
    loss: Box<LossFn<'a>>,
    validation: Option<Validation<'a>>,
    every_steps: Option<u64>,
    /// Whether the averages of the weights are what is validated.
    of_averages: bool,
    callbacks: Vec<Box<dyn Callback + 'a>>,
    /// A callback of this rank has enough.
    stop: bool,
}

type LossFn<'a> = dyn FnMut(&Model, &Pass, &Batch) -> Result<Loss, BoxError> + 'a;
type TotalsFn<'a> = dyn FnMut(&Model, &Batch) -> Result<Vec<f64>, BoxError> + 'a;

struct Validation<'a> {
    stream: Box<dyn BatchStream>,
    names: Vec<String>,
    totals: Box<TotalsFn<'a>>,
}

impl std::fmt::Debug for TrainLoop<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let callbacks: Vec<_> = self.callbacks.iter().map(|callback| callback.name()).collect();
        f.debug_struct("TrainLoop").field("callbacks", &callbacks).finish_non_exhaustive()
    }
}

impl<'a> TrainLoop<'a> {
    /// Steps with this loss, as those of [`WorkerContext::step`].
    pub fn new<L: Into<Loss>, E: Into<BoxError>>(
        mut loss: impl FnMut(&Model, &Pass, &Batch) -> Result<L, E> + 'a,
    ) -> Self {
        let loss = move |model: &Model, pass: &Pass, batch: &Batch| {
            loss(model, pass, batch).map(Into::into).map_err(Into::into)
        };
        Self {
            loss: Box::new(loss),
            validation: None,
            every_steps: None,
            of_averages: false,
            callbacks: Vec::new(),
            stop: false,
        }
    }

    /// Validates on one epoch of `stream` after each epoch: the mean over all rows of each of the
    /// metrics, of which `totals` gives the sums over the rows of a batch, such as the number of
    /// correct ones.
    pub fn with_validation<const N: usize, E: Into<BoxError>>(
        self,
        stream: Box<dyn BatchStream>,
        metrics: [&str; N],
        mut totals: impl FnMut(&Model, &Batch) -> Result<[f64; N], E> + 'a,
    ) -> Self {
        let totals = move |model: &Model, batch: &Batch| match totals(model, batch) {
            Ok(totals) => Ok(totals.to_vec()),
            Err(error) => Err(error.into()),
        };
        let (names, totals) = (metrics.map(str::to_owned).to_vec(), Box::new(totals));
        Self { validation: Some(Validation { stream, names, totals }), ..self }
    }

    /// Validates also after so many steps, again and again. Does nothing without a validation.
    pub fn with_validation_every_steps(self, steps: u64) -> Self {
        Self { every_steps: Some(steps), ..self }
    }

    /// Validates the averages of the weights, which the updater has to keep. Does nothing without a
    /// validation.
    pub fn with_averages_validated(self) -> Self {
        Self { of_averages: true, ..self }
    }

    /// Adds a callback; they are called in the order in which they were added.
    pub fn with_callback(mut self, callback: impl Callback + 'a) -> Self {
        self.callbacks.push(Box::new(callback));
        self
    }

    /// Continues from what there is, and trains until the epochs are done or a callback has enough.
    /// All ranks must call it alike. Gives the metrics of the last epoch.
    pub fn run(
        &mut self,
        context: &mut WorkerContext<'_>,
        state: &mut TrainState,
        batches: &mut dyn BatchStream,
    ) -> Result<BTreeMap<String, f64>> {
        self.check()?;
        self.stop = false;
        let is_restored = context.restore(state, batches)?;
        self.callbacks.iter_mut().try_for_each(|callback| restore(callback.as_mut(), state))?;
        let flow = tell(&mut self.callbacks, state, |callback| callback.on_start())?;
        if context.any(flow.is_stop())? {
            state.stop();
        }
        if is_restored && state.is_within_epoch() && !state.is_finished() {
            // Whoever was lost was lost behind the step, maybe before this.
            self.validate_if_due(context, state)?;
        }
        while !state.is_finished() {
            match batches.next_batch()? {
                Some(batch) => self.step(context, state, &batch)?,
                None => self.end_epoch(context, state, batches)?,
            }
        }
        Ok(state.metrics().clone())
    }

    fn check(&self) -> Result<()> {
        if self.every_steps == Some(0) {
            let (option, got) = ("every_steps", "0".to_owned());
            return Err(Error::Option { option, got, expected: "at least 1" });
        }
        let mut names = BTreeSet::new();
        match self.callbacks.iter().find(|callback| !names.insert(callback.name())) {
            None => Ok(()),
            Some(again) => {
                let (option, got) = ("name", format!("{:?} twice", again.name()));
                Err(Error::Option { option, got, expected: "another one for each callback" })
            }
        }
    }

    fn step(
        &mut self,
        context: &mut WorkerContext<'_>,
        state: &mut TrainState,
        batch: &Batch,
    ) -> Result<()> {
        let (mut stop, callbacks) = (false, &mut self.callbacks);
        let batches = std::slice::from_ref(batch);
        context.step_with(state, batches, &mut self.loss, |state, loss| {
            let report = StepReport { step: state.step(), epoch: state.epoch(), loss };
            stop = tell(callbacks, state, |callback| callback.on_step(&report))?.is_stop();
            Ok(())
        })?;
        self.validate_if_due(context, state)?;
        // Where ranks take steps of their own, they agree when they meet.
        self.stop |= stop;
        let agree = !self.callbacks.is_empty() && state.is_synchronised();
        match agree && context.any(self.stop)? {
            true => context.stop(state),
            false => Ok(()),
        }
    }

    fn validate_if_due(
        &mut self,
        context: &mut WorkerContext<'_>,
        state: &mut TrainState,
    ) -> Result<()> {
        let is_due = self.every_steps.is_some_and(|steps| state.step().is_multiple_of(steps));
        if is_due && self.validation.is_some() {
            let metrics = self.validate(context, state)?;
            context.report(state, &named(&metrics))?;
        }
        Ok(())
    }

    fn end_epoch(
        &mut self,
        context: &mut WorkerContext<'_>,
        state: &mut TrainState,
        batches: &dyn BatchStream,
    ) -> Result<()> {
        let metrics = self.validate(context, state)?;
        context.end_epoch_with(state, batches, &named(&metrics), |state, report| {
            let flow = tell(&mut self.callbacks, state, |callback| callback.on_epoch(report))?;
            Ok(Flow::stop_if(flow.is_stop() | self.stop))
        })
    }

    fn validate(
        &mut self,
        context: &mut WorkerContext<'_>,
        state: &mut TrainState,
    ) -> Result<Vec<(String, f64)>> {
        let Some(Validation { stream, names, totals }) = &mut self.validation else {
            return Ok(Vec::new());
        };
        context.synchronise(state)?;
        let mut means = |model: &Model| {
            context.means_over(stream.as_mut(), names.len(), |batch| totals(model, batch))
        };
        let means = match self.of_averages {
            true => state.with_averages(means)??,
            false => means(&state.model)?,
        };
        Ok(names.iter().cloned().zip(means).collect())
    }
}

/// Asks all callbacks, and has the next checkpoint hold what they remember.
fn tell(
    callbacks: &mut [Box<dyn Callback + '_>],
    state: &mut TrainState,
    mut tell: impl FnMut(&mut dyn Callback) -> Result<Flow, BoxError>,
) -> Result<Flow> {
    let mut stop = false;
    for callback in callbacks {
        stop |= tell(callback.as_mut()).map_err(Error::program)?.is_stop();
        let remembered = callback.state();
        if !remembered.is_null() {
            state.callbacks.insert(callback.name().to_owned(), remembered);
        }
    }
    Ok(Flow::stop_if(stop))
}

fn restore(callback: &mut dyn Callback, state: &TrainState) -> Result<()> {
    match state.callbacks.get(callback.name()) {
        Some(remembered) => callback.restore(remembered).map_err(Error::program),
        None => Ok(()),
    }
}

fn named(metrics: &[(String, f64)]) -> Vec<(&str, f64)> {
    metrics.iter().map(|(name, value)| (name.as_str(), *value)).collect()
}

/// Whether `value` is better than `best` by more than `min_delta`.
fn is_better(mode: Mode, value: f64, best: f64, min_delta: f64) -> bool {
    mode.sign() * (value - best) > min_delta
}
