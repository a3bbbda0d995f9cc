//! Averages of the weights over the steps.

use super::check;
use super::pass::{CHUNK, for_each, in_place, lerp, read};
use crate::tensors::{self, Slice};
use crate::{Error, Result};
use candle_core::{Device, Var};
use mobula_nn::Params;
use std::collections::HashMap;
use std::path::Path;

/// The exponential moving average of a model's parameters (Polyak & Juditsky 1992), as PyTorch's
/// `AveragedModel` with `get_ema_multi_avg_fn` computes it: the first update copies the
/// parameters, each later one moves the averages towards them by 1 − decay.
#[derive(Clone, Debug)]
pub struct Ema {
    decay: f64,
    updates: u64,
    averages: Vec<Vec<f32>>,
}

impl Ema {
    /// Averages over about 1 / (1 − decay) steps. Errors when `decay` is not from 0 to below 1.
    pub fn new(decay: f64) -> Result<Self> {
        check::below_one("ema", decay)?;
        Ok(Self { decay, updates: 0, averages: Vec::new() })
    }

    /// How much of the averages each update keeps.
    pub fn decay(&self) -> f64 {
        self.decay
    }

    /// Updates done.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The averages, by parameter in the order of their names. Empty before the first update.
    pub fn averages(&self) -> &[Vec<f32>] {
        &self.averages
    }

    /// Takes in the parameters after a step.
    pub fn update(&mut self, params: &Params) -> Result<()> {
        let vars = params.vars();
        if self.updates == 0 {
            self.averages = vars.iter().map(|(_, var)| vec![0.0; var.elem_count()]).collect();
        }
        self.check(params)?;
        // Only rounding tells a copy from a step of the whole way, and `lerp` has none then.
        let weight = if self.updates == 0 { 1.0 } else { (1.0 - self.decay) as f32 };
        for ((_, var), averages) in vars.iter().zip(&mut self.averages) {
            read(var, |values| {
                approach(averages, values, weight);
                Ok(())
            })?;
        }
        self.updates += 1;
        Ok(())
    }

    /// Exchanges the parameters and the averages: once to evaluate with the averages, once more to
    /// go on. Does nothing before the first update.
    pub fn swap(&mut self, params: &Params) -> Result<()> {
        if self.updates == 0 {
            return Ok(());
        }
        self.check(params)?;
        for ((_, var), averages) in params.vars().iter().zip(&mut self.averages) {
            in_place(var, |values| {
                averages.swap_with_slice(values);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Runs `evaluate` while the parameters are the averages, and puts them back, also when it
    /// panics.
    pub(super) fn with_averages<T>(
        &mut self,
        params: &Params,
        evaluate: impl FnOnce() -> T,
    ) -> Result<T> {
        self.swap(params)?;
        let mut swapped = Swapped { ema: self, params, is_over: false };
        let result = evaluate();
        swapped.put_back()?;
        Ok(result)
    }

    /// Writes the averages as a model's weights are written, so that `Params::load` reads them
    /// too. Before the first update these are the parameters.
    pub fn save(&self, params: &Params, path: &Path) -> Result<()> {
        let read = |(name, var): (String, Var)| -> Result<_> {
            Ok((name, var.dims().to_vec(), var.flatten_all()?.to_vec1::<f32>()?))
        };
        let weights = params.vars().into_iter().map(read).collect::<Result<Vec<_>>>()?;
        let buffers = params.buffers().into_iter().map(read).collect::<Result<Vec<_>>>()?;
        self.write(slices(&weights), slices(&buffers), path)
    }

    /// The same, of weights and buffers that were read.
    pub(crate) fn write<'a>(
        &'a self,
        mut weights: Vec<(String, Slice<'a>)>,
        buffers: Vec<(String, Slice<'a>)>,
        path: &Path,
    ) -> Result<()> {
        for ((_, weights), averages) in weights.iter_mut().zip(&self.averages) {
            weights.values = averages;
        }
        let metadata = HashMap::from([("updates".to_owned(), self.updates.to_string())]);
        tensors::write(path, weights.into_iter().chain(buffers), Some(metadata))
    }

    /// As large, of nothing.
    pub(crate) fn blank(&self, params: &Params) -> Self {
        let averages = params.vars().iter().map(|(_, var)| vec![0.0; var.elem_count()]).collect();
        Self { decay: self.decay, updates: 0, averages }
    }

    /// Becomes the same, in the memory that it has.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        (self.decay, self.updates) = (other.decay, other.updates);
        self.averages.clone_from(&other.averages);
    }

    /// As after so many updates, whose averages are yet to be set, unless there are as many.
    pub(crate) fn begin_at(&mut self, updates: u64, lens: impl Iterator<Item = usize>) {
        let lens: Vec<usize> = lens.take(if updates == 0 { 0 } else { usize::MAX }).collect();
        if !self.averages.iter().map(Vec::len).eq(lens.iter().copied()) {
            self.averages = lens.into_iter().map(|len| vec![0.0; len]).collect();
        }
        self.updates = updates;
    }

    pub(crate) fn averages_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        self.averages.iter_mut()
    }

    /// Reads what [`Ema::save`] wrote for the same parameters.
    pub fn load(&mut self, params: &Params, path: &Path) -> Result<()> {
        let bad = |reason: String| Error::OptimizerState { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
        let (_, header) =
            safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let updates = header.metadata().as_ref().and_then(|m| m.get("updates")?.parse().ok());
        let updates = updates.ok_or_else(|| bad("it has no count of updates".to_owned()))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        let mut averages = Vec::new();
        for (name, var) in params.vars() {
            let tensor = tensors.get(&name).ok_or_else(|| bad(format!("{name} is missing")))?;
            if tensor.shape() != var.shape() {
                let (expected, got) = (var.dims(), tensor.dims());
                return Err(bad(format!("{name} has shape {got:?}, expected {expected:?}")));
            }
            averages.push(tensor.flatten_all()?.to_vec1::<f32>()?);
        }
        let averages = if updates == 0 { Vec::new() } else { averages };
        (self.updates, self.averages) = (updates, averages);
        Ok(())
    }

    fn check(&self, params: &Params) -> Result<()> {
        let expected = self.averages.iter().map(Vec::len);
        let got = params.vars().into_iter().map(|(_, var)| var.elem_count());
        if expected.clone().eq(got.clone()) {
            return Ok(());
        }
        Err(Error::OptimizerModel { expected: expected.sum(), got: got.sum() })
    }
}

fn slices(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<(String, Slice<'_>)> {
    tensors.iter().map(|(name, shape, values)| (name.clone(), Slice { shape, values })).collect()
}

/// Puts the parameters back when dropped.
struct Swapped<'a> {
    ema: &'a mut Ema,
    params: &'a Params,
    is_over: bool,
}

impl Swapped<'_> {
    fn put_back(&mut self) -> Result<()> {
        self.is_over = true;
        self.ema.swap(self.params)
    }
}

impl Drop for Swapped<'_> {
    fn drop(&mut self) {
        if !self.is_over
            && let Err(error) = self.put_back()
        {
            tracing::error!(%error, "the model keeps the averages of its weights");
        }
    }
}

/// Moves the averages towards the values by so much of the way.
fn approach(averages: &mut [f32], values: &[f32], weight: f32) {
    let chunks = averages.chunks_mut(CHUNK).zip(values.chunks(CHUNK)).collect();
    for_each(chunks, |(averages, values): (&mut [f32], &[f32])| {
        let moved = |(average, value): (&mut f32, &f32)| *average = lerp(*average, *value, weight);
        pulp::Arch::new().dispatch(|| averages.iter_mut().zip(values).for_each(moved));
    });
}
