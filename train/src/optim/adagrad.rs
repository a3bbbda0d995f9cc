//! Adagrad.

use super::state::Slot;
use super::{Elementwise, Now, Number, Optimizer, Rule, check};
use crate::Result;
use serde::{Deserialize, Serialize};

/// Settings of [`Adagrad`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdagradOptions {
    /// Learning rate. Default 0.01.
    pub lr: f64,
    /// At step t the learning rate is divided by 1 + (t − 1) · this. Default 0.
    pub lr_decay: f64,
    /// L2 penalty: this times the parameter is added to its gradient. Default 0.
    pub weight_decay: f64,
    /// Where the sums of squares begin. Default 0.
    pub initial_accumulator_value: f64,
    /// Added to the denominator. Default 1e-10.
    pub eps: f64,
}

impl Default for AdagradOptions {
    fn default() -> Self {
        Self {
            lr: 1e-2,
            lr_decay: 0.0,
            weight_decay: 0.0,
            initial_accumulator_value: 0.0,
            eps: 1e-10,
        }
    }
}

/// Adagrad (Duchi, Hazan & Singer 2011), as PyTorch computes it:
///
/// s ← s + g²; p ← p − lr / (1 + (t − 1)·decay) · g / (√s + ε)
///
/// where g is the gradient + λ·p. State: `sum` (s).
#[derive(Clone, Debug)]
pub struct Adagrad(AdagradOptions);

impl Adagrad {
    /// Errors when an option is out of its range.
    pub fn new(options: AdagradOptions) -> Result<Self> {
        check::positive("lr", options.lr)?;
        check::not_negative("lr_decay", options.lr_decay)?;
        check::not_negative("weight_decay", options.weight_decay)?;
        check::not_negative("initial_accumulator_value", options.initial_accumulator_value)?;
        check::positive("eps", options.eps)?;
        Ok(Self(options))
    }
}

impl Optimizer for Adagrad {
    fn name(&self) -> &str {
        "adagrad"
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
        vec![Slot::filled("sum", shape, self.0.initial_accumulator_value as f32)]
    }

    fn rule(&self, now: Now, steps: u64) -> Option<Rule> {
        let before = (steps - 1) as f64;
        Some(Rule::new(SumOfSquares {
            lr: (now.lr / (1.0 + before * self.0.lr_decay)) as f32,
            l2: now.weight_decay as f32,
            eps: self.0.eps as f32,
        }))
    }
}

struct SumOfSquares {
    lr: f32,
    l2: f32,
    eps: f32,
}

impl Elementwise<1> for SumOfSquares {
    #[inline(always)]
    fn update<X: Number>(&self, p: X, g: X, [sum]: [X; 1]) -> (X, [X; 1]) {
        let g = g + p.clone() * self.l2;
        let sum = sum + g.clone().square();
        (p - g / (sum.clone().sqrt() + self.eps) * self.lr, [sum])
    }
}
