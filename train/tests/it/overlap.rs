//! Sums that begin while the backward pass computes.

use crate::Test;
use crate::digits::{CLASSES, Config, FEATURES, Outcome, train};
use candle_core::Device;
use mobula_core::{
    Batch, BoxError, GroupOptions, Member, Placement, Resources, RunDir, Runtime, remote,
};
use mobula_nn::models::MlpOptions;
use mobula_nn::{Model, ModelSpec, loss::cross_entropy};
use mobula_train::optim::{Clip, UpdaterOptions};
use mobula_train::{
    AdamW, AdamWOptions, CheckpointConfig, Overlap, ScalingConfig, TrainState, Trainer,
    TrainingResult, Transport, WorkerContext,
};
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("overlap::buckets_change_no_bit_in_shared_memory", same_bits),
    ("overlap::between_hosts_a_run_goes_on_to_the_same_bits", resumes),
    ("overlap::accumulated_batches_travel_once", accumulated),
    ("overlap::a_model_that_changes_is_an_error", changes),
];

fn config(epochs: u64, resnet: bool) -> Config {
    let updater = UpdaterOptions { clip: Some(Clip::Norm(0.5)), ..Default::default() };
    // The last batch of an epoch has no row for the third worker.
    Config { batch_size: 11, resnet, updater: Some(updater), ..Config::new(epochs) }
}

fn scaling(workers: usize, overlap: Overlap) -> ScalingConfig {
    ScalingConfig {
        placement: Placement::Thread,
        resources_per_worker: Resources::cpus(0.5),
        overlap,
        ..ScalingConfig::workers(workers)
    }
}

fn fit(runtime: &Runtime, scaling: ScalingConfig, config: Config) -> TrainingResult<Outcome> {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
    trainer.with_scaling(scaling).fit(runtime).expect("fit")
}

fn bits(outcome: &Outcome) -> Vec<u32> {
    outcome.weights.iter().map(|value| value.to_bits()).collect()
}

fn same_bits(runtime: &Runtime) {
    for resnet in [false, true] {
        for workers in [2, 3] {
            let whole = fit(runtime, scaling(workers, Overlap::Never), config(2, resnet));
            for bytes in [1, 300, 1 << 20] {
                let buckets = scaling(workers, Overlap::Buckets { bytes });
                let early = fit(runtime, buckets, config(2, resnet));
                for (early, whole) in early.values.iter().zip(&whole.values) {
                    assert_eq!(bits(early), bits(whole), "{workers} workers, {bytes} bytes");
                    assert_eq!(early.buffers, whole.buffers);
                }
                assert_eq!(early.metrics["loss"], whole.metrics["loss"]);
            }
        }
    }
}

/// Rings and halves add up in an order that depends on the buckets, in each step in the same.
fn resumes(runtime: &Runtime) {
    let between = |overlap| ScalingConfig { transport: Transport::Tcp, ..scaling(3, overlap) };
    let buckets = Overlap::Buckets { bytes: 300 };
    let never = fit(runtime, between(Overlap::Never), config(2, false));
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
    let trainer = |run: &RunDir, overlap| {
        let every = CheckpointConfig {
            every_steps: Some(7),
            keep: 9,
            asynchronous: false,
            ..Default::default()
        };
        let trainer = Trainer::new(train::remote(config(2, false))).with_logs_shown(false);
        trainer.with_scaling(between(overlap)).with_checkpoints(every).with_run(run)
    };
    let whole = trainer(&run, buckets).fit(runtime).expect("fit");
    assert!(whole.values.iter().all(|rank| bits(rank) == bits(&whole.values[0])));
    let far = |a: &f32, b: &f32| (a - b).abs() > 1e-4 * b.abs().max(1e-2);
    let (one, other) = (&whole.values[0].weights, &never.values[0].weights);
    assert!(!one.iter().zip(other).any(|(a, b)| far(a, b)));
    for path in run.checkpoints(9).paths().expect("paths") {
        let name = path.file_name().expect("name").to_string_lossy().into_owned();
        let from = RunDir::create(root.path(), &name, 5, &()).expect("run");
        crate::digits::copy(&path, &from.checkpoints(1).dir().join(&name));
        let resumed = trainer(&from, buckets).fit(runtime).expect("fit");
        assert_eq!(bits(&resumed.values[0]), bits(&whole.values[0]), "{name}");
    }
    // Between hosts that is what happens by itself.
    let auto = fit(runtime, between(Overlap::Auto), config(2, false));
    let large = fit(runtime, between(Overlap::Buckets { bytes: 25 << 20 }), config(2, false));
    assert_eq!(bits(&auto.values[0]), bits(&large.values[0]));
}

fn group<T>(
    runtime: &Runtime,
    task: &mobula_core::GroupTask<T>,
    overlap: Overlap,
) -> Vec<Result<T, String>>
where
    T: serde::de::DeserializeOwned + Send + 'static,
{
    let options = GroupOptions {
        placement: Placement::Thread,
        resources: Resources::cpus(0.5),
        ..GroupOptions::new("overlap", 2)
    };
    let setup = serde_json::json!({"overlap": overlap});
    let options = options.with_context(&setup).expect("context");
    let group = runtime.group(&options, task).expect("group");
    match group.join(Duration::from_secs(60)) {
        Ok(values) => values.into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error.to_string())],
    }
}

/// Two steps over two batches each, in the second of which the model is used so many times.
#[remote(crate = mobula_core)]
fn steps(member: Member, uses: usize) -> Result<Vec<u32>, BoxError> {
    let mut context = WorkerContext::join(member)?;
    let spec = ModelSpec::new("mlp", &MlpOptions::new(FEATURES, [16], CLASSES))?;
    let model = Model::build(&spec, 5, &Device::Cpu)?;
    let mut state = TrainState::new(model, AdamW::new(AdamWOptions::default())?, 5, 1);
    let mut stream = context.batches(&config(1, false))?;
    let mut next = || Ok::<Batch, BoxError>(stream.next_batch()?.ok_or("no batch")?);
    for uses in [1, uses] {
        let batches = [next()?, next()?];
        context.step_accumulated(&mut state, &batches, |model, pass, batch| {
            let (x, y) = (batch.get("x")?, batch.get("y")?);
            let mut loss = cross_entropy(&model.forward(x, pass)?, y)?;
            for _ in 1..uses {
                loss = (loss + cross_entropy(&model.forward(x, pass)?, y)?)?;
            }
            Ok::<_, BoxError>(loss)
        })?;
    }
    Ok(state.gradients().values().iter().map(|value| value.to_bits()).collect())
}

fn accumulated(runtime: &Runtime) {
    let run = |overlap| group(runtime, &steps::remote(1), overlap);
    let whole = run(Overlap::Never);
    assert!(whole.iter().all(Result::is_ok), "{whole:?}");
    for bytes in [1, 300, 1 << 20] {
        assert_eq!(run(Overlap::Buckets { bytes }), whole, "{bytes}");
    }
}

fn changes(runtime: &Runtime) {
    let run = |uses, overlap| group(runtime, &steps::remote(uses), overlap);
    let late = run(2, Overlap::Buckets { bytes: 1 });
    let text = late[0].as_ref().expect_err("late");
    assert!(text.contains("the backward pass of this step came to \"fc"), "{text}");
    assert!(text.contains("needs `Overlap::Never`"), "{text}");
    // In one piece it does not matter.
    let whole = run(2, Overlap::Never);
    assert!(whole.iter().all(Result::is_ok), "{whole:?}");
    assert_eq!(run(2, Overlap::Buckets { bytes: 1 << 30 }).len(), 1, "buckets of all are late too");
}
