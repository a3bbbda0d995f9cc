//! Images: a small convolutional network on the 60,000 pictures of clothes of Fashion-MNIST,
//! data-parallel on worker processes, with checkpoints.
//!
//! `cargo run --release --example fashion_mnist` trains; `--train-rows 6000` is a quick look.

use clap::Parser;
use mobula::data::{Dataset, MinMaxScaler, Preprocessor, StreamOptions, TensorSource};
use mobula::nn::{Model, ModelSpec, loss, metrics, models::CnnOptions};
use mobula::train::{AdamW, AdamWOptions, ScalingConfig, TrainState, Trainer, WorkerContext};
use mobula::{Member, RunDir, console, models};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEED: u64 = 7;
const FILES: [&str; 4] = [
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
];

/// Trains a small CNN on Fashion-MNIST.
#[derive(Parser, Serialize)]
struct Args {
    /// Folder with the four gzipped IDX files.
    #[arg(long, default_value = "/usr/share/datasets/fashion-mnist")]
    data: PathBuf,
    /// Worker processes.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Times that every image is seen.
    #[arg(long, default_value_t = 5)]
    epochs: u64,
    /// Images of a step, over all workers together.
    #[arg(long, default_value_t = 128)]
    batch_size: usize,
    /// Learning rate.
    #[arg(long, default_value_t = 0.001)]
    lr: f64,
    /// Train on about so many images, drawn at random, instead of all.
    #[arg(long)]
    train_rows: Option<u64>,
    /// Name of the run, in runs/. A run that exists is resumed.
    #[arg(long)]
    run: Option<String>,
}

/// All that a worker needs: descriptions, so that it can be sent to another process.
#[derive(Clone, Serialize, Deserialize)]
struct Config {
    model: ModelSpec,
    optimizer: AdamWOptions,
    epochs: u64,
    train: TensorSource,
    test: TensorSource,
    scaler: Preprocessor,
}

/// What each worker process runs.
#[mobula::remote]
fn train_worker(member: Member, config: Config) -> anyhow::Result<()> {
    let mut context = WorkerContext::join(member)?;
    let mut batches = context.batches(&config.train)?;
    let mut test = context.batches(&config.test)?;
    let model = Model::build(&config.model, SEED, context.device())?;
    let mut state = TrainState::new(model, AdamW::new(config.optimizer)?, SEED, config.epochs);
    context.add_checkpoint_file(models::PREPROCESSOR, serde_json::to_vec(&config.scaler)?);
    context.restore(&mut state, batches.as_mut())?;
    while !state.is_finished() {
        while let Some(batch) = batches.next_batch()? {
            context.step(&mut state, &batch, |model, pass, batch| -> anyhow::Result<_> {
                let logits = model.forward(batch.get("image")?, pass)?;
                Ok(loss::cross_entropy(&logits, batch.get("label")?)?)
            })?;
        }
        let accuracy = context.mean_over(test.as_mut(), |batch| -> anyhow::Result<f64> {
            let logits = state.model.predict(batch.get("image")?)?;
            Ok(metrics::correct(&logits, batch.get("label")?)? as f64)
        })?;
        if context.shard().rank == 0 {
            println!("epoch {}: test accuracy {accuracy:.4}", state.epoch() + 1);
        }
        context.end_epoch(&mut state, batches.as_ref(), &[("accuracy", accuracy)])?;
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let runtime = mobula::init()?;
    let args = Args::parse();
    let missing: Vec<_> = FILES.into_iter().filter(|f| !args.data.join(f).is_file()).collect();
    if !missing.is_empty() {
        console::note(how_to_get(&args.data, &missing));
        std::process::exit(2);
    }
    let run = RunDir::of_program(args.run.as_deref(), "fashion", SEED, &args)?;
    let resume = format!("Resume with the same options and: --run {}", run.name());
    let _hint = mobula::on_interrupt(move || Some(resume));

    // Data: pixels from 0..255 to 0..1, by what the training images have.
    let [train_images, train_labels, test_images, test_labels] = FILES.map(|f| args.data.join(f));
    let mut train = Dataset::read_idx(train_images, train_labels)?;
    let test = Dataset::read_idx(test_images, test_labels)?;
    if let Some(rows) = args.train_rows {
        let part = (rows as f64 / train.count()? as f64).min(1.0);
        (_, train) = train.train_test_split(part, SEED)?;
    }
    let scaler = MinMaxScaler::fit(&train, ["image"])?;
    let options = StreamOptions::new(["image"], "label").with_batch_size(args.batch_size);
    let config = Config {
        model: ModelSpec::new("cnn", &CnnOptions { dropout: 0.25, ..CnnOptions::default() })?,
        optimizer: AdamWOptions { lr: args.lr, ..AdamWOptions::default() },
        epochs: args.epochs,
        train: train.preprocess(&scaler)?.stream(options.clone().with_shuffle(SEED))?,
        test: test.preprocess(&scaler)?.stream(options)?,
        scaler,
    };
    println!("{} images to train on, {} to test on", config.train.rows(), config.test.rows());

    // Train: the loop above in every worker; each step takes the mean of all workers' gradients.
    let trained = Trainer::new(train_worker::remote(config))
        .with_scaling(ScalingConfig::workers(args.workers))
        .with_run(&run)
        .fit(&runtime)?;
    let metric = |name| trained.metrics.get(name).copied().unwrap_or(f64::NAN);
    println!(
        "test accuracy {:.4} after {} epochs, {:.0} images/s, everything in {}",
        metric("accuracy"),
        args.epochs,
        metric("samples_per_second"),
        run.path().display()
    );
    Ok(())
}

fn how_to_get(folder: &Path, missing: &[&str]) -> String {
    format!(
        "{} has no {}.\nOn Debian and Ubuntu: apt-get install dataset-fashion-mnist. \
         Elsewhere: put the four files of Fashion-MNIST into a folder, and give it as --data.",
        folder.display(),
        missing.join(", no ")
    )
}
