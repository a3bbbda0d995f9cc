//! Our side of data-parallel training.
//!
//! ```text
//! bench-train fixture MODEL PATH                      write initial weights and batches
//! bench-train train MODEL FIXTURE WORKERS [WAY]       answer requests on standard input
//! bench-train phases MODEL FIXTURE cpu|cuda           where the time of a step goes
//! bench-train recover                                 how long a killed worker takes
//! bench-train checkpoint [waited-for]                 how long a large checkpoint takes
//! bench-train shards WORKERS                          what virtual shards cost
//! bench-train zero WORKERS [tcp]                      what a sharded optimizer costs, and saves
//! bench-train fashion-fixture SEED PATH               write weights and the order of the rows
//! bench-train fashion DATA FIXTURE WORKERS EPOCHS     how long 90 % of Fashion-MNIST take
//! ```
//!
//! The requests are described in xtask/src/bench/worker.rs. The ways are `cpu`; `cuda`, where workers share
//! a GPU, and `nccl`, with one for each; and those over sockets, as between hosts: `tcp`, `tcp-whole` without
//! sums within the backward pass, and `tcp-bf16`.
#![forbid(unsafe_code)]

mod fashion;
mod phases;
mod survive;

use anyhow::{Context, Result, bail};
use mobula_bench::{Fixture, SEED, case, optimizer};
use mobula_core::{Batch, Member, Resources, Runtime, Shard};
use mobula_nn::loss;
use mobula_train::{
    Compression, Overlap, ReduceOp, ScalingConfig, TrainState, Trainer, Transport, WorkerContext,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::{Instant, SystemTime};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let workers = arguments.get(3).and_then(|workers| workers.parse().ok()).unwrap_or(2.0);
    let here = Resources::of_this_machine();
    // Also more workers than there are CPUs, to see what that costs.
    let runtime =
        mobula_core::init_with(Resources { cpus: here.cpus.max(workers), ..here.clone() })?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["fixture", model, path] => case(model)?.write_fixture(path.as_ref()),
        ["train", model, fixture, workers] => serve(&runtime, &[model, fixture, workers, "cpu"]),
        ["train", model, fixture, workers, device] => {
            serve(&runtime, &[model, fixture, workers, device])
        }
        ["phases", model, fixture, device] => phases::phases(model, fixture.as_ref(), device),
        ["recover"] => survive::recover(&runtime),
        ["shards", workers] => survive::shards(&runtime, workers.parse()?),
        ["zero", workers] => survive::zero(&runtime, workers.parse()?, Transport::Auto),
        ["zero", workers, "tcp"] => survive::zero(&runtime, workers.parse()?, Transport::Tcp),
        ["checkpoint"] => survive::checkpoint(&runtime, true),
        ["checkpoint", "waited-for"] => survive::checkpoint(&runtime, false),
        ["fashion-fixture", seed, path] => fashion::fixture(seed.parse()?, path.as_ref()),
        ["fashion", data, fixture, workers, epochs] => {
            fashion::train(&runtime, [data, fixture, workers, epochs])
        }
        _ => bail!(
            "usage: bench-train fixture MODEL PATH | train MODEL FIXTURE WORKERS [cpu|cuda|nccl|tcp|tcp-whole|tcp-bf16] | phases MODEL FIXTURE cpu|cuda | recover | checkpoint [waited-for] | shards WORKERS | zero WORKERS [tcp] | fashion-fixture SEED PATH | fashion DATA FIXTURE WORKERS EPOCHS"
        ),
    }
}

/// What each worker is to do.
#[derive(Clone, Serialize, Deserialize)]
struct Job {
    model: String,
    fixture: PathBuf,
    steps: usize,
    /// Where rank 0 leaves the weights.
    weights: PathBuf,
}

/// What a worker has done.
#[derive(Serialize, Deserialize)]
struct Ran {
    /// The time of each step.
    seconds: Vec<f64>,
    loss: f64,
    /// Seconds since 1970 at which the first step began.
    began: f64,
}

#[mobula_core::remote(crate = mobula_core)]
fn train(member: Member, job: Job) -> Result<Ran> {
    let mut context = WorkerContext::join(member)?;
    let case = case(&job.model)?;
    let Fixture { weights, batches } = case.read_fixture(&job.fixture)?;
    let mine = |batch: &Batch| Ok(share(batch, context.shard())?.to_device(context.device())?);
    let batches = batches.iter().map(mine).collect::<Result<Vec<_>>>()?;
    let model = case.model(context.device())?;
    model.params().load_tensors("the fixture", &weights)?;
    let mut state = TrainState::new(model, optimizer()?, SEED, 1);
    let began = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    let (mut seconds, mut last) = (Vec::with_capacity(job.steps), f64::NAN);
    for step in 0..job.steps {
        let batch = &batches[step % batches.len()];
        let start = Instant::now();
        last = context.step(&mut state, batch, |model, pass, batch| {
            loss::cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
        })?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    if context.shard().rank == 0 {
        state.model.params().save(&job.weights)?;
    }
    Ok(Ran { seconds, loss: last, began })
}

/// The time of each sum of `len` numbers over all ranks, which begin together.
#[mobula_core::remote(crate = mobula_core)]
fn reduce(member: Member, len: usize, steps: usize) -> Result<Vec<f64>> {
    let context = WorkerContext::join(member)?;
    let all = context.collective();
    let mut values = vec![1e-20f32; len];
    let mut seconds = Vec::with_capacity(steps);
    for _ in 0..steps {
        all.barrier()?;
        let start = Instant::now();
        all.all_reduce(&mut values, ReduceOp::Sum)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(seconds)
}

/// The rows of one rank, one after the other.
fn share(batch: &Batch, Shard { rank, world }: Shard) -> Result<Batch> {
    let rows = batch.rows();
    let (first, end) = (rows * rank / world, rows * (rank + 1) / world);
    Ok(batch.slice(first, end - first)?.with_global_rows(rows))
}

struct Training<'a> {
    runtime: &'a Runtime,
    scaling: ScalingConfig,
    job: Job,
}

impl Training<'_> {
    fn run(&self, steps: usize) -> Result<(Ran, f64)> {
        let job = Job { steps, ..self.job.clone() };
        let start = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        let trainer = Trainer::new(train::remote(job)).with_logs_shown(false);
        let fit = trainer.with_scaling(self.scaling.clone()).fit(self.runtime)?;
        let first = fit.values.into_iter().next().context("a rank 0")?;
        let startup = first.began - start;
        Ok((first, startup))
    }
}

impl Training<'_> {
    fn reduce(&self, len: usize, steps: usize) -> Result<Vec<f64>> {
        let trainer = Trainer::new(reduce::remote(len, steps)).with_logs_shown(false);
        let fit = trainer.with_scaling(self.scaling.clone()).fit(self.runtime)?;
        fit.values.into_iter().next().context("a rank 0")
    }
}

/// Answers the lines of standard input until it ends.
fn serve(runtime: &Runtime, arguments: &[&str; 4]) -> Result<()> {
    let [model, fixture, workers, device] = *arguments;
    let (transport, overlap, compression) = match device {
        "cpu" | "cuda" => (Transport::Auto, Overlap::Auto, Compression::None),
        "tcp" => (Transport::Tcp, Overlap::Auto, Compression::None),
        "tcp-whole" => (Transport::Tcp, Overlap::Never, Compression::None),
        "tcp-bf16" => (Transport::Tcp, Overlap::Auto, Compression::Bf16),
        "nccl" => (Transport::Nccl, Overlap::Auto, Compression::None),
        _ => bail!("expected cpu, cuda, nccl, tcp, tcp-whole or tcp-bf16, got {device:?}"),
    };
    let workers: usize = workers.parse()?;
    let gpus = match device {
        "cuda" => 1.0 / workers as f64,
        "nccl" => 1.0,
        _ => 0.0,
    };
    let scratch = tempfile::tempdir()?;
    let training = Training {
        runtime,
        scaling: ScalingConfig {
            resources_per_worker: Resources::cpus(1.0).with_gpus(gpus),
            transport,
            overlap,
            compression,
            ..ScalingConfig::workers(workers)
        },
        job: Job {
            model: model.to_owned(),
            fixture: fixture.into(),
            steps: 0,
            weights: scratch.path().join("weights.safetensors"),
        },
    };
    training.run(2)?;
    answer(json!({ "ready": format!("Mobula, {workers} workers, {device}") }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_once(' ') {
            Some(("run", steps)) => {
                let (Ran { seconds, loss, .. }, startup) = training.run(steps.parse()?)?;
                answer(json!({ "seconds": seconds, "loss": loss, "startup": startup }))?;
            }
            Some(("reduce", arguments)) => {
                let (len, steps) = arguments.split_once(' ').context("reduce LEN STEPS")?;
                let seconds = training.reduce(len.parse()?, steps.parse()?)?;
                answer(json!({ "seconds": seconds }))?;
            }
            Some(("save", path)) => {
                std::fs::copy(&training.job.weights, path)?;
                answer(json!({ "saved": true }))?;
            }
            _ => bail!("expected `run`, `reduce` or `save`, got {line:?}"),
        }
    }
    Ok(())
}

fn answer(value: serde_json::Value) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{value}")?;
    Ok(output.flush()?)
}
