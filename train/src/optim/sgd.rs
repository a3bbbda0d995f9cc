//! Gradient descent.

use super::state::Slot;
use super::{Elementwise, Now, Number, Optimizer, Rule, check};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Settings of [`Sgd`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SgdOptions {
    /// Learning rate. Default 0.001.
    pub lr: f64,
    /// How much of the last direction is kept. Default 0: none, and no state.
    pub momentum: f64,
    /// How much less of the gradient is added to the direction. Default 0.
    pub dampening: f64,
    /// L2 penalty: this times the parameter is added to its gradient. Default 0.
    pub weight_decay: f64,
    /// Nesterov's momentum. Needs a momentum, and no dampening. Default: no.
    pub nesterov: bool,
}

impl Default for SgdOptions {
    fn default() -> Self {
        Self { lr: 1e-3, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false }
    }
}

/// Stochastic gradient descent with momentum μ and dampening τ (Sutskever et al. 2013), as PyTorch
/// computes it:
///
/// b ← μ·b + (1 − τ)·g, at the first step b ← g; p ← p − lr·b, or p − lr·(g + μ·b) with Nesterov's
///
/// where g is the gradient + λ·p. State: `momentum_buffer` (b), if there is a momentum.
#[derive(Clone, Debug)]
pub struct Sgd(SgdOptions);

impl Sgd {
    /// Errors when an option is out of its range.
    pub fn new(options: SgdOptions) -> Result<Self> {
        check::positive("lr", options.lr)?;
        check::below_one("momentum", options.momentum)?;
        check::below_one("dampening", options.dampening)?;
        check::not_negative("weight_decay", options.weight_decay)?;
        if options.nesterov && (options.momentum == 0.0 || options.dampening != 0.0) {
            let expected = "false, or true with a momentum and no dampening";
            return Err(Error::Option { option: "nesterov", got: "true".to_owned(), expected });
        }
        Ok(Self(options))
    }
}

impl Optimizer for Sgd {
    fn name(&self) -> &str {
        "sgd"
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
        match self.0.momentum {
            0.0 => Vec::new(),
            _ => vec![Slot::zeros("momentum_buffer", shape)],
        }
    }

    fn rule(&self, now: Now, steps: u64) -> Option<Rule> {
        let (lr, l2) = (now.lr as f32, now.weight_decay as f32);
        let SgdOptions { momentum, dampening, nesterov, .. } = self.0;
        if momentum == 0.0 {
            return Some(Rule::new(Plain { lr, l2 }));
        }
        // The first direction is the gradient, undampened.
        let fresh = if steps == 1 { 1.0 } else { 1.0 - dampening };
        let (momentum, fresh) = (momentum as f32, fresh as f32);
        let (kept, of_gradient) = if nesterov { (momentum, 1.0) } else { (1.0, 0.0) };
        Some(Rule::new(Momentum { lr, l2, momentum, fresh, kept, of_gradient }))
    }
}

struct Plain {
    lr: f32,
    l2: f32,
}

impl Elementwise<0> for Plain {
    #[inline(always)]
    fn update<X: Number>(&self, p: X, g: X, _: [X; 0]) -> (X, [X; 0]) {
        (p.clone() - (g + p * self.l2) * self.lr, [])
    }
}

struct Momentum {
    lr: f32,
    l2: f32,
    momentum: f32,
    fresh: f32,
    /// The direction is `of_gradient`·g + `kept`·b.
    kept: f32,
    of_gradient: f32,
}

impl Elementwise<1> for Momentum {
    #[inline(always)]
    fn update<X: Number>(&self, p: X, g: X, [buffer]: [X; 1]) -> (X, [X; 1]) {
        let g = g + p.clone() * self.l2;
        let buffer = buffer * self.momentum + g.clone() * self.fresh;
        (p - (g * self.of_gradient + buffer.clone() * self.kept) * self.lr, [buffer])
    }
}
