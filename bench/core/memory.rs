//! A program with every layer linked in, whose process workers are weighed while they are idle.
//!
//! ```text
//! bench-core-memory            answers `run WORKERS`: starts them, and tells its process id
//! bench-core-memory PARQUET    uses every layer once, so that the linker has to keep them
//! ```
#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use mobula_core::{Batch, BoxError, Flow, Placement, Resources, Runtime};
use mobula_data::Dataset;
use mobula_nn::{Model, ModelSpec, loss, models::MlpOptions};
use mobula_serve::{Client, Datatype, Deployment, ModelMetadata, Server, TensorSpec};
use mobula_train::{AdamW, AdamWOptions, TrainState, WorkerContext};
use mobula_tune::{Metric, SearchSpace, Tuner};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Counter(u64);

#[mobula_core::remote(crate = mobula_core)]
impl Counter {
    fn new(start: u64) -> Self {
        Self(start)
    }

    fn add(&mut self, n: u64) -> u64 {
        self.0 += n;
        self.0
    }
}

fn main() -> Result<()> {
    let runtime = mobula_core::init_with(Resources::cpus(4.0))?;
    if let Some(parquet) = std::env::args().nth(1) {
        return every_layer(&runtime, &parquet);
    }
    println!("{}", json!({ "ready": "Mobula" }));
    let mut counters = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line?;
        let workers = line.strip_prefix("run ").with_context(|| format!("got {line:?}"))?;
        let workers: usize = workers.parse()?;
        for _ in 0..workers {
            let counter = runtime.spawn(Counter::remote(0u64).on(Placement::Process))?;
            counter.add(1u64).get()?;
            counters.push(counter);
        }
        let seconds = vec![0.0; workers];
        println!("{}", json!({ "seconds": seconds, "loss": std::process::id() }));
    }
    Ok(())
}

fn every_layer(runtime: &Runtime, parquet: &str) -> Result<()> {
    Dataset::read_parquet(parquet)?.sql("SELECT count(*) AS rows FROM dataset")?.show(1)?;
    let space = SearchSpace::new().log_uniform("lr", 1e-4, 1e-1);
    let results = Tuner::new(space, Metric::minimize("loss")).with_trials(2).quiet().run(
        runtime,
        |trial| {
            let lr = trial.params.float("lr")?;
            let _: Flow = trial.report(1, training_step(lr)?)?;
            Ok::<_, anyhow::Error>(())
        },
    )?;
    println!("loss {}", results.best()?.value);
    served(runtime)
}

fn training_step(lr: f64) -> Result<f64> {
    let spec = ModelSpec::new("mlp", &MlpOptions::new(2, [8], 2))?;
    let model = Model::build(&spec, 7, &Device::Cpu)?;
    let optimizer = AdamW::new(AdamWOptions { lr, ..AdamWOptions::default() })?;
    let mut state = TrainState::new(model, optimizer, 7, 1);
    let x = Tensor::new(&[[0f32, 1.], [1., 0.]], &Device::Cpu)?;
    let batch =
        Batch::new(vec![("x".into(), x), ("y".into(), Tensor::new(&[0u32, 1], &Device::Cpu)?)])?;
    let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
    Ok(context.step(&mut state, &batch, |model, pass, batch| {
        loss::cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
    })?)
}

fn served(runtime: &Runtime) -> Result<()> {
    let double = |batch: &Batch| -> Result<Batch, BoxError> {
        Ok(Batch::new(vec![("y".to_owned(), (batch.get("x")? * 2.0)?)])?)
    };
    let metadata = ModelMetadata::new("double")
        .with_input(TensorSpec::new("x", Datatype::Fp32, [1]))
        .with_output(TensorSpec::new("y", Datatype::Fp32, [1]));
    let deployment = Deployment::new(metadata, Arc::new(move || Ok(Box::new(double) as _)));
    let server = Server::new(runtime).deploy(deployment)?.bind("127.0.0.1:0")?;
    let x = Tensor::new(&[[1f32]], &Device::Cpu)?;
    let answer =
        Client::new(server.addr())?.infer("double", &Batch::new(vec![("x".into(), x)])?)?;
    println!("{}", answer.get("y")?);
    Ok(server.shutdown(Duration::from_secs(5))?)
}
