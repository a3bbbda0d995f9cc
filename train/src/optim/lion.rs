//! Lion.

use super::state::Slot;
use super::{Elementwise, Now, Number, Optimizer, Rule, check};
use crate::Result;
use serde::{Deserialize, Serialize};

/// Settings of [`Lion`]; the defaults are the paper's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LionOptions {
    /// Learning rate: a third to a tenth of AdamW's. Default 0.0001.
    pub lr: f64,
    /// Share of the momentum in the direction. Default 0.9.
    pub beta1: f64,
    /// Decay of the momentum. Default 0.99.
    pub beta2: f64,
    /// Decoupled weight decay: three to ten times AdamW's. Default 0.
    pub weight_decay: f64,
}

impl Default for LionOptions {
    fn default() -> Self {
        Self { lr: 1e-4, beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }
    }
}

/// Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2):
///
/// p ← p − lr·(sign(β₁·m + (1 − β₁)·g) + λ·p); m ← β₂·m + (1 − β₂)·g
///
/// State: `exp_avg` (m).
#[derive(Clone, Debug)]
pub struct Lion(LionOptions);

impl Lion {
    /// Errors when an option is out of its range.
    pub fn new(options: LionOptions) -> Result<Self> {
        check::positive("lr", options.lr)?;
        check::below_one("beta1", options.beta1)?;
        check::below_one("beta2", options.beta2)?;
        check::not_negative("weight_decay", options.weight_decay)?;
        Ok(Self(options))
    }
}

impl Optimizer for Lion {
    fn name(&self) -> &str {
        "lion"
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
        vec![Slot::zeros("exp_avg", shape)]
    }

    fn rule(&self, now: Now, _: u64) -> Option<Rule> {
        let LionOptions { beta1, beta2, .. } = self.0;
        Some(Rule::new(Sign {
            lr: now.lr as f32,
            decay: (1.0 - now.lr * now.weight_decay) as f32,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
        }))
    }
}

struct Sign {
    lr: f32,
    decay: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
}

impl Elementwise<1> for Sign {
    #[inline(always)]
    fn update<X: Number>(&self, p: X, g: X, [m]: [X; 1]) -> (X, [X; 1]) {
        let direction = m.clone() * self.beta1 + g.clone() * self.one_minus_beta1;
        let p = p * self.decay - direction.sign() * self.lr;
        (p, [m * self.beta2 + g * self.one_minus_beta2])
    }
}
