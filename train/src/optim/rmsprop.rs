//! RMSprop.

use super::pass::{Element, elements, lerp};
use super::state::{ParamState, Slot};
use super::{Now, Optimizer, check};
use crate::Result;
use serde::{Deserialize, Serialize};

/// Settings of [`RmsProp`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RmsPropOptions {
    /// Learning rate. Default 0.01.
    pub lr: f64,
    /// Decay of the mean square. Default 0.99.
    pub alpha: f64,
    /// Added to the denominator. Default 1e-8.
    pub eps: f64,
    /// L2 penalty: this times the parameter is added to its gradient. Default 0.
    pub weight_decay: f64,
    /// How much of the last direction is kept. Default 0.
    pub momentum: f64,
    /// Divides by the standard deviation of the gradient instead of its root mean square.
    /// Default: no.
    pub centered: bool,
}

impl Default for RmsPropOptions {
    fn default() -> Self {
        Self { lr: 1e-2, alpha: 0.99, eps: 1e-8, weight_decay: 0.0, momentum: 0.0, centered: false }
    }
}

/// RMSprop (Hinton 2012; centered: Graves 2013, arXiv 1308.0850), as PyTorch computes it:
///
/// v ← α·v + (1 − α)·g²; b ← μ·b + g / (√v + ε); p ← p − lr·b
///
/// where g is the gradient + λ·p; centered, with a ← α·a + (1 − α)·g and √(v − a²). State:
/// `square_avg` (v), `momentum_buffer` (b) if there is a momentum, `grad_avg` (a) if centered.
#[derive(Clone, Debug)]
pub struct RmsProp(RmsPropOptions);

impl RmsProp {
    /// Errors when an option is out of its range.
    pub fn new(options: RmsPropOptions) -> Result<Self> {
        check::positive("lr", options.lr)?;
        check::below_one("alpha", options.alpha)?;
        check::positive("eps", options.eps)?;
        check::not_negative("weight_decay", options.weight_decay)?;
        check::below_one("momentum", options.momentum)?;
        Ok(Self(options))
    }
}

impl Optimizer for RmsProp {
    fn name(&self) -> &str {
        "rmsprop"
    }

    fn options(&self) -> serde_json::Value {
        serde_json::json!(self.0)
    }

    fn lr(&self) -> f64 {
        self.0.lr
    }

    fn weight_decay(&self) -> f64 {
        self.0.weight_decay
    }

    fn slots(&self, shape: &[usize]) -> Vec<Slot> {
        let buffer = (self.0.momentum > 0.0).then_some("momentum_buffer");
        let mean = self.0.centered.then_some("grad_avg");
        let kinds = [Some("square_avg"), buffer, mean];
        kinds.into_iter().flatten().map(|kind| Slot::zeros(kind, shape)).collect()
    }

    fn update_param(
        &self,
        now: Now,
        values: &mut [f32],
        gradient: &[f32],
        state: &mut ParamState,
    ) -> Result<()> {
        let RmsPropOptions { alpha, eps, momentum, centered, .. } = self.0;
        let rule = Rule {
            lr: now.lr as f32,
            l2: now.weight_decay as f32,
            alpha: alpha as f32,
            one_minus_alpha: (1.0 - alpha) as f32,
            eps: eps as f32,
            momentum: momentum as f32,
        };
        match (momentum > 0.0, centered) {
            (false, false) => elements(&Plain(rule), values, gradient, state),
            (true, false) => elements(&Momentum(rule), values, gradient, state),
            (false, true) => elements(&Centered(rule), values, gradient, state),
            (true, true) => elements(&CenteredMomentum(rule), values, gradient, state),
        }
    }
}

struct Rule {
    lr: f32,
    l2: f32,
    alpha: f32,
    one_minus_alpha: f32,
    eps: f32,
    momentum: f32,
}

impl Rule {
    /// The gradient with its penalty, and the mean square.
    #[inline(always)]
    fn square(&self, p: f32, g: f32, v: f32) -> (f32, f32) {
        let g = g + self.l2 * p;
        (g, v * self.alpha + g * g * self.one_minus_alpha)
    }

    #[inline(always)]
    fn mean(&self, g: f32, a: f32) -> f32 {
        lerp(a, g, self.one_minus_alpha)
    }

    #[inline(always)]
    fn direction(&self, g: f32, square: f32) -> f32 {
        g / (square.sqrt() + self.eps)
    }
}

struct Plain(Rule);

impl Element<1> for Plain {
    #[inline(always)]
    fn update(&self, p: f32, g: f32, [v]: [f32; 1]) -> (f32, [f32; 1]) {
        let (g, v) = self.0.square(p, g, v);
        (p - self.0.lr * self.0.direction(g, v), [v])
    }
}

struct Momentum(Rule);

impl Element<2> for Momentum {
    #[inline(always)]
    fn update(&self, p: f32, g: f32, [v, b]: [f32; 2]) -> (f32, [f32; 2]) {
        let (g, v) = self.0.square(p, g, v);
        let b = b * self.0.momentum + self.0.direction(g, v);
        (p - self.0.lr * b, [v, b])
    }
}

struct Centered(Rule);

impl Element<2> for Centered {
    #[inline(always)]
    fn update(&self, p: f32, g: f32, [v, a]: [f32; 2]) -> (f32, [f32; 2]) {
        let (g, v) = self.0.square(p, g, v);
        let a = self.0.mean(g, a);
        (p - self.0.lr * self.0.direction(g, v - a * a), [v, a])
    }
}

struct CenteredMomentum(Rule);

impl Element<3> for CenteredMomentum {
    #[inline(always)]
    fn update(&self, p: f32, g: f32, [v, b, a]: [f32; 3]) -> (f32, [f32; 3]) {
        let (g, v) = self.0.square(p, g, v);
        let a = self.0.mean(g, a);
        let b = b * self.0.momentum + self.0.direction(g, v - a * a);
        (p - self.0.lr * b, [v, b, a])
    }
}
