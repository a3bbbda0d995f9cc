//! A small learnable problem, and the training function that the tests share.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use mobula_core::random::Stream;
use mobula_core::{
    Batch, BatchSource, BatchStream, BoxError, Error, Member, Shard, StreamState, remote,
};
use mobula_nn::loss::cross_entropy;
use mobula_nn::models::{MlpOptions, ResNetOptions};
use mobula_nn::{Model, ModelSpec, Pass, Precision, metrics};
use mobula_train::{
    AdamW, AdamWOptions, NonFinite, TrainState, Updater, UpdaterOptions, WorkerContext,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub(crate) const FEATURES: usize = 8;
pub(crate) const CLASSES: usize = 3;
pub(crate) const ROWS: usize = 90;

/// What to train, and which harm to do on the way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Config {
    pub(crate) epochs: u64,
    pub(crate) batch_size: usize,
    pub(crate) lr: f64,
    pub(crate) harm: Harm,
    /// Instead of AdamW with `lr`.
    pub(crate) updater: Option<UpdaterOptions>,
    /// Instead of a multilayer perceptron: a network with batch norms.
    pub(crate) resnet: bool,
    pub(crate) hidden: usize,
    /// In the perceptron. Masks differ between numbers of workers, unless there are virtual shards.
    pub(crate) dropout: f64,
    pub(crate) precision: Precision,
    pub(crate) non_finite: NonFinite,
    /// Gradients are taken for those of another device.
    pub(crate) elsewhere: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Harm {
    None,
    /// Rank 1 kills itself at this step unless the file is there, which it makes.
    KillOnce {
        at_step: u64,
        marker: PathBuf,
    },
    /// Rank 1 comes to harm in these places, in each once: when its file is not there, which it makes.
    Once {
        how: How,
        places: Vec<(Place, PathBuf)>,
    },
    /// Rank 1 kills itself so long after it has begun this step, once, wherever it is by then.
    KillAfter {
        at_step: u64,
        wait: Duration,
        marker: PathBuf,
    },
    /// Rank 0 kills itself as soon as this folder is there, once.
    KillWriter {
        folder: PathBuf,
        marker: PathBuf,
    },
    /// All ranks kill themselves at this step, once.
    KillAllOnce {
        at_step: u64,
        folder: PathBuf,
    },
    /// Rank 1 kills itself whenever it comes to this step.
    KillAlways {
        at_step: u64,
    },
    /// The inputs turn into NaN at this step.
    NanInputs {
        at_step: u64,
    },
    /// The loss turns into NaN at this step.
    NanLoss {
        at_step: u64,
    },
    /// That of rank 1 does at these.
    NanLosses {
        steps: Vec<u64>,
    },
    /// The last rank's logits, and their gradients, go through `f16`.
    Half,
    /// Rank 1 has a label that no class has.
    BadLabel,
    /// Rank 0 can write no large file from the second of the six steps of this epoch to its end, and then
    /// until its checkpoint is over.
    FullDisk {
        epoch: u64,
    },
    /// The driver can append no whole line to the metrics in the second epoch.
    FullMetrics,
    /// Each rank leaves its process id in the folder at this step, and goes no further.
    Wait {
        at_step: u64,
        folder: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum How {
    Kill,
    /// It hangs.
    Stop,
    Abort,
    /// It is refused the memory that it asks for.
    OutOfMemory,
}

/// Where in the training, all but the first at step 15.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Place {
    /// Before it meets the others, in this generation.
    Start(u64),
    /// When it has met them, in this generation, and before it gets what they have.
    Restore(u64),
    Forward,
    Backward,
    /// While the others wait for its gradients.
    Sum,
    Validation,
}

impl Config {
    pub(crate) fn new(epochs: u64) -> Self {
        Self {
            epochs,
            batch_size: 16,
            lr: 0.02,
            harm: Harm::None,
            updater: None,
            resnet: false,
            hidden: 16,
            dropout: 0.0,
            precision: Precision::F32,
            non_finite: NonFinite::Fail,
            elsewhere: false,
        }
    }
}

/// Class `c` has its rows around its own corner; row and class follow from the index alone.
pub(crate) fn row(index: usize) -> ([f32; FEATURES], u32) {
    let mut rng = Stream::new(1, "rows").at(0, index as u32);
    let class = index % CLASSES;
    let value = |i| if i % CLASSES == class { 1.0 } else { 0.0 };
    (std::array::from_fn(|i| value(i) + 0.3 * rng.normal() as f32), class as u32)
}

/// Global batches of consecutive rows in an order that changes with the epoch; each rank takes
/// every `world`-th row.
#[derive(Debug)]
pub(crate) struct Rows {
    shard: Shard,
    batch_size: usize,
    epoch: u64,
    step: u64,
}

impl Rows {
    pub(crate) fn open(shard: Shard, batch_size: usize) -> Self {
        Self { shard, batch_size, epoch: 0, step: 0 }
    }
}

impl BatchSource for Config {
    fn open(&self, shard: Shard) -> Result<Box<dyn BatchStream>, Error> {
        Ok(Box::new(Rows::open(shard, self.batch_size)))
    }
}

impl BatchStream for Rows {
    fn next_batch(&mut self) -> Result<Option<Batch>, Error> {
        let first = self.step as usize * self.batch_size;
        if first >= ROWS {
            (self.epoch, self.step) = (self.epoch + 1, 0);
            return Ok(None);
        }
        let last = (first + self.batch_size).min(ROWS);
        let mine = (first..last).filter(|i| i % self.shard.world == self.shard.rank);
        let rows: Vec<_> = mine.map(|i| row((i * 7 + self.epoch as usize) % ROWS)).collect();
        let x: Vec<f32> = rows.iter().flat_map(|(x, _)| *x).collect();
        let y: Vec<u32> = rows.iter().map(|(_, y)| *y).collect();
        self.step += 1;
        let x = Tensor::from_vec(x, (rows.len(), FEATURES), &Device::Cpu)?;
        let y = Tensor::from_vec(y, rows.len(), &Device::Cpu)?;
        let batch = Batch::new(vec![("x".into(), x), ("y".into(), y)])?;
        Ok(Some(batch.with_global_rows(last - first)))
    }

    fn state(&self) -> StreamState {
        let (epoch, step) = (self.epoch, self.step);
        StreamState { manifest: "rows".into(), version: 1, seed: 0, epoch, step }
    }

    fn restore(&mut self, state: &StreamState) -> Result<(), Error> {
        (self.epoch, self.step) = (state.epoch, state.step);
        Ok(())
    }

    fn steps_per_epoch(&self) -> u64 {
        ROWS.div_ceil(self.batch_size) as u64
    }
}

/// What a rank has at the end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) weights: Vec<f32>,
    pub(crate) buffers: BTreeMap<String, Vec<f32>>,
    pub(crate) accuracy: f64,
    /// Numbers that its optimizer remembers.
    pub(crate) optimizer_values: usize,
    /// The step that the rank began at: above 0 if it was restored from a checkpoint.
    pub(crate) began_at: u64,
    /// The generation in which its process was started.
    pub(crate) process: u64,
    pub(crate) is_on_gpu: bool,
}

/// Of this process.
static FIRST_GENERATION: OnceLock<u64> = OnceLock::new();
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// Trains, and gives what this rank has at the end.
#[remote(crate = mobula_core)]
pub(crate) fn train(member: Member, config: Config) -> Result<Outcome, BoxError> {
    let generation = member.generation();
    println!("generation {generation}");
    if member.rank() == 1 {
        come_to_harm(&config.harm, Place::Start(generation));
    }
    if let Harm::KillWriter { folder, marker } = &config.harm
        && member.rank() == 0
        && !marker.exists()
    {
        let (folder, marker) = (folder.clone(), marker.clone());
        std::thread::spawn(move || kill_when_there(&folder, &marker));
    }
    FIRST_GENERATION.get_or_init(|| generation);
    GENERATION.store(generation, Ordering::Relaxed);
    let context = WorkerContext::join(member)?;
    let mut context = if config.elsewhere { context.with_gradients_elsewhere() } else { context };
    learn(&mut context, &config)
}

pub(crate) fn learn(context: &mut WorkerContext<'_>, config: &Config) -> Result<Outcome, BoxError> {
    let adamw = AdamWOptions { lr: config.lr, ..Default::default() };
    let updater = match &config.updater {
        Some(options) => options.build()?,
        None => AdamW::new(adamw)?.into(),
    };
    learn_with(context, config, updater)
}

pub(crate) fn learn_with(
    context: &mut WorkerContext<'_>,
    config: &Config,
    updater: Updater,
) -> Result<Outcome, BoxError> {
    let mut stream = context.batches(config)?;
    let model = Model::build(&model(config)?, 5, context.device())?;
    let state = TrainState::new(model, updater, 5, config.epochs);
    let state = state.with_non_finite(config.non_finite);
    let mut state = state.with_precision(config.precision);
    if context.shard().rank == 1 {
        come_to_harm(&config.harm, Place::Restore(GENERATION.load(Ordering::Relaxed)));
    }
    let restored = context.restore(&mut state, stream.as_mut())?;
    let began_at = state.step();
    assert_eq!(restored, began_at > 0);
    let mut accuracy = f64::NAN;
    while !state.is_finished() {
        while let Some(batch) = stream.next_batch()? {
            let Shard { rank, world } = context.shard();
            do_harm(&config.harm, rank, state.step());
            let step = state.step();
            context.step(&mut state, &batch, |model, pass, batch| {
                let (x, y) = spoil(&config.harm, rank, step, batch)?;
                let logits = model.forward(&x, pass)?;
                if rank == 1 && step == 15 {
                    come_to_harm(&config.harm, Place::Forward);
                    in_sum(&config.harm);
                }
                let logits = match &config.harm {
                    Harm::Once { .. } if rank == 1 && step == 15 => {
                        logits.apply_op1(InBackward(config.harm.clone()))?
                    }
                    _ => logits,
                };
                let logits = match config.harm {
                    Harm::Half if rank + 1 == world => half(&logits)?,
                    _ => logits,
                };
                let loss = cross_entropy(&logits, &y)?;
                match &config.harm {
                    Harm::NanLosses { steps } if rank == 1 && steps.contains(&step) => {
                        Ok((loss * f64::NAN)?)
                    }
                    Harm::NanLoss { at_step } if *at_step == step => Ok((loss * f64::NAN)?),
                    _ => Ok::<_, BoxError>(loss),
                }
            })?;
            // One that is not finite brings them here.
            let are_finite = matches!(config.harm, Harm::None | Harm::KillOnce { .. });
            if config.elsewhere && are_finite {
                assert!(state.gradients().elsewhere().is_some());
            }
        }
        context.synchronise(&mut state)?;
        let mut test = context.batches(config)?;
        let (rank, epoch) = (context.shard().rank, state.epoch());
        accuracy = context.mean_over(test.as_mut(), |batch| -> Result<f64, BoxError> {
            if rank == 1 && epoch == 2 {
                come_to_harm(&config.harm, Place::Validation);
            }
            let logits = state.model.forward(batch.get("x")?, &Pass::eval())?;
            Ok(metrics::correct(&logits, batch.get("y")?)? as f64)
        })?;
        context.end_epoch(&mut state, stream.as_ref(), &[("accuracy", accuracy)])?;
    }
    let mut weights = Vec::new();
    for (_, var) in state.model.params().vars() {
        weights.extend(var.flatten_all()?.to_vec1::<f32>()?);
    }
    let buffers = buffers(&state.model)?;
    let process = FIRST_GENERATION.get().copied().unwrap_or(0);
    let is_on_gpu = context.device().is_cuda();
    let optimizer = state.updater.state()?;
    let params = optimizer.iter().flat_map(|state| &state.params);
    let slots = params.flat_map(|param| &param.slots);
    let optimizer_values = slots.map(|slot| slot.values.len()).sum();
    Ok(Outcome { weights, buffers, accuracy, optimizer_values, began_at, process, is_on_gpu })
}

fn model(config: &Config) -> Result<ModelSpec, BoxError> {
    let outputs = CLASSES;
    if config.resnet {
        let (blocks, size) = (vec![1, 1], ResNetOptions::default());
        let size = ResNetOptions { channels: 1, height: 2, width: 4, base: 4, ..size };
        return Ok(ModelSpec::new("resnet", &ResNetOptions { blocks, outputs, ..size })?);
    }
    let mut options = MlpOptions::new(FEATURES, [config.hidden], outputs);
    options.dropout = config.dropout;
    Ok(ModelSpec::new("mlp", &options)?)
}

pub(crate) fn buffers(model: &Model) -> Result<BTreeMap<String, Vec<f32>>, BoxError> {
    let buffers = model.params().buffers().into_iter();
    buffers.map(|(name, var)| Ok((name, var.flatten_all()?.to_vec1()?))).collect()
}

/// Rounds to half precision, forward and backward.
pub(crate) fn half(x: &Tensor) -> Result<Tensor, BoxError> {
    Ok(x.to_dtype(DType::F16)?.to_dtype(DType::F32)?)
}

fn signal(how: How) {
    use rustix::process::Signal;
    let signal = match how {
        How::Kill => Signal::KILL,
        How::Stop => Signal::STOP,
        How::Abort => std::process::abort(),
        How::OutOfMemory => return ask_for_too_much(),
    };
    let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
}

/// As in a container that has no more: so Rust ends the process.
fn ask_for_too_much() {
    let maximum = getrlimit(Resource::As).maximum;
    let little = Rlimit { current: Some(1 << 20), maximum };
    setrlimit(Resource::As, little).expect("a limit");
    std::hint::black_box(vec![1u8; 1 << 30]);
}

/// In the epoch that is said, and frees it again in the next one. After the first step of each, when the
/// thread that writes the checkpoint of the one before has a name by which it is known.
fn fill_disk(epoch: u64, step: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while is_saving().expect("threads") {
        assert!(Instant::now() < deadline, "it writes for ever");
        std::thread::yield_now();
    }
    // In the middle of the weights.
    limit_files((step / 6 == epoch).then_some(100_000));
}

/// To so many bytes each, as a full disk would.
pub(crate) fn limit_files(bytes: Option<u64>) {
    let maximum = getrlimit(Resource::Fsize).maximum;
    let current = bytes.or(maximum);
    setrlimit(Resource::Fsize, Rlimit { current, maximum }).expect("a limit");
}

/// Whether the thread that writes checkpoints is there.
fn is_saving() -> std::io::Result<bool> {
    for thread in std::fs::read_dir("/proc/self/task")? {
        // It may have ended meanwhile.
        let name = std::fs::read_to_string(thread?.path().join("comm")).unwrap_or_default();
        if name.trim() == "checkpoint" {
            return Ok(true);
        }
    }
    Ok(false)
}

/// If this is the place, and a marker is not there yet.
fn come_to_harm(harm: &Harm, here: Place) {
    let Harm::Once { how, places } = harm else {
        return;
    };
    let mut due = places.iter().filter(|(place, marker)| *place == here && !marker.exists());
    if let Some((_, marker)) = due.next() {
        let _ = std::fs::write(marker, "");
        signal(*how);
    }
}

fn do_harm(harm: &Harm, rank: usize, step: u64) {
    match harm {
        Harm::KillOnce { at_step, marker } if rank == 1 && step == *at_step && !marker.exists() => {
            let _ = std::fs::write(marker, "");
            signal(How::Kill);
        }
        Harm::KillAfter { at_step, wait, marker }
            if rank == 1 && step == *at_step && !marker.exists() =>
        {
            let (deadline, marker) = (Instant::now() + *wait, marker.clone());
            std::thread::spawn(move || {
                while Instant::now() < deadline {
                    std::hint::spin_loop();
                }
                let _ = std::fs::write(marker, "");
                signal(How::Kill);
            });
        }
        Harm::KillAllOnce { at_step, folder } if step == *at_step => {
            let marker = folder.join(format!("killed-{rank}"));
            if !marker.exists() {
                let _ = std::fs::write(marker, "");
                signal(How::Kill);
            }
        }
        Harm::FullDisk { epoch } if rank == 0 && step % 6 == 1 => fill_disk(*epoch, step),
        Harm::Wait { at_step, folder } if step == *at_step => {
            let (pid, file) = (std::process::id().to_string(), folder.join(rank.to_string()));
            let _ = std::fs::write(file.with_extension("tmp"), pid);
            let _ = std::fs::rename(file.with_extension("tmp"), file);
            loop {
                std::thread::park();
            }
        }
        Harm::KillAlways { at_step } if rank == 1 && step == *at_step => signal(How::Kill),
        _ => {}
    }
}

fn kill_when_there(folder: &Path, marker: &Path) {
    while !folder.exists() {
        std::thread::yield_now();
    }
    let _ = std::fs::write(marker, "");
    signal(How::Kill);
}

/// Harm in a backward pass.
struct InBackward(Harm);

impl CustomOp1 for InBackward {
    fn name(&self) -> &'static str {
        "in-backward"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let CpuStorage::F32(values) = storage else { candle_core::bail!("of f32") };
        Ok((CpuStorage::F32(values.clone()), layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        come_to_harm(&self.0, Place::Backward);
        Ok(Some(gradient.clone()))
    }
}

/// Late, so that the others are in their sum by then.
fn in_sum(harm: &Harm) {
    let Harm::Once { places, .. } = harm else {
        return;
    };
    if places.iter().any(|(place, marker)| *place == Place::Sum && !marker.exists()) {
        // Nothing that is tested depends on whether they are.
        std::thread::sleep(std::time::Duration::from_millis(200));
        come_to_harm(harm, Place::Sum);
    }
}

fn spoil(harm: &Harm, rank: usize, step: u64, batch: &Batch) -> Result<(Tensor, Tensor), BoxError> {
    let (x, y) = (batch.get("x")?.clone(), batch.get("y")?.clone());
    Ok(match harm {
        Harm::NanInputs { at_step } if step == *at_step => ((x * f64::NAN)?, y),
        Harm::BadLabel if rank == 1 => (x, (y.ones_like()? * 12.0)?),
        _ => (x, y),
    })
}

/// Whether a metric differs from run to run.
pub(crate) fn is_of_time(name: &str) -> bool {
    name == "samples_per_second" || name.starts_with("ranks/")
}

/// A folder of files, such as a checkpoint.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("folder");
    for entry in std::fs::read_dir(from).expect("list") {
        let entry = entry.expect("entry");
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copy");
    }
}
