//! Architectures by name, so that a file can say which model it is of.

use crate::models::{
    CnnOptions, LstmOptions, MlpOptions, ResNetOptions, TabularOptions, TransformerOptions,
};
use crate::{Error, Model, Module, Params, Result};
use candle_core::Device;
use mobula_core::error::AtPath;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// A model's description: which architecture, with which options.
///
/// In JSON and TOML it reads `architecture = "mlp"` and a table `[options]` with the fields of
/// [`MlpOptions`] or another of [`models`](crate::models), or of those that a program registered.
///
/// ```
/// use mobula_nn::ModelSpec;
/// use mobula_nn::models::MlpOptions;
///
/// let text = r#"{"architecture": "mlp", "options": {"inputs": 64, "hidden": [32], "outputs": 10}}"#;
/// let spec: ModelSpec = serde_json::from_str(text)?;
/// let same = ModelSpec::new("mlp", &MlpOptions::new(64, [32], 10))?;
/// assert_eq!(mobula_nn::Registry::builtin().input_shape(&spec)?, [64]);
/// assert_eq!(spec.architecture, same.architecture);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// A name in the [`Registry`].
    pub architecture: String,
    /// The architecture's own options.
    #[serde(default)]
    pub options: serde_json::Map<String, serde_json::Value>,
}

impl ModelSpec {
    /// Describes a model of the architecture registered as `architecture`. Errors when the
    /// options are not a struct with named fields.
    pub fn new(architecture: &str, options: &impl Serialize) -> Result<Self> {
        let failed = |source: serde_json::Error| options_error(architecture, source);
        let value = serde_json::to_value(options).map_err(failed)?;
        Ok(Self {
            architecture: architecture.to_owned(),
            options: serde_json::from_value(value).map_err(failed)?,
        })
    }
}

/// The options of a kind of model: what [`Registry`] reads from a [`ModelSpec`] and builds.
pub trait Architecture {
    /// The shape of one row of the input, without the rows.
    fn input_shape(&self) -> Vec<usize>;

    /// The shape of one row of the output, without the rows.
    fn output_shape(&self) -> Vec<usize>;

    /// Creates the parameters in `params` and the module over them. Errors when an option has a
    /// value that makes no model.
    fn build(&self, params: &Params) -> Result<Box<dyn Module>>;
}

type Parse = fn(serde_json::Value) -> serde_json::Result<Box<dyn Architecture>>;

/// The architectures that a program knows, a plain value to pass around.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::{layers::Linear, Architecture, Error, Module, ModelSpec, Params, Registry};
///
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct Affine { size: usize }
///
/// impl Architecture for Affine {
///     fn input_shape(&self) -> Vec<usize> { vec![self.size] }
///     fn output_shape(&self) -> Vec<usize> { vec![self.size] }
///     fn build(&self, params: &Params) -> Result<Box<dyn Module>, Error> {
///         Ok(Box::new(Linear::new(params, self.size, self.size)?))
///     }
/// }
///
/// let registry = Registry::builtin().with::<Affine>("affine");
/// let model = registry.build(&ModelSpec::new("affine", &Affine { size: 3 })?, 7, &Device::Cpu)?;
/// assert_eq!(model.params().names(), ["bias", "weight"]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct Registry {
    known: BTreeMap<String, Parse>,
}

impl Registry {
    /// `"cnn"`, `"lstm"`, `"mlp"`, `"resnet"`, `"tabular"` and `"transformer"`.
    pub fn builtin() -> Self {
        let known = BTreeMap::new();
        let known = Self { known }.with::<MlpOptions>("mlp").with::<CnnOptions>("cnn");
        let known = known.with::<LstmOptions>("lstm").with::<TabularOptions>("tabular");
        known.with::<ResNetOptions>("resnet").with::<TransformerOptions>("transformer")
    }

    /// The same with the architecture `name`, whose options are an `A`. Replaces one of that name.
    pub fn with<A: Architecture + DeserializeOwned + 'static>(mut self, name: &str) -> Self {
        let parse: Parse = |options| Ok(Box::new(serde_json::from_value::<A>(options)?));
        self.known.insert(name.to_owned(), parse);
        self
    }

    /// The names of the architectures, sorted.
    pub fn names(&self) -> Vec<String> {
        self.known.keys().cloned().collect()
    }

    /// The options in `spec`. Errors when the architecture is unknown (and lists the known ones)
    /// or its options do not parse.
    pub fn resolve(&self, spec: &ModelSpec) -> Result<Box<dyn Architecture>> {
        let Some(parse) = self.known.get(&spec.architecture) else {
            return Err(Error::UnknownArchitecture {
                name: spec.architecture.clone(),
                known: self.names(),
            });
        };
        let options = serde_json::Value::Object(spec.options.clone());
        parse(options).map_err(|source| options_error(&spec.architecture, source))
    }

    /// The shape of one row of the input of the model that `spec` describes.
    pub fn input_shape(&self, spec: &ModelSpec) -> Result<Vec<usize>> {
        Ok(self.resolve(spec)?.input_shape())
    }

    /// The shape of one row of its output.
    pub fn output_shape(&self, spec: &ModelSpec) -> Result<Vec<usize>> {
        Ok(self.resolve(spec)?.output_shape())
    }

    /// A new model with `f32` parameters initialised under `seed`.
    pub fn build(&self, spec: &ModelSpec, seed: u64, device: &Device) -> Result<Model> {
        self.build_in(spec, Params::new(seed, device))
    }

    /// A new model whose parameters are created in `params`.
    pub fn build_in(&self, spec: &ModelSpec, params: Params) -> Result<Model> {
        let architecture = self.resolve(spec)?;
        let module = architecture.build(&params)?;
        Ok(Model::new(spec.clone(), architecture.as_ref(), params, module))
    }

    /// The model that [`Model::save`] wrote into `dir`.
    pub fn load(&self, dir: impl AsRef<Path>, device: &Device) -> Result<Model> {
        let dir = dir.as_ref();
        let path = dir.join(Model::SPEC_FILE);
        let text = std::fs::read(&path).at("read", &path)?;
        let spec: ModelSpec = serde_json::from_slice(&text)
            .map_err(|source| Error::Spec { path, source: source.into() })?;
        let model = self.build(&spec, 0, device)?;
        model.params().load(dir.join(Model::WEIGHTS_FILE))?;
        Ok(model)
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::builtin()
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Registry").field(&self.names()).finish()
    }
}

fn options_error(architecture: &str, source: serde_json::Error) -> Error {
    Error::Options { architecture: architecture.to_owned(), source: source.into() }
}
