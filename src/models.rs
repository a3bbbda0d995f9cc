//! From a checkpoint to a served model: the model repository that `mobula serve` reads, with the
//! weights and the preprocessor that training fitted.
//!
//! ```text
//! models/<name>/config.toml                 architecture, inputs, outputs, replicas, batching
//! models/<name>/<version>/model.safetensors the weights
//! models/<name>/<version>/preprocessor.json what was fitted in training, if anything was
//! ```

use crate::nn::{Model as Network, ModelSpec, Params, Registry};
use crate::serve::{
    BatchingConfig, Datatype, Loader, Model, ModelConfig, RepositoryModel, TensorSpec,
};
use crate::{Batch, BoxError, Checkpoint, Error};
use candle_core::{D, DType, Device, Tensor};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const WEIGHTS: &str = "model.safetensors";
/// The file of a checkpoint, and of a model's version, that holds the fitted preprocessor.
pub const PREPROCESSOR: &str = "preprocessor.json";

/// What the served model answers with.
const CLASS: &str = "class";
const PROBABILITIES: &str = "probabilities";

/// Puts the classifier of a checkpoint into a model repository as the next version of `name`.
///
/// It takes rows of the tensor `input`, and answers with `class` (the most probable one) and
/// `probabilities`. A [`PREPROCESSOR`] in the checkpoint goes along and is applied to the inputs.
pub fn export_classifier(
    checkpoint: &Checkpoint,
    repository: impl AsRef<Path>,
    name: &str,
    input: &str,
    replicas: usize,
) -> Result<RepositoryModel, Error> {
    let network = Network::load(checkpoint.path(), &Device::Cpu).map_err(Error::layer)?;
    let shape = |dims: &[usize]| dims.iter().map(|d| *d as i64).collect::<Vec<_>>();
    let config = ModelConfig {
        name: name.to_owned(),
        architecture: network.spec().architecture.clone(),
        replicas,
        cpus: None,
        params: options_as_toml(network.spec()).map_err(Error::layer)?,
        batching: BatchingConfig::default(),
        inputs: vec![TensorSpec::new(input, Datatype::Fp32, shape(network.input_shape()))],
        outputs: vec![
            TensorSpec::new(CLASS, Datatype::Uint32, []),
            TensorSpec::new(PROBABILITIES, Datatype::Fp32, shape(network.output_shape())),
        ],
    };
    try_out(checkpoint, &config).map_err(Error::layer)?;
    RepositoryModel::save(repository, &config, |version| {
        std::fs::copy(checkpoint.file(WEIGHTS), version.join(WEIGHTS))?;
        if checkpoint.file(PREPROCESSOR).exists() {
            std::fs::copy(checkpoint.file(PREPROCESSOR), version.join(PREPROCESSOR))?;
        }
        Ok(())
    })
    .map_err(Error::layer)
}

/// Runs one row of zeros through what would be served: a preprocessor that needs more than the one
/// input, such as the columns of a table, is found here and not at the first request.
fn try_out(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<(), BoxError> {
    let version = Version {
        spec: ModelSpec::new(&config.architecture, &config.params)?,
        path: checkpoint.path().to_owned(),
        input: config.inputs[0].name.clone(),
        outputs: config.outputs.iter().map(|output| output.name.clone()).collect(),
    };
    let mut shape = vec![1];
    shape.extend(config.inputs[0].shape.iter().map(|dim| *dim as usize));
    let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
    let row = Batch::new(vec![(version.input.clone(), zeros)])?;
    version.load()?.infer(&row).map(drop).map_err(|error| {
        let (name, input) = (&config.name, &version.input);
        format!("model {name} cannot be served from the one input {input:?}: {error}").into()
    })
}

/// How to load a model of a repository: its architecture from nn's registry, its weights, and its
/// preprocessor. What cannot be loaded is an error now, not at the first request.
pub fn loader(model: &RepositoryModel) -> Result<Loader, BoxError> {
    let version = Arc::new(Version::of(model)?);
    version.load()?;
    Ok(Arc::new(move || Ok(Box::new(version.load()?) as Box<dyn Model>)))
}

/// Where one version of a model is, and what its `config.toml` says of it.
struct Version {
    spec: ModelSpec,
    path: PathBuf,
    input: String,
    outputs: Vec<String>,
}

impl Version {
    fn of(model: &RepositoryModel) -> Result<Self, BoxError> {
        let config = &model.config;
        let [input] = config.inputs.as_slice() else {
            let names: Vec<_> = config.inputs.iter().map(|i| i.name.as_str()).collect();
            return Err(format!("model {}: expected one input, got {names:?}", model.name).into());
        };
        let outputs: Vec<String> = config.outputs.iter().map(|o| o.name.clone()).collect();
        let known = [CLASS, PROBABILITIES, LOGITS];
        if let Some(unknown) = outputs.iter().find(|name| !known.contains(&name.as_str())) {
            return Err(format!(
                "model {}: no output {unknown:?}; there are {}",
                model.name,
                known.join(", ")
            )
            .into());
        }
        Ok(Self {
            spec: ModelSpec::new(&config.architecture, &config.params)?,
            path: model.path.clone(),
            input: input.name.clone(),
            outputs,
        })
    }

    fn load(&self) -> Result<Classifier, BoxError> {
        let params = Params::new(0, &Device::Cpu);
        let network = Registry::builtin().build_in(&self.spec, params)?;
        network.params().load(self.path.join(WEIGHTS))?;
        Ok(Classifier {
            network,
            preprocess: preprocessor(&self.path.join(PREPROCESSOR))?,
            input: self.input.clone(),
            outputs: self.outputs.clone(),
        })
    }
}

/// The scores before the softmax, for models that are configured to give them.
const LOGITS: &str = "logits";

type Preprocess = Box<dyn Fn(&Batch) -> Result<Batch, BoxError> + Send>;

struct Classifier {
    network: Network,
    preprocess: Option<Preprocess>,
    input: String,
    outputs: Vec<String>,
}

impl Model for Classifier {
    fn infer(&mut self, batch: &Batch) -> Result<Batch, BoxError> {
        let features = match &self.preprocess {
            Some(preprocess) => preprocess(batch)?,
            None => batch.clone(),
        };
        let x = features.get(&self.input)?.to_dtype(DType::F32)?;
        let logits = self.network.predict(&x)?;
        let output = |name: &String| {
            let tensor = match name.as_str() {
                CLASS => logits.argmax(D::Minus1)?,
                PROBABILITIES => softmax(&logits)?,
                _ => logits.clone(),
            };
            Ok((name.clone(), tensor))
        };
        let outputs: Result<Vec<_>, candle_core::Error> = self.outputs.iter().map(output).collect();
        Ok(Batch::new(outputs?)?)
    }
}

fn softmax(logits: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
    shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)
}

#[cfg(feature = "data")]
fn preprocessor(path: &Path) -> Result<Option<Preprocess>, BoxError> {
    if !path.exists() {
        return Ok(None);
    }
    let fitted = crate::data::Preprocessor::load(path)?;
    Ok(Some(Box::new(move |batch| Ok(fitted.transform_batch(batch)?))))
}

#[cfg(not(feature = "data"))]
fn preprocessor(path: &Path) -> Result<Option<Preprocess>, BoxError> {
    match path.exists() {
        false => Ok(None),
        true => Err(format!("{} needs the feature `data` of mobula", path.display()).into()),
    }
}

fn options_as_toml(spec: &ModelSpec) -> Result<toml::Table, BoxError> {
    Ok(toml::Table::try_from(&spec.options)?)
}
