//! The whole house in one program: data → tune → train → serve, on 1,797 real handwritten digits.
//!
//! `cargo run --example pipeline -- --help` lists the options. Copy this file to start your own.

use anyhow::Context;
use clap::Parser;
use mobula::data::{Dataset, Preprocessor, StandardScaler, StreamOptions, TensorSource};
use mobula::nn::{Model, ModelSpec, loss, metrics, models::MlpOptions};
use mobula::serve::{Client, LoadTest, Repository, Server};
use mobula::train::{
    AdamW, AdamWOptions, EpochReport, ScalingConfig, TrainState, Trainer, WorkerContext,
};
use mobula::tune::{AshaScheduler, Metric, Params, SearchSpace, TpeSampler, Tuner};
use mobula::{Member, RunDir, models};
use serde::{Deserialize, Serialize};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEED: u64 = 7;

/// data → tune → train → serve, on the UCI optical digits.
#[derive(Parser, Serialize)]
struct Args {
    /// Name of the run, in runs/. A run that exists is resumed.
    #[arg(long)]
    run: Option<String>,
    /// Keep the server up at the end, at this address.
    #[arg(long, num_args = 0..=1, default_missing_value = "127.0.0.1:8000")]
    keep_serving: Option<String>,
    /// Fail unless the accuracies and the batching are as they should be.
    #[arg(long)]
    check: bool,
}

/// All that a trial or a worker needs: descriptions, so that it can be sent to another process.
#[derive(Clone, Serialize, Deserialize)]
struct Config {
    model: ModelSpec,
    optimizer: AdamWOptions,
    epochs: u64,
    train: TensorSource,
    test: TensorSource,
    scaler: Preprocessor,
}

impl Config {
    /// The same with the parameters of a trial.
    fn with(&self, params: &Params) -> anyhow::Result<Self> {
        let mut mlp = MlpOptions::new(64, [params.usize("width")?], 10);
        mlp.dropout = params.float("dropout")?;
        let mut config = Self { model: ModelSpec::new("mlp", &mlp)?, ..self.clone() };
        config.optimizer.lr = params.float("lr")?;
        config.optimizer.weight_decay = params.float("weight_decay")?;
        Ok(config)
    }
}

/// The training loop: the same in a trial of the search and on every worker of the training.
fn learn(context: &mut WorkerContext<'_>, config: &Config) -> anyhow::Result<()> {
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
        context.end_epoch(&mut state, batches.as_ref(), &[("accuracy", accuracy)])?;
    }
    Ok(())
}

/// What each worker process runs.
#[mobula::remote]
fn train_worker(member: Member, config: Config) -> anyhow::Result<()> {
    learn(&mut WorkerContext::join(member)?, &config)
}

fn main() -> anyhow::Result<()> {
    let runtime = mobula::init()?;
    let args = Args::parse();
    let run = RunDir::of_program(args.run.as_deref(), "digits", SEED, &args)?;
    let resume = format!("Resume with: cargo run --example pipeline -- --run {}", run.name());
    let _hint = mobula::on_interrupt(move || Some(resume));

    // Data: a lazy dataset, a split by seed, a scaler that sees the training part only.
    let files = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/digits-*.parquet");
    let (train, test) = Dataset::read_parquet(files)?.train_test_split(0.2, SEED)?;
    let scaler = StandardScaler::fit(&train, ["image"])?;
    let shuffled = StreamOptions::new(["image"], "label").with_batch_size(64).with_shuffle(SEED);
    let stream = |part: &Dataset| part.preprocess(&scaler)?.stream(shuffled.clone());
    println!("data: {} images to train on, {} to test on", train.count()?, test.count()?);

    // Tune: 16 trials on a validation split of the training part.
    let (fit, validation) = train.train_test_split(0.2, SEED + 1)?;
    let search = Config {
        model: ModelSpec::new("mlp", &MlpOptions::new(64, [64], 10))?,
        optimizer: AdamWOptions::default(),
        epochs: 12,
        train: stream(&fit)?,
        test: stream(&validation)?,
        scaler: scaler.clone(),
    };
    let config =
        Config { train: stream(&train)?, test: stream(&test)?, epochs: 30, ..search.clone() };
    let space = SearchSpace::new()
        .log_uniform("lr", 1e-4, 3e-2)
        .choice("width", [32, 64, 128])
        .uniform("dropout", 0.0, 0.5)
        .log_uniform("weight_decay", 1e-4, 1e-1);
    let results = Tuner::new(space, Metric::maximize("accuracy"))
        .with_sampler(TpeSampler::default().with_startup_trials(6))
        .with_scheduler(AshaScheduler::new(12).with_grace_period(2))
        .with_trials(16)
        .with_seed(SEED)
        .with_journal(run.path().join("study.journal"))
        .run(&runtime, move |trial| -> anyhow::Result<()> {
            let config = search.with(&trial.params)?;
            let report = |e: &EpochReport| Ok(trial.report(e.epoch, e.metrics["accuracy"])?);
            learn(&mut WorkerContext::alone(report), &config)
        })?;

    // Train: the best trial's configuration on two worker processes.
    let trained = Trainer::new(train_worker::remote(config.with(&results.best()?.params)?))
        .with_scaling(ScalingConfig::workers(2))
        .with_run(&run)
        .fit(&runtime)?;
    let accuracy = trained.metrics["accuracy"];
    println!("train: test accuracy {accuracy:.4}, everything in {}", run.path().display());

    // Serve: two replicas, raw pixels in; the scaler comes with the checkpoint.
    let checkpoint = trained.checkpoint.context("a run directory has checkpoints")?;
    let repository = run.path().join("models");
    models::export_classifier(&checkpoint, &repository, "digits", "image", 2)?;
    let deployments = Repository::open(&repository)?.deployments(models::loader)?;
    let address = args.keep_serving.as_deref().unwrap_or("127.0.0.1:0");
    let server = Server::new(&runtime).deploy_all(deployments)?.bind(address)?;
    let rows = test.to_batch(["image"], "label")?;
    let images = rows.select(&["image"])?;
    let load = LoadTest { clients: 64, requests: rows.rows(), ..LoadTest::default() };
    let report = load.run(server.addr(), "digits", |i| Ok(images.slice(i, 1)?))?;
    let labels = rows.get("label")?.to_vec1::<u32>()?;
    let answers = report.output("class")?.to_vec1::<u32>()?;
    let correct = labels.iter().zip(&answers).filter(|(label, answer)| label == answer).count();
    let served = correct as f64 / labels.len() as f64;
    let mean_batch = server.stats("digits")?.mean_batch_size;
    println!("serve: accuracy {served:.4} over HTTP, {report}, mean batch {mean_batch:.1}");

    let good = accuracy >= 0.96 && served >= 0.96 && mean_batch > 1.0;
    anyhow::ensure!(good || !args.check, "expected accuracies of 0.96 and batches above 1");
    if args.keep_serving.is_some() {
        let (address, body) = (server.addr(), Client::request_body(&images.slice(0, 1)?)?);
        println!("try: curl http://{address}/v2/models/digits/infer -d '{body}'");
        server.run_until_interrupted()?;
    }
    Ok(())
}
