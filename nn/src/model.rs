//! A built model: description, parameters and module.

use crate::registry::Architecture;
use crate::{Error, ModelSpec, Module, Params, Pass, Registry, Result};
use candle_core::{Device, Tensor};
use mobula_core::checkpoint::write_atomically;
use mobula_core::error::AtPath;
use std::path::Path;

/// A model that can be trained, saved, and loaded without its program.
pub struct Model {
    spec: ModelSpec,
    input_shape: Vec<usize>,
    output_shape: Vec<usize>,
    params: Params,
    module: Box<dyn Module>,
}

impl Model {
    /// The file of the parameters in a saved model's folder.
    pub const WEIGHTS_FILE: &str = "model.safetensors";
    /// The file of the description, JSON.
    pub const SPEC_FILE: &str = "model.json";

    pub(crate) fn new(
        spec: ModelSpec,
        architecture: &dyn Architecture,
        params: Params,
        module: Box<dyn Module>,
    ) -> Self {
        Self {
            spec,
            input_shape: architecture.input_shape(),
            output_shape: architecture.output_shape(),
            params,
            module,
        }
    }

    /// A new model of a [built-in](Registry::builtin) architecture, initialised under `seed`.
    pub fn build(spec: &ModelSpec, seed: u64, device: &Device) -> Result<Self> {
        Registry::builtin().build(spec, seed, device)
    }

    /// Loads a model of a built-in architecture from the folder that [`save`](Self::save) wrote.
    pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Registry::builtin().load(dir, device)
    }

    /// Writes [`WEIGHTS_FILE`](Self::WEIGHTS_FILE) and [`SPEC_FILE`](Self::SPEC_FILE) into `dir`,
    /// which is created if it is missing.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        std::fs::create_dir_all(dir).at("create", dir)?;
        self.params.save(dir.join(Self::WEIGHTS_FILE))?;
        let path = dir.join(Self::SPEC_FILE);
        let text = serde_json::to_vec_pretty(&self.spec)
            .map_err(|source| Error::Spec { path: path.clone(), source: source.into() })?;
        Ok(write_atomically(&path, &text)?)
    }

    /// The output for `x`: `[rows, ..output_shape]` for `[rows, ..input_shape]`.
    ///
    /// Rows may also come flat, or with other axes of size 1, where that leaves no doubt:
    /// `[rows, 784]` and `[rows, 28, 28]` fit a model of `[1, 28, 28]`. Any other shape is an
    /// error.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.module.forward(&self.fit(x)?, pass)
    }

    /// The output for `x` in evaluation, without gradients: as [`forward`](Self::forward) in
    /// [`no_grad`](crate::no_grad).
    pub fn predict(&self, x: &Tensor) -> Result<Tensor> {
        Ok(crate::no_grad(|| self.forward(x, &Pass::eval()))?.detach())
    }

    /// What it was built from.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its parameters, for optimizers and checkpoints.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The shape of one row of its input, without the rows.
    pub fn input_shape(&self) -> &[usize] {
        &self.input_shape
    }

    /// The shape of one row of its output, without the rows.
    pub fn output_shape(&self) -> &[usize] {
        &self.output_shape
    }

    fn fit(&self, x: &Tensor) -> Result<Tensor> {
        let wanted = self.input_shape.as_slice();
        match x.dims() {
            [_, row @ ..] if row == wanted => Ok(x.clone()),
            [rows, row @ ..] if fits(row, wanted) => {
                let shape: Vec<usize> = std::iter::once(rows).chain(wanted).copied().collect();
                Ok(x.reshape(shape)?)
            }
            got => {
                let what = format!("the input of the {:?} model", self.spec.architecture);
                let sizes: Vec<String> = wanted.iter().map(usize::to_string).collect();
                Err(Error::shape(what, format!("[rows, {}]", sizes.join(", ")), got))
            }
        }
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("spec", &self.spec)
            .field("parameters", &self.params.num_elements())
            .finish_non_exhaustive()
    }
}

/// Whether a row of shape `got` can only mean the row of shape `wanted`.
fn fits(got: &[usize], wanted: &[usize]) -> bool {
    let squeezed =
        |shape: &[usize]| shape.iter().copied().filter(|size| *size != 1).collect::<Vec<_>>();
    let flat = |shape: &[usize]| squeezed(shape).len() <= 1;
    let same_size = got.iter().product::<usize>() == wanted.iter().product::<usize>();
    same_size && (flat(got) || flat(wanted) || squeezed(got) == squeezed(wanted))
}
