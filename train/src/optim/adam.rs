//! Adam and AdamW.

use super::state::Slot;
use super::{Elementwise, Now, Number, Optimizer, Rule, check};
use crate::Result;
use serde::{Deserialize, Serialize};

/// Settings of [`AdamW`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWOptions {
    /// Learning rate. Default 0.001.
    pub lr: f64,
    /// Decay of the first moment. Default 0.9.
    pub beta1: f64,
    /// Decay of the second moment. Default 0.999.
    pub beta2: f64,
    /// Added to the denominator. Default 1e-8.
    pub eps: f64,
    /// Decoupled weight decay. Default 0.01.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// Settings of [`Adam`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamOptions {
    /// Learning rate. Default 0.001.
    pub lr: f64,
    /// Decay of the first moment. Default 0.9.
    pub beta1: f64,
    /// Decay of the second moment. Default 0.999.
    pub beta2: f64,
    /// Added to the denominator. Default 1e-8.
    pub eps: f64,
    /// L2 penalty: this times the parameter is added to its gradient. Default 0.
    pub weight_decay: f64,
}

impl Default for AdamOptions {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), as PyTorch computes it:
///
/// p ← p·(1 − lr·λ) − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
///
/// with m ← β₁·m + (1 − β₁)·g and v ← β₂·v + (1 − β₂)·g². State: `exp_avg` (m), `exp_avg_sq` (v).
#[derive(Clone, Debug)]
pub struct AdamW(AdamWOptions);

impl AdamW {
    /// Errors when an option is out of its range.
    pub fn new(options: AdamWOptions) -> Result<Self> {
        let AdamWOptions { lr, beta1, beta2, eps, weight_decay } = options;
        validate(lr, beta1, beta2, eps, weight_decay)?;
        Ok(Self(options))
    }
}

/// Adam (Kingma & Ba 2015, arXiv 1412.6980) with an L2 penalty, as PyTorch computes it: like
/// [`AdamW`] without its decay, for the gradient g + λ·p. State: `exp_avg`, `exp_avg_sq`.
#[derive(Clone, Debug)]
pub struct Adam(AdamOptions);

impl Adam {
    /// Errors when an option is out of its range.
    pub fn new(options: AdamOptions) -> Result<Self> {
        let AdamOptions { lr, beta1, beta2, eps, weight_decay } = options;
        validate(lr, beta1, beta2, eps, weight_decay)?;
        Ok(Self(options))
    }
}

fn validate(lr: f64, beta1: f64, beta2: f64, eps: f64, weight_decay: f64) -> Result<()> {
    check::positive("lr", lr)?;
    check::below_one("beta1", beta1)?;
    check::below_one("beta2", beta2)?;
    check::positive("eps", eps)?;
    check::not_negative("weight_decay", weight_decay)
}

fn moments(shape: &[usize]) -> Vec<Slot> {
    vec![Slot::zeros("exp_avg", shape), Slot::zeros("exp_avg_sq", shape)]
}

impl Optimizer for AdamW {
    fn name(&self) -> &str {
        "adamw"
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
        moments(shape)
    }

    fn rule(&self, now: Now, steps: u64) -> Option<Rule> {
        let AdamWOptions { beta1, beta2, eps, .. } = self.0;
        Some(Rule::new(Moments {
            decay: (1.0 - now.lr * now.weight_decay) as f32,
            ..Moments::new(now.lr, beta1, beta2, eps, steps)
        }))
    }
}

impl Optimizer for Adam {
    fn name(&self) -> &str {
        "adam"
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
        moments(shape)
    }

    fn rule(&self, now: Now, steps: u64) -> Option<Rule> {
        let AdamOptions { beta1, beta2, eps, .. } = self.0;
        Some(Rule::new(Moments {
            l2: now.weight_decay as f32,
            ..Moments::new(now.lr, beta1, beta2, eps, steps)
        }))
    }
}

/// The scalars of one step. Rounded once each: 1 − β₂ taken from the rounded β₂ would be off by
/// 1e-5.
struct Moments {
    decay: f32,
    l2: f32,
    step_size: f32,
    sqrt_correction2: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    eps: f32,
}

impl Moments {
    fn new(lr: f64, beta1: f64, beta2: f64, eps: f64, steps: u64) -> Self {
        let t = steps as f64;
        Self {
            decay: 1.0,
            l2: 0.0,
            step_size: (lr / (1.0 - beta1.powf(t))) as f32,
            sqrt_correction2: (1.0 - beta2.powf(t)).sqrt() as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            eps: eps as f32,
        }
    }
}

impl Elementwise<2> for Moments {
    #[inline(always)]
    fn update<X: Number>(&self, p: X, g: X, [m, v]: [X; 2]) -> (X, [X; 2]) {
        let g = g + p.clone() * self.l2;
        let m = m.lerp(g.clone(), self.one_minus_beta1);
        let v = v * self.beta2 + g.square() * self.one_minus_beta2;
        let denominator = v.clone().sqrt() / self.sqrt_correction2 + self.eps;
        (p * self.decay - m.clone() / denominator * self.step_size, [m, v])
    }
}
