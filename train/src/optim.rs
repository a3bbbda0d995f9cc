//! Optimizers whose state is plain data: checkpointing one is writing its fields down.

use crate::{Error, Result};
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};
use mobula_nn::{Gradients, Params};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

/// Parameters below this size are updated on one thread.
const CHUNK: usize = 1 << 14;

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

impl AdamWOptions {
    fn validate(&self) -> Result<()> {
        let check = |option, value: f64, good: bool, expected| match good {
            true => Ok(()),
            false => Err(Error::Option { option, got: value.to_string(), expected }),
        };
        let positive = "a finite number above 0";
        check("lr", self.lr, self.lr.is_finite() && self.lr > 0.0, positive)?;
        check("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "from 0 to below 1")?;
        check("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "from 0 to below 1")?;
        check("eps", self.eps, self.eps.is_finite() && self.eps > 0.0, positive)?;
        let decay = self.weight_decay;
        check(
            "weight_decay",
            decay,
            decay.is_finite() && decay >= 0.0,
            "a finite number, 0 or above",
        )
    }
}

/// AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), as PyTorch computes it:
///
/// p ← p·(1 − lr·λ) − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    step: u64,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

impl AdamW {
    /// A fresh optimizer. Errors when an option is out of its range.
    pub fn new(options: AdamWOptions) -> Result<Self> {
        options.validate()?;
        Ok(Self { options, step: 0, exp_avg: Vec::new(), exp_avg_sq: Vec::new() })
    }

    /// The settings.
    pub fn options(&self) -> &AdamWOptions {
        &self.options
    }

    /// Changes the learning rate from the next step on.
    pub fn set_lr(&mut self, lr: f64) {
        self.options.lr = lr;
    }

    /// Steps done: the t of the bias correction.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The moments `exp_avg` and `exp_avg_sq`, flat, in the order of the parameters' names.
    /// Empty before the first step.
    pub fn moments(&self) -> (&[f32], &[f32]) {
        (&self.exp_avg, &self.exp_avg_sq)
    }

    /// Updates the parameters in place.
    pub fn step(&mut self, params: &Params, gradients: &Gradients) -> Result<()> {
        let (expected, got) = (self.exp_avg.len(), gradients.values().len());
        if self.step > 0 && expected != got {
            return Err(Error::OptimizerModel { expected, got });
        }
        self.exp_avg.resize(gradients.values().len(), 0.0);
        self.exp_avg_sq.resize(gradients.values().len(), 0.0);
        self.step += 1;
        let factors = Factors::new(&self.options, self.step);
        for ((_, range), (_, var)) in gradients.places().iter().zip(params.vars()) {
            let update = Update {
                factors,
                gradient: &gradients.values()[range.clone()],
                moments: RefCell::new((
                    &mut self.exp_avg[range.clone()],
                    &mut self.exp_avg_sq[range.clone()],
                )),
            };
            var.inplace_op1(&update)?;
        }
        Ok(())
    }

    /// Writes `<param>.exp_avg` and `<param>.exp_avg_sq`, in the parameters' shapes, as
    /// safetensors; the step count and the settings as its metadata.
    pub fn save(&self, params: &Params, path: &Path) -> Result<()> {
        let gradients = Gradients::zeros(params);
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for ((name, range), (_, var)) in gradients.places().iter().zip(params.vars()) {
            for (kind, moments) in [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)] {
                if let Some(values) = moments.get(range.clone()) {
                    let tensor =
                        Tensor::from_slice(values, var.shape(), &candle_core::Device::Cpu)?;
                    tensors.push((format!("{name}.{kind}"), tensor));
                }
            }
        }
        let options = serde_json::to_string(&self.options).map_err(mobula_core::Error::layer)?;
        let metadata = HashMap::from([
            ("optimizer".to_owned(), "adamw".to_owned()),
            ("step".to_owned(), self.step.to_string()),
            ("options".to_owned(), options),
        ]);
        safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| {
            mobula_core::Error::codec("encode", path.display().to_string(), error).into()
        })
    }

    /// Reads what [`AdamW::save`] wrote for the same parameters. The settings stay those given to
    /// [`AdamW::new`].
    pub fn load(&mut self, params: &Params, path: &Path) -> Result<()> {
        let bad = |reason: String| Error::OptimizerState { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
        let (_, header) =
            safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let step = header.metadata().as_ref().and_then(|m| m.get("step")?.parse().ok());
        let step = step.ok_or_else(|| bad("it has no step count".to_owned()))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &candle_core::Device::Cpu)?;
        let gradients = Gradients::zeros(params);
        let len = if step == 0 { 0 } else { gradients.values().len() };
        let mut moments = [vec![0.0; len], vec![0.0; len]];
        // Before the first step there are no moments, in memory and in the file.
        let saved = gradients.places().iter().zip(params.vars()).filter(|_| len > 0);
        for ((name, range), (_, var)) in saved {
            for (kind, into) in ["exp_avg", "exp_avg_sq"].iter().zip(&mut moments) {
                let key = format!("{name}.{kind}");
                let tensor = tensors.get(&key).ok_or_else(|| bad(format!("{key} is missing")))?;
                if tensor.shape() != var.shape() {
                    let (expected, got) = (var.dims(), tensor.dims());
                    return Err(bad(format!("{key} has shape {got:?}, expected {expected:?}")));
                }
                into[range.clone()].copy_from_slice(&tensor.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        let [exp_avg, exp_avg_sq] = moments;
        *self = Self { options: self.options, step, exp_avg, exp_avg_sq };
        Ok(())
    }
}

/// The scalars of one step.
#[derive(Clone, Copy)]
struct Factors {
    decay: f32,
    step_size: f32,
    sqrt_correction2: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    eps: f32,
}

impl Factors {
    fn new(options: &AdamWOptions, step: u64) -> Self {
        let t = step as f64;
        Self {
            decay: (1.0 - options.lr * options.weight_decay) as f32,
            step_size: (options.lr / (1.0 - options.beta1.powf(t))) as f32,
            sqrt_correction2: (1.0 - options.beta2.powf(t)).sqrt() as f32,
            // Rounded once each: 1 − β₂ taken from the rounded β₂ would be off by 1e-5.
            one_minus_beta1: (1.0 - options.beta1) as f32,
            beta2: options.beta2 as f32,
            one_minus_beta2: (1.0 - options.beta2) as f32,
            eps: options.eps as f32,
        }
    }

    /// One pass over everything: gradient, both moments, parameter.
    fn apply(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m += (g - *m) * self.one_minus_beta1;
            *v = *v * self.beta2 + g * g * self.one_minus_beta2;
            let denominator = v.sqrt() / self.sqrt_correction2 + self.eps;
            *p = *p * self.decay - self.step_size * (*m / denominator);
        }
    }
}

/// The update of one parameter, in place in candle's own storage.
struct Update<'a> {
    factors: Factors,
    gradient: &'a [f32],
    moments: RefCell<(&'a mut [f32], &'a mut [f32])>,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("adamw: expected f32 parameters")
        };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("adamw: expected contiguous parameters, got {layout:?}")
        };
        let mut moments = self.moments.borrow_mut();
        let (m, v) = &mut *moments;
        let (p, factors) = (&mut values[start..end], self.factors);
        if p.len() <= CHUNK {
            factors.apply(p, self.gradient, m, v);
        } else {
            let chunks = p.par_chunks_mut(CHUNK).zip(self.gradient.par_chunks(CHUNK));
            let chunks = chunks.zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK));
            chunks.for_each(|(((p, g), m), v)| factors.apply(p, g, m, v));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};
    use mobula_nn::Init;

    fn one_parameter(value: f64) -> (Params, Var) {
        let params = Params::new(0, &Device::Cpu);
        params.get(2, "w", Init::Const(value)).expect("parameter");
        let var = params.vars().remove(0).1;
        (params, var)
    }

    fn gradients(params: &Params, var: &Var, slope: f64) -> Gradients {
        let loss = (var.as_tensor() * slope).and_then(|t| t.sum_all()).expect("loss");
        let mut gradients = Gradients::zeros(params);
        gradients.backward(&loss, 1.0).expect("gradients");
        gradients
    }

    /// The paper's update written out in f64, three steps with changing gradients.
    #[test]
    fn steps_match_the_formula() {
        let options = AdamWOptions { lr: 0.1, weight_decay: 0.2, ..Default::default() };
        let (params, var) = one_parameter(1.0);
        let mut adamw = AdamW::new(options).expect("options");
        let (mut p, mut m, mut v) = (1.0f64, 0.0f64, 0.0f64);
        for (t, g) in [(1, 0.5f64), (2, -1.5), (3, 2.0)] {
            adamw.step(&params, &gradients(&params, &var, g)).expect("step");
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.999f64.powi(t)));
            p -= 0.1 * 0.2 * p;
            p -= 0.1 * m_hat / (v_hat.sqrt() + 1e-8);
            let got = var.to_dtype(DType::F64).expect("cast").to_vec1::<f64>().expect("values");
            assert!(got.iter().all(|x| (x - p).abs() < 1e-5), "step {t}: {got:?}, expected {p}");
        }
    }

    #[test]
    fn state_survives_a_round_trip_bit_by_bit() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("optimizer.safetensors");
        let (params, var) = one_parameter(1.0);
        let mut adamw = AdamW::new(AdamWOptions::default()).expect("options");
        adamw.step(&params, &gradients(&params, &var, 0.3)).expect("step");
        adamw.save(&params, &path).expect("save");
        let mut restored = AdamW::new(AdamWOptions::default()).expect("options");
        restored.load(&params, &path).expect("load");
        assert_eq!(restored.moments(), adamw.moments());
        assert_eq!(restored.steps(), 1);

        let other = Params::new(0, &Device::Cpu);
        other.get(3, "w", Init::Zeros).expect("parameter");
        let error = restored.load(&other, &path).expect_err("another shape").to_string();
        assert!(error.contains("w.exp_avg has shape [2], expected [3]"), "{error}");
    }

    #[test]
    fn options_out_of_range_are_refused() {
        let options = AdamWOptions { lr: -1.0, ..Default::default() };
        let error = AdamW::new(options).expect_err("negative").to_string();
        assert_eq!(error, "option lr is -1, expected a finite number above 0");
    }
}
