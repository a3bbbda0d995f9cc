//! Our side of training steps and of inference.
//!
//! ```text
//! bench-nn peak                           the best rate of a large product, in GFLOP/s
//! bench-nn bandwidth                      the best rate of a sum of large vectors, in GB/s
//! bench-nn fixture MODEL PATH             write initial weights and batches for both sides
//! bench-nn train MODEL FIXTURE THREADS    answer requests on standard input
//! bench-nn bf16 MODEL FIXTURE THREADS     the same with products of `bf16`
//! ```
//!
//! The requests are described in xtask/src/bench/worker.rs.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use mobula_bench::{Case, Fixture, SEED, case, optimizer};
use mobula_core::{Batch, Flow};
use mobula_nn::{Model, Pass, Precision, loss, no_grad};
use mobula_train::{Gradients, TrainState, Updater, WorkerContext};
use rayon::prelude::*;
use serde_json::json;
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    // As in every program: the allocator is told to keep what a step frees.
    let _runtime = mobula_core::init()?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["peak"] => {
            println!("{}", peak()?);
            Ok(())
        }
        ["bandwidth"] => {
            println!("{}", bandwidth());
            Ok(())
        }
        ["fixture", model, path] => case(model)?.write_fixture(path.as_ref()),
        ["train", model, fixture, threads] => {
            serve(&mut Training::new(case(model)?, fixture.as_ref())?, threads)
        }
        ["bf16", model, fixture, threads] => {
            let training = Training::new(case(model)?, fixture.as_ref())?;
            serve(&mut Training { precision: Precision::Bf16, ..training }, threads)
        }
        _ => bail!(
            "usage: bench-nn peak | bench-nn bandwidth | bench-nn fixture MODEL PATH | bench-nn train|bf16 MODEL FIXTURE THREADS"
        ),
    }
}

/// What a program does that trains by itself: no group, so nothing to sum over.
struct Training {
    case: Case,
    precision: Precision,
    weights: HashMap<String, Tensor>,
    batches: Vec<Batch>,
    /// The last run's, for `save`.
    trained: Option<Model>,
}

impl Training {
    fn new(case: Case, fixture: &Path) -> Result<Self> {
        let Fixture { weights, batches } = case.read_fixture(fixture)?;
        Ok(Self { case, precision: Precision::F32, weights, batches, trained: None })
    }

    /// Trains from the initial weights with a fresh optimizer: the time of each step, the last loss.
    fn run(&mut self, steps: usize, rows: Option<usize>) -> Result<(Vec<f64>, f64)> {
        let model = self.case.model(&Device::Cpu)?;
        model.params().load_tensors("the fixture", &self.weights)?;
        let state = TrainState::new(model, optimizer()?, SEED, 1);
        let mut state = state.with_precision(self.precision);
        let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
        let (mut seconds, mut last) = (Vec::with_capacity(steps), f64::NAN);
        for step in 0..steps {
            let batch = first_rows(&self.batches[step % self.batches.len()], rows)?;
            let start = Instant::now();
            last = context.step(&mut state, &batch, |model, pass, batch| {
                loss::cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
            })?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        self.trained = Some(state.model);
        Ok((seconds, last))
    }

    /// The time of each update by gradients that stay the same.
    fn update(&self, steps: usize) -> Result<Vec<f64>> {
        let model = self.case.model(&Device::Cpu)?;
        model.params().load_tensors("the fixture", &self.weights)?;
        let mut gradients = Gradients::zeros(model.params());
        gradients.values_mut().fill(1e-3);
        let mut updater = Updater::new(optimizer()?);
        let mut step = || {
            let start = Instant::now();
            updater.step(model.params(), &mut gradients)?;
            Ok(start.elapsed().as_secs_f64())
        };
        (0..steps).map(|_| step()).collect()
    }

    /// The time of each forward pass of the first `rows` rows, and the sum of what came out.
    fn infer(&self, rows: usize, steps: usize) -> Result<(Vec<f64>, f64)> {
        let model = self.case.model(&Device::Cpu)?;
        model.params().load_tensors("the fixture", &self.weights)?;
        let x = self.batches[0].get("x")?.narrow(0, 0, rows)?;
        let mut seconds = Vec::with_capacity(steps);
        let pass = Pass::eval().with_precision(self.precision);
        let predict = || no_grad(|| model.forward(&x, &pass));
        let mut y = predict()?;
        for _ in 0..steps {
            let start = Instant::now();
            y = predict()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        Ok((seconds, y.sum_all()?.to_dtype(DType::F64)?.to_scalar()?))
    }
}

fn first_rows(batch: &Batch, rows: Option<usize>) -> Result<Batch> {
    let Some(rows) = rows else { return Ok(batch.clone()) };
    let first = |name: &str| Ok((name.to_owned(), batch.get(name)?.narrow(0, 0, rows)?));
    Ok(Batch::new(["x", "y"].map(first).into_iter().collect::<Result<_>>()?)?)
}

/// Answers the lines of standard input until it ends.
fn serve(training: &mut Training, threads: &str) -> Result<()> {
    training.run(1, Some(1))?; // starts threads
    let bytes = peak_above_idle(|| training.run(3, None).map(drop))?; // fills caches
    answer(json!({ "ready": format!("Mobula, {threads} threads"), "bytes": bytes }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_once(' ') {
            Some(("infer", arguments)) => {
                let (rows, steps) = arguments.split_once(' ').context("infer ROWS STEPS")?;
                let (seconds, loss) = training.infer(rows.parse()?, steps.parse()?)?;
                answer(json!({ "seconds": seconds, "loss": loss }))?;
            }
            Some(("run", steps)) => {
                let (seconds, loss) = training.run(steps.parse()?, None)?;
                answer(json!({ "seconds": seconds, "loss": loss }))?;
            }
            Some(("update", steps)) => {
                answer(json!({ "seconds": training.update(steps.parse()?)? }))?;
            }
            Some(("save", path)) => {
                let trained = training.trained.as_ref().context("nothing was run yet")?;
                trained.params().save(path)?;
                answer(json!({ "saved": true }))?;
            }
            _ => bail!("expected `run`, `infer`, `update` or `save`, got {line:?}"),
        }
    }
    Ok(())
}

fn answer(value: serde_json::Value) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{value}")?;
    Ok(output.flush()?)
}

fn peak() -> Result<f64> {
    const SIZE: usize = 1024;
    let a = Tensor::ones((SIZE, SIZE), DType::F32, &Device::Cpu)?;
    let mut least = f64::INFINITY;
    for _ in 0..30 {
        let start = Instant::now();
        a.matmul(&a)?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (SIZE as f64).powi(3) / least / 1e9)
}

/// Of `a += b` far beyond the caches: two numbers are read and one is written.
fn bandwidth() -> f64 {
    const LEN: usize = 1 << 24;
    let (mut a, b) = (vec![1f32; LEN], vec![1f32; LEN]);
    let mut least = f64::INFINITY;
    for _ in 0..20 {
        let start = Instant::now();
        let chunks = a.par_chunks_mut(1 << 14).zip(b.par_chunks(1 << 14));
        chunks.for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a += b));
        least = least.min(start.elapsed().as_secs_f64());
    }
    (3 * size_of::<f32>() * LEN) as f64 / least / 1e9
}

/// How far `work` raises what this process has in memory, at its peak.
fn peak_above_idle(work: impl FnOnce() -> Result<()>) -> Result<u64> {
    // Makes the peak that of from now on.
    std::fs::write("/proc/self/clear_refs", "5")?;
    let before = memory("VmRSS:")?;
    work()?;
    Ok(memory("VmHWM:")?.saturating_sub(before))
}

fn memory(field: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    let kilobytes: u64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kilobytes * 1024)
}
