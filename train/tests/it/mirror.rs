//! ZeRO, stage 1, where each part of the optimizer's state is there twice: no loss of a worker costs a
//! step.

use crate::digits::{CLASSES, Config, FEATURES, Harm, How, Outcome, Place, train};
use crate::{Test, zero};
use mobula_core::checkpoint::Checkpoint;
use mobula_core::{Placement, Resources, RunDir, Runtime};
use mobula_train::optim::{OptimizerSpec, SgdOptions, UpdaterOptions};
use mobula_train::{
    CheckpointConfig, FailureConfig, NonFinite, ScalingConfig, Trainer, TrainingResult, Transport,
};
use std::path::Path;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("mirror::trains_to_the_same_bits_with_each_part_twice", same_bits),
    ("mirror::wherever_one_is_lost_no_step_is", places),
    ("mirror::whenever_one_is_lost_no_step_is", moments),
    ("mirror::one_that_is_lost_again_and_again", again),
    ("mirror::steps_that_are_left_out_or_undone", non_finite),
    ("mirror::checkpoints_have_each_part_once", checkpoints),
    ("mirror::checkpoints_are_written_after_a_loss_too", checkpoints_after),
    ("mirror::where_nobody_would_need_them_there_are_none", needless),
];

/// Of the perceptron with 16 hidden units.
const PARAMETERS: usize = FEATURES * 16 + 16 + 16 * CLASSES + CLASSES;

fn config() -> Config {
    Config { batch_size: 16, ..zero::config(4) }
}

fn mirrored(workers: usize) -> ScalingConfig {
    let scaling = ScalingConfig::workers(workers);
    ScalingConfig { shard_optimizer: true, mirror_optimizer: true, ..scaling }
}

fn trainer(config: Config, scaling: ScalingConfig) -> Trainer<Outcome> {
    Trainer::new(train::remote(config)).with_logs_shown(false).with_scaling(scaling)
}

fn fit(runtime: &Runtime, config: Config, scaling: ScalingConfig) -> TrainingResult<Outcome> {
    trainer(config, scaling).fit(runtime).expect("fit")
}

/// What has to be the same, to the bit, on all ranks.
fn bits(fit: &TrainingResult<Outcome>) -> (Vec<u32>, u64) {
    let bits = |rank: &Outcome| -> (Vec<u32>, u64) {
        (rank.weights.iter().map(|value| value.to_bits()).collect(), rank.accuracy.to_bits())
    };
    let first = bits(&fit.values[0]);
    assert!(fit.values.iter().all(|rank| bits(rank) == first));
    first
}

/// Of a training without parts, which nothing happens to.
fn whole(runtime: &Runtime, config: &Config, workers: usize) -> (Vec<u32>, u64) {
    let config = Config { harm: Harm::None, ..config.clone() };
    bits(&fit(runtime, config, ScalingConfig::workers(workers)))
}

fn same_bits(runtime: &Runtime) {
    let sgd = SgdOptions { momentum: 0.9, nesterov: true, ..Default::default() };
    let sgd = UpdaterOptions { optimizer: OptimizerSpec::Sgd(sgd), ..Default::default() };
    let sgd = Config { updater: Some(sgd), ..config() };
    for (config, slots) in [(config(), 2), (sgd, 1)] {
        for workers in [1, 2, 3, 4] {
            let parts = fit(runtime, config.clone(), mirrored(workers));
            assert!(bits(&parts) == whole(runtime, &config, workers), "{workers} workers");
            let held: Vec<_> = parts.values.iter().map(|rank| rank.optimizer_values).collect();
            let all = slots * PARAMETERS;
            assert_eq!(held.iter().sum::<usize>(), all * workers.min(2), "{held:?}");
            assert!(workers < 3 || held.iter().all(|held| *held < all), "{held:?}");
        }
    }
}

/// Without a run directory: what the others have in memory is all there is.
fn harmed(
    runtime: &Runtime,
    workers: usize,
    how: How,
    places: &[Place],
) -> TrainingResult<Outcome> {
    let root = tempfile::tempdir().expect("temporary folder");
    let marker = |(at, place): (usize, &Place)| (*place, root.path().join(at.to_string()));
    let harm = Harm::Once { how, places: places.iter().enumerate().map(marker).collect() };
    let fit = fit(runtime, Config { harm, ..config() }, mirrored(workers));
    assert_eq!(fit.restarts as usize, places.len(), "{how:?} {places:?}");
    fit
}

fn places(runtime: &Runtime) {
    for workers in [2, 3] {
        let expected = whole(runtime, &config(), workers);
        for (how, place, step) in [
            (How::Kill, Place::Start(0), 0),
            (How::Kill, Place::Forward, 15),
            (How::Abort, Place::Backward, 15),
            (How::Kill, Place::Sum, 15),
            (How::Kill, Place::Validation, 18),
        ] {
            let fit = harmed(runtime, workers, how, &[place]);
            assert_eq!(fit.values[1].began_at, step, "{workers}: {how:?} {place:?}");
            assert!(bits(&fit) == expected, "{workers}: {how:?} {place:?}");
        }
    }
}

/// While it computes, sums, clips, updates, or gives weights.
fn moments(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    // Over sockets what a rank gives reaches one after the other.
    for (workers, transport) in [(2, Transport::Auto), (3, Transport::Auto), (4, Transport::Tcp)] {
        let scaling = |scaling| ScalingConfig { transport, ..scaling };
        let expected = bits(&fit(runtime, config(), scaling(ScalingConfig::workers(workers))));
        for micros in (0..600).step_by(40) {
            let marker = root.path().join(format!("{workers}-{micros}"));
            let wait = Duration::from_micros(micros);
            let harm = Harm::KillAfter { at_step: 15, wait, marker };
            let fit = fit(runtime, Config { harm, ..config() }, scaling(mirrored(workers)));
            let began_at = fit.values[0].began_at;
            assert!(fit.restarts == 0 || began_at >= 15, "{workers}: {micros}: {began_at}");
            // What is lost at the very end has no accuracy: there is nothing left to do.
            assert!(bits(&fit).0 == expected.0, "{workers}: {micros} us behind step 15");
        }
    }
}

/// The one that takes its place comes to harm in the same step, or before it has anything.
fn again(runtime: &Runtime) {
    let expected = whole(runtime, &config(), 3);
    for places in [
        [Place::Forward, Place::Forward, Place::Forward],
        [Place::Forward, Place::Restore(1), Place::Start(2)],
    ] {
        let fit = harmed(runtime, 3, How::Kill, &places);
        assert!(fit.values[1].began_at == 15 && bits(&fit) == expected);
    }
}

fn non_finite(runtime: &Runtime) {
    let harm = Harm::NanLosses { steps: vec![3, 10, 11] };
    let skip = NonFinite::Skip { in_a_row: 2 };
    let config = Config { harm: harm.clone(), non_finite: skip, ..config() };
    let scaling = |shard_optimizer| match shard_optimizer {
        true => mirrored(2),
        false => ScalingConfig::workers(2),
    };
    let skipped = [true, false].map(|parts| bits(&fit(runtime, config.clone(), scaling(parts))));
    assert!(skipped[0] == skipped[1]);
    let root = tempfile::tempdir().expect("temporary folder");
    let back = [true, false].map(|parts| {
        let non_finite = NonFinite::RollBack { in_a_row: 1, at_most: 1 };
        let run = run_in(root.path(), &parts.to_string());
        let waited_for = CheckpointConfig { asynchronous: false, ..Default::default() };
        let trainer = trainer(Config { non_finite, ..config.clone() }, scaling(parts));
        let trainer = trainer.with_run(&run).with_checkpoints(waited_for);
        let fit = trainer.fit(runtime).expect("fit");
        assert_eq!(fit.metrics["rollbacks"], 1.0);
        bits(&fit)
    });
    assert!(back[0] == back[1] && back[0] != skipped[0]);
}

fn run_in(root: &Path, name: &str) -> RunDir {
    RunDir::create(root, name, 5, &()).expect("run")
}

/// From which any number of workers goes on, with mirrors or without.
fn checkpoints(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let shards = |scaling| ScalingConfig { virtual_shards: Some(4), ..scaling };
    let parts = ScalingConfig { mirror_optimizer: false, ..mirrored(4) };
    let scalings = [mirrored(4), mirrored(2), parts, ScalingConfig::workers(1)];
    for (epochs, scaling) in (1..).zip(scalings) {
        let config = Config { epochs, ..config() };
        let fit = trainer(config.clone(), shards(scaling)).with_run(&run).fit(runtime);
        let fit = fit.expect("fit");
        let expected = bits(&self::fit(runtime, config, shards(ScalingConfig::workers(1))));
        assert!(bits(&fit).0 == expected.0, "{epochs} epochs");
        if epochs == 1 {
            let checkpoint = fit.checkpoint.expect("checkpoint");
            let size = |part: usize| {
                let name = format!("optimizer-{part:05}-of-00004.safetensors");
                std::fs::metadata(checkpoint.file(&name)).expect("part").len() as usize
            };
            // Values of two tensors in f32, and the headers.
            let bytes: usize = (1..=4).map(size).sum();
            assert!(bytes < 2 * PARAMETERS * 4 * 2, "{bytes}");
        }
    }
}

fn checkpoints_after(runtime: &Runtime) {
    for workers in [2, 3] {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = run_in(root.path(), "r");
        let harm = Harm::KillOnce { at_step: 15, marker: root.path().join("marker") };
        let all = CheckpointConfig { every_steps: Some(1), keep: 100, ..Default::default() };
        let trainer = |epochs, harm, scaling| {
            let config = Config { epochs, harm, ..config() };
            trainer(config, scaling).with_run(&run).with_checkpoints(all.clone())
        };
        let fit = trainer(4, harm, mirrored(workers)).fit(runtime).expect("fit");
        assert_eq!((fit.restarts, fit.values[0].began_at), (1, 15));
        let paths = run.checkpoints(100).paths().expect("paths");
        let steps: Vec<_> =
            paths.iter().map(|p| Checkpoint::open(p).expect("valid").step()).collect();
        // That of an epoch is due until it is taken.
        assert!(steps.iter().filter(|step| **step > 15).count() > 1, "{steps:?}");
        let names = std::fs::read_dir(paths.last().expect("the last")).expect("list");
        let names = names.map(|file| file.expect("file").file_name().into_string().expect("name"));
        assert_eq!(names.filter(|name| name.starts_with("optimizer-")).count(), workers);
        let shards = ScalingConfig { mirror_optimizer: false, ..mirrored(workers) };
        let resumed = trainer(5, Harm::None, shards).fit(runtime).expect("fit");
        assert_eq!(resumed.values[0].began_at, 24);
        let longer = Config { epochs: 5, ..config() };
        assert!(bits(&resumed) == whole(runtime, &longer, workers), "{workers} workers");
    }
}

fn needless(runtime: &Runtime) {
    let threads = ScalingConfig {
        placement: Placement::Thread,
        resources_per_worker: Resources::cpus(0.5),
        ..mirrored(3)
    };
    let fit = fit(runtime, config(), threads);
    let held: usize = fit.values.iter().map(|rank| rank.optimizer_values).sum();
    assert_eq!(held, 2 * PARAMETERS);
    let never = FailureConfig { max_failures: 0, ..Default::default() };
    let fit = trainer(config(), mirrored(3)).with_failure(never).fit(runtime).expect("fit");
    let held: usize = fit.values.iter().map(|rank| rank.optimizer_values).sum();
    assert_eq!(held, 2 * PARAMETERS);
    let alone = ScalingConfig { mirror_optimizer: true, ..ScalingConfig::workers(2) };
    let error = trainer(config(), alone).fit(runtime).expect_err("refused").to_string();
    let expected = "option mirror_optimizer is true, expected false without `shard_optimizer`";
    assert_eq!(error, expected);
}
