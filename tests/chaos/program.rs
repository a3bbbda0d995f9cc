//! The program under test: a small training on two worker processes, of a few seconds.

use mobula::nn::{Model, ModelSpec, loss, models::MlpOptions};
use mobula::random::Stream;
use mobula::train::{
    AdamW, AdamWOptions, FailureConfig, ScalingConfig, TrainState, Trainer, WorkerContext,
};
use mobula::{
    Batch, BatchSource, BatchStream, BoxError, Error, Member, OnLoss, RunDir, Runtime, Shard,
};
use mobula_core::StreamState;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The first argument of this binary as the program.
pub(crate) const ROLE: &str = "be-a-program";

const SEED: u64 = 7;
const BATCHES: u64 = 20;
const ROWS: usize = 16;
const FEATURES: usize = 4;
/// Of each step: so that there is time for a signal.
const PACE: Duration = Duration::from_millis(5);

#[derive(Clone, Serialize, Deserialize)]
struct Config {
    seed: u64,
    epochs: u64,
}

/// Trains; the words are `epochs=N`, `max-failures=N`, `restart-all`, `own-run`, `any-seed`.
pub(crate) fn run(runtime: &Runtime, words: &[String]) -> Result<(), BoxError> {
    let has = |word: &str| words.iter().any(|other| other == word);
    let number = |name: &str| words.iter().find_map(|w| w.strip_prefix(name)?.parse().ok());
    // A program whose weights are others each time.
    let seed = if has("any-seed") { u64::from(std::process::id()) } else { SEED };
    let config = Config { seed, epochs: number("epochs=").unwrap_or(20) };
    let run = match has("own-run") {
        true => RunDir::open_or_create("runs", "mine", seed, &config)?,
        false => RunDir::of_program(None, "chaos", seed, &config)?,
    };
    let max_failures = number("max-failures=").unwrap_or(3) as u32;
    let on_loss = if has("restart-all") { OnLoss::RestartAll } else { OnLoss::ReplaceLost };
    Trainer::new(train::remote(config))
        .with_run(&run)
        .with_scaling(ScalingConfig::workers(2))
        .with_failure(FailureConfig { max_failures, on_loss, ..FailureConfig::default() })
        .fit(runtime)?;
    Ok(())
}

#[mobula::remote]
fn train(member: Member, config: Config) -> Result<(), BoxError> {
    let mut context = WorkerContext::join(member)?;
    let mut stream = context.batches(&config)?;
    let spec = ModelSpec::new("mlp", &MlpOptions::new(FEATURES, [8], 2))?;
    let model = Model::build(&spec, config.seed, context.device())?;
    let adamw = AdamW::new(AdamWOptions::default())?;
    let mut state = TrainState::new(model, adamw, config.seed, config.epochs);
    context.restore(&mut state, stream.as_mut())?;
    while !state.is_finished() {
        while let Some(batch) = stream.next_batch()? {
            std::thread::sleep(PACE);
            context.step(&mut state, &batch, |model, pass, batch| -> Result<_, BoxError> {
                let logits = model.forward(batch.get("x")?, pass)?;
                Ok(loss::cross_entropy(&logits, batch.get("y")?)?)
            })?;
        }
        context.end_epoch(&mut state, stream.as_ref(), &[])?;
    }
    Ok(())
}

/// Rows that follow from their place alone.
#[derive(Debug)]
struct Rows {
    shard: Shard,
    epoch: u64,
    step: u64,
}

impl BatchSource for Config {
    fn open(&self, shard: Shard) -> Result<Box<dyn BatchStream>, Error> {
        Ok(Box::new(Rows { shard, epoch: 0, step: 0 }))
    }
}

impl BatchStream for Rows {
    fn next_batch(&mut self) -> Result<Option<Batch>, Error> {
        if self.step == BATCHES {
            (self.epoch, self.step) = (self.epoch + 1, 0);
            return Ok(None);
        }
        let mut dice = Stream::new(SEED, "rows").at(self.epoch * BATCHES + self.step, 0);
        let all: Vec<f32> = (0..ROWS * FEATURES).map(|_| dice.normal() as f32).collect();
        let rows = all.chunks(FEATURES).skip(self.shard.rank).step_by(self.shard.world);
        let rows: Vec<&[f32]> = rows.collect();
        let y: Vec<u32> = rows.iter().map(|row| u32::from(row[0] > 0.0)).collect();
        self.step += 1;
        let device = candle_core::Device::Cpu;
        let x = candle_core::Tensor::from_vec(rows.concat(), (y.len(), FEATURES), &device)?;
        let y = candle_core::Tensor::from_vec(y, rows.len(), &device)?;
        let batch = Batch::new(vec![("x".into(), x), ("y".into(), y)])?;
        Ok(Some(batch.with_global_rows(ROWS)))
    }

    fn state(&self) -> StreamState {
        let (epoch, step) = (self.epoch, self.step);
        StreamState { manifest: "rows".into(), version: 1, seed: SEED, epoch, step }
    }

    fn restore(&mut self, state: &StreamState) -> Result<(), Error> {
        (self.epoch, self.step) = (state.epoch, state.step);
        Ok(())
    }

    fn steps_per_epoch(&self) -> u64 {
        BATCHES
    }
}
