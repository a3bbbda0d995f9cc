//! Virtual shards: the same bits on any number of workers.

use crate::Test;
use crate::digits::{CLASSES, Config, FEATURES, Outcome, Rows, train};
use candle_core::Device;
use mobula_core::{
    Batch, BoxError, GroupOptions, Member, Placement, Resources, RunDir, Runtime, Shard, remote,
};
use mobula_nn::models::MlpOptions;
use mobula_nn::{Model, ModelSpec, loss::cross_entropy};
use mobula_train::optim::{Clip, UpdaterOptions};
use mobula_train::{
    AdamW, AdamWOptions, ScalingConfig, TrainState, Trainer, TrainingResult, WorkerContext,
};
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("shards::any_number_of_workers_trains_to_the_same_bits", worlds),
    ("shards::however_workers_are_connected", connections),
    ("shards::a_run_goes_on_with_other_workers_to_the_same_bits", resumes),
    ("shards::accumulated_batches_too", accumulated),
    ("shards::what_cannot_be_is_refused", refused),
];

const SHARDS: usize = 8;

/// Dropout, clipping by the norm of all gradients, averages, batch norms; 24 rows a step, and 18 in
/// the last of an epoch.
fn config(resnet: bool) -> Config {
    let updater = UpdaterOptions { clip: Some(Clip::Norm(0.5)), ..Default::default() };
    let (dropout, updater) = (0.3, Some(UpdaterOptions { ema: Some(0.9), ..updater }));
    Config { batch_size: 24, dropout, updater, resnet, ..Config::new(3) }
}

fn scaling(workers: usize) -> ScalingConfig {
    ScalingConfig {
        placement: Placement::Thread,
        resources_per_worker: Resources::cpus(0.5),
        virtual_shards: Some(SHARDS),
        ..ScalingConfig::workers(workers)
    }
}

fn fit(runtime: &Runtime, scaling: ScalingConfig, config: Config) -> TrainingResult<Outcome> {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
    trainer.with_scaling(scaling).fit(runtime).expect("fit")
}

/// What has to be the same, to the bit.
fn bits(outcome: &Outcome) -> (Vec<u32>, Vec<Vec<u32>>, u64) {
    let of = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let buffers = outcome.buffers.values().map(|values| of(values)).collect();
    (of(&outcome.weights), buffers, outcome.accuracy.to_bits())
}

fn worlds(runtime: &Runtime) {
    for resnet in [false, true] {
        let one = fit(runtime, scaling(1), config(resnet));
        for workers in [2, 4, 8] {
            let many = fit(runtime, scaling(workers), config(resnet));
            assert!(many.values.iter().all(|rank| bits(rank) == bits(&one.values[0])), "{workers}");
            assert_eq!(many.metrics["loss"].to_bits(), one.metrics["loss"].to_bits());
        }
        assert_eq!(one.values[0].buffers.is_empty(), !resnet);
        // The control: without them, bits depend on the number of workers.
        let plain = |workers| ScalingConfig { virtual_shards: None, ..scaling(workers) };
        let fits = [1, 2].map(|workers| fit(runtime, plain(workers), config(resnet)));
        assert_ne!(bits(&fits[0].values[0]), bits(&fits[1].values[0]));
    }
}

fn group(runtime: &Runtime, setup: serde_json::Value, world: usize) -> Vec<Outcome> {
    let options = GroupOptions {
        placement: Placement::Thread,
        resources: Resources::cpus(0.5),
        ..GroupOptions::new("shards", world)
    };
    let options = options.with_context(&setup).expect("context");
    let group = runtime.group(&options, &train::remote(config(true))).expect("group");
    group.join(Duration::from_secs(60)).expect("join")
}

fn connections(runtime: &Runtime) {
    let one = group(runtime, serde_json::json!({"virtual_shards": SHARDS}), 1);
    for (world, hosts) in [
        (4, serde_json::json!(null)),
        (4, serde_json::json!([1, 1, 2, 2])),
        // Not branches of the tree: each rank for itself.
        (4, serde_json::json!([1, 1, 1, 2])),
        (4, serde_json::json!([1, 2, 2, 1])),
        (8, serde_json::json!([1, 1, 2, 2, 3, 3, 4, 4])),
        (8, serde_json::json!([1, 2, 3, 4, 5, 6, 7, 8])),
    ] {
        let setup = serde_json::json!({"virtual_shards": SHARDS, "hosts": hosts});
        let many = group(runtime, setup, world);
        assert!(many.iter().all(|rank| bits(rank) == bits(&one[0])), "{world} {hosts}");
    }
}

fn resumes(runtime: &Runtime) {
    let whole = fit(runtime, scaling(1), config(false));
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
    for (epochs, workers) in [(1, 4), (2, 1), (3, 2)] {
        let trainer = Trainer::new(train::remote(Config { epochs, ..config(false) }));
        let trainer = trainer.with_run(&run).with_scaling(scaling(workers)).with_logs_shown(false);
        let part = trainer.fit(runtime).expect("fit");
        assert_eq!(part.values[0].began_at, 4 * (epochs - 1));
        if epochs == 3 {
            assert_eq!(bits(&part.values[0]), bits(&whole.values[0]));
        }
    }
}

/// Two steps over two batches each.
#[remote(crate = mobula_core)]
fn accumulate(member: Member) -> Result<Vec<u32>, BoxError> {
    let mut context = WorkerContext::join(member)?;
    let spec = ModelSpec::new("mlp", &MlpOptions::new(FEATURES, [16], CLASSES))?;
    let model = Model::build(&spec, 5, &Device::Cpu)?;
    let mut state = TrainState::new(model, AdamW::new(AdamWOptions::default())?, 5, 1);
    let mut stream = context.batches(&config(false))?;
    let mut next = || Ok::<Batch, BoxError>(stream.next_batch()?.ok_or("no batch")?);
    for _ in 0..2 {
        let batches = [next()?, next()?];
        context.step_accumulated(&mut state, &batches, |model, pass, batch| {
            let logits = model.forward(batch.get("x")?, pass)?;
            Ok::<_, BoxError>(cross_entropy(&logits, batch.get("y")?)?)
        })?;
    }
    Ok(state.gradients().values().iter().map(|value| value.to_bits()).collect())
}

fn accumulated(runtime: &Runtime) {
    let run = |world| {
        let options = GroupOptions {
            placement: Placement::Thread,
            resources: Resources::cpus(0.5),
            ..GroupOptions::new("shards", world)
        };
        let setup = serde_json::json!({"virtual_shards": SHARDS});
        let options = options.with_context(&setup).expect("context");
        let group = runtime.group(&options, &accumulate::remote()).expect("group");
        group.join(Duration::from_secs(60)).expect("join")
    };
    let one = run(1);
    for world in [2, 8] {
        assert!(run(world).iter().all(|rank| *rank == one[0]), "{world}");
    }
}

/// A batch that is not of the context's stream.
#[remote(crate = mobula_core)]
fn whole_batch(member: Member) -> Result<f64, BoxError> {
    let mut context = WorkerContext::join(member)?;
    let spec = ModelSpec::new("mlp", &MlpOptions::new(FEATURES, [16], CLASSES))?;
    let model = Model::build(&spec, 5, &Device::Cpu)?;
    let mut state = TrainState::new(model, AdamW::new(AdamWOptions::default())?, 5, 1);
    let mut stream: Box<dyn mobula_core::BatchStream> = Box::new(Rows::open(Shard::ALL, 8));
    let batch = stream.next_batch()?.ok_or("no batch")?;
    Ok(context.step(&mut state, &batch, |model, pass, batch| {
        let logits = model.forward(batch.get("x")?, pass)?;
        Ok::<_, BoxError>(cross_entropy(&logits, batch.get("y")?)?)
    })?)
}

fn refused(runtime: &Runtime) {
    let error = |scaling: ScalingConfig| {
        let trainer = Trainer::new(train::remote(config(false))).with_scaling(scaling);
        trainer.fit(runtime).expect_err("refused").to_string()
    };
    let shards = |shards| ScalingConfig { virtual_shards: Some(shards), ..scaling(2) };
    let expected = "expected a power of two, and at least the number of workers";
    for number in [0, 1, 6] {
        assert_eq!(error(shards(number)), format!("option virtual_shards is {number}, {expected}"));
    }
    let text = error(scaling(3));
    assert!(text.starts_with("option num_workers is 3, expected a power of two"), "{text}");
    let text = error(ScalingConfig { sync_batch_norm: true, ..scaling(2) });
    assert!(text.starts_with("option sync_batch_norm is true"), "{text}");
    let options = GroupOptions { placement: Placement::Thread, ..GroupOptions::new("shards", 1) };
    let setup = serde_json::json!({"virtual_shards": SHARDS});
    let options = options.with_context(&setup).expect("context");
    let group = runtime.group(&options, &whole_batch::remote()).expect("group");
    let text = group.join(Duration::from_secs(60)).expect_err("not in shards").to_string();
    assert!(text.contains("needs a batch of a stream that `context.batches` has opened"), "{text}");
}
