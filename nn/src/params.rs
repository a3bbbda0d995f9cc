//! The named, ordered parameters of one model.

use crate::{Error, Init, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Shape, Tensor, Var};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The trainable parameters of a model, by name and in the order of their names.
///
/// A handle: clones and [scopes](Params::scope) share one set. A layer takes its scope, creates
/// its parameters in it and keeps the tensors; an optimizer updates the [`Var`]s in place, which
/// the layer's tensors see, so a model is built once.
///
/// ```
/// use candle_core::Device;
/// use mobula_nn::{Init, Params};
///
/// let params = Params::new(7, &Device::Cpu);
/// params.scope("fc1").get((3, 2), "weight", Init::default_weight())?;
/// assert_eq!(params.names(), ["fc1.weight"]);
/// assert_eq!(params.num_elements(), 6);
/// # Ok::<(), mobula_nn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Params {
    path: String,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    seed: u64,
    device: Device,
    dtype: DType,
    vars: Mutex<BTreeMap<String, Var>>,
    buffers: Mutex<BTreeMap<String, Var>>,
    exempt: Mutex<BTreeSet<String>>,
}

impl Params {
    /// An empty set of `f32` parameters on `device`, initialised under `seed`.
    pub fn new(seed: u64, device: &Device) -> Self {
        Self::with_dtype(seed, device, DType::F32)
    }

    /// The same with another type, such as `f64` for gradient checks. The values are drawn in
    /// `f64` and rounded, so they agree between types up to rounding.
    pub fn with_dtype(seed: u64, device: &Device, dtype: DType) -> Self {
        let (vars, buffers, exempt) = Default::default();
        let shared = Shared { seed, device: device.clone(), dtype, vars, buffers, exempt };
        Self { path: String::new(), shared: Arc::new(shared) }
    }

    /// A handle whose names start with this one's path, then `name`, then a dot.
    pub fn scope(&self, name: &str) -> Self {
        Self { path: self.full_name(name), shared: Arc::clone(&self.shared) }
    }

    /// This handle's path, such as `"encoder.fc1"`; empty at the root.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Creates the parameter `name` and returns its tensor, which follows every later update.
    ///
    /// Its values depend on the seed and its full name alone. Errors when the name is taken, or
    /// when `init` needs more dimensions than `shape` has.
    pub fn get(&self, shape: impl Into<Shape>, name: &str, init: Init) -> Result<Tensor> {
        Ok(self.create(&shape.into(), name, init, &self.shared.vars)?.as_tensor().clone())
    }

    /// Creates a buffer: what a model saves with its parameters and does not train, such as running
    /// statistics. The same rules as for parameters.
    pub fn buffer(&self, shape: impl Into<Shape>, name: &str, init: Init) -> Result<Var> {
        self.create(&shape.into(), name, init, &self.shared.buffers)
    }

    fn create(
        &self,
        shape: &Shape,
        name: &str,
        init: Init,
        into: &Mutex<BTreeMap<String, Var>>,
    ) -> Result<Var> {
        let name = self.full_name(name);
        let Shared { seed, device, dtype, vars, buffers, .. } = &*self.shared;
        let values = init.values(*seed, &name, shape.dims())?;
        let values = Tensor::from_vec(values, shape, &Device::Cpu)?;
        let var = Var::from_tensor(&values.to_dtype(*dtype)?.to_device(device)?)?;
        if lock(vars).contains_key(&name) || lock(buffers).contains_key(&name) {
            return Err(Error::DuplicateParameter { name });
        }
        lock(into).insert(name, var.clone());
        Ok(var)
    }

    /// Lets the parameter `name` of this handle go without a gradient: it is no error then, and
    /// its gradient is 0.
    pub fn exempt(&self, name: &str) {
        lock(&self.shared.exempt).insert(self.full_name(name));
    }

    /// Whether the parameter of this full name may go without a gradient.
    pub(crate) fn is_exempt(&self, name: &str) -> bool {
        lock(&self.shared.exempt).contains(name)
    }

    /// The parameters under this handle's path with their full names, sorted by name.
    pub fn vars(&self) -> Vec<(String, Var)> {
        self.under(&self.shared.vars)
    }

    /// The buffers under this handle's path with their full names, sorted by name.
    pub fn buffers(&self) -> Vec<(String, Var)> {
        self.under(&self.shared.buffers)
    }

    /// Parameters and buffers, sorted by name: what is saved.
    pub fn state(&self) -> Vec<(String, Var)> {
        let mut state = self.vars();
        state.extend(self.buffers());
        state.sort_by(|(a, _), (b, _)| a.cmp(b));
        state
    }

    fn under(&self, map: &Mutex<BTreeMap<String, Var>>) -> Vec<(String, Var)> {
        let map = lock(map);
        let under = map.iter().filter(|(name, _)| self.holds(name));
        under.map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// The full names of the parameters under this handle's path, sorted.
    pub fn names(&self) -> Vec<String> {
        self.vars().into_iter().map(|(name, _)| name).collect()
    }

    /// How many numbers the parameters under this handle's path have, all in all.
    pub fn num_elements(&self) -> usize {
        self.vars().iter().map(|(_, var)| var.elem_count()).sum()
    }

    /// The device that they live on.
    pub fn device(&self) -> &Device {
        &self.shared.device
    }

    /// The type of their elements.
    pub fn dtype(&self) -> DType {
        self.shared.dtype
    }

    /// The names of the parameters that a backward pass gave no gradient.
    ///
    /// Candle drops gradients silently where an operation has no backward pass; a training loop
    /// that looks once, after its first step, finds out.
    pub fn without_gradient(&self, gradients: &GradStore) -> Vec<String> {
        let vars = self.vars().into_iter();
        let lost = vars.filter(|(name, var)| {
            gradients.get(var.as_tensor()).is_none() && !self.is_exempt(name)
        });
        lost.map(|(name, _)| name).collect()
    }

    fn full_name(&self, name: &str) -> String {
        match self.path.as_str() {
            "" => name.to_owned(),
            path => format!("{path}.{name}"),
        }
    }

    fn holds(&self, name: &str) -> bool {
        let rest = name.strip_prefix(&self.path);
        self.path.is_empty() || rest.is_some_and(|rest| rest.starts_with('.'))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is whole whenever the lock is free, even after a panic elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
