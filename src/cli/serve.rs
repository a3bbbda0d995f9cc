//! `mobula serve`: the models of a repository over HTTP.

use super::output::print;
use anyhow::{Context, ensure};
use candle_core::{Device, Tensor};
use mobula::serve::{Client, Repository, RepositoryModel, Server, TensorSpec};
use mobula::{Batch, Runtime, models};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A folder with NAME/config.toml and NAME/VERSION/, or the folder of a run that has models/
    repository: PathBuf,
    /// Where to listen; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8000")]
    http: String,
    /// Replicas of each model, instead of what its config.toml says
    #[arg(long, value_name = "N")]
    replicas: Option<usize>,
}

pub(crate) fn run(options: &Options, runtime: &Runtime) -> anyhow::Result<()> {
    let repository = Repository::open(folder(&options.repository)?)?;
    let mut server = Server::new(runtime);
    for deployment in repository.deployments(models::loader)? {
        let replicas = options.replicas;
        server = server.deploy(match replicas {
            Some(replicas) => deployment.with_replicas(replicas),
            None => deployment,
        })?;
    }
    let server = server.bind(&options.http)?;
    let url = url(server.addr());
    for model in repository.models() {
        let replicas = options.replicas.unwrap_or(model.config.replicas);
        print(describe(model, replicas, &url)?)?;
    }
    print(format!("listening on {url}; Ctrl-C ends it"))?;
    Ok(server.run_until_interrupted()?)
}

/// The model repository that `path` is, or that the run at `path` has.
fn folder(path: &Path) -> anyhow::Result<PathBuf> {
    ensure!(
        path.is_dir(),
        "{} is no folder; expected a model repository (NAME/config.toml, NAME/1/…) or a run",
        path.display()
    );
    if !path.join("run.json").exists() {
        return Ok(path.to_owned());
    }
    let models = path.join("models");
    ensure!(
        models.is_dir(),
        "the run {} has no models; its program puts them there with mobula::models",
        path.display()
    );
    Ok(models)
}

/// A server that listens everywhere is reached, from here, at the loopback address.
fn url(mut addr: SocketAddr) -> String {
    if addr.ip().is_unspecified() {
        let loopback: &str = if addr.is_ipv4() { "127.0.0.1" } else { "::1" };
        addr.set_ip(loopback.parse().expect("a loopback address parses"));
    }
    format!("http://{addr}")
}

fn describe(model: &RepositoryModel, replicas: usize, url: &str) -> anyhow::Result<String> {
    let RepositoryModel { name, config, .. } = model;
    let version = model.versions.last().copied().unwrap_or(1);
    let tensors = |specs: &[TensorSpec]| specs.iter().map(tensor).collect::<Vec<_>>().join(", ");
    let body = Client::request_body(&example(&config.inputs)?)?;
    Ok(format!(
        "{name} version {version}: {}, replicas: {replicas}\n  inputs   {}\n  outputs  {}\n  \
         try: curl {url}/v2/models/{name}/infer -d '{body}'",
        config.architecture,
        tensors(&config.inputs),
        tensors(&config.outputs),
    ))
}

fn tensor(spec: &TensorSpec) -> String {
    format!("{} {} {:?}", spec.name, spec.datatype, spec.batched_shape())
}

/// One row of zeros for every input; open sizes are 1.
fn example(inputs: &[TensorSpec]) -> anyhow::Result<Batch> {
    let zeros = |spec: &TensorSpec| {
        let dims: Vec<usize> = spec.batched_shape().iter().map(|n| (*n).max(1) as usize).collect();
        let tensor = Tensor::zeros(dims, spec.datatype.dtype(), &Device::Cpu)?;
        Ok((spec.name.clone(), tensor))
    };
    let tensors: candle_core::Result<Vec<_>> = inputs.iter().map(zeros).collect();
    Ok(Batch::new(tensors.context("an example request")?)?)
}
