//! Training on one and several workers: same numbers, uneven shares, resumption.

use crate::Test;
use crate::digits::{Config, ROWS, learn, train};
use mobula_core::{Flow, RunDir, Runtime};
use mobula_train::{
    CheckpointConfig, ScalingConfig, Trainer, TrainingResult, WorkerContext, load_model,
};

pub(crate) const TESTS: &[Test] = &[
    ("training::two_workers_train_like_one", worlds_agree),
    ("training::uneven_shares_are_weighted_by_their_rows", uneven),
    ("training::a_run_records_metrics_logs_and_checkpoints", records),
    ("training::a_stopped_run_resumes_to_the_same_bits", resumes),
    ("training::a_finished_run_is_not_trained_again", finished),
    ("training::a_listener_ends_the_training", breaks_off),
];

type Outcome = TrainingResult<(Vec<f32>, f64)>;

fn fit(runtime: &Runtime, workers: usize, config: Config) -> Outcome {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
    trainer.with_scaling(ScalingConfig::workers(workers)).fit(runtime).expect("fit")
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn worlds_agree(runtime: &Runtime) {
    let one = fit(runtime, 1, Config::new(6));
    let two = fit(runtime, 2, Config::new(6));
    assert_eq!(two.values[0].0, two.values[1].0, "ranks must hold the same weights");
    let difference = max_difference(&one.values[0].0, &two.values[0].0);
    assert!(difference < 1e-4, "weights differ by {difference}");
    assert!(one.metrics["accuracy"] > 0.9 && two.metrics["accuracy"] > 0.9, "{:?}", two.metrics);
    // The control: another learning rate does move the weights by more than the tolerance.
    let other = fit(runtime, 1, Config { lr: 0.021, ..Config::new(6) });
    assert!(max_difference(&one.values[0].0, &other.values[0].0) > 1e-3);
}

/// 90 rows in batches of 89: the last step has one row, on one rank only.
fn uneven(runtime: &Runtime) {
    let config = Config { batch_size: ROWS - 1, ..Config::new(4) };
    let one = fit(runtime, 1, config.clone());
    let three = fit(runtime, 3, config);
    let difference = max_difference(&one.values[0].0, &three.values[0].0);
    assert!(difference < 1e-4, "weights differ by {difference}");
}

fn records(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &Config::new(3)).expect("run");
    let trainer = Trainer::new(train::remote(Config::new(3))).with_run(&run).with_logs_shown(false);
    let result = trainer.with_scaling(ScalingConfig::workers(2)).fit(runtime).expect("fit");

    let epochs: Vec<f64> = run
        .metrics()
        .expect("metrics")
        .iter()
        .filter_map(|line| line.values.get("epoch").copied())
        .collect();
    assert_eq!(epochs, [1.0, 2.0, 3.0]);
    let log = std::fs::read_to_string(run.log_path(1)).expect("log of rank 1");
    assert_eq!(log, "generation 0\n");
    assert_eq!(run.status().expect("status").state, mobula_core::run::RunState::Finished);

    let checkpoint = result.checkpoint.expect("a checkpoint");
    assert_eq!(checkpoint.step(), 18);
    let mut saved = Vec::new();
    for (_, var) in load_model(&checkpoint).expect("model").params().vars() {
        saved.extend(var.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values"));
    }
    assert_eq!(saved, result.values[0].0);
}

/// Trains 2 of 5 epochs, then goes on with another number of workers; and without a stop.
fn resumes(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "stopped", 5, &()).expect("run");
    let fit = |epochs, workers| {
        let trainer = Trainer::new(train::remote(Config::new(epochs))).with_run(&run);
        let trainer = trainer.with_checkpoints(CheckpointConfig { every_epochs: 2, keep: 2 });
        let trainer = trainer.with_scaling(ScalingConfig::workers(workers)).with_logs_shown(false);
        trainer.fit(runtime).expect("fit")
    };
    fit(2, 2);
    let resumed = fit(5, 2);
    let whole = self::fit(runtime, 2, Config::new(5));
    assert_eq!(resumed.values[0].0, whole.values[0].0);
}

fn finished(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
    let trainer =
        || Trainer::new(train::remote(Config::new(2))).with_run(&run).with_logs_shown(false);
    let first = trainer().fit(runtime).expect("fit");
    let again = trainer().fit(runtime).expect("fit");
    assert_eq!(first.values[0].0, again.values[0].0);
    assert_eq!(first.metrics["accuracy"], again.metrics["accuracy"]);
}

fn breaks_off(_: &Runtime) {
    let mut epochs = Vec::new();
    let listener = |report: &mobula_train::EpochReport| {
        epochs.push((report.epoch, report.metrics["loss"]));
        Ok(Flow::stop_if(report.epoch == 2))
    };
    learn(&mut WorkerContext::alone(listener), &Config::new(10)).expect("learn");
    assert_eq!(epochs.len(), 2);
    assert!(epochs[1].1 < epochs[0].1, "the loss falls: {epochs:?}");
}
