//! Tabular data: which species is this penguin? Mixed types and missing values, from a CSV file
//! through SQL and preprocessors to a classifier trained on two worker processes.
//!
//! `cargo run --example tabular` trains once. The flags are what `examples/sweep.yaml` searches.

use clap::Parser;
use mobula::data::{
    Chain, Concatenator, CsvOptions, Dataset, LabelEncoder, OneHotEncoder, Preprocessor,
    SimpleImputer, StandardScaler, StreamOptions, TensorSource,
};
use mobula::nn::{Model, ModelSpec, loss, metrics, models::MlpOptions};
use mobula::train::{AdamW, AdamWOptions, ScalingConfig, TrainState, Trainer, WorkerContext};
use mobula::{Member, RunDir, models};
use serde::{Deserialize, Serialize};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEED: u64 = 7;
const MEASURES: [&str; 5] =
    ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g", "bill_shape"];
const CATEGORIES: [&str; 2] = ["island", "sex"];

/// Tells penguins apart: 344 of them, mixed types, missing values.
#[derive(Parser, Serialize)]
struct Args {
    /// Worker processes.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Times that every row is seen.
    #[arg(long, default_value_t = 30)]
    epochs: u64,
    /// Learning rate.
    #[arg(long, default_value_t = 0.01)]
    lr: f64,
    /// Width of the hidden layer.
    #[arg(long, default_value_t = 32)]
    width: usize,
    /// Rate of dropout after the hidden layer.
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// Measure on a part of the training rows, and leave the test rows alone: for searches.
    #[arg(long)]
    validate: bool,
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
    preprocessor: Preprocessor,
}

/// What each worker process runs.
#[mobula::remote]
fn train_worker(member: Member, config: Config) -> anyhow::Result<()> {
    let mut context = WorkerContext::join(member)?;
    let mut batches = context.batches(&config.train)?;
    let mut test = context.batches(&config.test)?;
    let model = Model::build(&config.model, SEED, context.device())?;
    let mut state = TrainState::new(model, AdamW::new(config.optimizer)?, SEED, config.epochs);
    context.add_checkpoint_file(models::PREPROCESSOR, serde_json::to_vec(&config.preprocessor)?);
    context.restore(&mut state, batches.as_mut())?;
    while !state.is_finished() {
        while let Some(batch) = batches.next_batch()? {
            context.step(&mut state, &batch, |model, pass, batch| -> anyhow::Result<_> {
                let logits = model.forward(batch.get("features")?, pass)?;
                Ok(loss::cross_entropy(&logits, batch.get("species")?)?)
            })?;
        }
        let accuracy = context.mean_over(test.as_mut(), |batch| -> anyhow::Result<f64> {
            let logits = state.model.predict(batch.get("features")?)?;
            Ok(metrics::correct(&logits, batch.get("species")?)? as f64)
        })?;
        context.end_epoch(&mut state, batches.as_ref(), &[("accuracy", accuracy)])?;
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let runtime = mobula::init()?;
    let args = Args::parse();

    // Read: types are inferred, `NA` is missing. Any SQL, and columns from SQL expressions.
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/penguins.csv");
    let penguins = Dataset::read_csv(file, CsvOptions::default())?;
    penguins
        .sql(
            "SELECT species, count(*) AS penguins, count(*) - count(sex) AS without_sex, \
             round(avg(body_mass_g)) AS grams FROM dataset GROUP BY species ORDER BY species",
        )?
        .show(10)?;
    let penguins = penguins.with_column("bill_shape", "bill_length_mm / bill_depth_mm")?;

    // Prepare: everything is fitted on the rows that the model is fitted on, and on no others.
    let (mut train, mut test) = penguins.train_test_split(0.2, SEED)?;
    if args.validate {
        (train, test) = train.train_test_split(0.25, SEED + 1)?;
    }
    let steps = [
        SimpleImputer::mean(MEASURES),
        SimpleImputer::most_frequent(CATEGORIES),
        StandardScaler::of(MEASURES),
        OneHotEncoder::of(CATEGORIES),
        Concatenator::of(MEASURES.iter().chain(&CATEGORIES).copied(), "features"),
        LabelEncoder::of("species"),
    ];
    let preprocessor = Chain::fit(steps, &train)?;
    let classes = |column| preprocessor.classes(column).unwrap_or_default();
    let encoded: usize = CATEGORIES.iter().map(|column| classes(column).len()).sum();
    for column in ["species", "island", "sex"] {
        println!("{column}: {}", classes(column).join(", "));
    }

    // Train: a run of this name, or, as a trial of a sweep, the folder that the sweep has made.
    let run = RunDir::of_program(args.run.as_deref(), "penguins", SEED, &args)?;
    let resume = format!("Resume with the same options and: --run {}", run.name());
    let _hint = mobula::on_interrupt(move || Some(resume));
    let options = StreamOptions::new(["features"], "species").with_batch_size(32);
    let options = options.with_shuffle(SEED);
    let stream = |part: &Dataset| part.preprocess(&preprocessor)?.stream(options.clone());
    let mut model =
        MlpOptions::new(MEASURES.len() + encoded, [args.width], classes("species").len());
    model.dropout = args.dropout;
    let config = Config {
        model: ModelSpec::new("mlp", &model)?,
        optimizer: AdamWOptions { lr: args.lr, ..AdamWOptions::default() },
        epochs: args.epochs,
        train: stream(&train)?,
        test: stream(&test)?,
        preprocessor: preprocessor.clone(),
    };
    let (rows, held_out) = (config.train.rows(), config.test.rows());
    let trained = Trainer::new(train_worker::remote(config))
        .with_scaling(ScalingConfig::workers(args.workers))
        .with_run(&run)
        .fit(&runtime)?;
    let accuracy = trained.metrics["accuracy"];
    println!("trained on {rows} rows; accuracy {accuracy:.4} on {held_out} that it had not seen");
    println!("everything in {}", run.path().display());
    Ok(())
}
