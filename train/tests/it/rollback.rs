//! Trainings that go back to a checkpoint when their numbers are not finite.

use crate::Test;
use crate::digits::{Config, Harm, Outcome, copy, train};
use mobula_core::checkpoint::Checkpoint;
use mobula_core::{Placement, Resources, RunDir, Runtime};
use mobula_train::optim::{Clip, LossScaleOptions, UpdaterOptions};
use mobula_train::{
    CheckpointConfig, LocalSgd, NonFinite, SavedState, ScalingConfig, Trainer, TrainingResult,
};
use std::path::Path;

pub(crate) const TESTS: &[Test] = &[
    ("rollback::weights_become_those_of_the_checkpoint_and_training_goes_on_behind", behind),
    ("rollback::what_does_not_help_is_not_gone_back_to_again", again),
    ("rollback::a_few_steps_are_left_out_before", left_out_before),
    ("rollback::gradients_that_overflow_at_the_least_scale_count", overflow),
    ("rollback::a_run_that_goes_on_later_goes_back_as_far", later),
    ("rollback::a_checkpoint_that_is_being_written_is_waited_for", waited_for),
    ("rollback::a_damaged_checkpoint_is_passed_over", damaged),
    ("rollback::what_cannot_be_gone_back_to_is_said", cannot),
];

/// Steps of an epoch.
const STEPS: u64 = 6;

/// Checkpoints of steps 4, 6, 8, 12, 16 and 18.
fn checkpoints() -> CheckpointConfig {
    CheckpointConfig { every_steps: Some(4), keep: 9, asynchronous: false, ..Default::default() }
}

/// Without a plateau: it would see another loss of the epoch than in a run that begins within it.
fn config(steps: &[u64]) -> Config {
    let updater =
        UpdaterOptions { clip: Some(Clip::Norm(0.3)), ema: Some(0.9), ..Default::default() };
    Config {
        dropout: 0.2,
        updater: Some(updater),
        harm: Harm::NanLosses { steps: steps.to_vec() },
        non_finite: NonFinite::RollBack { in_a_row: 0, at_most: 3 },
        ..Config::new(3)
    }
}

fn scaling() -> ScalingConfig {
    ScalingConfig {
        placement: Placement::Thread,
        resources_per_worker: Resources::cpus(0.5),
        ..ScalingConfig::workers(2)
    }
}

fn run_in(root: &Path, name: &str) -> RunDir {
    RunDir::create(root, name, 5, &()).expect("run")
}

fn trainer_in(config: Config, scaling: ScalingConfig, run: &RunDir) -> Trainer<Outcome> {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false).with_run(run);
    trainer.with_scaling(scaling).with_checkpoints(checkpoints())
}

/// What has to be the same, to the bit.
fn bits(fit: &TrainingResult<Outcome>) -> Vec<Vec<u32>> {
    let bits = |values: &Vec<f32>| values.iter().map(|value| value.to_bits()).collect();
    let first = &fit.values[0];
    [&first.weights].into_iter().chain(first.buffers.values()).map(bits).collect()
}

/// What a training comes to that begins with the weights of this checkpoint, but behind these steps.
fn from_checkpoint(
    runtime: &Runtime,
    run: &RunDir,
    (weights_of, step): (u64, u64),
    config: Config,
    scaling: ScalingConfig,
) -> TrainingResult<Outcome> {
    let checkpoint = |step: u64| run.checkpoints(9).dir().join(format!("step-{step:010}"));
    let root = tempfile::tempdir().expect("temporary folder");
    let other = run_in(root.path(), "other");
    let write = |dir: &Path| {
        copy(&checkpoint(weights_of), dir);
        std::fs::remove_file(dir.join("manifest.json")).expect("remove");
        let path = dir.join("state.json");
        let text = std::fs::read(&path).expect("state");
        let mut saved: SavedState = serde_json::from_slice(&text).expect("state");
        (saved.step, saved.epoch) = (step, step / STEPS);
        (saved.stream.epoch, saved.stream.step) = (step / STEPS, step % STEPS);
        std::fs::write(&path, serde_json::to_vec(&saved).expect("text")).expect("write");
        Ok(())
    };
    other.checkpoints(9).save(step, write).expect("save");
    let config = Config { harm: Harm::None, ..config };
    let fit = trainer_in(config, scaling, &other).fit(runtime).expect("fit");
    assert_eq!(fit.values[0].began_at, step);
    fit
}

/// Whatever the optimizer's state is, and with batch norms, whose statistics go back too.
fn behind(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let shards = ScalingConfig { shard_optimizer: true, ..scaling() };
    let virtual_shards = ScalingConfig { virtual_shards: Some(4), ..scaling() };
    let resnet = Config { resnet: true, ..config(&[10]) };
    let cases = [
        ("plain", config(&[10]), scaling()),
        ("parts", config(&[10]), shards),
        ("shards", config(&[10]), virtual_shards),
        ("norms", resnet, scaling()),
    ];
    for (name, config, scaling) in cases {
        let run = run_in(root.path(), name);
        let fit = trainer_in(config.clone(), scaling.clone(), &run).fit(runtime).expect("fit");
        assert_eq!((fit.metrics["rollbacks"], fit.metrics["non_finite_steps"]), (1.0, 1.0));
        let expected = from_checkpoint(runtime, &run, (8, 11), config.clone(), scaling.clone());
        assert!(bits(&fit) == bits(&expected), "{name}");
        assert!(fit.values.iter().all(|rank| rank.weights == fit.values[0].weights), "{name}");
        let skipped = Config { non_finite: NonFinite::Skip { in_a_row: 1 }, ..config };
        let run = run_in(root.path(), &format!("{name}-skipped"));
        let skipped = trainer_in(skipped, scaling, &run).fit(runtime).expect("fit");
        assert!(bits(&fit) != bits(&skipped), "{name}: it went nowhere");
    }
}

/// Steps 10, 11 and 12 in a row: back to 8, 6 and 4, although there is one of step 12 by then.
fn again(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let config = config(&[10, 11, 12]);
    let fit = trainer_in(config.clone(), scaling(), &run).fit(runtime).expect("fit");
    assert_eq!(fit.metrics["rollbacks"], 3.0);
    let expected = from_checkpoint(runtime, &run, (4, 13), config, scaling());
    assert!(bits(&fit) == bits(&expected));
    let shown = std::fs::read_to_string(run.path().join("metrics.jsonl")).expect("metrics");
    assert!(shown.contains("\"rollbacks\":3"), "{shown}");
}

fn left_out_before(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let non_finite = NonFinite::RollBack { in_a_row: 1, at_most: 1 };
    // Step 3 has nothing to go back to, and needs nothing.
    let config = Config { non_finite, ..config(&[3, 9, 10, 11]) };
    let fit = trainer_in(config.clone(), scaling(), &run).fit(runtime).expect("fit");
    assert_eq!((fit.metrics["rollbacks"], fit.metrics["non_finite_steps"]), (1.0, 4.0));
    let expected = from_checkpoint(runtime, &run, (8, 12), config.clone(), scaling());
    assert!(bits(&fit) == bits(&expected));
    // That of step 8 has the weights that steps 8 and 9 were left out with.
    let run = run_in(root.path(), "of-these");
    let config = Config { harm: Harm::NanLosses { steps: vec![8, 9] }, ..config };
    let fit = trainer_in(config.clone(), scaling(), &run).fit(runtime).expect("fit");
    assert_eq!((fit.metrics["rollbacks"], fit.metrics["non_finite_steps"]), (1.0, 2.0));
    let expected = from_checkpoint(runtime, &run, (6, 10), config, scaling());
    assert!(bits(&fit) == bits(&expected));
}

/// Gradients overflow at a scale that cannot fall, which ends a training without this policy.
fn overflow(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let loss_scale = LossScaleOptions {
        init_scale: 65536.0 * 65536.0,
        min_scale: 65536.0 * 65536.0,
        ..Default::default()
    };
    let updater = UpdaterOptions { loss_scale: Some(loss_scale), ..Default::default() };
    let error = |non_finite, name: &str| {
        let updater = Some(updater.clone());
        let config = Config { harm: Harm::Half, updater, non_finite, ..Config::new(1) };
        let trainer = trainer_in(config, scaling(), &run_in(root.path(), name));
        trainer.fit(runtime).expect_err("the end").to_string()
    };
    let text = error(NonFinite::Skip { in_a_row: 2 }, "skip");
    assert!(text.contains("at step 0 is not finite although the loss scale"), "{text}");
    let text = error(NonFinite::RollBack { in_a_row: 2, at_most: 1 }, "back");
    assert!(text.contains("at step 2 is not finite although the loss scale"), "{text}");
    assert!(text.ends_with("there is none from before step 0"), "{text}");
}

/// A checkpoint says how far the training has gone back.
fn later(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let config = config(&[10, 11, 12]);
    let whole = trainer_in(config.clone(), scaling(), &run_in(root.path(), "whole"));
    let whole = whole.fit(runtime).expect("fit");
    let run = run_in(root.path(), "r");
    let half = Config { epochs: 2, ..config.clone() };
    trainer_in(half, scaling(), &run).fit(runtime).expect("fit");
    let fit = trainer_in(config, scaling(), &run).fit(runtime).expect("fit");
    assert_eq!((fit.values[0].began_at, fit.metrics["rollbacks"]), (12, 3.0));
    assert!(bits(&fit) == bits(&whole));
}

fn waited_for(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    for shard_optimizer in [false, true] {
        let run = run_in(root.path(), &shard_optimizer.to_string());
        let checkpoints = CheckpointConfig {
            every_steps: Some(10),
            every_epochs: 9,
            keep: 9,
            ..Default::default()
        };
        let scaling = ScalingConfig { shard_optimizer, ..scaling() };
        let trainer =
            trainer_in(config(&[11]), scaling.clone(), &run).with_checkpoints(checkpoints);
        let fit = trainer.fit(runtime).expect("fit");
        let expected = from_checkpoint(runtime, &run, (10, 12), config(&[]), scaling);
        assert!(bits(&fit) == bits(&expected));
    }
}

fn damaged(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let half = Config { epochs: 2, ..config(&[]) };
    trainer_in(half, scaling(), &run).fit(runtime).expect("fit");
    let dir = run.checkpoints(9).dir().join("step-0000000008");
    std::fs::write(dir.join("model.safetensors"), "no weights").expect("damage");
    assert!(Checkpoint::open(dir).is_err());
    // Back to 12, and then not to 8, but to 6.
    let config = config(&[13, 14]);
    let fit = trainer_in(config.clone(), scaling(), &run).fit(runtime).expect("fit");
    let expected = from_checkpoint(runtime, &run, (6, 15), config, scaling());
    assert!(bits(&fit) == bits(&expected));
}

fn cannot(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let error = |name: &str, steps: &[u64], at_most| {
        let non_finite = NonFinite::RollBack { in_a_row: 0, at_most };
        let config = Config { non_finite, ..config(steps) };
        let trainer = trainer_in(config, scaling(), &run_in(root.path(), name));
        trainer.fit(runtime).expect_err("the end").to_string()
    };
    let text = error("early", &[2], 9);
    assert!(text.contains("the loss at step 2 is NaN"), "{text}");
    assert!(
        text.ends_with("cannot go back to a checkpoint: there is none from before step 2"),
        "{text}"
    );
    let text = error("far", &[5, 6], 9);
    let expected = "cannot go back to a checkpoint: there is none from before step 4";
    assert!(text.contains("the loss at step 6 is NaN") && text.ends_with(expected), "{text}");
    let text = error("often", &[5, 9, 13], 2);
    assert!(text.contains("the loss at step 13 is NaN"), "{text}");
    assert!(text.ends_with("that was done 2 time(s), as often as allowed"), "{text}");

    let trainer = Trainer::new(train::remote(config(&[]))).with_logs_shown(false);
    let text = trainer.with_scaling(scaling()).fit(runtime).expect_err("no run").to_string();
    assert!(text.contains("option non_finite is RollBack, expected another policy"), "{text}");
    let local = ScalingConfig { local_sgd: Some(LocalSgd::average(3)), ..scaling() };
    let run = run_in(root.path(), "local");
    let fit = trainer_in(config(&[]), local, &run).fit(runtime);
    let text = fit.expect_err("refused").to_string();
    assert!(text.contains("option local_sgd is some, expected none where steps"), "{text}");
}
