//! Saving parameters to, and loading them from, safetensors files.

use crate::{Error, Params, Result};
use candle_core::{Device, Tensor, Var};
use mobula_core::checkpoint::write_atomically;
use mobula_core::error::AtPath;
use std::collections::HashMap;
use std::path::Path;

impl Params {
    /// Writes the parameters and buffers under this handle's path to a safetensors file, under their full
    /// names. Readers see the old file or the new one, never a half.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let failed = |source: safetensors::SafeTensorError| Error::Weights {
            path: path.to_owned(),
            source: source.into(),
        };
        let mut tensors = Vec::new();
        for (name, var) in self.state() {
            // On the CPU first: the format's writer cannot report a failed copy from a device.
            tensors.push((name, var.as_detached_tensor().to_device(&Device::Cpu)?));
        }
        let bytes = safetensors::serialize(tensors, None).map_err(failed)?;
        Ok(write_atomically(path, &bytes)?)
    }

    /// Sets the parameters and buffers under this handle's path from a safetensors file.
    ///
    /// The file must have exactly these names and shapes; otherwise the error names the first
    /// difference and no parameter is changed.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).at("read", path)?;
        let read = candle_core::safetensors::load_buffer(&bytes, self.device());
        let tensors =
            read.map_err(|source| Error::Weights { path: path.to_owned(), source: source.into() })?;
        self.load_tensors(&path.display().to_string(), &tensors)
    }

    /// Sets the parameters under this handle's path from tensors by full name; `from` says in an
    /// error where they come from. The same rules as for [`load`](Params::load).
    pub fn load_tensors(&self, from: &str, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let vars = self.state();
        check_names(from, &vars, tensors)?;
        for (name, var) in &vars {
            check_shape(from, name, var, &tensors[name])?;
        }
        for (name, var) in &vars {
            let tensor = tensors[name].to_device(self.device())?;
            var.set(&tensor.to_dtype(self.dtype())?)?;
        }
        Ok(())
    }
}

fn check_names(
    from: &str,
    vars: &[(String, Var)],
    tensors: &HashMap<String, Tensor>,
) -> Result<()> {
    let from = from.to_owned();
    let wanted = vars.iter().map(|(name, _)| name.clone());
    let names: Vec<_> = wanted.filter(|name| !tensors.contains_key(name)).collect();
    if !names.is_empty() {
        return Err(Error::MissingParameters { from, names });
    }
    // PyTorch's batch norms count their batches, which no result depends on.
    let ignored = |name: &String| name.ends_with(".num_batches_tracked");
    let ours = |name: &String| ignored(name) || vars.binary_search_by(|(n, _)| n.cmp(name)).is_ok();
    let mut names: Vec<_> = tensors.keys().filter(|name| !ours(name)).cloned().collect();
    names.sort();
    if !names.is_empty() {
        return Err(Error::UnexpectedParameters { from, names });
    }
    Ok(())
}

fn check_shape(from: &str, name: &str, var: &Var, tensor: &Tensor) -> Result<()> {
    if var.dims() == tensor.dims() {
        return Ok(());
    }
    Err(Error::ParameterShape {
        from: from.to_owned(),
        name: name.to_owned(),
        expected: var.dims().to_vec(),
        got: tensor.dims().to_vec(),
    })
}
