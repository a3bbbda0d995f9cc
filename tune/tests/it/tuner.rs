//! The tuner: concurrency, failures, stopping, resuming.

use mobula_core::{BoxError, Resources, Runtime};
use mobula_tune::{
    AshaScheduler, Error, Flow, Metric, ResultGrid, SearchSpace, StopHandle, TpeSampler, Trial,
    TrialState, Tuner,
};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};

fn runtime() -> Runtime {
    Runtime::local(Resources::cpus(2.0)).expect("a local runtime")
}

fn space() -> SearchSpace {
    SearchSpace::new().log_uniform("lr", 1e-4, 1.0).choice("width", [32, 64])
}

fn tuner(trials: usize) -> Tuner {
    let sampler = TpeSampler::default().with_startup_trials(4);
    let tuner = Tuner::new(space(), Metric::maximize("accuracy")).with_sampler(sampler);
    tuner.with_trials(trials).with_seed(7).quiet()
}

/// Accuracy grows with the epochs and is best at lr = 0.01.
fn train(trial: &mut Trial) -> Result<(), Error> {
    let lr = trial.params.float("lr")?;
    for epoch in 1..=9 {
        let accuracy = (1.0 - 0.1 * (lr.log10() + 2.0).abs()) * (epoch as f64 / 9.0).sqrt();
        if trial.report(epoch, &[("loss", 1.0 - accuracy), ("accuracy", accuracy)])? == Flow::Stop {
            return Ok(());
        }
    }
    Ok(())
}

#[test]
fn a_study_finds_the_best_and_asha_prunes() {
    let asha = AshaScheduler::new(9).with_reduction_factor(3.0);
    let grid = tuner(30).with_scheduler(asha).run(&runtime(), train).expect("a study");
    let (complete, pruned) = (grid.count(TrialState::Complete), grid.count(TrialState::Pruned));
    assert_eq!((grid.trials().len(), complete + pruned), (30, 30));
    assert!(pruned >= 10, "{pruned} pruned");
    let best = grid.best().expect("a best trial");
    assert!(best.value > 0.9 && best.step == 9, "{best:?}");
    assert!(grid.best_line().expect("line").contains("accuracy 0.9"), "{:?}", grid.best_line());
    let table = grid.to_string();
    assert!(
        table.lines().nth(1).is_some_and(|line| line.contains(&format!("{} ", best.number))),
        "{table}"
    );
}

/// As many trials as fit run at the same time, and no more: each of the two waits for the other.
#[test]
fn trials_run_at_the_same_time_within_the_resources() {
    let (pair, running, most) =
        (Barrier::new(2), AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&most);
    let work = move |trial: &mut Trial| {
        seen.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        pair.wait();
        running.fetch_sub(1, Ordering::SeqCst);
        trial.report(1, 0.5).map(|_| ())
    };
    tuner(8).run(&runtime(), work).expect("a study");
    assert_eq!(most.load(Ordering::SeqCst), 2);
    let asked = tuner(2).with_resources(Resources::cpus(64.0)).run(&runtime(), train);
    let text = asked.expect_err("64 CPUs").to_string();
    assert!(text.contains("64 CPU") && text.contains("2 CPU"), "{text}");
}

#[test]
fn failing_and_panicking_trials_do_not_end_the_study() {
    let work = |trial: &mut Trial| -> Result<(), BoxError> {
        match trial.number {
            1 => Err("no such file".into()),
            2 => panic!("index out of bounds"),
            _ => Ok(train(trial)?),
        }
    };
    let grid = tuner(5).run(&runtime(), work).expect("a study");
    assert_eq!((grid.count(TrialState::Complete), grid.count(TrialState::Failed)), (3, 2));
    let error = |n: usize| grid.trials()[n].error.clone().expect("an error");
    assert_eq!(error(1), "no such file");
    assert!(
        error(2).contains("tuner.rs") && error(2).contains("index out of bounds"),
        "{}",
        error(2)
    );
}

#[test]
fn a_study_whose_trials_all_fail_shows_the_first() {
    let work = |_: &mut Trial| Err::<(), BoxError>("the data is missing\nrun make data".into());
    let text = tuner(3).run(&runtime(), work).expect_err("all failed").to_string();
    assert!(
        text.contains("all 3 trials failed") && text.contains("the data is missing | run"),
        "{text}"
    );
    let text =
        tuner(50).with_max_failures(2).run(&runtime(), work).expect_err("too many").to_string();
    assert!(text.contains("more than the 2 allowed"), "{text}");
}

#[test]
fn a_failed_trial_is_tried_again_with_the_same_parameters() {
    let seen: Arc<Mutex<BTreeMap<usize, Vec<String>>>> = Arc::default();
    let record = Arc::clone(&seen);
    let work = move |trial: &mut Trial| -> Result<(), BoxError> {
        let line = format!("{} {}", trial.params, trial.seed);
        record.lock().expect("lock").entry(trial.number).or_default().push(line);
        if trial.attempt == 1 { Err("flaky".into()) } else { Ok(train(trial)?) }
    };
    let grid = tuner(4).with_max_retries(1).run(&runtime(), work).expect("a study");
    assert_eq!(grid.count(TrialState::Complete), 4);
    let seen = seen.lock().expect("lock");
    assert!(seen.values().all(|lines| lines.len() == 2 && lines[0] == lines[1]), "{seen:?}");
}

#[test]
fn a_missing_metric_is_named() {
    let work = |trial: &mut Trial| trial.report(1, &[("loss", 0.1), ("f1", 0.2)]).map(|_| ());
    let text = tuner(1).run(&runtime(), work).expect_err("no accuracy").to_string();
    assert!(text.contains("reported loss, f1") && text.contains("\"accuracy\""), "{text}");
}

/// One trial at a time, stopped after five and resumed: the same trials as without the stop.
#[test]
fn a_stopped_study_resumes_to_the_same_result() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("study.journal");
    let build = || tuner(14).with_max_concurrent(1);
    let whole = build().run(&runtime(), train).expect("without a stop");

    let stop = StopHandle::default();
    let stopping = build().with_journal(&path).with_stop(stop.clone());
    let work = move |trial: &mut Trial| {
        if trial.number == 5 {
            stop.stop();
        }
        train(trial)
    };
    let stopped = stopping.run(&runtime(), work).expect_err("stopped");
    let text = stopped.to_string();
    assert!(text.contains("after 5 of 14 trials") && text.contains("study.journal"), "{text}");
    assert_eq!(ResultGrid::load(&path).expect("load").count(TrialState::Running), 1);

    let resumed = build().with_journal(&path).run(&runtime(), train).expect("resumed");
    let lines = |grid: &ResultGrid| -> Vec<String> {
        grid.trials().iter().map(|t| format!("{:?} {} {}", t.params, t.state, t.value)).collect()
    };
    assert_eq!(lines(&resumed), lines(&whole));

    // A finished study has nothing to run; a larger one goes on behind it.
    let never = |_: &mut Trial| -> Result<(), BoxError> { panic!("nothing is left to run") };
    let again = build().with_journal(&path).run(&runtime(), never).expect("finished");
    assert_eq!(lines(&again), lines(&whole));
    let more =
        build().with_trials(16).with_journal(&path).run(&runtime(), train).expect("two more");
    assert_eq!((more.trials().len(), &lines(&more)[..14]), (16, &lines(&whole)[..]));
    let other = build().with_seed(8).with_journal(&path).run(&runtime(), train);
    assert!(
        other
            .expect_err("another seed")
            .to_string()
            .contains("another seed: recorded 7, asked for 8")
    );
}

/// A trial that outlives its study is told so instead of waiting.
#[test]
fn a_trial_without_a_study_gets_an_error() {
    let (sender, receiver) = std::sync::mpsc::channel();
    // Without it the study may give up before the second trial has begun, which then never runs.
    let both_run = Barrier::new(2);
    let work = move |trial: &mut Trial| -> Result<(), BoxError> {
        both_run.wait();
        if trial.number == 0 {
            return Err("the study gives up".into());
        }
        while trial.report(1, 0.5).is_ok_and(|flow| flow == Flow::Continue) {}
        let last = trial.report(2, 0.5);
        sender.send(matches!(last, Ok(Flow::Stop) | Err(Error::StudyGone { .. })))?;
        Ok(())
    };
    let study = tuner(2).with_max_failures(0).run(&runtime(), work);
    assert!(matches!(study, Err(Error::TooManyFailures { .. })));
    let told = receiver.recv_timeout(std::time::Duration::from_secs(30));
    assert!(told.expect("the second trial ended"));
}
