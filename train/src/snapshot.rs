//! What a run is at one step, apart from its program: copied while the next step computes, and then
//! written to a checkpoint, or given to a rank that has lost its own.

use crate::collective::Collective;
use crate::optim::{Ema, Kept, OptimizerState, optimizer_file};
use crate::outer::{OUTER, Outer};
use crate::share::Share;
use crate::state::{STATE, SavedState, TrainState};
use crate::tensors::{self, Slice};
use crate::{Error, Result};
use candle_core::{CpuStorage, Storage, Tensor, Var};
use mobula_nn::{Model, ModelSpec, Params};
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;

/// What is yet to be copied. Holds on to the tensors, so that no step may change them.
#[derive(Clone)]
pub(crate) struct Source {
    saved: SavedState,
    stopped: bool,
    /// `None` where only the optimizer's state is copied, and another rank has all else.
    params: Option<Params>,
    /// A pass changes them, so these are copies.
    buffers: Vec<(String, Tensor)>,
    optimizer: Kept,
    ema: Option<Arc<Ema>>,
    outer: Option<Arc<OptimizerState>>,
}

/// The copy.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) saved: SavedState,
    /// Before its last epoch, which no checkpoint says: it may go on later.
    pub(crate) stopped: bool,
    pub(crate) weights: Vec<Named>,
    pub(crate) buffers: Vec<Named>,
    pub(crate) optimizer: OptimizerState,
    pub(crate) ema: Option<Ema>,
    outer: Option<OptimizerState>,
}

/// A tensor of a model.
#[derive(Debug, Default)]
pub(crate) struct Named {
    name: String,
    shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// What goes with a checkpoint's tensors and is the same in all of a run.
#[derive(Clone, Debug)]
pub(crate) struct Labels {
    pub(crate) spec: ModelSpec,
    pub(crate) optimizer: String,
    pub(crate) options: serde_json::Value,
    /// The parameters that this rank updates, where others update the rest.
    pub(crate) share: Option<Share>,
    /// Name and options of an outer optimizer.
    outer: Option<(String, serde_json::Value)>,
}

impl Labels {
    pub(crate) fn of(state: &TrainState) -> Self {
        let optimizer = state.updater.optimizer();
        let (spec, options) = (state.model.spec().clone(), optimizer.options());
        let share = state.updater.shared().cloned();
        let outer = state.outer.as_ref().map(Outer::optimizer);
        let outer = outer.map(|outer| (outer.name().to_owned(), outer.options()));
        Self { spec, optimizer: optimizer.name().to_owned(), options, share, outer }
    }
}

impl Source {
    pub(crate) fn of(state: &TrainState, saved: SavedState) -> Result<Self> {
        let params = state.model.params();
        let copy = |(name, var): (String, Var)| Ok((name, var.as_detached_tensor().copy()?));
        Ok(Self {
            saved,
            stopped: state.is_stopped(),
            buffers: params.buffers().into_iter().map(copy).collect::<Result<_>>()?,
            optimizer: state.updater.kept(params)?,
            ema: state.updater.shared_ema(),
            outer: state.outer.as_ref().map(Outer::state),
            params: Some(params.clone()),
        })
    }

    /// This rank's part of the optimizer's state alone.
    pub(crate) fn of_optimizer(state: &TrainState, saved: SavedState) -> Result<Self> {
        Ok(Self {
            saved,
            stopped: state.is_stopped(),
            params: None,
            buffers: Vec::new(),
            optimizer: state.updater.kept(state.model.params())?,
            ema: None,
            outer: None,
        })
    }

    pub(crate) fn saved(&self) -> &SavedState {
        &self.saved
    }

    /// Whether a thread may copy it while another one computes.
    pub(crate) fn is_on_cpu(&self) -> bool {
        self.params.as_ref().is_none_or(|params| params.device().is_cpu())
    }

    pub(crate) fn copy(self, mut into: Snapshot) -> Result<Snapshot> {
        (into.saved, into.stopped) = (self.saved, self.stopped);
        let weights = self.params.map_or_else(Vec::new, |params| params.vars());
        into.weights.resize_with(weights.len(), Named::default);
        into.buffers.resize_with(self.buffers.len(), Named::default);
        for ((name, var), to) in weights.iter().zip(&mut into.weights) {
            to.fill(name, var)?;
        }
        for ((name, buffer), to) in self.buffers.iter().zip(&mut into.buffers) {
            to.fill(name, buffer)?;
        }
        self.optimizer.copy_to(&mut into.optimizer)?;
        match (&mut into.ema, self.ema) {
            (Some(to), Some(from)) => to.copy_from(&from),
            (to, from) => *to = from.map(|from| (*from).clone()),
        }
        match (&mut into.outer, self.outer) {
            (Some(to), Some(from)) => to.copy_from(&from),
            (to, from) => *to = from.map(|from| (*from).clone()),
        }
        Ok(into)
    }
}

impl Named {
    pub(crate) fn fill(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.name.clear();
        self.name.push_str(name);
        self.shape.clear();
        self.shape.extend_from_slice(tensor.dims());
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => {
                self.values.clear();
                self.values.extend_from_slice(&values[start..end]);
            }
            _ => {
                drop(storage);
                self.values = tensor.flatten_all()?.to_vec1()?;
            }
        }
        Ok(())
    }

    fn slice(&self) -> (String, Slice<'_>) {
        (self.name.clone(), Slice { shape: &self.shape, values: &self.values })
    }

    pub(crate) fn put(&self, var: &Var) -> Result<()> {
        Ok(var.set(&Tensor::from_slice(&self.values, self.shape.as_slice(), var.device())?)?)
    }
}

impl Snapshot {
    /// Of the size of a run, or of the optimizer's state alone, in memory that the system has yet to give.
    pub(crate) fn blank(state: &TrainState, is_whole: bool) -> Result<Self> {
        let params = state.model.params();
        let blank = |vars: Vec<(String, Var)>| {
            let vars = vars.into_iter().filter(|_| is_whole);
            let values = vars.map(|(_, var)| vec![0.0; var.elem_count()]);
            values.map(|values| Named { values, ..Named::default() }).collect()
        };
        Ok(Self {
            weights: blank(params.vars()),
            buffers: blank(params.buffers()),
            optimizer: state.updater.fresh_state(params)?,
            ema: state.updater.shared_ema().filter(|_| is_whole).map(|ema| ema.blank(params)),
            ..Self::default()
        })
    }

    /// Has the system give its memory now.
    pub(crate) fn touch(mut self) -> Self {
        self.tensors_mut().for_each(|values| values.fill(1.0));
        self
    }

    pub(crate) fn of(state: &TrainState, saved: SavedState) -> Result<Self> {
        Source::of(state, saved)?.copy(Self::default())
    }

    /// Writes `model.safetensors`, `model.json`, `optimizer.safetensors`, `state.json`, and
    /// `ema.safetensors` and `outer.safetensors` where there are such things; but not what is a part of an optimizer's state.
    pub(crate) fn write(&self, dir: &Path, labels: &Labels) -> Result<()> {
        let buffers = || self.buffers.iter().map(Named::slice);
        let weights = || self.weights.iter().map(Named::slice);
        tensors::write(&dir.join(Model::WEIGHTS_FILE), weights().chain(buffers()), None)?;
        json(&dir.join(Model::SPEC_FILE), &labels.spec)?;
        if labels.share.is_none() {
            self.write_optimizer(dir, labels)?;
        }
        if let Some(ema) = &self.ema {
            ema.write(weights().collect(), buffers().collect(), &dir.join(crate::optim::EMA))?;
        }
        if let (Some(outer), Some((name, options))) = (&self.outer, &labels.outer) {
            outer.write(0..outer.params.len(), name, options, &dir.join(OUTER))?;
        }
        json(&dir.join(STATE), &self.saved)
    }

    /// Writes `optimizer.safetensors`, or this rank's part of it. Gives its name.
    pub(crate) fn write_optimizer(&self, dir: &Path, labels: &Labels) -> Result<String> {
        let Labels { share, optimizer, options, .. } = labels;
        let params = share.as_ref().map_or(0..self.optimizer.params.len(), Share::params);
        let name = optimizer_file(share.as_ref().map(Share::shard));
        self.optimizer.write(params, optimizer, options, &dir.join(&name))?;
        Ok(name)
    }

    /// Makes a run what this is of.
    pub(crate) fn put(&self, state: &mut TrainState) -> Result<()> {
        let params = state.model.params();
        for (named, (_, var)) in self.weights.iter().zip(params.vars()) {
            named.put(&var)?;
        }
        for (named, (_, var)) in self.buffers.iter().zip(params.buffers()) {
            named.put(&var)?;
        }
        state.updater.resume(self.optimizer.clone(), self.ema.clone(), &self.saved.updater);
        state.resume(&self.saved, self.stopped);
        Ok(())
    }

    fn tensors_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let named = self.weights.iter_mut().chain(&mut self.buffers);
        let slots = self.optimizer.params.iter_mut().flat_map(|param| &mut param.slots);
        let averages = self.ema.iter_mut().flat_map(Ema::averages_mut);
        let named = named.map(|named| named.values.as_mut_slice());
        let slots = slots.map(|slot| slot.values.as_mut_slice());
        named.chain(slots).chain(averages.map(Vec::as_mut_slice))
    }
}

pub(crate) fn broadcast_bytes(
    collective: &dyn Collective,
    bytes: &mut Vec<u8>,
    root: usize,
) -> Result<()> {
    let mut len = [bytes.len() as f64];
    collective.broadcast(&mut len, root)?;
    bytes.resize(len[0] as usize, 0);
    // As numbers, which nothing computes with.
    let mut words: Vec<f32> = bytes.chunks(4).map(word).collect();
    collective.broadcast(&mut words, root)?;
    let words = words.iter().flat_map(|word| word.to_bits().to_le_bytes());
    bytes.iter_mut().zip(words).for_each(|(byte, word)| *byte = word);
    Ok(())
}

/// Gives all ranks what `root` says.
pub(crate) fn broadcast_text(
    collective: &dyn Collective,
    text: &mut String,
    root: usize,
) -> Result<()> {
    let mut bytes = std::mem::take(text).into_bytes();
    broadcast_bytes(collective, &mut bytes, root)?;
    *text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(())
}

fn word(bytes: &[u8]) -> f32 {
    let mut word = [0; 4];
    word[..bytes.len()].copy_from_slice(bytes);
    f32::from_bits(u32::from_le_bytes(word))
}

fn json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(mobula_core::Error::layer)?;
    std::fs::write(path, text)
        .map_err(|e| Error::program(format!("cannot write {}: {e}", path.display())))
}
