//! How an epoch ends.

use crate::context::Place;
use crate::pace::Spread;
use crate::report::{EpochReport, WorkerReport};
use crate::{Error, Result, TrainState, WorkerContext};
use mobula_core::{BatchStream, Flow};
use std::collections::BTreeMap;

impl WorkerContext<'_> {
    /// Ends an epoch: counts it, reports the metrics and the mean loss, and takes a checkpoint when
    /// one is due. When the training is to stop here, `state` is finished afterwards, on all ranks
    /// alike.
    pub fn end_epoch(
        &mut self,
        state: &mut TrainState,
        stream: &dyn BatchStream,
        metrics: &[(&str, f64)],
    ) -> Result<()> {
        self.end_epoch_with(state, stream, metrics, |_, _| Ok(Flow::Continue))
    }

    /// The same, of which `hears` hears before its end is final.
    pub(crate) fn end_epoch_with(
        &mut self,
        state: &mut TrainState,
        stream: &dyn BatchStream,
        metrics: &[(&str, f64)],
        hears: impl FnOnce(&mut TrainState, &EpochReport) -> Result<Flow>,
    ) -> Result<()> {
        self.synchronise(state)?;
        let spread = self.epoch_spread()?;
        let metrics = self.epoch_metrics(state, spread, metrics)?;
        let observed = self.plateau_metric(state, &metrics)?;
        let (epoch, epochs, step) = (state.epoch() + 1, state.epochs(), state.step());
        let report = EpochReport { epoch, epochs, step, metrics: metrics.clone() };
        let stop = hears(state, &report)?.is_stop() | self.tell_epoch(report)?.is_stop();
        let stop = self.any(stop)?;
        // From here on a rank does not wait for others before all is done: a loss finds the epoch
        // ended, or not yet.
        if let Some(metric) = observed {
            state.updater.observe(metric);
        }
        state.count_epoch(stream.state(), metrics, stop);
        if let Some(keeper) = self.keeper() {
            keeper.remember(state)?;
        }
        self.checkpoint_after_epoch(state)?;
        self.meter.restart_clock();
        Ok(())
    }

    /// Of what the ranks have computed in the steps of this epoch, the same on all.
    fn epoch_spread(&mut self) -> Result<Option<Spread>> {
        let step_ms = self.meter.take_epoch_pace().step_ms();
        Ok(Spread::of(self.collective.gather_one(step_ms)?.into_iter().enumerate()))
    }

    fn epoch_metrics(
        &self,
        state: &TrainState,
        spread: Option<Spread>,
        metrics: &[(&str, f64)],
    ) -> Result<BTreeMap<String, f64>> {
        let mut all = BTreeMap::from([
            ("loss".to_owned(), state.tally.mean_loss()),
            ("samples_per_second".to_owned(), state.tally.rows_per_second()),
            ("lr".to_owned(), state.updater.lr()),
        ]);
        if let Some(scale) = state.updater.loss_scale() {
            all.insert("loss_scale".to_owned(), scale.scale().into());
            all.insert("skipped_steps".to_owned(), scale.skipped_steps() as f64);
        }
        if let Some(steps) = state.non_finite_steps() {
            all.insert("non_finite_steps".to_owned(), steps as f64);
        }
        if let Some(times) = state.rollbacks() {
            all.insert("rollbacks".to_owned(), times.into());
        }
        let spread = spread.map(|spread| spread.metrics());
        let metrics = spread.iter().flatten().chain(metrics);
        all.extend(metrics.map(|(name, value)| ((*name).to_owned(), *value)));
        match &self.setup.best {
            Some(best) if !all.contains_key(&best.metric) => {
                let (metric, names) = (best.metric.clone(), all.into_keys().collect());
                Err(Error::NoMetric { what: "the best checkpoint", metric, names })
            }
            _ => Ok(all),
        }
    }

    /// Rank 0's metric counts, so that the learning rate stays the same on all ranks.
    fn plateau_metric(
        &self,
        state: &TrainState,
        metrics: &BTreeMap<String, f64>,
    ) -> Result<Option<f64>> {
        let Some(metric) = state.updater.plateau_metric(metrics)? else {
            return Ok(None);
        };
        let mut shared = [metric];
        self.collective.broadcast(&mut shared, 0)?;
        Ok(Some(shared[0]))
    }

    fn tell_epoch(&mut self, report: EpochReport) -> Result<Flow> {
        match &mut self.place {
            Place::Alone(listener) => listener(&report).map_err(Error::program),
            Place::Member(member, _) => {
                if member.rank() == 0 {
                    member.report(&WorkerReport::Epoch(report))?;
                }
                // Else the report may be of a generation that counts no more: the epoch ends again.
                member.check_generation()?;
                Ok(Flow::stop_if(member.stop_requested()))
            }
        }
    }
}
