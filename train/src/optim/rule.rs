//! What an optimizer is.

use super::element::Rule;
use super::pass;
use super::state::{OptimizerState, ParamState, Slot};
use crate::{Error, Result};
use candle_core::Var;
use mobula_nn::Gradients;
use mobula_nn::Params;
use std::fmt::Debug;

/// A rule that changes parameters by their gradients. Its settings do not change; what it
/// remembers is in an [`OptimizerState`].
///
/// Of one's own it needs the first five functions, and one of the next two: a [`Rule`] for each element
/// runs on any device, and `update_param` sees one parameter at a time, on the CPU. An `update` of one's own
/// is not called where it is wrapped or of some parameters only (groups, `ScalingConfig::shard_optimizer`,
/// `local_sgd`); and of an optimizer with a rule, neither that nor `update_param` where parameters are on a GPU.
pub trait Optimizer: Debug + Send + Sync {
    /// The name that checkpoints and configurations know it by, such as `"adamw"`.
    fn name(&self) -> &str;

    /// The settings, as they are written beside its state.
    fn options(&self) -> serde_json::Value;

    /// The learning rate where no schedule says otherwise.
    fn lr(&self) -> f64;

    /// The weight decay where no group says otherwise.
    fn weight_decay(&self) -> f64;

    /// What it remembers of a parameter of this shape, before the first step.
    fn slots(&self, shape: &[usize]) -> Vec<Slot>;

    /// How it changes each element of a parameter at its step number `steps`, of which 1 is the first: the t
    /// of a bias correction. `None` when it is no rule for single elements.
    fn rule(&self, _now: Now, _steps: u64) -> Option<Rule> {
        None
    }

    /// Updates one parameter and its state in place. `values` and `gradient` are in row-major
    /// order; `state.steps` counts this update already. Default: by the [`rule`](Self::rule).
    fn update_param(
        &self,
        now: Now,
        values: &mut [f32],
        gradient: &[f32],
        state: &mut ParamState,
    ) -> Result<()> {
        let rule = self.rule(now, state.steps);
        rule.ok_or_else(|| Error::NoRule { optimizer: self.name().to_owned() })?
            .update(values, gradient, state)
    }

    /// How it treats one parameter; `None` when it leaves it alone. Default: like all others.
    fn param_options(&self, _name: &str, _shape: &[usize]) -> Option<ParamOptions> {
        Some(ParamOptions { lr_scale: 1.0, weight_decay: self.weight_decay() })
    }

    /// The state before the first step.
    fn init(&self, params: &Params) -> Result<OptimizerState> {
        Ok(fresh(self, params))
    }

    /// One step: updates parameters and state in place, with the learning rate `state.lr`. Errors
    /// when the state is of other parameters, or gradients are [elsewhere](Gradients::elsewhere); then nothing
    /// has changed.
    fn update(
        &self,
        params: &Params,
        gradients: &Gradients,
        state: &mut OptimizerState,
    ) -> Result<()> {
        update_by(self, params, gradients, state, &|name, shape| self.param_options(name, shape))
    }
}

/// One step of the parameters that have `options`.
pub(crate) fn update_by<O: Optimizer + ?Sized>(
    optimizer: &O,
    params: &Params,
    gradients: &Gradients,
    state: &mut OptimizerState,
    options: &dyn Fn(&str, &[usize]) -> Option<ParamOptions>,
) -> Result<()> {
    let vars = params.vars();
    check_fit(state, gradients, &vars)?;
    if gradients.elsewhere().is_some() {
        return Err(Error::GradientsElsewhere);
    }
    state.step += 1;
    let lr = state.lr;
    let places = gradients.places().iter().zip(&vars);
    for (((_, range), (_, var)), param) in places.zip(&mut state.params) {
        let Some(options) = options(&param.name, &param.shape) else {
            continue;
        };
        let now = Now { lr: lr * options.lr_scale, weight_decay: options.weight_decay };
        param.steps += 1;
        let gradient = &gradients.values()[range.clone()];
        pass::in_place(var, |values| optimizer.update_param(now, values, gradient, param))?;
    }
    Ok(())
}

/// The state before the first step; parameters that are left alone have none.
pub(super) fn fresh<O: Optimizer + ?Sized>(optimizer: &O, params: &Params) -> OptimizerState {
    let fresh = |(name, var): (String, Var)| {
        let shape = var.dims().to_vec();
        let moves = optimizer.param_options(&name, &shape).is_some();
        let slots = if moves { optimizer.slots(&shape) } else { Vec::new() };
        ParamState { name, shape, steps: 0, slots }
    };
    let params = params.vars().into_iter().map(fresh).collect();
    OptimizerState { step: 0, lr: optimizer.lr(), params }
}

/// Errors unless state, gradients and parameters are of one model.
pub(super) fn check_fit(
    state: &OptimizerState,
    gradients: &Gradients,
    vars: &[(String, Var)],
) -> Result<()> {
    let places = gradients.places();
    let same_number = vars.len() == places.len() && vars.len() == state.params.len();
    let mut all = vars.iter().zip(&state.params).zip(places);
    let is_same = all.all(|(((name, var), param), (place, range))| {
        let of_state = *name == param.name && var.dims() == param.shape;
        of_state && name == place && var.elem_count() == range.len()
    });
    let (expected, got) = (state.num_elements(), gradients.values().len());
    let fits = same_number && is_same;
    if fits { Ok(()) } else { Err(Error::OptimizerModel { expected, got }) }
}

/// The settings of one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ParamOptions {
    /// Multiplies the learning rate.
    pub lr_scale: f64,
    /// Weight decay, instead of the optimizer's.
    pub weight_decay: f64,
}

/// What may differ from step to step and from parameter to parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Now {
    /// The learning rate.
    pub lr: f64,
    /// The weight decay.
    pub weight_decay: f64,
}

/// So that a function which takes any optimizer also takes one that was chosen at run time.
impl Optimizer for Box<dyn Optimizer> {
    fn name(&self) -> &str {
        (**self).name()
    }

    fn options(&self) -> serde_json::Value {
        (**self).options()
    }

    fn lr(&self) -> f64 {
        (**self).lr()
    }

    fn weight_decay(&self) -> f64 {
        (**self).weight_decay()
    }

    fn slots(&self, shape: &[usize]) -> Vec<Slot> {
        (**self).slots(shape)
    }

    fn rule(&self, now: Now, steps: u64) -> Option<Rule> {
        (**self).rule(now, steps)
    }

    fn update_param(
        &self,
        now: Now,
        values: &mut [f32],
        gradient: &[f32],
        state: &mut ParamState,
    ) -> Result<()> {
        (**self).update_param(now, values, gradient, state)
    }

    fn param_options(&self, name: &str, shape: &[usize]) -> Option<ParamOptions> {
        (**self).param_options(name, shape)
    }

    fn init(&self, params: &Params) -> Result<OptimizerState> {
        (**self).init(params)
    }

    fn update(
        &self,
        params: &Params,
        gradients: &Gradients,
        state: &mut OptimizerState,
    ) -> Result<()> {
        (**self).update(params, gradients, state)
    }
}
