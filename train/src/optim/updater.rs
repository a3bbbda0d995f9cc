//! What happens between gradients and weights, in one place.

use super::elsewhere::clip_elsewhere;
use super::kept::Kept;
use super::state::{optimizer_file, optimizer_files};
use super::{
    Clip, Ema, Grouped, LossScale, LossScaleOptions, Now, Optimizer, OptimizerSpec, OptimizerState,
    ParamGroup, Plateau, PlateauOptions, Schedule, update_by,
};
use crate::collective::{Collective, ReduceOp};
use crate::saver::Gate;
use crate::share::{Held, Share};
use crate::{Error, Result};
use candle_core::DType;
use mobula_nn::Gradients;
use mobula_nn::Params;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

pub(crate) const EMA: &str = "ema.safetensors";

/// An optimizer with all that goes with it: learning-rate schedule, clipping, averages of the
/// weights, and the state of these.
#[derive(Debug)]
pub struct Updater {
    optimizer: Box<dyn Optimizer>,
    /// Made at the first step, or from a checkpoint.
    state: Option<Kept>,
    schedule: Option<Schedule>,
    plateau: Option<Plateau>,
    clip: Option<Clip>,
    ema: Option<Arc<Ema>>,
    loss_scale: Option<LossScale>,
    gradient_norm: Option<f64>,
    /// A copy is being made of state, averages and parameters.
    copying: Option<Arc<Gate>>,
    /// Of the parameters, where each rank updates some.
    share: Option<Share>,
}

/// An [`Updater`] as configurations write it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UpdaterOptions {
    /// The optimizer by name. Default: AdamW.
    pub optimizer: OptimizerSpec,
    /// Parameters that it treats differently. Default: none.
    pub groups: Vec<ParamGroup>,
    /// The learning rate of each step. Default: the optimizer's.
    pub schedule: Option<Schedule>,
    /// Lowers the learning rate when a metric no longer improves. Default: no.
    pub plateau: Option<PlateauOptions>,
    /// Keeps gradients small. Default: no.
    pub clip: Option<Clip>,
    /// Decay of an average of the weights. Default: none is kept.
    pub ema: Option<f64>,
    /// Scales the loss, for half precision. Default: no.
    pub loss_scale: Option<LossScaleOptions>,
}

impl UpdaterOptions {
    /// Errors when an option is out of its range.
    pub fn build(&self) -> Result<Updater> {
        let optimizer = Grouped::new(self.optimizer.build()?, self.groups.iter().cloned())?;
        let mut updater = Updater::new(optimizer);
        if let Some(schedule) = &self.schedule {
            updater = updater.with_schedule(schedule.clone())?;
        }
        if let Some(plateau) = &self.plateau {
            updater = updater.with_plateau(plateau.clone())?;
        }
        if let Some(clip) = self.clip {
            updater = updater.with_clip(clip)?;
        }
        if let Some(decay) = self.ema {
            updater = updater.with_ema(decay)?;
        }
        match self.loss_scale {
            Some(options) => updater.with_loss_scale(options),
            None => Ok(updater),
        }
    }
}

/// What a checkpoint's `state.json` says of an updater. When a run is resumed, the settings are
/// again those of the program, and plateau and loss scale go on from here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedUpdater {
    /// The learning rate of the last step.
    pub lr: f64,
    /// The schedule.
    pub schedule: Option<Schedule>,
    /// The plateau and how far it is.
    pub plateau: Option<Plateau>,
    /// The clipping.
    pub clip: Option<Clip>,
    /// The decay of the average of the weights, which is in `ema.safetensors`.
    pub ema: Option<f64>,
    /// The scale of the loss and how far it is.
    pub loss_scale: Option<LossScale>,
}

impl Updater {
    /// Just the optimizer.
    pub fn new(optimizer: impl Optimizer + 'static) -> Self {
        Self {
            optimizer: Box::new(optimizer),
            state: None,
            schedule: None,
            plateau: None,
            clip: None,
            ema: None,
            loss_scale: None,
            gradient_norm: None,
            copying: None,
            share: None,
        }
    }

    /// Sets the learning rate of each step. Default: the optimizer's. Errors when an option of
    /// the schedule is out of its range.
    pub fn with_schedule(self, schedule: Schedule) -> Result<Self> {
        schedule.validate()?;
        Ok(Self { schedule: Some(schedule), ..self })
    }

    /// Lowers the learning rate when a metric no longer improves. Default: no.
    pub fn with_plateau(self, options: PlateauOptions) -> Result<Self> {
        Ok(Self { plateau: Some(Plateau::new(options)?), ..self })
    }

    /// Keeps gradients small. Default: no.
    pub fn with_clip(self, clip: Clip) -> Result<Self> {
        clip.validate()?;
        Ok(Self { clip: Some(clip), ..self })
    }

    /// Keeps an average of the weights, see [`Ema`]. Default: no.
    pub fn with_ema(self, decay: f64) -> Result<Self> {
        Ok(Self { ema: Some(Arc::new(Ema::new(decay)?)), ..self })
    }

    /// Multiplies the loss by a scale before its backward pass, and leaves out steps whose gradients
    /// overflow, see [`LossScale`]. [`WorkerContext::step`](crate::WorkerContext::step) does it;
    /// [`Updater::step`] expects gradients that are divided by the scale. Default: no.
    pub fn with_loss_scale(self, options: LossScaleOptions) -> Result<Self> {
        Ok(Self { loss_scale: Some(LossScale::new(options)?), ..self })
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &dyn Optimizer {
        self.optimizer.as_ref()
    }

    /// What the optimizer remembers: nothing before the first step. From another device it is copied.
    pub fn state(&self) -> Result<Option<Arc<OptimizerState>>> {
        self.state.as_ref().map(Kept::here).transpose()
    }

    /// The average of the weights, if one is kept.
    pub fn ema(&self) -> Option<&Ema> {
        self.ema.as_deref()
    }

    /// The scale of the loss, if it has one.
    pub fn loss_scale(&self) -> Option<&LossScale> {
        self.loss_scale.as_ref()
    }

    pub(crate) fn loss_scale_mut(&mut self) -> Option<&mut LossScale> {
        self.loss_scale.as_mut()
    }

    /// The learning rate of the last step; before the first step, that of the first.
    pub fn lr(&self) -> f64 {
        match self.state.as_ref().map(Kept::outline) {
            Some(state) if state.step > 0 => state.lr,
            _ => self.lr_at(0),
        }
    }

    /// The norm of the last step's gradients before they were clipped, if they are clipped by it.
    pub fn gradient_norm(&self) -> Option<f64> {
        self.gradient_norm
    }

    fn lr_at(&self, step: u64) -> f64 {
        let base = self.optimizer.lr();
        let lr = self.schedule.as_ref().map_or(base, |schedule| schedule.lr(base, step));
        self.plateau.as_ref().map_or(lr, |plateau| plateau.lr(lr))
    }

    /// One step: clips the gradients and updates the parameters, both in place, and what is
    /// remembered of them.
    pub fn step(&mut self, params: &Params, gradients: &mut Gradients) -> Result<()> {
        if !self.updates_elsewhere(params) {
            gradients.bring_here()?;
        }
        self.clip(params, gradients)?;
        self.update(params, gradients)?;
        self.gather(params, gradients)?;
        self.average_in(params)
    }

    /// Whether it can work where the parameters are if that is not the CPU.
    pub(crate) fn updates_elsewhere(&self, params: &Params) -> bool {
        let now = Now { lr: self.optimizer.lr(), weight_decay: self.optimizer.weight_decay() };
        let has_rule = self.optimizer.rule(now, 1).is_some();
        has_rule && self.share.is_none() && params.dtype() == DType::F32
    }

    /// Clips the gradients.
    pub(crate) fn clip(&mut self, params: &Params, gradients: &mut Gradients) -> Result<()> {
        let Some(clip) = self.clip else {
            return Ok(());
        };
        let moving = self.moving(params, gradients);
        self.gradient_norm = match gradients.elsewhere() {
            Some(_) => clip_elsewhere(clip, gradients, &moving)?,
            None => self.clip_here(clip, gradients, &moving)?,
        };
        Ok(())
    }

    /// Updates the parameters by them, or those that this rank has the state of.
    pub(crate) fn update(&mut self, params: &Params, gradients: &Gradients) -> Result<()> {
        self.wait_for_copy();
        let kept = match self.state.take() {
            Some(kept) => kept,
            None => Kept::new(self.fresh_state(params)?),
        };
        let is_elsewhere = gradients.elsewhere().is_some() || !params.device().is_cpu();
        let (kept, updated) = match is_elsewhere && self.updates_elsewhere(params) {
            true => self.update_elsewhere(params, gradients, kept),
            false => self.update_here(params, gradients, kept),
        };
        self.state = Some(kept);
        updated
    }

    fn update_here(
        &self,
        params: &Params,
        gradients: &Gradients,
        mut kept: Kept,
    ) -> (Kept, Result<()>) {
        let held = self.share.as_ref().map(Share::held);
        let update = |state| self.update_in(params, gradients, state, held);
        let updated = kept.bring_here().and_then(update);
        (kept, updated)
    }

    fn update_elsewhere(
        &self,
        params: &Params,
        gradients: &Gradients,
        kept: Kept,
    ) -> (Kept, Result<()>) {
        let mut state = kept.leave();
        state.set_lr(self.lr_at(state.outline().step));
        let updated = state.update(self.optimizer(), params, gradients);
        (Kept::Elsewhere(state), updated)
    }

    fn update_in(
        &self,
        params: &Params,
        gradients: &Gradients,
        state: &mut OptimizerState,
        held: Option<&Held>,
    ) -> Result<()> {
        state.lr = self.lr_at(state.step);
        match held {
            None => self.optimizer.update(params, gradients, state),
            Some(held) => update_by(self.optimizer(), params, gradients, state, &|name, shape| {
                held.options(self.optimizer(), name, shape)
            }),
        }
    }

    /// The same of what another updater of the same settings had after the step before.
    pub(crate) fn update_kept(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        (state, saved): (&mut OptimizerState, &SavedUpdater),
        held: &Held,
    ) -> Result<()> {
        self.resume_settings(saved);
        self.update_in(params, gradients, state, Some(held))
    }

    /// Gives and takes the parameters that others have updated.
    pub(crate) fn gather(&self, params: &Params, gradients: &mut Gradients) -> Result<()> {
        self.share.as_ref().map_or(Ok(()), |share| share.gather(params, gradients))
    }

    /// Has the averages, if any are kept, take in the parameters.
    pub(crate) fn average_in(&mut self, params: &Params) -> Result<()> {
        self.ema.as_mut().map_or(Ok(()), |ema| Arc::make_mut(ema).update(params))
    }

    /// From now on this rank updates a part of the parameters, and others the rest.
    pub(crate) fn share(&mut self, share: Share) -> Result<()> {
        if let Some(kept) = &mut self.state {
            share.trim(kept.bring_here()?);
        }
        self.share = Some(share);
        Ok(())
    }

    /// What this rank updates, if others update the rest.
    pub(crate) fn shared(&self) -> Option<&Share> {
        self.share.as_ref()
    }

    /// Replaces what is remembered by the mean over all ranks.
    pub(crate) fn average(&mut self, collective: &dyn Collective) -> Result<()> {
        self.wait_for_copy();
        let state = self.state.as_mut().map(Kept::bring_here).transpose()?;
        let slots = state.into_iter().flat_map(|state| &mut state.params);
        for slot in slots.flat_map(|param| &mut param.slots) {
            collective.all_reduce(&mut slot.values, ReduceOp::Mean)?;
        }
        let averages = self.ema.as_mut().map(Arc::make_mut).into_iter().flat_map(Ema::averages_mut);
        for values in averages {
            collective.all_reduce(values, ReduceOp::Mean)?;
        }
        Ok(())
    }

    /// Holds back what would change the tensors until a copy is made.
    pub(crate) fn hold(&mut self, copying: Arc<Gate>) {
        self.copying = Some(copying);
    }

    fn wait_for_copy(&mut self) {
        if let Some(copying) = self.copying.take() {
            copying.wait();
        }
    }

    /// What the optimizer remembers, to be copied.
    pub(crate) fn kept(&self, params: &Params) -> Result<Kept> {
        match &self.state {
            Some(kept) => Ok(kept.clone()),
            None => Ok(Kept::new(self.fresh_state(params)?)),
        }
    }

    /// What the optimizer remembers before the first step.
    pub(crate) fn fresh_state(&self, params: &Params) -> Result<OptimizerState> {
        let mut state = self.optimizer.init(params)?;
        if let Some(share) = &self.share {
            share.trim(&mut state);
        }
        Ok(state)
    }

    pub(crate) fn shared_ema(&self) -> Option<Arc<Ema>> {
        self.ema.clone()
    }

    /// Goes on from what another one of the same settings had.
    pub(crate) fn resume(&mut self, state: OptimizerState, ema: Option<Ema>, saved: &SavedUpdater) {
        self.state = Some(Kept::new(state));
        self.ema = ema.map(Arc::new).or(self.ema.take());
        self.resume_settings(saved);
    }

    fn resume_settings(&mut self, saved: &SavedUpdater) {
        if let Some(kept) = &mut self.state {
            kept.set_lr(saved.lr);
        }
        if let (Some(plateau), Some(saved)) = (&mut self.plateau, &saved.plateau) {
            plateau.resume(saved);
        }
        if let (Some(scale), Some(saved)) = (&mut self.loss_scale, &saved.loss_scale) {
            scale.resume(saved);
        }
    }

    /// The places of gradients that move something: those of frozen parameters do not, and do not count.
    fn moving(&self, params: &Params, gradients: &Gradients) -> Vec<Range<usize>> {
        let vars = params.vars();
        let places = gradients.places().iter().zip(&vars);
        let moving = places
            .filter(|(_, (name, var))| self.optimizer.param_options(name, var.dims()).is_some());
        moving.map(|((_, range), _)| range.clone()).collect()
    }

    fn clip_here(
        &self,
        clip: Clip,
        gradients: &mut Gradients,
        moving: &[Range<usize>],
    ) -> Result<Option<f64>> {
        let own = self.share.as_ref().map_or(0..gradients.values().len(), Share::range);
        let mut squares = clip.squares(gradients.values(), moving, own);
        if let (Some(share), Some(squares)) = (&self.share, &mut squares) {
            share.sum(squares)?;
        }
        Ok(clip.apply_to(gradients.values_mut(), moving, squares.as_deref()))
    }

    /// The metric that the learning rate depends on, if it does. Errors when it is not among those
    /// of the epoch.
    pub(crate) fn plateau_metric(&self, metrics: &BTreeMap<String, f64>) -> Result<Option<f64>> {
        let Some(plateau) = &self.plateau else {
            return Ok(None);
        };
        let metric = &plateau.options().metric;
        match metrics.get(metric) {
            Some(value) => Ok(Some(*value)),
            None => {
                let names = metrics.keys().cloned().collect();
                Err(Error::NoMetric { what: "the learning rate", metric: metric.clone(), names })
            }
        }
    }

    /// Takes in the metric of an epoch that the learning rate depends on, the same on all ranks.
    /// [`WorkerContext::end_epoch`](crate::WorkerContext::end_epoch) does it.
    pub fn observe(&mut self, metric: f64) {
        if let Some(plateau) = &mut self.plateau {
            plateau.observe(metric);
        }
    }

    /// Runs `evaluate` while the parameters are the averages of the weights, and puts these back,
    /// also when it panics. Errors when no averages are kept.
    pub fn with_averages<T>(&mut self, params: &Params, evaluate: impl FnOnce() -> T) -> Result<T> {
        self.wait_for_copy();
        let ema = self.ema.as_mut().ok_or(Error::NoAverages)?;
        Arc::make_mut(ema).with_averages(params, evaluate)
    }

    /// Writes `optimizer.safetensors`, or this rank's part of it, and `ema.safetensors` if averages are kept, into a folder.
    /// What is returned belongs with them.
    pub fn save(&self, params: &Params, dir: &Path) -> Result<SavedUpdater> {
        let state = self.kept(params)?.here()?;
        let part = self.share.as_ref().map_or(0..state.params.len(), Share::params);
        let path = dir.join(optimizer_file(self.share.as_ref().map(Share::shard)));
        state.write(part, self.optimizer.name(), &self.optimizer.options(), &path)?;
        if let Some(ema) = &self.ema {
            ema.save(params, &dir.join(EMA))?;
        }
        Ok(self.saved())
    }

    /// What a checkpoint's `state.json` says of it.
    pub(crate) fn saved(&self) -> SavedUpdater {
        SavedUpdater {
            lr: self.lr(),
            schedule: self.schedule.clone(),
            plateau: self.plateau.clone(),
            clip: self.clip,
            ema: self.ema().map(Ema::decay),
            loss_scale: self.loss_scale.clone(),
        }
    }

    /// Goes on from what [`Updater::save`] wrote for the same optimizer and parameters. Averages
    /// that were not kept then begin with the next step.
    pub fn load(&mut self, params: &Params, dir: &Path, saved: &SavedUpdater) -> Result<()> {
        let mut state = self.fresh_state(params)?;
        state.load_parts(self.optimizer(), &optimizer_files(dir)?, &|name, shape| {
            let held = self.share.as_ref().map(Share::held);
            let options = held.map(|held| held.options(self.optimizer(), name, shape));
            options.unwrap_or_else(|| self.optimizer.param_options(name, shape)).is_some()
        })?;
        match (self.ema.as_mut().map(Arc::make_mut), saved.ema) {
            (Some(ema), Some(_)) => ema.load(params, &dir.join(EMA))?,
            (Some(ema), None) => *ema = Ema::new(ema.decay())?,
            (None, _) => {}
        }
        self.state = Some(Kept::new(state));
        self.resume_settings(saved);
        Ok(())
    }
}

/// So that an optimizer by itself is enough where an updater is expected.
impl<O: Optimizer + 'static> From<O> for Updater {
    fn from(optimizer: O) -> Self {
        Self::new(optimizer)
    }
}
