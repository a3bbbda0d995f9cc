//! ZeRO, stage 1: each rank has a part of the optimizer's state.

use crate::digits::{CLASSES, Config, FEATURES, Harm, Outcome, train};
use crate::{Test, faults};
use mobula_core::{GroupOptions, Placement, Resources, RunDir, Runtime, checkpoint::Checkpoint};
use mobula_train::optim::{Clip, LossScaleOptions, OptimizerSpec, PlateauOptions, UpdaterOptions};
use mobula_train::{CheckpointConfig, Error, NonFinite, ScalingConfig, Trainer, TrainingResult};
use std::path::Path;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("zero::trains_to_the_same_bits_with_a_part_of_the_memory", same_bits),
    ("zero::between_hosts_too", hosts),
    ("zero::sums_between_hosts_go_where_they_belong", far_apart),
    ("zero::any_number_of_workers_goes_on_from_its_checkpoints", reshards),
    ("zero::from_every_checkpoint_in_the_background", in_background),
    ("zero::a_lost_worker_means_the_newest_checkpoint", killed),
    ("zero::a_part_that_cannot_be_written_costs_no_training", unwritten),
    ("zero::a_missing_part_is_named", missing),
    ("zero::steps_that_are_not_finite_are_left_out", non_finite),
];

/// Of the perceptron with 16 hidden units.
const PARAMETERS: usize = FEATURES * 16 + 16 + 16 * CLASSES + CLASSES;

/// Whatever depends on all gradients, or on all weights.
pub(crate) fn config(epochs: u64) -> Config {
    let updater = UpdaterOptions {
        plateau: Some(PlateauOptions { patience: 0, ..Default::default() }),
        clip: Some(Clip::Norm(0.3)),
        ema: Some(0.9),
        loss_scale: Some(LossScaleOptions { growth_interval: 7, ..Default::default() }),
        ..Default::default()
    };
    Config { batch_size: 9, dropout: 0.2, updater: Some(updater), ..Config::new(epochs) }
}

fn scaling(workers: usize, shard_optimizer: bool) -> ScalingConfig {
    ScalingConfig {
        placement: Placement::Thread,
        resources_per_worker: Resources::cpus(0.5),
        shard_optimizer,
        ..ScalingConfig::workers(workers)
    }
}

fn fit(runtime: &Runtime, scaling: ScalingConfig, config: Config) -> TrainingResult<Outcome> {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
    trainer.with_scaling(scaling).fit(runtime).expect("fit")
}

/// What has to be the same, to the bit.
fn bits(outcome: &Outcome) -> (Vec<u32>, u64) {
    (outcome.weights.iter().map(|value| value.to_bits()).collect(), outcome.accuracy.to_bits())
}

fn same_bits(runtime: &Runtime) {
    let lion =
        UpdaterOptions { optimizer: OptimizerSpec::Lion(Default::default()), ..Default::default() };
    let adafactor = OptimizerSpec::Adafactor(Default::default());
    let adafactor = UpdaterOptions { optimizer: adafactor, ..Default::default() };
    let with = |updater| Config { updater: Some(updater), ..config(2) };
    for (config, slots) in [(config(3), 2), (with(lion), 1), (with(adafactor), 0)] {
        for workers in [2, 3, 4, 6] {
            let whole = fit(runtime, scaling(workers, false), config.clone());
            let parts = fit(runtime, scaling(workers, true), config.clone());
            for (whole, part) in whole.values.iter().zip(&parts.values) {
                assert_eq!(bits(part), bits(whole), "{workers} workers");
            }
            let held: Vec<_> = parts.values.iter().map(|rank| rank.optimizer_values).collect();
            let all = whole.values[0].optimizer_values;
            assert_eq!(held.iter().sum::<usize>(), all, "nothing twice, nothing missing");
            assert!(held.iter().all(|held| *held < all), "{held:?}");
            assert!(slots == 0 || all == slots * PARAMETERS);
        }
    }
}

fn hosts(runtime: &Runtime) {
    let run_of = |hidden, setup: serde_json::Value| {
        let options = GroupOptions {
            placement: Placement::Thread,
            resources: Resources::cpus(0.5),
            ..GroupOptions::new("zero", 4)
        };
        let options = options.with_context(&setup).expect("context");
        let config = Config { hidden, ..config(2) };
        let group = runtime.group(&options, &train::remote(config)).expect("group");
        let all: Vec<Outcome> = group.join(Duration::from_secs(60)).expect("join");
        all
    };
    let run = |setup| run_of(16, setup);
    // So many that they would go around a ring.
    let many = |setup| run_of(30_000, setup);
    let whole = many(serde_json::json!({"virtual_shards": 4}));
    let shards = serde_json::json!({
        "virtual_shards": 4, "shard_optimizer": true, "hosts": [1, 1, 2, 2],
    });
    assert!(many(shards).iter().all(|rank| bits(rank) == bits(&whole[0])), "large");
    // In a tree, so that bits do not depend on the way that numbers take.
    let whole = run(serde_json::json!({"virtual_shards": 4}));
    for hosts in [[1, 1, 2, 2], [1, 2, 3, 4], [1, 1, 1, 2]] {
        let shards = serde_json::json!({
            "virtual_shards": 4, "shard_optimizer": true, "hosts": hosts,
        });
        assert!(run(shards).iter().all(|rank| bits(rank) == bits(&whole[0])), "{hosts:?}");
        // Otherwise all ranks still have the same.
        let plain = run(serde_json::json!({"shard_optimizer": true, "hosts": hosts}));
        assert!(plain.iter().all(|rank| bits(rank) == bits(&plain[0])));
    }
}

/// Gradients that are so many that each host gets the sums of its own parts only.
fn far_apart(runtime: &Runtime) {
    let run = |shard_optimizer, compression: &str, hosts: [u64; 3]| -> Vec<Outcome> {
        let options = GroupOptions {
            placement: Placement::Thread,
            resources: Resources::cpus(0.5),
            ..GroupOptions::new("zero", 3)
        };
        let setup = serde_json::json!({
            "shard_optimizer": shard_optimizer, "compression": compression, "hosts": hosts,
        });
        let options = options.with_context(&setup).expect("context");
        let config = Config { hidden: 30_000, lr: 1e-3, ..Config::new(1) };
        let group = runtime.group(&options, &train::remote(config)).expect("group");
        group.join(Duration::from_secs(60)).expect("join")
    };
    for (compression, tolerance) in [("none", 1e-8), ("bf16", 2e-5)] {
        for hosts in [[1, 2, 3], [1, 1, 2], [2, 1, 2]] {
            let (whole, parts) = (run(false, compression, hosts), run(true, compression, hosts));
            assert!(parts.iter().all(|rank| rank.weights == parts[0].weights));
            let off = parts[0].weights.iter().zip(&whole[0].weights).map(|(a, b)| (a - b).abs());
            let mean = off.clone().sum::<f32>() / off.len() as f32;
            assert!(mean < tolerance, "{compression} {hosts:?}: {mean}");
        }
    }
}

fn trainer(config: Config, scaling: ScalingConfig, run: &RunDir) -> Trainer<Outcome> {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false).with_run(run);
    trainer.with_scaling(scaling)
}

fn run_in(root: &Path, name: &str) -> RunDir {
    RunDir::create(root, name, 5, &()).expect("run")
}

fn optimizer_files(checkpoint: &Checkpoint) -> Vec<String> {
    let files = std::fs::read_dir(checkpoint.path()).expect("list");
    let names = files.map(|file| file.expect("file").file_name().into_string().expect("name"));
    let mut names: Vec<_> = names.filter(|name| name.starts_with("optimizer")).collect();
    names.sort();
    names
}

/// Four workers, then two, one, two of which each has all, and four again.
fn reshards(runtime: &Runtime) {
    let with_shards = |workers, shard_optimizer| ScalingConfig {
        virtual_shards: Some(4),
        ..scaling(workers, shard_optimizer)
    };
    let whole = fit(runtime, with_shards(4, false), config(6));
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let worlds = [(4, true), (2, true), (1, true), (2, false), (4, true), (2, true)];
    for (epochs, (workers, parts)) in (1..).zip(worlds) {
        let part =
            trainer(config(epochs), with_shards(workers, parts), &run).fit(runtime).expect("fit");
        assert_eq!(part.values[0].began_at, 10 * (epochs - 1));
        let files = optimizer_files(&part.checkpoint.expect("checkpoint"));
        match parts && workers > 1 {
            true => assert_eq!(files[0], format!("optimizer-00001-of-{workers:05}.safetensors")),
            false => assert_eq!(files, ["optimizer.safetensors"]),
        }
        assert_eq!(files.len(), if parts { workers } else { 1 });
        if epochs == 6 {
            assert!(part.values.iter().all(|rank| bits(rank) == bits(&whole.values[0])));
        }
    }
}

/// Whatever checkpoint a run goes on from, it ends as it would have.
fn in_background(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let all = CheckpointConfig { every_steps: Some(1), keep: 100, ..Default::default() };
    let whole = trainer(config(2), scaling(3, true), &run).with_checkpoints(all).fit(runtime);
    let whole = whole.expect("fit");
    let paths = run.checkpoints(100).paths().expect("paths");
    assert!(paths.len() > 1, "{paths:?}");
    let left = std::fs::read_dir(run.checkpoints(1).dir()).expect("list").count();
    assert_eq!(left, paths.len(), "nothing temporary");
    for (at, path) in paths.iter().enumerate() {
        let run = run_in(root.path(), &format!("from-{at}"));
        let name = path.file_name().expect("name");
        crate::digits::copy(path, &run.checkpoints(1).dir().join(name));
        let resumed = trainer(config(2), scaling(3, true), &run).fit(runtime).expect("fit");
        assert!(resumed.values[0].began_at > 0);
        // The last one has nothing left to do, and so no accuracy.
        assert!(bits(&resumed.values[0]).0 == bits(&whole.values[0]).0, "{name:?}");
    }
}

fn killed(runtime: &Runtime) {
    let scaling = ScalingConfig { shard_optimizer: true, ..ScalingConfig::workers(2) };
    faults::goes_on_from_the_newest_checkpoint(runtime, &scaling, &config(3), 15, 10);
}

/// A file is where the first folder of parts should be.
fn unwritten(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    block(&run);
    let fit = trainer(config(3), scaling(2, true), &run).fit(runtime).expect("fit");
    let paths = run.checkpoints(9).paths().expect("paths");
    let steps: Vec<_> = paths.iter().map(|p| Checkpoint::open(p).expect("valid").step()).collect();
    assert_eq!((steps.last(), fit.restarts), (Some(&30), 0));
    assert!(!steps.contains(&10), "{steps:?}");
    // The last one has to be written.
    let run = run_in(root.path(), "last");
    block(&run);
    let error = trainer(config(1), scaling(2, true), &run).fit(runtime).expect_err("no checkpoint");
    let text = error.to_string();
    assert!(text.contains("could not write the checkpoint: cannot create"), "{text}");
}

fn block(run: &RunDir) {
    let folder = run.checkpoints(1);
    std::fs::create_dir_all(folder.dir()).expect("folder");
    std::fs::write(folder.dir().join(".parts-0-1"), "").expect("file");
}

fn missing(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let fit = trainer(config(1), scaling(3, true), &run).fit(runtime).expect("fit");
    let from = fit.checkpoint.expect("checkpoint");
    // A checkpoint that somebody has put together, without one of the parts.
    let run = run_in(root.path(), "other");
    let copy = |dir: &Path| {
        crate::digits::copy(from.path(), dir);
        std::fs::remove_file(dir.join("optimizer-00002-of-00003.safetensors")).expect("remove");
        std::fs::remove_file(dir.join("manifest.json")).expect("remove");
        Ok(())
    };
    run.checkpoints(1).save(10, copy).expect("save");
    for parts in [true, false] {
        let error: Error =
            trainer(config(2), scaling(2, parts), &run).fit(runtime).expect_err("missing");
        let text = error.to_string();
        assert!(text.contains("optimizer-00002-of-00003.safetensors"), "{text}");
    }
}

fn non_finite(runtime: &Runtime) {
    let steps = vec![3, 4, 12];
    let skipping = Config {
        harm: Harm::NanLosses { steps },
        non_finite: NonFinite::Skip { in_a_row: 2 },
        ..config(2)
    };
    let whole = fit(runtime, scaling(2, false), skipping.clone());
    let parts = fit(runtime, scaling(2, true), skipping.clone());
    assert_eq!(parts.metrics["non_finite_steps"], 3.0);
    assert!(parts.values.iter().all(|rank| bits(rank) == bits(&whole.values[0])));
    // Gradients that overflow are found by the rank that they belong to, and heard of by all.
    let scale = LossScaleOptions { init_scale: 65536.0 * 65536.0, ..Default::default() };
    let updater = Some(UpdaterOptions { loss_scale: Some(scale), ..Default::default() });
    let overflow = Config { harm: Harm::Half, updater, ..Config::new(2) };
    let whole = fit(runtime, scaling(2, false), overflow.clone());
    let parts = fit(runtime, scaling(2, true), overflow);
    assert!(parts.metrics["skipped_steps"] > 0.0);
    assert_eq!(parts.metrics["skipped_steps"], whole.metrics["skipped_steps"]);
    assert!(parts.values.iter().all(|rank| bits(rank) == bits(&whole.values[0])));
}
