//! Our side of the MLP training step.
//!
//! ```text
//! bench-train fixture PATH            write initial weights and batches for both sides
//! bench-train mlp FIXTURE THREADS     answer `run STEPS` and `save PATH` on standard input
//! ```
//!
//! The lines are described in xtask/src/bench/worker.rs.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use mobula_core::random::Stream;
use mobula_core::{Batch, Flow};
use mobula_nn::{Model, ModelSpec, loss, models::MlpOptions};
use mobula_train::{AdamW, AdamWOptions, TrainState, WorkerContext};
use serde_json::json;
use std::collections::HashMap;
use std::io::{BufRead, Write};

use std::path::Path;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SIZES: (usize, [usize; 2], usize) = (784, [512, 512], 10);
/// Enough that a round hardly sees one twice: once learnt by heart, losses are tiny and twitch.
const BATCHES: usize = 64;
const ROWS: usize = 256;
const SEED: u64 = 1;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["fixture", path] => write_fixture(path.as_ref()),
        ["mlp", fixture, threads] => serve(&mut Training::new(fixture.as_ref())?, threads),
        _ => bail!("usage: bench-train fixture PATH | bench-train mlp FIXTURE THREADS"),
    }
}

fn model() -> Result<Model> {
    let (inputs, hidden, outputs) = SIZES;
    let spec = ModelSpec::new("mlp", &MlpOptions::new(inputs, hidden, outputs))?;
    Ok(Model::build(&spec, SEED, &Device::Cpu)?)
}

/// Weights as nn initialises them, and batches whose labels a linear map of the inputs decides, so
/// that there is something to learn.
fn write_fixture(path: &Path) -> Result<()> {
    let mut tensors = HashMap::new();
    for (name, var) in model()?.params().vars() {
        tensors.insert(name, var.as_tensor().clone());
    }
    let (inputs, _, outputs) = SIZES;
    let teacher = normal("teacher", 0, (inputs, outputs))?;
    for batch in 0..BATCHES {
        let x = normal("x", batch, (ROWS, inputs))?;
        let y = x.matmul(&teacher)?.argmax(1)?.to_dtype(DType::I64)?;
        tensors.insert(format!("x.{batch}"), x);
        tensors.insert(format!("y.{batch}"), y);
    }
    candle_core::safetensors::save(&tensors, path)
        .with_context(|| format!("writing {}", path.display()))
}

fn normal(purpose: &str, index: usize, shape: (usize, usize)) -> Result<Tensor> {
    let mut numbers = Stream::new(SEED, purpose).at(index as u64, 0);
    let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| numbers.normal() as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// What a program does that trains by itself: no group, so nothing to sum over.
struct Training {
    weights: HashMap<String, Tensor>,
    batches: Vec<Batch>,
    /// The last run's, for `save`.
    trained: Option<Model>,
}

impl Training {
    fn new(fixture: &Path) -> Result<Self> {
        let tensors = candle_core::safetensors::load(fixture, &Device::Cpu);
        let mut tensors = tensors.with_context(|| format!("reading {}", fixture.display()))?;
        let batches =
            (0..BATCHES).map(|index| batch(&mut tensors, index)).collect::<Result<_>>()?;
        // What is left are the weights.
        Ok(Self { weights: tensors, batches, trained: None })
    }

    /// Trains from the initial weights with a fresh optimizer: the time of each step, the last loss.
    fn run(&mut self, steps: usize) -> Result<(Vec<f64>, f64)> {
        let model = model()?;
        model.params().load_tensors("the fixture", &self.weights)?;
        let optimizer = AdamW::new(AdamWOptions {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
        })?;
        let mut state = TrainState::new(model, optimizer, SEED, 1);
        let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
        let (mut seconds, mut last) = (Vec::with_capacity(steps), f64::NAN);
        for step in 0..steps {
            let batch = &self.batches[step % BATCHES];
            let start = Instant::now();
            last = context.step(&mut state, batch, |model, pass| {
                loss::cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
            })?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        self.trained = Some(state.model);
        Ok((seconds, last))
    }
}

fn batch(tensors: &mut HashMap<String, Tensor>, index: usize) -> Result<Batch> {
    let mut take = |name: String| tensors.remove(&name).with_context(|| format!("no {name}"));
    let (x, y) = (take(format!("x.{index}"))?, take(format!("y.{index}"))?.to_dtype(DType::U32)?);
    Ok(Batch::new(vec![("x".to_owned(), x), ("y".to_owned(), y)])?)
}

/// Answers the lines of standard input until it ends.
fn serve(training: &mut Training, threads: &str) -> Result<()> {
    training.run(3)?; // fills caches, starts threads
    answer(json!({ "ready": format!("Mobula, {threads} threads") }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_once(' ') {
            Some(("run", steps)) => {
                let (seconds, loss) = training.run(steps.parse()?)?;
                answer(json!({ "seconds": seconds, "loss": loss }))?;
            }
            Some(("save", path)) => {
                let trained = training.trained.as_ref().context("nothing was run yet")?;
                trained.params().save(path)?;
                answer(json!({ "saved": true }))?;
            }
            _ => bail!("expected `run STEPS` or `save PATH`, got {line:?}"),
        }
    }
    Ok(())
}

fn answer(value: serde_json::Value) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{value}")?;
    Ok(output.flush()?)
}
