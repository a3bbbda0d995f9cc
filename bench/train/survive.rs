//! What a training costs beside its steps: lost workers, and checkpoints.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use mobula_bench::{SEED, optimizer};
use mobula_core::{
    Batch, BatchSource, BatchStream, Error, Member, Resources, RunDir, Runtime, Shard, StreamState,
};
use mobula_nn::models::MlpOptions;
use mobula_nn::{Model, ModelSpec, loss};
use mobula_train::{
    CheckpointConfig, ScalingConfig, TrainState, Trainer, Transport, WorkerContext,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::PathBuf;
use std::time::SystemTime;

const OUTPUTS: usize = 10;

/// Rows of `inputs` numbers, the same in every step.
#[derive(Clone, Serialize, Deserialize)]
struct Same {
    rows: usize,
    inputs: usize,
}

struct Stream {
    batch: Batch,
    step: u64,
}

impl BatchSource for Same {
    fn open(&self, shard: Shard) -> Result<Box<dyn BatchStream>, Error> {
        let rows = self.rows / shard.world;
        let x = Tensor::ones((rows, self.inputs), DType::F32, &Device::Cpu)?;
        let y = Tensor::zeros(rows, DType::U32, &Device::Cpu)?;
        let batch = Batch::new(vec![("x".to_owned(), x), ("y".to_owned(), y)])?;
        Ok(Box::new(Stream { batch: batch.with_global_rows(rows * shard.world), step: 0 }))
    }
}

/// One epoch without an end.
impl BatchStream for Stream {
    fn next_batch(&mut self) -> Result<Option<Batch>, Error> {
        self.step += 1;
        Ok(Some(self.batch.clone()))
    }

    fn state(&self) -> StreamState {
        StreamState { step: self.step, ..StreamState::default() }
    }

    fn restore(&mut self, state: &StreamState) -> Result<(), Error> {
        self.step = state.step;
        Ok(())
    }

    fn steps_per_epoch(&self) -> u64 {
        u64::MAX
    }
}

#[derive(Clone, Serialize, Deserialize)]
struct Job {
    source: Same,
    hidden: Vec<usize>,
    steps: u64,
    /// The last rank kills itself before this step, once, and leaves the time here.
    kill: Option<(u64, PathBuf)>,
}

/// The step that it began with, when each one ended, and what the process had in memory at most, in MB.
type Ran = (u64, Vec<f64>, f64);

fn peak_mb() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
    Ok(peak.context("a peak")?.parse::<f64>()? / 1024.0)
}

fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64())
}

#[mobula_core::remote(crate = mobula_core)]
fn go_on(member: Member, job: Job) -> Result<Ran> {
    let mut context = WorkerContext::join(member)?;
    let mut stream = context.batches(&job.source)?;
    let options = MlpOptions::new(job.source.inputs, job.hidden.clone(), OUTPUTS);
    let model = Model::build(&ModelSpec::new("mlp", &options)?, SEED, &Device::Cpu)?;
    let mut state = TrainState::new(model, optimizer()?, SEED, 1);
    context.restore(&mut state, stream.as_mut())?;
    let (began, mut ends) = (state.step(), Vec::new());
    while state.step() < job.steps {
        kill_once(&job, context.shard(), state.step())?;
        let batch = stream.next_batch()?.context("a batch")?;
        context.step(&mut state, &batch, |model, pass, batch| {
            loss::cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
        })?;
        ends.push(now()?);
    }
    Ok((began, ends, peak_mb()?))
}

fn kill_once(job: &Job, shard: Shard, step: u64) -> Result<()> {
    match &job.kill {
        Some((at, marker)) if *at == step && shard.rank + 1 == shard.world && !marker.exists() => {
            std::fs::write(marker, now()?.to_string())?;
            let me = rustix::process::getpid();
            Ok(rustix::process::kill_process(me, rustix::process::Signal::KILL)?)
        }
        _ => Ok(()),
    }
}

/// From the SIGKILL of one of two workers to the end of the next step, and the steps that are done
/// once more.
pub(crate) fn recover(runtime: &Runtime) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let marker = scratch.path().join("killed");
    let run = RunDir::create(scratch.path(), "r", SEED, &())?;
    let (at, steps) = (55, 80);
    let job = Job {
        source: Same { rows: 256, inputs: 784 },
        hidden: vec![512, 512],
        steps,
        kill: Some((at, marker.clone())),
    };
    let trainer = Trainer::new(go_on::remote(job)).with_run(&run).with_logs_shown(false);
    let fit = trainer.with_scaling(ScalingConfig::workers(2)).fit(runtime)?;
    let killed: f64 = std::fs::read_to_string(&marker)?.parse()?;
    let (began, ends, _) = fit.values.first().context("a rank 0")?;
    let seconds = ends.first().context("a step after it")? - killed;
    super::answer(json!({ "seconds": seconds, "lost_steps": at - began, "restarts": fit.restarts }))
}

/// The steps of so many workers, with and without virtual shards: what the same bits cost.
pub(crate) fn shards(runtime: &Runtime, workers: usize) -> Result<()> {
    for virtual_shards in [None, Some(2), Some(4), Some(8)] {
        let source = Same { rows: 256, inputs: 784 };
        let job = Job { source, hidden: vec![512, 512], steps: 300, kill: None };
        let scaling = ScalingConfig { virtual_shards, ..ScalingConfig::workers(workers) };
        let trainer = Trainer::new(go_on::remote(job)).with_logs_shown(false);
        let fit = trainer.with_scaling(scaling).fit(runtime)?;
        let (_, ends, _) = fit.values.first().context("a rank 0")?;
        let lengths: Vec<f64> = ends.windows(2).map(|pair| pair[1] - pair[0]).collect();
        super::answer(json!({ "virtual_shards": virtual_shards, "seconds": lengths }))?;
    }
    Ok(())
}

/// The steps of so many workers over 100 million parameters, and the memory of each worker, with the
/// optimizer's state whole, in parts, and in parts of which each is there twice.
pub(crate) fn zero(runtime: &Runtime, workers: usize, transport: Transport) -> Result<()> {
    for state in ["whole", "parts", "mirrors", "whole", "parts", "mirrors"] {
        let source = Same { rows: 16, inputs: 4096 };
        let job = Job { source, hidden: vec![4096; 6], steps: 15, kill: None };
        let (shard_optimizer, mirror_optimizer) = (state != "whole", state == "mirrors");
        // More than there are processors share them.
        let cpus = (Resources::of_this_machine().cpus / workers as f64).min(1.0);
        let scaling = ScalingConfig {
            shard_optimizer,
            mirror_optimizer,
            resources_per_worker: Resources::cpus(cpus),
            transport,
            ..ScalingConfig::workers(workers)
        };
        let trainer = Trainer::new(go_on::remote(job)).with_logs_shown(false);
        let fit = trainer.with_scaling(scaling).fit(runtime)?;
        let (_, ends, _) = fit.values.first().context("a rank 0")?;
        let lengths: Vec<f64> = ends.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let peaks: Vec<f64> = fit.values.iter().map(|rank| rank.2).collect();
        super::answer(json!({ "state": state, "seconds": lengths, "peak_mb": peaks }))?;
    }
    Ok(())
}

/// How much longer the steps take in which a checkpoint of 100 million parameters and the moments of
/// AdamW is copied, and all steps while it is written; and a step without.
pub(crate) fn checkpoint(runtime: &Runtime, asynchronous: bool) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (steps, every) = (80, 32);
    let job =
        Job { source: Same { rows: 16, inputs: 4096 }, hidden: vec![4096; 6], steps, kill: None };
    let run = RunDir::create(scratch.path(), "r", SEED, &())?;
    let checkpoints = CheckpointConfig {
        every_steps: Some(every),
        keep: 1,
        asynchronous,
        ..CheckpointConfig::default()
    };
    let trainer = Trainer::new(go_on::remote(job)).with_run(&run).with_logs_shown(false);
    let fit = trainer.with_checkpoints(checkpoints).fit(runtime)?;
    let (_, ends, _) = fit.values.first().context("a rank 0")?;
    let lengths: Vec<f64> = ends.windows(2).map(|pair| pair[1] - pair[0]).collect();
    super::answer(json!({ "seconds": lengths, "every": every }))
}
