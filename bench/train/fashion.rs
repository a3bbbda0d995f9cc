//! Fashion-MNIST until nine of ten test images are told right: what an epoch costs, evaluation
//! included.
//!
//! Both sides begin with the same weights and take the same rows in the same order, so that they need
//! about as many epochs.

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use mobula_bench::optimizer;
use mobula_core::random::Stream;
use mobula_core::{
    Batch, BatchSource, BatchStream, BoxError, Error, Member, Runtime, Shard, StreamState,
};
use mobula_nn::models::CnnOptions;
use mobula_nn::{Model, ModelSpec, loss, metrics};
use mobula_train::{ScalingConfig, TrainState, Trainer, WorkerContext};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

const SIDE: usize = 28;
const PIXELS: usize = SIDE * SIDE;
/// Rows of a step on all workers.
const BATCH: usize = 256;
/// Of an evaluation.
const TEST_BATCH: usize = 1000;
const TRAIN_ROWS: usize = 60_000;
/// Epochs of which a fixture has the order.
const ORDERS: usize = 15;
/// Of the training images.
const MEAN: f32 = 0.2860;
const DEVIATION: f32 = 0.3530;
const TARGET: f64 = 0.90;

/// Images and labels, and the rows of each epoch in their order.
struct Images {
    pixels: Vec<f32>,
    labels: Vec<u32>,
    orders: Vec<Vec<usize>>,
    batch: usize,
}

impl Images {
    /// From a pair of IDX files: headers of 16 and 8 bytes, then one byte a value.
    fn read(folder: &Path, part: &str, orders: Vec<Vec<usize>>, batch: usize) -> Result<Source> {
        let file = |kind: &str| {
            let path = folder.join(format!("{part}-{kind}-ubyte"));
            std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
        };
        let (pixels, labels) = (file("images-idx3")?, file("labels-idx1")?);
        let scale = |byte: &u8| (f32::from(*byte) / 255.0 - MEAN) / DEVIATION;
        let pixels: Vec<f32> = pixels.iter().skip(16).map(scale).collect();
        let labels: Vec<u32> = labels.iter().skip(8).map(|byte| u32::from(*byte)).collect();
        ensure!(pixels.len() == labels.len() * PIXELS, "images and labels do not fit");
        Ok(Source(Arc::new(Self { pixels, labels, orders, batch })))
    }

    fn batch(&self, rows: &[usize]) -> Result<Batch, Error> {
        let mut pixels = Vec::with_capacity(rows.len() * PIXELS);
        for row in rows {
            pixels.extend_from_slice(&self.pixels[row * PIXELS..(row + 1) * PIXELS]);
        }
        let labels = rows.iter().map(|row| self.labels[*row]).collect();
        let x = Tensor::from_vec(pixels, (rows.len(), 1, SIDE, SIDE), &Device::Cpu)?;
        let y = Tensor::from_vec::<_, u32>(labels, rows.len(), &Device::Cpu)?;
        Batch::new(vec![("x".to_owned(), x), ("y".to_owned(), y)])
    }
}

struct Source(Arc<Images>);

struct Rows {
    images: Arc<Images>,
    shard: Shard,
    epoch: usize,
    step: usize,
}

impl BatchSource for Source {
    fn open(&self, shard: Shard) -> Result<Box<dyn BatchStream>, Error> {
        Ok(Box::new(Rows { images: Arc::clone(&self.0), shard, epoch: 0, step: 0 }))
    }
}

impl BatchStream for Rows {
    fn next_batch(&mut self) -> Result<Option<Batch>, Error> {
        let orders = &self.images.orders;
        let Some(rows) = orders[self.epoch % orders.len()].chunks(self.images.batch).nth(self.step)
        else {
            (self.epoch, self.step) = (self.epoch + 1, 0);
            return Ok(None);
        };
        self.step += 1;
        let Shard { rank, world } = self.shard;
        let mine = &rows[rows.len() * rank / world..rows.len() * (rank + 1) / world];
        Ok(Some(self.images.batch(mine)?.with_global_rows(rows.len())))
    }

    fn state(&self) -> StreamState {
        let (epoch, step) = (self.epoch as u64, self.step as u64);
        StreamState { epoch, step, ..StreamState::default() }
    }

    fn restore(&mut self, state: &StreamState) -> Result<(), Error> {
        (self.epoch, self.step) = (state.epoch as usize, state.step as usize);
        Ok(())
    }

    fn steps_per_epoch(&self) -> u64 {
        self.images.labels.len().div_ceil(self.images.batch) as u64
    }
}

/// Writes initial weights, as nn draws them, and the rows of each epoch.
pub(crate) fn fixture(seed: u64, path: &Path) -> Result<()> {
    let state = model(seed)?.params().state();
    let mut tensors: HashMap<String, Tensor> =
        state.into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
    for epoch in 0..ORDERS {
        let mut dice = Stream::new(seed, "order").at(epoch as u64, 0);
        let mut rows: Vec<i64> = (0..TRAIN_ROWS as i64).collect();
        for last in (1..TRAIN_ROWS).rev() {
            rows.swap(last, dice.below(last as u64 + 1) as usize);
        }
        let rows = Tensor::from_vec(rows, TRAIN_ROWS, &Device::Cpu)?;
        tensors.insert(format!("order.{epoch}"), rows);
    }
    candle_core::safetensors::save(&tensors, path)
        .with_context(|| format!("writing {}", path.display()))
}

fn model(seed: u64) -> Result<Model> {
    Ok(Model::build(&ModelSpec::new("cnn", &CnnOptions::default())?, seed, &Device::Cpu)?)
}

#[derive(Clone, Serialize, Deserialize)]
struct Job {
    data: PathBuf,
    fixture: PathBuf,
    epochs: u64,
}

/// The accuracy after each epoch, and the seconds since the training began, data in memory.
type Curve = Vec<(f64, f64)>;

#[mobula_core::remote(crate = mobula_core)]
fn classify(member: Member, job: Job) -> Result<Curve> {
    let mut context = WorkerContext::join(member)?;
    let mut tensors = candle_core::safetensors::load(&job.fixture, &Device::Cpu)?;
    let mut orders = Vec::new();
    while let Some(rows) = tensors.remove(&format!("order.{}", orders.len())) {
        orders.push(rows.to_vec1::<i64>()?.into_iter().map(|row| row as usize).collect());
    }
    let train = Images::read(&job.data, "train", orders, BATCH)?;
    let in_order = vec![(0..10_000).collect()];
    let test = Images::read(&job.data, "t10k", in_order, TEST_BATCH)?;
    let (mut train, mut test) = (context.batches(&train)?, context.batches(&test)?);
    let model = model(0)?;
    model.params().load_tensors("the fixture", &tensors)?;
    let mut state = TrainState::new(model, optimizer()?, 1, job.epochs);
    context.collective().barrier()?;
    let (start, mut curve) = (Instant::now(), Vec::new());
    while !state.is_finished() {
        while let Some(batch) = train.next_batch()? {
            context.step(&mut state, &batch, |model, pass, batch| {
                loss::cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
            })?;
        }
        let accuracy = context.mean_over(test.as_mut(), |batch| -> Result<f64, BoxError> {
            let logits = state.model.predict(batch.get("x")?)?;
            Ok(metrics::correct(&logits, batch.get("y")?)? as f64)
        })?;
        context.end_epoch(&mut state, train.as_ref(), &[("accuracy", accuracy)])?;
        curve.push((accuracy, start.elapsed().as_secs_f64()));
        if accuracy >= TARGET {
            break;
        }
    }
    Ok(curve)
}

/// Trains until the target, or for so many epochs, and prints the curve.
pub(crate) fn train(runtime: &Runtime, arguments: [&str; 4]) -> Result<()> {
    let [data, fixture, workers, epochs] = arguments;
    let job = Job { data: data.into(), fixture: fixture.into(), epochs: epochs.parse()? };
    let trainer = Trainer::new(classify::remote(job)).with_logs_shown(false);
    let scaling = ScalingConfig::workers(workers.parse::<usize>()?);
    let fit = trainer.with_scaling(scaling).fit(runtime)?;
    let curve = fit.values.into_iter().next().context("a rank 0")?;
    let (accuracies, seconds): (Vec<f64>, Vec<f64>) = curve.into_iter().unzip();
    super::answer(json!({ "accuracies": accuracies, "seconds": seconds, "name": "Mobula" }))
}
