//! Trains a classifier of points on two spirals on worker processes. Replace the data and the
//! model by your own; `cargo run -- --help` lists the options.

use anyhow::Context;
use candle_core::{Result, Tensor};
use clap::Parser;
use mobula::data::{CsvOptions, Dataset, StreamOptions, TensorSource};
use mobula::nn::{Model, ModelSpec, loss, metrics, models::MlpOptions};
use mobula::train::{AdamW, AdamWOptions, ScalingConfig, TrainState, Trainer, WorkerContext};
use mobula::{Batch, Member, RunDir, models};
use serde::{Deserialize, Serialize};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/spirals.csv");
const SEED: u64 = 7;

/// Trains a classifier of points on two spirals.
#[derive(Clone, Parser, Serialize, Deserialize)]
struct Args {
    /// Learning rate
    #[arg(long, default_value_t = 0.01)]
    lr: f64,
    /// Width of both hidden layers
    #[arg(long, default_value_t = 32)]
    width: usize,
    /// Passes over the training data
    #[arg(long, default_value_t = 40)]
    epochs: u64,
    /// Worker processes
    #[arg(long, default_value_t = 2)]
    workers: usize,
}

/// All that a worker needs: descriptions, so that it can be sent to another process.
#[derive(Serialize, Deserialize)]
struct Config {
    args: Args,
    train: TensorSource,
    test: TensorSource,
}

impl Config {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let (train, test) =
            Dataset::read_csv(DATA, CsvOptions::default())?.train_test_split(0.2, SEED)?;
        let batches = StreamOptions::new(["x", "y"], "spiral").with_batch_size(64);
        Ok(Self {
            args: args.clone(),
            train: train.stream(batches.clone().with_shuffle(SEED))?,
            test: test.stream(batches)?,
        })
    }
}

/// The points of a batch, `[rows, 2]`.
fn points(batch: &Batch) -> anyhow::Result<Tensor> {
    let columns: Result<Vec<_>> =
        batch.tensors()[..2].iter().map(|(_, t)| t.unsqueeze(1)).collect();
    Ok(Tensor::cat(&columns?, 1)?)
}

/// The training loop: the same on every worker, and in the test below.
fn learn(context: &mut WorkerContext<'_>, config: &Config) -> anyhow::Result<()> {
    let Args { lr, width, epochs, .. } = config.args;
    let mut batches = context.batches(&config.train)?;
    let mut test = context.batches(&config.test)?;
    let spec = ModelSpec::new("mlp", &MlpOptions::new(2, [width, width], 2))?;
    let model = Model::build(&spec, SEED, context.device())?;
    let optimizer = AdamW::new(AdamWOptions { lr, ..AdamWOptions::default() })?;
    let mut state = TrainState::new(model, optimizer, SEED, epochs);
    context.restore(&mut state, batches.as_mut())?;
    while !state.is_finished() {
        while let Some(batch) = batches.next_batch()? {
            context.step(&mut state, &batch, |model, pass, batch| -> anyhow::Result<_> {
                let logits = model.forward(&points(batch)?, pass)?;
                Ok(loss::cross_entropy(&logits, batch.get("spiral")?)?)
            })?;
        }
        let accuracy = context.mean_over(test.as_mut(), |batch| -> anyhow::Result<f64> {
            let logits = state.model.predict(&points(batch)?)?;
            Ok(metrics::correct(&logits, batch.get("spiral")?)? as f64)
        })?;
        context.end_epoch(&mut state, batches.as_ref(), &[("accuracy", accuracy)])?;
    }
    Ok(())
}

/// What each worker process runs.
#[mobula::remote]
fn worker(member: Member, config: Config) -> anyhow::Result<()> {
    learn(&mut WorkerContext::join(member)?, &config)
}

fn main() -> anyhow::Result<()> {
    let runtime = mobula::init()?; // first: workers are this same program
    let args = Args::parse();
    let run = RunDir::of_program(None, env!("CARGO_PKG_NAME"), SEED, &args)?;
    let trained = Trainer::new(worker::remote(Config::new(&args)?))
        .with_scaling(ScalingConfig::workers(args.workers))
        .with_run(&run)
        .fit(&runtime)?;
    let checkpoint = trained.checkpoint.context("a run directory has checkpoints")?;
    models::export_classifier(&checkpoint, run.path().join("models"), "spirals", "point", 1)?;
    println!("test accuracy {:.4}", trained.metrics["accuracy"]);
    println!("everything is in {0}; serve it with: mobula serve {0}", run.path().display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spirals_are_told_apart() -> anyhow::Result<()> {
        let mut accuracy = 0.0;
        let mut context = WorkerContext::alone(|epoch| {
            accuracy = epoch.metrics["accuracy"];
            Ok(mobula::Flow::Continue)
        });
        learn(&mut context, &Config::new(&Args::parse_from(["test"]))?)?;
        drop(context);
        assert!(accuracy > 0.95, "test accuracy {accuracy}");
        Ok(())
    }
}
