//! What an optimizer remembers, as named data that is saved and loaded bit by bit.

use super::Optimizer;
use crate::tensors::{self, Slice};
use crate::{Error, Result};
use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use mobula_core::Shard;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

const OPTIMIZER: &str = "optimizer.safetensors";
/// How the files of parts begin.
const OPTIMIZER_PART: &str = "optimizer-";

/// What an [`Optimizer`] remembers of the parameters of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Steps done.
    pub step: u64,
    /// The learning rate of the next step. It begins as the optimizer's; a schedule sets it.
    pub lr: f64,
    /// In the order of the parameters' names.
    pub params: Vec<ParamState>,
}

/// What an optimizer remembers of one parameter.
#[derive(Debug, PartialEq)]
pub struct ParamState {
    /// The parameter's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// How often it was updated: fewer times than others, if it was frozen at first.
    pub steps: u64,
    /// The tensors, in the optimizer's order.
    pub slots: Vec<Slot>,
}

/// A tensor of an optimizer's state.
#[derive(Debug, PartialEq)]
pub struct Slot {
    /// What it is, such as `"exp_avg"`: the end of its name in a file.
    pub kind: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values in row-major order.
    pub values: Vec<f32>,
}

/// Into memory that is there: a state has as many values as its model, or more.
impl Clone for ParamState {
    fn clone(&self) -> Self {
        let (name, shape) = (self.name.clone(), self.shape.clone());
        Self { name, shape, steps: self.steps, slots: self.slots.clone() }
    }

    fn clone_from(&mut self, other: &Self) {
        self.name.clone_from(&other.name);
        self.shape.clone_from(&other.shape);
        self.slots.clone_from(&other.slots);
        self.steps = other.steps;
    }
}

impl Clone for Slot {
    fn clone(&self) -> Self {
        Self { kind: self.kind, shape: self.shape.clone(), values: self.values.clone() }
    }

    fn clone_from(&mut self, other: &Self) {
        self.kind = other.kind;
        self.shape.clone_from(&other.shape);
        self.values.clone_from(&other.values);
    }
}

impl Slot {
    /// A tensor of zeros.
    pub fn zeros(kind: &'static str, shape: &[usize]) -> Self {
        Self::filled(kind, shape, 0.0)
    }

    /// A tensor of one value.
    pub fn filled(kind: &'static str, shape: &[usize], value: f32) -> Self {
        Self { kind, shape: shape.to_vec(), values: vec![value; shape.iter().product()] }
    }
}

impl ParamState {
    /// The tensors, when there are `N` and each has so many values.
    pub(super) fn tensors<const N: usize>(&mut self, lens: [usize; N]) -> Result<&mut [Slot; N]> {
        let got: Vec<_> = self.slots.iter().map(|slot| slot.values.len()).collect();
        let fits = got == lens;
        let error = || Error::OptimizerSlots {
            parameter: self.name.clone(),
            expected: format!("tensors of {lens:?} values"),
            got: format!("{got:?}"),
        };
        match <&mut [Slot; N]>::try_from(self.slots.as_mut_slice()) {
            Ok(slots) if fits => Ok(slots),
            _ => Err(error()),
        }
    }
}

impl OptimizerState {
    /// Values of the parameters that it is of.
    pub fn num_elements(&self) -> usize {
        self.params.iter().map(|param| param.shape.iter().product::<usize>()).sum()
    }

    /// Writes `<param>.<kind>` for each tensor as safetensors; the optimizer's name and settings,
    /// and the step count, as its metadata.
    pub fn save(&self, optimizer: &dyn Optimizer, path: &Path) -> Result<()> {
        self.write(0..self.params.len(), optimizer.name(), &optimizer.options(), path)
    }

    /// The same of these parameters.
    pub(crate) fn write(
        &self,
        params: Range<usize>,
        optimizer: &str,
        options: &serde_json::Value,
        path: &Path,
    ) -> Result<()> {
        let params = &self.params[params];
        let updated = params.iter().filter(|param| param.steps > 0);
        let slots = updated.flat_map(|param| param.slots.iter().map(|slot| (&param.name, slot)));
        let slots = slots.map(|(name, Slot { kind, shape, values })| {
            (format!("{name}.{kind}"), Slice { shape, values })
        });
        let mut metadata = HashMap::from([
            ("optimizer".to_owned(), optimizer.to_owned()),
            ("step".to_owned(), self.step.to_string()),
            ("options".to_owned(), options.to_string()),
        ]);
        let odd = params.iter().filter(|param| param.steps != self.step);
        let odd: BTreeMap<_, _> = odd.map(|param| (&param.name, param.steps)).collect();
        if !odd.is_empty() {
            metadata.insert("steps".to_owned(), serde_json::json!(odd).to_string());
        }
        tensors::write(path, slots, Some(metadata))
    }

    /// Becomes the same, in the memory that it has.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        (self.step, self.lr) = (other.step, other.lr);
        self.params.clone_from(&other.params);
    }

    /// Sets it to what [`OptimizerState::save`] wrote for the same optimizer and parameters. The
    /// learning rate stays. Errors when the file is of others; then nothing has changed.
    pub fn load(&mut self, optimizer: &dyn Optimizer, path: &Path) -> Result<()> {
        let moves = |name: &str, shape: &[usize]| optimizer.param_options(name, shape).is_some();
        self.load_parts(optimizer, &[path.to_owned()], &moves)
    }

    /// The same from several files, each of some parameters, for those that are updated here.
    pub(crate) fn load_parts(
        &mut self,
        optimizer: &dyn Optimizer,
        paths: &[PathBuf],
        moves: &dyn Fn(&str, &[usize]) -> bool,
    ) -> Result<()> {
        let moving = self.params.iter().filter(|param| moves(&param.name, &param.shape));
        let wanted: Vec<String> = moving.map(|param| format!("{}.", param.name)).collect();
        let mut saved = Saved::read(&paths[0], &wanted)?;
        for path in &paths[1..] {
            saved.add(Saved::read(path, &wanted)?);
        }
        if let Some(name) = saved.optimizer.as_deref().filter(|name| *name != optimizer.name()) {
            let reason = format!("it is of the optimizer {name}, expected {}", optimizer.name());
            return Err(saved.bad(reason));
        }
        let load =
            |param: &ParamState| saved.param(param, optimizer, moves(&param.name, &param.shape));
        let params = self.params.iter().map(load).collect::<Result<_>>()?;
        (self.step, self.params) = (saved.step, params);
        Ok(())
    }
}

/// A file of optimizer state.
struct Saved<'a> {
    path: &'a Path,
    optimizer: Option<String>,
    step: u64,
    /// Of the parameters that were updated less often.
    steps: BTreeMap<String, u64>,
    tensors: HashMap<String, Tensor>,
}

impl<'a> Saved<'a> {
    /// The tensors whose names begin with one of these.
    fn read(path: &'a Path, wanted: &[String]) -> Result<Self> {
        let bad = |reason: String| Error::OptimizerState { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
        let (_, header) =
            safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let all = safetensors::SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let is_wanted = |name: &str| wanted.iter().any(|start| name.starts_with(start.as_str()));
        let tensors = all.iter().filter(|(name, _)| is_wanted(name));
        let tensors = tensors.map(|(name, view)| Ok((name.to_owned(), view.load(&Device::Cpu)?)));
        let metadata = header.metadata().clone().unwrap_or_default();
        let step = metadata.get("step").and_then(|step| step.parse().ok());
        let steps = metadata.get("steps").map_or(Ok(BTreeMap::new()), |s| serde_json::from_str(s));
        Ok(Self {
            path,
            optimizer: metadata.get("optimizer").cloned(),
            step: step.ok_or_else(|| bad("it has no step count".to_owned()))?,
            steps: steps.map_err(|error| bad(format!("its steps: {error}")))?,
            tensors: tensors.collect::<Result<_>>()?,
        })
    }

    /// What another file of the same state has.
    fn add(&mut self, other: Self) {
        self.tensors.extend(other.tensors);
        self.steps.extend(other.steps);
    }

    /// A parameter that was never updated has no tensors there, and a frozen one needs none.
    fn param(
        &self,
        param: &ParamState,
        optimizer: &dyn Optimizer,
        moves: bool,
    ) -> Result<ParamState> {
        let (name, shape) = (param.name.clone(), param.shape.clone());
        let steps = self.steps.get(&name).copied().unwrap_or(self.step);
        let mut slots = if moves { optimizer.slots(&shape) } else { Vec::new() };
        for slot in slots.iter_mut().filter(|_| steps > 0) {
            slot.values = self.values(&name, slot)?;
        }
        // What is frozen from here on loses its state, so it begins anew when it thaws.
        Ok(ParamState { name, shape, steps: if moves { steps } else { 0 }, slots })
    }

    fn values(&self, param: &str, slot: &Slot) -> Result<Vec<f32>> {
        let key = format!("{param}.{}", slot.kind);
        let missing = || self.bad(format!("{key} is missing"));
        let tensor = self.tensors.get(&key).ok_or_else(missing)?;
        let (expected, got) = (&slot.shape, tensor.dims());
        if got != expected {
            return Err(self.bad(format!("{key} has shape {got:?}, expected {expected:?}")));
        }
        Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
    }

    fn bad(&self, reason: String) -> Error {
        Error::OptimizerState { path: self.path.to_owned(), reason }
    }
}

/// The file of an optimizer's state, or of a rank's part of it.
pub(crate) fn optimizer_file(shard: Option<Shard>) -> String {
    match shard {
        None => OPTIMIZER.to_owned(),
        Some(Shard { rank, world }) => {
            format!("{OPTIMIZER_PART}{:05}-of-{world:05}.safetensors", rank + 1)
        }
    }
}

/// The files of an optimizer's state in a folder: all parts of it, or the one that there has to be.
pub(super) fn optimizer_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |error: std::io::Error| Error::OptimizerState {
        path: dir.to_owned(),
        reason: error.to_string(),
    };
    let entries = std::fs::read_dir(dir).map_err(unreadable)?.collect::<Result<Vec<_>, _>>();
    let names = entries.map_err(unreadable)?.into_iter().map(|entry| entry.file_name());
    let names: BTreeSet<_> = names.filter_map(|name| name.into_string().ok()).collect();
    let first = names.iter().find_map(|name| name.strip_prefix(OPTIMIZER_PART)?.get(9..14));
    let world = first.and_then(|world| world.parse().ok()).filter(|world| *world > 0);
    let Some(world) = world else {
        return Ok(vec![dir.join(OPTIMIZER)]);
    };
    // One that is missing will be named when it is read.
    Ok((0..world).map(|rank| dir.join(optimizer_file(Some(Shard { rank, world })))).collect())
}
