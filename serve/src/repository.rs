//! A folder of models: `NAME/config.toml` says what a model is, `NAME/VERSION/` holds its files.

use crate::model::{Loader, ModelMetadata, TensorSpec};
use crate::options::BatchingOptions;
use crate::{Deployment, Error};
use mobula_core::checkpoint::write_atomically;
use mobula_core::error::{AtPath, chain};
use mobula_core::{BoxError, Resources};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The content of a model's `config.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The model's name, the same as its folder's.
    pub name: String,
    /// What builds the model, such as `mlp`; the program that serves it knows these names.
    pub architecture: String,
    /// How many replicas to run. Default 1.
    #[serde(default = "one")]
    pub replicas: usize,
    /// CPUs of each replica. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<f64>,
    /// The architecture's own parameters, passed through as they are.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub params: toml::Table,
    /// How requests are batched.
    #[serde(default, skip_serializing_if = "BatchingConfig::is_default")]
    pub batching: BatchingConfig,
    /// The inputs.
    pub inputs: Vec<TensorSpec>,
    /// The outputs.
    pub outputs: Vec<TensorSpec>,
}

fn one() -> usize {
    1
}

/// The table `[batching]`: what is not set is [`BatchingOptions`]' default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchingConfig {
    /// See [`BatchingOptions::max_batch_size`].
    pub max_batch_size: Option<usize>,
    /// See [`BatchingOptions::max_delay`].
    pub max_delay_ms: Option<f64>,
    /// See [`BatchingOptions::max_queue_rows`].
    pub max_queue_rows: Option<usize>,
    /// See [`BatchingOptions::request_timeout`].
    pub request_timeout_ms: Option<f64>,
}

impl BatchingConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The options with every default filled in. Errors on times that are none.
    pub fn resolve(&self) -> Result<BatchingOptions, String> {
        let millis = |name: &str, value: Option<f64>, default: Duration| match value {
            None => Ok(default),
            Some(ms) => Duration::try_from_secs_f64(ms / 1e3)
                .map_err(|_| format!("batching.{name} is {ms}, expected milliseconds from 0 up")),
        };
        let default = BatchingOptions::default();
        Ok(BatchingOptions {
            max_batch_size: self.max_batch_size.unwrap_or(default.max_batch_size),
            max_delay: millis("max_delay_ms", self.max_delay_ms, default.max_delay)?,
            max_queue_rows: self.max_queue_rows.unwrap_or(default.max_queue_rows),
            request_timeout: millis(
                "request_timeout_ms",
                self.request_timeout_ms,
                default.request_timeout,
            )?,
        })
    }
}

/// One model of a repository, with all of its versions.
#[derive(Clone, Debug)]
pub struct RepositoryModel {
    /// The name of its folder.
    pub name: String,
    /// The versions there are, ascending; never empty.
    pub versions: Vec<u64>,
    /// What its `config.toml` says.
    pub config: ModelConfig,
    /// The folder of the newest version, which is the one that is served.
    pub path: PathBuf,
}

impl RepositoryModel {
    /// Adds a version to the model `config.name` of `repository`, which is made if need be: calls
    /// `write` with the folder to put the model's files in, and shows it to readers only when
    /// that is done.
    pub fn save(
        repository: impl AsRef<Path>,
        config: &ModelConfig,
        write: impl FnOnce(&Path) -> Result<(), BoxError>,
    ) -> Result<Self, Error> {
        let folder = repository.as_ref().join(&config.name);
        fs::create_dir_all(&folder).at("create", &folder)?;
        let newest = versions(&folder)?.last().copied().unwrap_or(0);
        let version = (newest + 1).to_string();
        let draft = folder.join(format!(".{version}.tmp"));
        if draft.exists() {
            fs::remove_dir_all(&draft).at("remove", &draft)?;
        }
        fs::create_dir(&draft).at("create", &draft)?;
        write(&draft).map_err(mobula_core::Error::layer)?;
        let text = toml::to_string_pretty(config).map_err(mobula_core::Error::layer)?;
        write_atomically(&folder.join("config.toml"), text.as_bytes())?;
        let path = folder.join(&version);
        fs::rename(&draft, &path).at("rename", &path)?;
        Self::open(&folder)
    }

    fn open(folder: &Path) -> Result<Self, Error> {
        let config = read_config(folder)?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let config_path = folder.join("config.toml");
        if config.name != name {
            let reason = format!("name is {:?}, expected {name:?} as its folder", config.name);
            return Err(invalid(&config_path, reason));
        }
        config.batching.resolve().map_err(|reason| invalid(&config_path, reason))?;
        let versions = versions(folder)?;
        let Some(newest) = versions.last() else {
            let reason = "it has no version; put the model's files in a folder named 1".to_owned();
            return Err(invalid(folder, reason));
        };
        let path = folder.join(newest.to_string());
        Ok(Self { name, versions, config, path })
    }

    fn deployment(&self, loader: Loader) -> Result<Deployment, Error> {
        let config = &self.config;
        let version = self.versions.last().map(u64::to_string).unwrap_or_default();
        let metadata = ModelMetadata {
            name: self.name.clone(),
            version,
            inputs: config.inputs.clone(),
            outputs: config.outputs.clone(),
        };
        let batching = config.batching.resolve().map_err(|reason| invalid(&self.path, reason))?;
        Ok(Deployment::new(metadata, loader)
            .with_replicas(config.replicas)
            .with_resources(Resources::cpus(config.cpus.unwrap_or(1.0)))
            .with_batching(batching))
    }
}

/// The models in a folder.
///
/// ```no_run
/// use mobula_serve::{Loader, Repository, RepositoryModel};
/// # use mobula_core::{BoxError, Resources, Runtime};
/// # fn my_loader(model: &RepositoryModel) -> Result<Loader, BoxError> { Err(model.name.as_str().into()) }
/// # let runtime = Runtime::local(Resources::cpus(2.0))?;
/// let mut server = mobula_serve::Server::new(&runtime);
/// for deployment in Repository::open("models")?.deployments(my_loader)? {
///     server = server.deploy(deployment)?;
/// }
/// # Ok::<(), BoxError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Repository {
    models: Vec<RepositoryModel>,
}

impl Repository {
    /// Reads every model's `config.toml` and versions in `dir`. Errors at the first model that
    /// cannot be served, and when there is none.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let dir = dir.as_ref();
        let mut folders = folders(dir)?;
        folders.sort();
        let models = folders.iter().map(|folder| RepositoryModel::open(folder));
        let models = models.collect::<Result<Vec<_>, _>>()?;
        if models.is_empty() {
            let reason = "it has no model; expected NAME/config.toml and NAME/1/".to_owned();
            return Err(invalid(dir, reason));
        }
        Ok(Self { models })
    }

    /// The models, by name.
    pub fn models(&self) -> &[RepositoryModel] {
        &self.models
    }

    /// A deployment of each model's newest version, with the loader that `hook` makes for it from
    /// its architecture, parameters and files.
    pub fn deployments(
        &self,
        hook: impl Fn(&RepositoryModel) -> Result<Loader, BoxError>,
    ) -> Result<Vec<Deployment>, Error> {
        let deploy = |model: &RepositoryModel| {
            let loader = hook(model).map_err(|error| Error::LoadFailed {
                model: model.name.clone(),
                message: chain(error.as_ref()),
            })?;
            model.deployment(loader)
        };
        self.models.iter().map(deploy).collect()
    }
}

fn invalid(path: &Path, reason: String) -> Error {
    Error::Repository { path: path.to_owned(), reason }
}

fn read_config(folder: &Path) -> Result<ModelConfig, Error> {
    let path = folder.join("config.toml");
    if !path.is_file() {
        let reason = "it has no config.toml; that names the architecture, inputs and outputs";
        return Err(invalid(folder, reason.to_owned()));
    }
    let text = fs::read_to_string(&path).at("read", &path)?;
    toml::from_str(&text).map_err(|error| invalid(&path, error.to_string().trim().to_owned()))
}

/// The folders in `dir` that are not hidden.
fn folders(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).at("read", dir)? {
        let entry = entry.at("read", dir)?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if !hidden && entry.path().is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The versions in a model's folder, ascending: its folders that are named by a number.
fn versions(folder: &Path) -> Result<Vec<u64>, Error> {
    let number = |path: &PathBuf| path.file_name()?.to_str()?.parse::<u64>().ok();
    let mut versions: Vec<u64> = folders(folder)?.iter().filter_map(number).collect();
    versions.sort_unstable();
    Ok(versions)
}
