//! Workers that take steps of their own and meet now and then.

use crate::digits::{CLASSES, Config, FEATURES, Outcome, Rows, train};
use crate::{Test, faults};
use candle_core::Device;
use mobula_core::{
    Batch, BatchStream, BoxError, GroupOptions, Member, Placement, Resources, RunDir, Runtime,
    Shard, checkpoint::Checkpoint, remote,
};
use mobula_nn::models::MlpOptions;
use mobula_nn::{Gradients, Model, ModelSpec, Pass, loss::cross_entropy};
use mobula_train::optim::{Clip, OptimizerSpec, ParamGroup, Sgd, SgdOptions, UpdaterOptions};
use mobula_train::{
    CheckpointConfig, LocalSgd, NonFinite, ScalingConfig, TrainState, Trainer, TrainingResult,
    WorkerContext,
};
use std::path::Path;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("local::workers_part_and_meet_as_the_papers_say", as_told),
    ("local::a_meeting_after_each_step_is_data_parallel", each_step),
    ("local::a_run_goes_on_from_every_meeting_to_the_same_bits", resumes),
    ("local::frozen_parameters_stay_what_they_are", frozen),
    ("local::a_lost_worker_means_the_newest_checkpoint", killed),
    ("local::what_cannot_be_is_refused", refused),
];

const BATCH: usize = 12;
const LR: f64 = 0.1;

fn config(epochs: u64) -> Config {
    let updater =
        UpdaterOptions { clip: Some(Clip::Norm(0.5)), ema: Some(0.9), ..Default::default() };
    Config { batch_size: BATCH, dropout: 0.2, updater: Some(updater), ..Config::new(epochs) }
}

fn model() -> Result<Model, BoxError> {
    let spec = ModelSpec::new("mlp", &MlpOptions::new(FEATURES, [16], CLASSES))?;
    Ok(Model::build(&spec, 5, &Device::Cpu)?)
}

fn weights(model: &Model) -> Result<Vec<f32>, BoxError> {
    let mut weights = Vec::new();
    for (_, var) in model.params().vars() {
        weights.extend(var.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(weights)
}

/// Eight steps of plain SGD: the weights after each, and whether all ranks have the same by then.
#[remote(crate = mobula_core)]
fn steps(member: Member) -> Result<Vec<(Vec<f32>, bool)>, BoxError> {
    let mut context = WorkerContext::join(member)?;
    let sgd = Sgd::new(SgdOptions { lr: LR, ..Default::default() })?;
    let mut state = TrainState::new(model()?, sgd, 5, 9);
    let mut stream = context.batches(&config(9))?;
    let mut all = Vec::new();
    while all.len() < 8 {
        let Some(batch) = stream.next_batch()? else { continue };
        context.step(&mut state, &batch, |model, pass, batch| {
            let logits = model.forward(batch.get("x")?, pass)?;
            Ok::<_, BoxError>(cross_entropy(&logits, batch.get("y")?)?)
        })?;
        all.push((weights(&state.model)?, state.is_synchronised()));
    }
    Ok(all)
}

fn run(runtime: &Runtime, setup: serde_json::Value) -> Vec<Vec<(Vec<f32>, bool)>> {
    let options = GroupOptions {
        placement: Placement::Thread,
        resources: Resources::cpus(0.5),
        ..GroupOptions::new("local", 3)
    };
    let options = options.with_context(&setup).expect("context");
    let group = runtime.group(&options, &steps::remote()).expect("group");
    group.join(Duration::from_secs(60)).expect("join")
}

/// What a rank does by itself.
struct Alone {
    model: Model,
    gradients: Gradients,
    rows: Rows,
}

impl Alone {
    fn new(rank: usize) -> Result<Self, BoxError> {
        let model = model()?;
        let gradients = Gradients::zeros(model.params());
        Ok(Self { model, gradients, rows: Rows::open(Shard { rank, world: 3 }, BATCH) })
    }

    fn next(&mut self) -> Result<Batch, BoxError> {
        loop {
            if let Some(batch) = self.rows.next_batch()? {
                return Ok(batch);
            }
        }
    }

    fn step(&mut self) -> Result<Vec<f32>, BoxError> {
        let batch = self.next()?;
        let logits = self.model.forward(batch.get("x")?, &Pass::eval())?;
        self.gradients.backward(&cross_entropy(&logits, batch.get("y")?)?, 1.0)?;
        let before = weights(&self.model)?;
        let moved = before.iter().zip(self.gradients.values());
        self.put(&moved.map(|(weight, gradient)| weight - LR as f32 * gradient).collect::<Vec<_>>())
    }

    fn put(&self, values: &[f32]) -> Result<Vec<f32>, BoxError> {
        let mut rest = values;
        for (_, var) in self.model.params().vars() {
            let (own, others) = rest.split_at(var.elem_count());
            var.set(&candle_core::Tensor::from_slice(own, var.shape(), var.device())?)?;
            rest = others;
        }
        Ok(values.to_vec())
    }
}

/// DiLoCo, written down a second time: three steps by themselves, then SGD with Nesterov momentum along
/// the mean of the ways.
fn expected(lr: f32, momentum: f32) -> Result<Vec<Vec<Vec<f32>>>, BoxError> {
    let mut ranks = [Alone::new(0)?, Alone::new(1)?, Alone::new(2)?];
    let mut start = weights(&ranks[0].model)?;
    let (mut velocity, mut all) = (vec![0.0; start.len()], vec![Vec::new(); 3]);
    for step in 1..=8 {
        let mut now: Vec<Vec<f32>> = ranks.iter_mut().map(Alone::step).collect::<Result<_, _>>()?;
        if step % 3 == 0 {
            for at in 0..start.len() {
                let way = start[at] - now.iter().map(|rank| rank[at]).sum::<f32>() / 3.0;
                velocity[at] = momentum * velocity[at] + way;
                start[at] -= lr * (way + momentum * velocity[at]);
            }
            now = ranks.iter().map(|rank| rank.put(&start)).collect::<Result<_, _>>()?;
        }
        all.iter_mut().zip(now).for_each(|(all, now)| all.push(now));
    }
    Ok(all)
}

fn as_told(runtime: &Runtime) {
    let options = [(LocalSgd::diloco(3), 0.7, 0.9), (LocalSgd::average(3), 1.0, 0.0)];
    for (options, lr, momentum) in options {
        let got = run(runtime, serde_json::json!({"local_sgd": options}));
        let expected = expected(lr, momentum).expect("expected");
        for step in 0..8 {
            let is_meeting = (step + 1) % 3 == 0;
            for (rank, expected) in got.iter().zip(&expected) {
                let (weights, is_synchronised) = &rank[step];
                assert_eq!(*is_synchronised, is_meeting);
                let mut pairs = weights.iter().zip(&expected[step]);
                assert!(pairs.all(|(a, b)| (a - b).abs() < 1e-5), "step {step}, {options:?}");
                assert_eq!(*weights == got[0][step].0, is_meeting || std::ptr::eq(rank, &got[0]));
            }
        }
    }
}

/// With equal numbers of rows the mean of the weights is the step along the mean of the gradients.
fn each_step(runtime: &Runtime) {
    let local = run(runtime, serde_json::json!({"local_sgd": LocalSgd::average(1)}));
    let parallel = run(runtime, serde_json::json!({}));
    // The last batch of an epoch has six rows, two for each.
    let (local, parallel) = (&local[0][7].0, &parallel[0][7].0);
    assert!(local.iter().zip(parallel).all(|(a, b)| (a - b).abs() < 1e-5));
}

fn scaling(local: LocalSgd) -> ScalingConfig {
    ScalingConfig {
        placement: Placement::Thread,
        resources_per_worker: Resources::cpus(0.5),
        local_sgd: Some(local),
        ..ScalingConfig::workers(3)
    }
}

fn trainer(config: Config, scaling: ScalingConfig, run: &RunDir) -> Trainer<Outcome> {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false).with_run(run);
    trainer.with_scaling(scaling)
}

fn run_in(root: &Path, name: &str) -> RunDir {
    RunDir::create(root, name, 5, &()).expect("run")
}

fn bits(result: &TrainingResult<Outcome>) -> Vec<Vec<u32>> {
    let of = |rank: &Outcome| rank.weights.iter().map(|value| value.to_bits()).collect();
    result.values.iter().map(of).collect()
}

/// Eight steps an epoch, so they meet at 3, 6, 8, 9, 12, ..; AdamW, averages of the weights, dropout.
fn resumes(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let every = CheckpointConfig {
        every_steps: Some(1),
        keep: 99,
        asynchronous: false,
        ..Default::default()
    };
    let whole = trainer(config(4), scaling(LocalSgd::diloco(3)), &run).with_checkpoints(every);
    let whole = whole.fit(runtime).expect("fit");
    assert!(bits(&whole).iter().all(|rank| *rank == bits(&whole)[0]));
    assert!(whole.metrics["accuracy"] > 0.8, "{:?}", whole.metrics);
    let paths = run.checkpoints(99).paths().expect("paths");
    let steps = paths.iter().map(|path| Checkpoint::open(path).expect("valid").step());
    let meetings = (1..=32u64).filter(|step| step % 3 == 0 || step % 8 == 0);
    assert!(steps.eq(meetings));
    for path in paths {
        let name = path.file_name().expect("name").to_string_lossy().into_owned();
        let from = run_in(root.path(), &name);
        crate::digits::copy(&path, &from.checkpoints(1).dir().join(&name));
        let resumed =
            trainer(config(4), scaling(LocalSgd::diloco(3)), &from).fit(runtime).expect("fit");
        assert_eq!(bits(&resumed), bits(&whole), "{name}");
        assert_eq!(resumed.metrics["loss"].to_bits(), whole.metrics["loss"].to_bits(), "{name}");
    }
}

/// The mean of three equal numbers need not be that number, and an outer optimizer may decay weights.
fn frozen(runtime: &Runtime) {
    let frozen = ParamGroup { frozen: true, ..ParamGroup::named(["fc1.*"]) };
    let updater = UpdaterOptions { groups: vec![frozen], ..Default::default() };
    let adamw = OptimizerSpec::AdamW(Default::default());
    for local in [LocalSgd::diloco(3), LocalSgd { every_steps: 3, outer: adamw }] {
        let config = Config { updater: Some(updater.clone()), ..config(2) };
        let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
        let fit = trainer.with_scaling(scaling(local)).fit(runtime).expect("fit");
        let (before, after) =
            (weights(&model().expect("model")).expect("weights"), &fit.values[0].weights);
        let fc1 = 16 + 16 * FEATURES;
        assert_eq!(after[..fc1], before[..fc1]);
        assert_ne!(after[fc1..], before[fc1..]);
    }
}

fn killed(runtime: &Runtime) {
    let local_sgd = Some(LocalSgd::diloco(3));
    let scaling = ScalingConfig { local_sgd, ..ScalingConfig::workers(2) };
    faults::goes_on_from_the_newest_checkpoint(runtime, &scaling, &config(3), 13, 8);
}

fn refused(runtime: &Runtime) {
    let error = |scaling: ScalingConfig, config: Config| {
        let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
        trainer.with_scaling(scaling).fit(runtime).expect_err("refused").to_string()
    };
    let local = || scaling(LocalSgd::average(3));
    let text = error(scaling(LocalSgd::average(0)), config(1));
    assert_eq!(text, "option local_sgd.every_steps is 0, expected at least 1");
    for scaling in [
        ScalingConfig { shard_optimizer: true, ..local() },
        ScalingConfig { sync_batch_norm: true, ..local() },
        ScalingConfig { virtual_shards: Some(4), ..local() },
    ] {
        let text = error(scaling, config(1));
        assert!(text.starts_with("option local_sgd is some, expected none with"), "{text}");
    }
    let skipping = Config { non_finite: NonFinite::Skip { in_a_row: 1 }, ..config(1) };
    let text = error(local(), skipping);
    assert!(text.contains("option local_sgd is some, expected none where steps"), "{text}");
    let text = error(ScalingConfig { num_workers: (2..=3).into(), ..local() }, config(1));
    assert!(text.starts_with("option num_workers is a range, expected one number"), "{text}");
    let outer = OptimizerSpec::Sgd(SgdOptions { lr: -1.0, ..Default::default() });
    let text = error(scaling(LocalSgd { every_steps: 3, outer }), config(1));
    assert!(text.contains("lr"), "{text}");
}
