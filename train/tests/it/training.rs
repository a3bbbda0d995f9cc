//! Training on one and several workers: same numbers, uneven shares, resumption.

use crate::Test;
use crate::digits::{Config, Outcome, ROWS, learn, train};
use candle_core::{DType, Device, Tensor};
use mobula_core::{
    Batch, BoxError, Flow, GroupOptions, Member, Placement, PlacementGroupOptions, Resources,
    RunDir, Runtime, Shard, remote,
};
use mobula_nn::loss::{CrossEntropyOptions, cross_entropy_with};
use mobula_nn::models::MlpOptions;
use mobula_nn::{Model, ModelSpec};
use mobula_train::{
    AdamW, AdamWOptions, CheckpointConfig, Error, Loss, ScalingConfig, TrainState, Trainer,
    TrainingResult, WorkerContext, load_model,
};
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("training::two_workers_train_like_one", worlds_agree),
    ("training::uneven_shares_are_weighted_by_their_rows", uneven),
    ("training::a_run_records_metrics_logs_and_checkpoints", records),
    ("training::several_workers_tell_how_long_their_steps_take", step_times),
    ("training::a_stopped_run_resumes_to_the_same_bits", resumes),
    ("training::a_finished_run_is_not_trained_again", finished),
    ("training::ranks_draw_different_dropout_masks", masks_differ),
    ("training::rows_that_count_otherwise_are_weighted_over_all_ranks", weighted),
    ("training::no_workers_are_refused", no_workers),
    ("training::workers_that_find_no_room_are_refused_in_time", no_room),
    ("training::a_listener_ends_the_training", breaks_off),
];

type Fit = TrainingResult<Outcome>;

fn fit(runtime: &Runtime, workers: usize, config: Config) -> Fit {
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
    assert_eq!(two.values[0].weights, two.values[1].weights, "ranks must hold the same weights");
    let difference = max_difference(&one.values[0].weights, &two.values[0].weights);
    assert!(difference < 1e-4, "weights differ by {difference}");
    assert!(one.metrics["accuracy"] > 0.9 && two.metrics["accuracy"] > 0.9, "{:?}", two.metrics);
    // The control: another learning rate does move the weights by more than the tolerance.
    let other = fit(runtime, 1, Config { lr: 0.021, ..Config::new(6) });
    assert!(max_difference(&one.values[0].weights, &other.values[0].weights) > 1e-3);
}

/// 90 rows in batches of 89: the last step has one row, on one rank only.
fn uneven(runtime: &Runtime) {
    let config = Config { batch_size: ROWS - 1, ..Config::new(4) };
    let one = fit(runtime, 1, config.clone());
    let three = fit(runtime, 3, config);
    let difference = max_difference(&one.values[0].weights, &three.values[0].weights);
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
    assert_eq!(saved, result.values[0].weights);
}

/// Which of them is slow is for the clock to say: here, that it is told, and in which order.
fn step_times(runtime: &Runtime) {
    let of = |workers| {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
        let trainer = Trainer::new(train::remote(Config::new(2))).with_run(&run);
        let trainer = trainer.with_logs_shown(false).with_scaling(ScalingConfig::workers(workers));
        let fit = trainer.fit(runtime).expect("fit");
        let epochs = run.metrics().expect("metrics").into_iter().map(|line| line.values);
        let epochs: Vec<_> = epochs.filter(|values| values.contains_key("epoch")).collect();
        (fit.metrics, epochs)
    };
    let (metrics, epochs) = of(3);
    for metrics in epochs.iter().chain([&metrics]) {
        let [min, max, slowest] = ["step_ms_min", "step_ms_max", "slowest"]
            .map(|name| metrics.get(&format!("ranks/{name}")).copied().expect(name));
        assert!(0.0 < min && min <= max && [0.0, 1.0, 2.0].contains(&slowest), "{metrics:?}");
    }
    let (metrics, _) = of(1);
    assert!(metrics.keys().all(|name| !name.starts_with("ranks/")), "{metrics:?}");
}

/// Trains 2 of 5 epochs, then goes on, with as many workers and with fewer.
fn resumes(runtime: &Runtime) {
    let whole = fit(runtime, 2, Config::new(5));
    for workers in [2, 1] {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "stopped", 5, &()).expect("run");
        let fit = |epochs, workers| {
            let trainer = Trainer::new(train::remote(Config::new(epochs))).with_run(&run);
            let trainer = trainer
                .with_checkpoints(CheckpointConfig { every_epochs: 2, ..Default::default() });
            let trainer = trainer.with_scaling(ScalingConfig::workers(workers));
            trainer.with_logs_shown(false).fit(runtime).expect("fit")
        };
        fit(2, 2);
        let resumed = fit(5, workers);
        assert!(resumed.values.iter().all(|rank| rank.began_at == 12), "{workers} workers");
        let difference = max_difference(&resumed.values[0].weights, &whole.values[0].weights);
        // As many workers add in the same order: the same bits.
        assert!(difference <= if workers == 2 { 0.0 } else { 1e-4 }, "{difference}");
        let epochs = run.metrics().expect("metrics");
        let epochs = epochs.iter().filter_map(|line| line.values.get("epoch").copied());
        assert_eq!(epochs.collect::<Vec<_>>(), [1.0, 2.0, 3.0, 4.0, 5.0]);
    }
}

fn finished(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
    let trainer =
        || Trainer::new(train::remote(Config::new(2))).with_run(&run).with_logs_shown(false);
    let first = trainer().fit(runtime).expect("fit");
    let again = trainer().fit(runtime).expect("fit");
    assert_eq!(first.values[0].weights, again.values[0].weights);
    assert_eq!(again.values[0].began_at, 12, "there was nothing left to do");
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

/// Steps once on two ranks and gives the row that each one's dropout starts at.
#[remote(crate = mobula_core)]
fn first_row(member: Member) -> Result<u64, BoxError> {
    let mut context = WorkerContext::join(member)?;
    let spec = ModelSpec::new("mlp", &MlpOptions::new(2, [4], 2))?;
    let model = Model::build(&spec, 1, &Device::Cpu)?;
    let mut state = TrainState::new(model, AdamW::new(AdamWOptions::default())?, 1, 1);
    let x = Tensor::ones((3, 2), DType::F32, &Device::Cpu)?;
    let batch = Batch::new(vec![("x".into(), x.clone())])?.with_global_rows(6);
    let mut offset = None;
    context.step(&mut state, &batch, |model, pass, batch| {
        offset = pass.training().map(|training| training.row_offset);
        model.forward(batch.get("x")?, pass)?.sum_all().map_err(BoxError::from)
    })?;
    offset.ok_or_else(|| "a step is a training pass".into())
}

fn masks_differ(runtime: &Runtime) {
    let options = GroupOptions { placement: Placement::Thread, ..GroupOptions::new("masks", 2) };
    let options = options.with_context(&crate::collectives::no_setup()).expect("context");
    let group = runtime.group(&options, &first_row::remote()).expect("group");
    let offsets = group.join(std::time::Duration::from_secs(60)).expect("join");
    assert_eq!(offsets, [0, 6], "disjoint rows of one step");
}

/// Twelve rows, of which every third and the first six have no label that counts: a rank has four of
/// those that do, another one none. Gradients, and the loss.
#[remote(crate = mobula_core)]
fn weigh(member: Member, how: String) -> Result<(Vec<f32>, f64), BoxError> {
    let mut context = WorkerContext::join(member)?;
    let spec = ModelSpec::new("mlp", &MlpOptions::new(2, [4], 3))?;
    let model = Model::build(&spec, 1, &Device::Cpu)?;
    let mut state = TrainState::new(model, AdamW::new(AdamWOptions::default())?, 1, 1);
    let Shard { rank, world } = context.shard();
    let mine: Vec<u32> = (0..12).filter(|row| *row as usize % world == rank).collect();
    let x: Vec<f32> = mine.iter().flat_map(|row| [*row as f32 / 6.0, 1.0]).collect();
    let counts = |row: u32| how != "nothing" && row % 3 != 1 && row > 5;
    let y = mine.iter().map(|row| if counts(*row) { row % 2 } else { 9 }).collect();
    let x = Tensor::from_vec(x, (mine.len(), 2), &Device::Cpu)?;
    let y = Tensor::from_vec(y, mine.len(), &Device::Cpu)?;
    let batch = Batch::new(vec![("x".into(), x), ("y".into(), y)])?.with_global_rows(12);
    let options = CrossEntropyOptions { ignored_label: Some(9), ..Default::default() };
    let loss = context.step(&mut state, &batch, |model, pass, batch| {
        let logits = model.forward(batch.get("x")?, pass)?;
        let loss = cross_entropy_with(&logits, batch.get("y")?, None, &options)?;
        Ok::<Loss, BoxError>(match how.as_str() {
            // Each rank's own mean, as a training loop that does not know better has it.
            "mean" => (loss.sum / loss.weight.max(1.0))?.into(),
            _ => loss.into(),
        })
    })?;
    Ok((state.gradients().values().to_vec(), loss))
}

fn weighted(runtime: &Runtime) {
    let run = |how: &str, world| {
        let options = GroupOptions::new("weigh", world);
        let options = GroupOptions { placement: Placement::Thread, ..options };
        let options = options.with_context(&crate::collectives::no_setup()).expect("context");
        let group = runtime.group(&options, &weigh::remote(how.to_owned())).expect("group");
        group.join(std::time::Duration::from_secs(60)).expect("join")
    };
    let (one, three) = (run("sum", 1), run("sum", 3));
    for (gradients, loss) in three {
        let difference = max_difference(&gradients, &one[0].0);
        assert!(difference < 1e-7, "{difference}");
        assert!((loss - one[0].1).abs() < 1e-6, "{loss} {}", one[0].1);
    }
    // The control: means of means are not it.
    assert!(max_difference(&run("mean", 3)[0].0, &one[0].0) > 1e-2);
    let nothing = run("nothing", 3);
    assert!(nothing[0].1 == 0.0 && nothing[0].0.iter().all(|gradient| *gradient == 0.0));
}

fn no_workers(runtime: &Runtime) {
    let trainer = Trainer::new(train::remote(Config::new(1)));
    let error = trainer.with_scaling(ScalingConfig::workers(0)).fit(runtime).expect_err("none");
    assert_eq!(error.to_string(), "option num_workers is 0, expected at least 1");
}

fn no_room(runtime: &Runtime) {
    let seat = || Resources::default().with_custom("seat", 2.0);
    let others = PlacementGroupOptions::new("others", vec![seat()]);
    let _others = runtime.placement_group(&others).expect("fits");
    let scaling = ScalingConfig {
        resources_per_worker: seat(),
        placement_timeout: Duration::from_millis(1),
        ..ScalingConfig::workers(2)
    };
    let trainer = Trainer::new(train::remote(Config::new(1))).with_scaling(scaling);
    let error = trainer.fit(runtime).expect_err("no room");
    assert!(matches!(error, Error::Core(mobula_core::Error::NotPlaced { .. })), "{error}");
}
