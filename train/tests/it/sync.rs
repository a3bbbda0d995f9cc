//! Batch norms on several workers: statistics over all rows, and the same buffers everywhere.

use crate::Test;
use crate::digits::{CLASSES, Config, FEATURES, Harm, Outcome, buffers, train};
use candle_core::{Device, Tensor};
use mobula_core::{Batch, BoxError, GroupEvent, GroupOptions, Member, Placement, RunDir, Runtime};
use mobula_core::{OnLoss, Shard, remote};
use mobula_nn::{Model, ModelSpec, loss::cross_entropy, models::ResNetOptions};
use mobula_train::optim::{OptimizerSpec, SgdOptions, UpdaterOptions};
use mobula_train::{
    AdamW, AdamWOptions, FailureConfig, ScalingConfig, TrainState, Trainer, TrainingResult,
    WorkerContext, load_model,
};
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("sync::any_number_of_workers_trains_like_one", worlds_agree),
    ("sync::running_statistics_are_weighted_by_rows", weighted),
    ("sync::a_resumed_run_has_the_same_statistics", resumes),
    ("sync::accumulated_batches_sync_each_by_itself", accumulates),
    ("sync::a_killed_worker_costs_nothing_but_time", killed),
    ("sync::a_rank_that_fails_is_not_waited_for", fails),
    ("sync::ranks_that_sum_differently_all_fail", ranks_differ),
];

type Fit = TrainingResult<Outcome>;

/// SGD, since Adam divides the rounding of small gradients by their size.
fn config(epochs: u64, batch_size: usize, lr: f64) -> Config {
    let optimizer = OptimizerSpec::Sgd(SgdOptions { lr, momentum: 0.9, ..Default::default() });
    let updater = Some(UpdaterOptions { optimizer, ..Default::default() });
    Config { batch_size, updater, resnet: true, ..Config::new(epochs) }
}

fn scaling(workers: usize, sync_batch_norm: bool, placement: Placement) -> ScalingConfig {
    ScalingConfig { sync_batch_norm, placement, ..ScalingConfig::workers(workers) }
}

fn fit(runtime: &Runtime, scaling: ScalingConfig, config: Config) -> Fit {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
    let fit = trainer.with_scaling(scaling).fit(runtime).expect("fit");
    assert!(fit.values.iter().all(|rank| rank.weights == fit.values[0].weights));
    assert!(fit.values.iter().all(|rank| rank.buffers == fit.values[0].buffers));
    fit
}

/// Of weights and of buffers.
fn differences(a: &Fit, b: &Fit) -> [f32; 2] {
    let (a, b) = (&a.values[0], &b.values[0]);
    let difference = |a: &[f32], b: &[f32]| {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    let all = |of: &Outcome| of.buffers.values().flatten().copied().collect::<Vec<f32>>();
    [difference(&a.weights, &b.weights), difference(&all(a), &all(b))]
}

/// Ten steps and more: of uneven shares, and of 88 rows and 2, of which one rank of three has none.
fn worlds_agree(runtime: &Runtime) {
    for (epochs, batch_size) in [(2, 16), (5, 88)] {
        let config = config(epochs, batch_size, 0.05);
        let one = fit(runtime, ScalingConfig::workers(1), config.clone());
        for (workers, placement) in [(3, Placement::Process), (2, Placement::Thread)] {
            let many = fit(runtime, scaling(workers, true, placement), config.clone());
            let off = differences(&one, &many);
            assert!(off.iter().all(|off| *off < 1e-5), "{workers}, {batch_size}: {off:?}");
            // The control: each by itself is another training.
            let many = fit(runtime, scaling(workers, false, placement), config.clone());
            let off = differences(&one, &many);
            assert!(off.iter().all(|off| *off > 1e-3), "{workers}, {batch_size}: {off:?}");
        }
    }
}

/// Three rows on four ranks, and five: while weights stay, the mean over workers of the means of
/// the first norm is that of the whole batch.
fn weighted(runtime: &Runtime) {
    for batch_size in [3, 5] {
        let config = config(1, batch_size, 1e-12);
        let one = fit(runtime, ScalingConfig::workers(1), config.clone());
        let four = fit(runtime, scaling(4, false, Placement::Thread), config);
        let of = |fit: &Fit| fit.values[0].buffers["bn1.running_mean"].clone();
        let off = of(&one).iter().zip(of(&four)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-6, "{batch_size} rows: {off}");
        assert!(of(&one).iter().any(|mean| mean.abs() > 1e-2), "they have moved");
    }
}

fn resumes(runtime: &Runtime) {
    for sync in [false, true] {
        let scaling = || scaling(3, sync, Placement::Thread);
        let whole = fit(runtime, scaling(), config(4, 88, 0.05));
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "stopped", 5, &()).expect("run");
        let fit = |epochs| {
            let trainer = Trainer::new(train::remote(config(epochs, 88, 0.05))).with_run(&run);
            let trainer = trainer.with_scaling(scaling()).with_logs_shown(false);
            trainer.fit(runtime).expect("fit")
        };
        let first = fit(2);
        let saved = load_model(first.checkpoint.as_ref().expect("checkpoint")).expect("model");
        let saved = buffers(&saved).expect("buffers");
        assert!(first.values.iter().all(|rank| rank.buffers == saved), "of any rank");
        let resumed = fit(4);
        assert_eq!(resumed.values[0].began_at, 4);
        assert_eq!(differences(&whole, &resumed), [0.0; 2], "{sync}");
    }
}

fn killed(runtime: &Runtime) {
    let whole = fit(runtime, scaling(3, true, Placement::Process), config(4, 88, 0.05));
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "killed", 5, &()).expect("run");
    let harm = Harm::KillOnce { at_step: 5, marker: root.path().join("marker") };
    let config = Config { harm, ..config(4, 88, 0.05) };
    let trainer = Trainer::new(train::remote(config)).with_run(&run).with_logs_shown(false);
    let failure = FailureConfig { on_loss: OnLoss::ReplaceLost, ..Default::default() };
    let trainer = trainer.with_scaling(scaling(3, true, Placement::Process)).with_failure(failure);
    let killed = trainer.fit(runtime).expect("recovers");
    assert_eq!((killed.restarts, killed.values[0].began_at), (1, 5));
    assert_eq!(differences(&whole, &killed), [0.0; 2]);
}

/// Behind its forward pass, while the others are in the sums of their backward pass.
fn fails(runtime: &Runtime) {
    let config = Config { harm: Harm::BadLabel, ..config(1, 88, 0.05) };
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
    let trainer = trainer.with_scaling(scaling(3, true, Placement::Process));
    let begun = Instant::now();
    let error = trainer.fit(runtime).expect_err("bad label").to_string();
    assert!(error.contains("train rank 1 failed: label 12 in row 0 is out of range"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(40), "before the deadline of a sum");
}

fn small_model() -> Result<Model, BoxError> {
    let options = ResNetOptions { channels: 1, height: 2, width: 4, base: 4, ..Default::default() };
    let options = ResNetOptions { blocks: vec![1], outputs: CLASSES, ..options };
    Ok(Model::build(&ModelSpec::new("resnet", &options)?, 3, &Device::Cpu)?)
}

/// A rank's part of so many rows that all ranks have together, dealt out in turns.
fn rows(shard: Shard, first: usize, count: usize) -> Result<Batch, BoxError> {
    let mine = || (first..first + count).filter(|row| row % shard.world == shard.rank);
    let pixel = |row: usize, at: usize| ((row * 31 + at * 17) % 23) as f32 / 11.0 - 1.0;
    let x: Vec<f32> = mine().flat_map(|row| (0..FEATURES).map(move |at| pixel(row, at))).collect();
    let y: Vec<u32> = mine().map(|row| (row % CLASSES) as u32).collect();
    let rows = y.len();
    let x = Tensor::from_vec(x, (rows, FEATURES), &Device::Cpu)?;
    let y = Tensor::from_vec(y, rows, &Device::Cpu)?;
    Ok(Batch::new(vec![("x".into(), x), ("y".into(), y)])?.with_global_rows(count))
}

fn state() -> Result<TrainState, BoxError> {
    Ok(TrainState::new(small_model()?, AdamW::new(AdamWOptions::default())?, 1, 1))
}

fn group_options(world: usize) -> GroupOptions {
    let mut setup = crate::collectives::no_setup();
    setup["sync_batch_norm"] = true.into();
    let options = GroupOptions { show_logs: false, ..GroupOptions::new("sync", world) };
    let options = GroupOptions { placement: Placement::Thread, ..options };
    options.with_context(&setup).expect("context")
}

/// One step over batches of 6 rows, 1 row and 2 rows; gradients, and buffers by name.
#[remote(crate = mobula_core)]
fn accumulate(member: Member) -> Result<Vec<Vec<f32>>, BoxError> {
    let mut context = WorkerContext::join(member)?;
    let mut state = state()?;
    let batches = [(0, 6), (6, 1), (7, 2)].map(|(at, count)| rows(context.shard(), at, count));
    let batches = batches.into_iter().collect::<Result<Vec<_>, _>>()?;
    context.step_accumulated(&mut state, &batches, |model, pass, batch| {
        cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
    })?;
    let mut values = vec![state.gradients().values().to_vec()];
    values.extend(buffers(&state.model)?.into_values());
    Ok(values)
}

fn accumulates(runtime: &Runtime) {
    let run = |world| {
        let group = runtime.group(&group_options(world), &accumulate::remote()).expect("group");
        group.join(Duration::from_secs(60)).expect("join")
    };
    let (one, three) = (run(1), run(3));
    assert!(three.iter().all(|rank| *rank == three[0]));
    for (one, three) in one[0].iter().flatten().zip(three[0].iter().flatten()) {
        assert!((one - three).abs() < 1e-5, "{one} {three}");
    }
}

/// Two rows on three ranks. Rank 1 goes through the model twice.
#[remote(crate = mobula_core)]
fn differ(member: Member) -> Result<(), BoxError> {
    let mut context = WorkerContext::join(member)?;
    let (mut state, shard) = (state()?, context.shard());
    let batch = rows(shard, 0, 2)?;
    context.step(&mut state, &batch, |model, pass, batch| {
        let x = batch.get("x")?;
        if shard.rank == 1 {
            model.forward(x, pass)?;
        }
        cross_entropy(&model.forward(x, pass)?, batch.get("y")?)
    })?;
    Ok(())
}

fn ranks_differ(runtime: &Runtime) {
    let mut group = runtime.group(&group_options(3), &differ::remote()).expect("group");
    for _ in 0..3 {
        let Some(GroupEvent::Failed { error, .. }) = group.next_event(Duration::from_secs(30))
        else {
            panic!("every rank must fail");
        };
        let text = error.to_string();
        assert!(text.contains("do all ranks build the same model?"), "{text}");
    }
}
