use super::*;
use crate::{AshaScheduler, Fifo, Metric, SearchSpace, TpeSampler};
use proptest::prelude::*;

fn space() -> SearchSpace {
    SearchSpace::new().log_uniform("lr", 1e-4, 1.0).int("layers", 1, 4).choice("opt", ["a", "b"])
}

fn parts() -> (StudyInfo, Box<dyn Sampler>, Box<dyn Scheduler>) {
    let sampler = Box::new(TpeSampler::default().with_startup_trials(3));
    let scheduler = Box::new(AshaScheduler::new(9).with_reduction_factor(3.0));
    let info = StudyInfo {
        space: space(),
        metric: Metric::maximize("accuracy"),
        seed: 7,
        sampler: sampler.config(),
        scheduler: scheduler.config(),
    };
    (info, sampler, scheduler)
}

fn study(trials: usize, max_retries: u32, events: &[Event]) -> Result<Study, Error> {
    let (info, sampler, scheduler) = parts();
    let limits = Limits { trials, max_retries };
    Study::open(info, limits, sampler, scheduler, events, Path::new("study.journal"))
}

/// Three trials at a time; each reports a value that depends on its parameters, some fail.
fn drive(study: &mut Study, choices: &[u8], log: &mut Vec<Event>) {
    let mut running: Vec<(Start, u64)> = Vec::new();
    for choice in choices {
        if running.len() < 3
            && let Some(start) = study.next_trial().expect("next")
        {
            running.push((start, 0));
        }
        log.extend(study.take_events());
        if running.is_empty() {
            break;
        }
        let at = *choice as usize % running.len();
        let (start, step) = &mut running[at];
        *step += 1;
        let (number, attempt) = (start.number, start.attempt);
        let value = if *choice == 13 {
            f64::NAN
        } else {
            start.params.float("lr").expect("lr") * *step as f64
        };
        let flow = study.report(number, attempt, *step, value).expect("report");
        if flow == Flow::Stop || *step == 6 || *choice > 240 {
            let error = (*choice > 240).then(|| "boom".to_owned());
            study.ended(number, attempt, error).expect("ended");
            running.remove(at);
        }
        log.extend(study.take_events());
    }
}

/// NaN equals NaN here.
fn same(a: &Study, b: &Study) -> bool {
    format!("{:?} {:?}", a.trials, a.scheduler) == format!("{:?} {:?}", b.trials, b.scheduler)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// INV-REPLAY: through JSON and back, events rebuild the study that made them; and each trial
    /// was drawn as a pure function of the events before it.
    #[test]
    fn replay_rebuilds_the_study(choices in prop::collection::vec(any::<u8>(), 1..150)) {
        let mut live = study(12, 1, &[]).expect("open");
        let mut log = Vec::new();
        drive(&mut live, &choices, &mut log);
        let decode = |e: &Event| serde_json::from_str(&serde_json::to_string(e).expect("encode")).expect("decode");
        let events: Vec<Event> = log.iter().map(decode).collect();
        let mut replayed = study(12, 1, &[]).expect("open");
        for event in &events[1..] {
            if let Event::Created { trial, params } = event {
                let drawn = replayed.sampler.sample(&space(), &replayed.history, 7, *trial);
                prop_assert_eq!(&drawn, params);
            }
            replayed.apply(event).expect("apply");
        }
        prop_assert!(same(&live, &replayed));
    }

    /// INV-COUNT: stopped anywhere and resumed, a study ends with exactly its number of trials,
    /// and interrupted ones run again with the parameters they had.
    #[test]
    fn a_resumed_study_runs_every_trial_once(choices in prop::collection::vec(any::<u8>(), 1..80)) {
        let mut log = Vec::new();
        drive(&mut study(8, 0, &[]).expect("open"), &choices, &mut log);
        let mut resumed = study(8, 0, &log).expect("reopen");
        let interrupted: Vec<(usize, u32, Params)> =
            resumed.in_state(TrialState::Waiting).map(|t| (t.number, t.attempt, t.params.clone())).collect();
        for (number, attempt, params) in interrupted {
            let start = resumed.next_trial().expect("next").expect("a waiting trial");
            prop_assert_eq!((start.number, start.attempt, &start.params), (number, attempt + 1, &params));
            let void = resumed.report(number, attempt, 1, 0.5).expect("report");
            prop_assert_eq!(void, Flow::Stop, "a report of the old attempt");
            prop_assert!(resumed.trials[number].last().is_none());
            resumed.ended(number, start.attempt, Some("boom".into())).expect("ended");
        }
        drive(&mut resumed, &[0; 400], &mut log);
        prop_assert!(resumed.is_done());
        prop_assert_eq!(resumed.trials().len(), 8);
    }
}

#[test]
fn another_study_is_refused_with_the_difference_named() {
    let log = study(4, 0, &[]).expect("open").take_events();
    let check = |change: fn(&mut StudyInfo), expected: [&str; 2]| {
        let (mut info, sampler, scheduler) = parts();
        change(&mut info);
        let limits = Limits { trials: 4, max_retries: 0 };
        let opened = Study::open(info, limits, sampler, scheduler, &log, Path::new("j"));
        let text = opened.expect_err("another study").to_string();
        assert!(expected.iter().all(|part| text.contains(part)), "{text}");
    };
    check(|i| i.seed = 8, ["another seed: recorded 7", "asked for 8"]);
    check(|i| i.metric = Metric::minimize("loss"), ["another metric", "asked for minimize loss"]);
    check(
        |i| i.space = space().int("more", 0, 1),
        ["no further parameter", "more in integers 0..1"],
    );
    check(
        |i| i.space = SearchSpace::new().log_uniform("lr", 1e-5, 1.0),
        ["recorded lr in log 0.0001..1", "asked for lr in log 0.00001..1"],
    );
    check(|i| i.sampler = crate::RandomSampler.config(), ["another sampler", "random"]);
}

/// A trial that fails is tried again as often as allowed, then failed, with its error.
#[test]
fn failures_are_retried_then_final() {
    let mut study = study(1, 1, &[]).expect("open");
    for attempt in 1..=2 {
        let start = study.next_trial().expect("next").expect("a trial");
        assert_eq!((start.number, start.attempt), (0, attempt));
        study.ended(0, attempt, Some(format!("boom {attempt}"))).expect("ended");
    }
    assert!(study.is_done());
    assert_eq!(study.trials()[0].state, TrialState::Failed);
    assert_eq!(study.trials()[0].error.as_deref(), Some("boom 2"));
}

#[test]
fn a_trial_without_a_finite_last_value_failed() {
    let mut study = {
        let (mut info, sampler, _) = parts();
        info.scheduler = Fifo.config();
        let limits = Limits { trials: 2, max_retries: 0 };
        Study::open(info, limits, sampler, Box::new(Fifo), &[], Path::new("j")).expect("open")
    };
    for (trial, expected) in
        ["without a report of \"accuracy\"", "not a finite number"].iter().enumerate()
    {
        study.next_trial().expect("next").expect("a trial");
        if trial == 1 {
            let _ = study.report(1, 1, 1, f64::INFINITY).expect("report");
        }
        study.ended(trial, 1, None).expect("ended");
        let record = &study.trials()[trial];
        assert_eq!(record.state, TrialState::Failed);
        assert!(record.error.as_ref().is_some_and(|e| e.contains(expected)), "{record:?}");
    }
}
