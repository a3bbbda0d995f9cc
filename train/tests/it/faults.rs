//! Killed workers, damaged checkpoints, bad numbers: one clear end, or a recovery that loses
//! nothing.

use crate::Test;
use crate::digits::{Config, Harm, How, Outcome, Place, train};
use mobula_core::checkpoint::Checkpoint;
use mobula_core::{BoxError, OnLoss, Placement, Resources, RunDir, Runtime, remote};
use mobula_train::{
    CheckpointConfig, Error, FailureConfig, NonFinite, ScalingConfig, Trainer, TrainingResult,
};
use std::path::PathBuf;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("faults::a_killed_worker_costs_nothing_but_time", killed_once),
    ("faults::wherever_it_is_lost_no_step_is", places),
    ("faults::a_worker_that_hangs_is_replaced", hangs),
    ("faults::one_that_is_lost_again_and_again", again),
    ("faults::when_all_are_lost_the_newest_checkpoint_counts", all_lost),
    ("faults::the_one_that_writes_is_killed_while_it_does", while_writing),
    ("faults::a_trial_in_a_process_recovers_like_any_training", trials),
    ("faults::losses_long_ago_do_not_count", long_ago),
    ("faults::a_worker_that_always_dies_ends_the_training", killed_always),
    ("faults::a_damaged_checkpoint_falls_back_to_the_one_before", damaged_checkpoint),
    ("faults::a_nan_loss_is_named", nan),
    ("faults::steps_without_numbers_are_left_out_if_that_is_the_policy", left_out),
    ("faults::a_bad_label_is_named_with_its_rank", bad_label),
    ("faults::a_world_that_never_fits_is_refused", never_fits),
];

type Fit = Result<TrainingResult<Outcome>, Error>;

fn fit(runtime: &Runtime, config: Config, run: Option<&RunDir>) -> Fit {
    fit_on_loss(OnLoss::RestartAll, runtime, config, run)
}

fn fit_on_loss(on_loss: OnLoss, runtime: &Runtime, config: Config, run: Option<&RunDir>) -> Fit {
    let mut trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
    if let Some(run) = run {
        trainer = trainer.with_run(run);
    }
    // What is written in the background may not be there yet.
    let waited_for = CheckpointConfig { asynchronous: false, ..Default::default() };
    let failure = FailureConfig { max_failures: 2, on_loss, ..Default::default() };
    let trainer = trainer.with_checkpoints(waited_for);
    trainer.with_scaling(ScalingConfig::workers(2)).with_failure(failure).fit(runtime)
}

/// INV-RECOVER: after a real `kill -9` in the middle of an epoch the weights are, bit by bit,
/// those of a run that nothing happened to; whether every worker begins anew, from the newest
/// checkpoint, or only the lost one, with what the other still has.
/// A worker is lost at a step: all begin where the checkpoint was taken, and come to the undisturbed weights.
pub(crate) fn goes_on_from_the_newest_checkpoint(
    runtime: &Runtime,
    scaling: &ScalingConfig,
    config: &Config,
    at_step: u64,
    began_at: u64,
) {
    // So that there is one when the worker is lost.
    let waited_for = CheckpointConfig { asynchronous: false, ..Default::default() };
    let root = tempfile::tempdir().expect("temporary folder");
    let fit = |name, harm| {
        let run = RunDir::create(root.path(), name, 5, &()).expect("run");
        let trainer = Trainer::new(train::remote(Config { harm, ..config.clone() }));
        let trainer = trainer.with_logs_shown(false).with_run(&run).with_scaling(scaling.clone());
        trainer.with_checkpoints(waited_for.clone()).fit(runtime).expect("fit")
    };
    let whole = fit("whole", Harm::None);
    let marker = root.path().join("marker");
    let killed = fit("killed", Harm::KillOnce { at_step, marker });
    assert_eq!((killed.restarts, killed.values[0].began_at), (1, began_at));
    for (killed, whole) in killed.values.iter().zip(&whole.values) {
        assert_eq!(killed.weights, whole.weights);
    }
}

fn killed_once(runtime: &Runtime) {
    let undisturbed = fit(runtime, Config::new(5), None).expect("fit");
    for on_loss in [OnLoss::RestartAll, OnLoss::ReplaceLost] {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
        let harm = Harm::KillOnce { at_step: 15, marker: root.path().join("marker") };
        let config = Config { harm, ..Config::new(5) };
        let killed = fit_on_loss(on_loss, runtime, config, Some(&run)).expect("recovers");
        assert_eq!(killed.restarts, 1);
        let step = if on_loss == OnLoss::ReplaceLost { 15 } else { 12 };
        assert!(killed.values.iter().all(|rank| rank.began_at == step), "restored, not begun anew");
        assert_eq!(killed.values[0].weights, undisturbed.values[0].weights);
        let processes: Vec<u64> = killed.values.iter().map(|rank| rank.process).collect();
        let of_rank_0 = if on_loss == OnLoss::ReplaceLost { 0 } else { 1 };
        assert_eq!(processes, [of_rank_0, 1], "{on_loss:?}");
        let log = std::fs::read_to_string(run.log_path(0)).expect("log");
        assert_eq!(log, "generation 0\ngeneration 1\n");
    }
}

/// Three workers, of which the second comes to harm in these places, one after the other.
fn harmed(runtime: &Runtime, how: How, places: &[Place]) -> TrainingResult<Outcome> {
    let root = tempfile::tempdir().expect("temporary folder");
    let marker = |(at, place): (usize, &Place)| (*place, root.path().join(at.to_string()));
    let harm = Harm::Once { how, places: places.iter().enumerate().map(marker).collect() };
    let trainer = Trainer::new(train::remote(Config { harm, ..Config::new(4) }));
    let trainer = trainer.with_logs_shown(false).with_scaling(ScalingConfig::workers(3));
    let fit = trainer.fit(runtime).expect("recovers");
    assert_eq!(fit.restarts as usize, places.len(), "{how:?} {places:?}");
    assert!(fit.values.iter().all(|rank| rank.weights == fit.values[0].weights));
    fit
}

fn undisturbed(runtime: &Runtime) -> Vec<f32> {
    let trainer = Trainer::new(train::remote(Config::new(4))).with_logs_shown(false);
    let fit = trainer.with_scaling(ScalingConfig::workers(3)).fit(runtime).expect("fit");
    fit.values[0].weights.clone()
}

/// Without a run directory: what the others have in memory is all there is.
fn places(runtime: &Runtime) {
    let expected = undisturbed(runtime);
    for (how, place, step) in [
        (How::Kill, Place::Start(0), 0),
        (How::Kill, Place::Forward, 15),
        (How::Abort, Place::Forward, 15),
        (How::OutOfMemory, Place::Forward, 15),
        (How::Kill, Place::Backward, 15),
        (How::Kill, Place::Sum, 15),
        (How::Kill, Place::Validation, 18),
    ] {
        let fit = harmed(runtime, how, &[place]);
        assert_eq!(fit.values[0].weights, expected, "{how:?} {place:?}");
        assert_eq!(fit.values[1].began_at, step, "{how:?} {place:?}");
    }
}

fn hangs(runtime: &Runtime) {
    let fit = harmed(runtime, How::Stop, &[Place::Forward]);
    assert_eq!(fit.values[0].weights, undisturbed(runtime));
    // A signal takes effect on all threads, which may be some steps behind this one.
    assert!(fit.values[1].began_at >= 15, "{}", fit.values[1].began_at);
}

/// The one that takes its place comes to harm in the same step, or before it has anything; what the
/// others have stays.
fn again(runtime: &Runtime) {
    let expected = undisturbed(runtime);
    for places in [
        [Place::Forward, Place::Forward, Place::Forward],
        [Place::Forward, Place::Restore(1), Place::Start(2)],
    ] {
        let fit = harmed(runtime, How::Kill, &places);
        assert_eq!(fit.values[0].weights, expected);
        assert_eq!(fit.values[1].began_at, 15);
    }
}

/// Of one, nobody is left.
fn all_lost(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let alone = |name, harm| {
        let run = RunDir::create(root.path(), name, 5, &()).expect("run");
        let trainer = Trainer::new(train::remote(Config { harm, ..Config::new(5) }));
        let waited_for = CheckpointConfig { asynchronous: false, ..Default::default() };
        let trainer = trainer.with_run(&run).with_checkpoints(waited_for).with_logs_shown(false);
        trainer.fit(runtime).expect("recovers")
    };
    let undisturbed = alone("undisturbed", Harm::None);
    let killed = alone("killed", Harm::KillAllOnce { at_step: 15, folder: root.path().to_owned() });
    assert_eq!((killed.restarts, killed.values[0].began_at), (1, 12));
    assert_eq!(killed.values[0].weights, undisturbed.values[0].weights);
}

/// Rank 0, by a thread that watches for what it writes: of an epoch within, and of the last.
fn while_writing(runtime: &Runtime) {
    let undisturbed = fit(runtime, Config::new(5), None).expect("fit");
    for step in [12, 30] {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
        let folder = run.checkpoints(1).dir().join(format!(".tmp-step-{step:010}"));
        let harm = Harm::KillWriter { folder, marker: root.path().join("killed") };
        let config = Config { harm, ..Config::new(5) };
        let killed =
            fit_on_loss(OnLoss::ReplaceLost, runtime, config, Some(&run)).expect("recovers");
        assert_eq!((killed.restarts, root.path().join("killed").exists()), (1, true));
        assert_eq!(killed.values[0].weights, undisturbed.values[0].weights);
        let paths = run.checkpoints(9).paths().expect("paths");
        assert!(paths.iter().all(|path| Checkpoint::open(path).is_ok()));
        assert_eq!(killed.checkpoint.expect("of the end").step(), 30);
    }
}

/// A training that is a task in a process, and whose workers are others.
#[remote(crate = mobula_core)]
fn trial(root: PathBuf) -> Result<(u32, Vec<Outcome>), BoxError> {
    let run = RunDir::create(&root, "r", 5, &())?;
    let harm = Harm::KillOnce { at_step: 15, marker: root.join("marker") };
    let config = Config { harm, ..Config::new(5) };
    let trained = fit_on_loss(OnLoss::ReplaceLost, &Runtime::current()?, config, Some(&run))?;
    Ok((trained.restarts, trained.values))
}

fn trials(runtime: &Runtime) {
    let undisturbed = fit(runtime, Config::new(5), None).expect("fit");
    let roots = [(); 3].map(|()| tempfile::tempdir().expect("temporary folder"));
    // Six workers of one CPU each, and three tasks that watch over them, on four CPUs.
    let trials = roots.each_ref().map(|root| {
        let task = trial::remote(root.path().to_owned()).on(Placement::Process);
        runtime.submit(task)
    });
    for trial in trials {
        let trained = trial.get_timeout(Duration::from_secs(120)).expect("no deadlock");
        let (restarts, values) = &*trained;
        assert_eq!(*restarts, 1);
        assert!(values.iter().all(|rank| rank.began_at == 15), "restored, not begun anew");
        assert_eq!(values[0].weights, undisturbed.values[0].weights);
    }
}

/// Three of which one is allowed, but each is long ago when the next one comes.
fn long_ago(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let marker = |at: usize| (Place::Forward, root.path().join(at.to_string()));
    let harm = Harm::Once { how: How::Kill, places: (0..3).map(marker).collect() };
    let run = |window| {
        let config = Config { harm: harm.clone(), ..Config::new(4) };
        let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
        let failure = FailureConfig { max_failures: 1, window, ..Default::default() };
        trainer.with_scaling(ScalingConfig::workers(2)).with_failure(failure).fit(runtime)
    };
    assert_eq!(run(Duration::from_nanos(1)).expect("recovers").restarts, 3);
    (0..3).for_each(|at| std::fs::remove_file(root.path().join(at.to_string())).expect("marker"));
    let error = run(Duration::MAX).expect_err("the second is too many").to_string();
    assert!(error.starts_with("training failed 2 time(s), 1 allowed"), "{error}");
}

fn killed_always(runtime: &Runtime) {
    let harm = Harm::KillAlways { at_step: 3 };
    let error = fit(runtime, Config { harm, ..Config::new(5) }, None).expect_err("dies thrice");
    let text = error.to_string();
    assert!(text.starts_with("training failed 3 time(s), 2 allowed"), "{text}");
    assert!(text.contains("rank 1 was lost") && text.contains("signal 9"), "{text}");
}

fn damaged_checkpoint(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
    fit(runtime, Config::new(3), Some(&run)).expect("fit");
    let newest = run.checkpoints(2).paths().expect("paths").pop().expect("a checkpoint");
    let weights = newest.join("model.safetensors");
    let half = std::fs::metadata(&weights).expect("metadata").len() / 2;
    std::fs::File::options().write(true).open(&weights).and_then(|f| f.set_len(half)).expect("cut");

    let resumed = fit(runtime, Config::new(4), Some(&run)).expect("falls back");
    assert_eq!(resumed.values[0].began_at, 12, "the one before it was taken at step 12");
    let undisturbed = fit(runtime, Config::new(4), None).expect("fit");
    assert_eq!(resumed.values[0].weights, undisturbed.values[0].weights);
}

fn nan(runtime: &Runtime) {
    let cases = [
        (Harm::NanLoss { at_step: 4 }, "the loss at step 4 is NaN: lower the learning rate"),
        (Harm::NanInputs { at_step: 4 }, "the loss at step 4 is NaN: lower the learning rate"),
    ];
    for (harm, expected) in cases {
        let error =
            fit(runtime, Config { harm, ..Config::new(2) }, None).expect_err("NaN").to_string();
        assert!(error.contains(expected) && error.contains("check the inputs for NaN"), "{error}");
    }
}

/// One rank's loss is no number in some steps, which leave no trace, on all ranks alike.
fn left_out(runtime: &Runtime) {
    let run = |steps: &[u64], in_a_row| {
        let harm = Harm::NanLosses { steps: steps.to_vec() };
        let non_finite = NonFinite::Skip { in_a_row };
        fit(runtime, Config { harm, non_finite, ..Config::new(3) }, None)
    };
    let all_finite = run(&[], 2).expect("fit");
    let left_out = run(&[4, 5, 9], 2).expect("borne");
    assert_eq!(left_out.metrics["non_finite_steps"], 3.0);
    assert!(left_out.metrics["loss"].is_finite() && all_finite.metrics["non_finite_steps"] == 0.0);
    assert_eq!(left_out.values[0].weights, left_out.values[1].weights);
    assert!(left_out.values[0].weights.iter().all(|weight| weight.is_finite()));
    assert_ne!(left_out.values[0].weights, all_finite.values[0].weights);
    let error = run(&[4, 5, 6], 2).expect_err("one too many").to_string();
    assert!(error.contains("the loss at step 6 is NaN"), "{error}");
}

fn bad_label(runtime: &Runtime) {
    let config = Config { harm: Harm::BadLabel, ..Config::new(1) };
    let error = fit(runtime, config, None).expect_err("bad label").to_string();
    assert!(error.contains("train rank 1 failed: label 12 in row 0 is out of range"), "{error}");
}

fn never_fits(runtime: &Runtime) {
    let scaling =
        ScalingConfig { resources_per_worker: Resources::cpus(32.0), ..ScalingConfig::workers(2) };
    let trainer = Trainer::new(train::remote(Config::new(1))).with_scaling(scaling);
    let error = trainer.fit(runtime).expect_err("64 CPUs").to_string();
    assert!(error.contains("cannot place 64 CPU: this machine has 4 CPU"), "{error}");
}
