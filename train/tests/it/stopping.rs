//! A training that is asked to stop from outside.

use crate::Test;
use crate::digits::{CLASSES, Config, FEATURES};
use mobula_core::{BoxError, Flow, Member, RunDir, Runtime, remote};
use mobula_nn::models::MlpOptions;
use mobula_nn::{Model, ModelSpec, loss::cross_entropy};
use mobula_train::{
    AdamW, AdamWOptions, ScalingConfig, TrainState, Trainer, TrainingResult, WorkerContext,
};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("stopping::all_ranks_stop_at_the_same_step_with_a_checkpoint", within),
    ("stopping::an_epoch_that_ends_ends_the_training", after_epoch),
    ("stopping::an_error_of_who_listens_ends_the_training", error),
];

/// Six steps an epoch.
const EPOCHS: u64 = 5;

/// Asked after the second epoch, of which it knows at this step.
const KNOWN_AT: u64 = 15;

/// At the end: weights, steps, whether nobody had asked before the first epoch was over.
type Ended = (Vec<f32>, u64, bool);

/// Goes on behind `KNOWN_AT` when it has been asked to stop, if it will be, for which it makes this file
/// in its third epoch; then it stops, `within` the epoch, or at its end.
#[remote(crate = mobula_core)]
fn train_until(member: Member, third: Option<PathBuf>, within: bool) -> Result<Ended, BoxError> {
    let mut context = WorkerContext::join(member)?;
    let mut stream = context.batches(&Config::new(EPOCHS))?;
    let spec = ModelSpec::new("mlp", &MlpOptions::new(FEATURES, [16], CLASSES))?;
    let model = Model::build(&spec, 5, context.device())?;
    let mut state = TrainState::new(model, AdamW::new(AdamWOptions::default())?, 5, EPOCHS);
    context.restore(&mut state, stream.as_mut())?;
    let mut at_first = true;
    while !state.is_finished() {
        while let Some(batch) = stream.next_batch()? {
            context.step(&mut state, &batch, |model, pass, batch| {
                cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)
            })?;
            if state.step() == 3 {
                at_first = !context.should_stop()?;
            }
            if let Some(third) = third.as_ref().filter(|_| state.step() == KNOWN_AT) {
                std::fs::write(third, "")?;
                await_request(&context)?;
                if within {
                    context.stop(&mut state)?;
                    break;
                }
            }
        }
        if !state.is_finished() {
            context.end_epoch(&mut state, stream.as_ref(), &[])?;
        }
    }
    let mut weights = Vec::new();
    for (_, var) in state.model.params().vars() {
        weights.extend(var.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok((weights, state.step(), at_first))
}

fn await_request(context: &WorkerContext<'_>) -> Result<(), BoxError> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !context.should_stop()? {
        if Instant::now() > deadline {
            return Err("nobody has asked it to stop".into());
        }
    }
    Ok(())
}

fn trainer(third: Option<&Path>, within: bool, run: &RunDir) -> Trainer<Ended> {
    let third = third.map(Path::to_owned);
    let trainer = Trainer::new(train_until::remote(third, within)).with_run(run);
    trainer.with_logs_shown(false).with_scaling(ScalingConfig::workers(3))
}

/// Stopped by what hears of the second epoch, at `step`; what goes on from there ends like one that
/// nobody has asked.
fn stops_at(runtime: &Runtime, within: bool, step: u64) {
    let root = tempfile::tempdir().expect("temporary folder");
    let whole = RunDir::create(root.path(), "whole", 5, &()).expect("run");
    let whole = trainer(None, within, &whole).fit(runtime).expect("fit");
    assert_eq!(whole.values[0].1, 30);

    let run = RunDir::create(root.path(), "stopped", 5, &()).expect("run");
    let mut heard = Vec::new();
    let third = root.path().join("third");
    let stopped = trainer(Some(&third), within, &run).fit_with(runtime, |report| {
        heard.push(report.epoch);
        if report.epoch == 2 {
            // Sooner, and the second may not be over on all ranks: then it is the last.
            wait_for(&third);
        }
        Ok(Flow::stop_if(report.epoch == 2))
    });
    let stopped: TrainingResult<Ended> = stopped.expect("is no error");
    let ended: Vec<_> = stopped.values.iter().map(|rank| (rank.1, rank.2)).collect();
    assert_eq!(ended, [(step, true); 3], "on all ranks");
    assert!(stopped.values.iter().all(|rank| rank.0 == stopped.values[0].0));
    assert_eq!(stopped.checkpoint.expect("a checkpoint").step(), step);
    assert_eq!(heard, (1..=step / 6).collect::<Vec<_>>());

    let resumed = trainer(None, within, &run).fit(runtime).expect("goes on");
    assert_eq!(resumed.values[0].0, whole.values[0].0);
    let epochs = run.metrics().expect("metrics").into_iter();
    let epochs = epochs.filter_map(|line| line.values.get("epoch").copied());
    assert_eq!(epochs.collect::<Vec<_>>(), [1.0, 2.0, 3.0, 4.0, 5.0]);
}

fn wait_for(file: &Path) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !file.exists() {
        assert!(Instant::now() < deadline, "{} does not appear", file.display());
        std::thread::yield_now();
    }
}

fn within(runtime: &Runtime) {
    stops_at(runtime, true, KNOWN_AT);
}

fn after_epoch(runtime: &Runtime) {
    stops_at(runtime, false, 18);
}

fn error(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
    let fit = trainer(None, false, &run).fit_with(runtime, |_| Err("seen enough".into()));
    assert_eq!(fit.expect_err("ends").to_string(), "seen enough");
}
