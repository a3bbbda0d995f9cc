//! RMSprop.

use super::state::Slot;
use super::{Elementwise, Now, Number, Optimizer, Rule, check};
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

    fn rule(&self, now: Now, _: u64) -> Option<Rule> {
        let RmsPropOptions { alpha, eps, momentum, centered, .. } = self.0;
        let rule = Settings {
            lr: now.lr as f32,
            l2: now.weight_decay as f32,
            alpha: alpha as f32,
            one_minus_alpha: (1.0 - alpha) as f32,
            eps: eps as f32,
            momentum: momentum as f32,
        };
        Some(match (momentum > 0.0, centered) {
            (false, false) => Rule::new(Plain(rule)),
            (true, false) => Rule::new(Momentum(rule)),
            (false, true) => Rule::new(Centered(rule)),
            (true, true) => Rule::new(CenteredMomentum(rule)),
        })
    }
}

struct Settings {
    lr: f32,
    l2: f32,
    alpha: f32,
    one_minus_alpha: f32,
    eps: f32,
    momentum: f32,
}

impl Settings {
    /// The gradient with its penalty, and the mean square.
    #[inline(always)]
    fn square<X: Number>(&self, p: &X, g: X, v: X) -> (X, X) {
        let g = g + p.clone() * self.l2;
        (g.clone(), v * self.alpha + g.square() * self.one_minus_alpha)
    }

    #[inline(always)]
    fn mean<X: Number>(&self, g: &X, a: X) -> X {
        a.lerp(g.clone(), self.one_minus_alpha)
    }

    #[inline(always)]
    fn direction<X: Number>(&self, g: X, square: X) -> X {
        g / (square.sqrt() + self.eps)
    }
}

struct Plain(Settings);

impl Elementwise<1> for Plain {
    #[inline(always)]
    fn update<X: Number>(&self, p: X, g: X, [v]: [X; 1]) -> (X, [X; 1]) {
        let (g, v) = self.0.square(&p, g, v);
        (p - self.0.direction(g, v.clone()) * self.0.lr, [v])
    }
}

struct Momentum(Settings);

impl Elementwise<2> for Momentum {
    #[inline(always)]
    fn update<X: Number>(&self, p: X, g: X, [v, b]: [X; 2]) -> (X, [X; 2]) {
        let (g, v) = self.0.square(&p, g, v);
        let b = b * self.0.momentum + self.0.direction(g, v.clone());
        (p - b.clone() * self.0.lr, [v, b])
    }
}

struct Centered(Settings);

impl Elementwise<2> for Centered {
    #[inline(always)]
    fn update<X: Number>(&self, p: X, g: X, [v, a]: [X; 2]) -> (X, [X; 2]) {
        let (g, v) = self.0.square(&p, g, v);
        let a = self.0.mean(&g, a);
        let variance = v.clone() - a.clone().square();
        (p - self.0.direction(g, variance) * self.0.lr, [v, a])
    }
}

struct CenteredMomentum(Settings);

impl Elementwise<3> for CenteredMomentum {
    #[inline(always)]
    fn update<X: Number>(&self, p: X, g: X, [v, b, a]: [X; 3]) -> (X, [X; 3]) {
        let (g, v) = self.0.square(&p, g, v);
        let a = self.0.mean(&g, a);
        let variance = v.clone() - a.clone().square();
        let b = b * self.0.momentum + self.0.direction(g, variance);
        (p - b.clone() * self.0.lr, [v, b, a])
    }
}
