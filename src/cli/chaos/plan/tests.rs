use super::*;

fn rules() -> Rules {
    Rules { every: 5.0, kinds: vec![Kind::Kill], seed: 1, most: u64::MAX, patience: 60.0 }
}

fn worker(rank: u32, pid: u32, started: f64) -> Worker {
    Worker { name: format!("train rank {rank}"), pid, started }
}

fn pair() -> Vec<Worker> {
    vec![worker(0, 10, 0.0), worker(1, 11, 0.0)]
}

fn line(step: u64, time: f64) -> Line {
    Line { step, time }
}

fn seen(now: f64, workers: &[Worker], lines: &[Line]) -> Sighting {
    Sighting { now, workers: workers.to_vec(), lines: lines.to_vec() }
}

/// The worker that is struck; panics if none is.
fn strike(plan: &mut Plan, sighting: &Sighting) -> Worker {
    match plan.step(sighting) {
        Command::Strike(worker, kind) => {
            plan.struck(worker.clone(), kind, sighting, sighting.now);
            worker
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_clock_starts_with_the_workers_and_again_with_each_signal() {
    let mut plan = Plan::new(rules(), 0.0);
    assert_eq!(plan.step(&seen(20.0, &[], &[])), Command::Wait);
    assert_eq!(plan.step(&seen(21.0, &pair(), &[])), Command::Wait);
    assert_eq!(plan.step(&seen(25.9, &pair(), &[])), Command::Wait);
    let first = strike(&mut plan, &seen(26.1, &pair(), &[]));
    assert_eq!(plan.step(&seen(31.0, &pair(), &[])), Command::Wait);
    let second = strike(&mut plan, &seen(31.2, &pair(), &[]));
    assert_ne!(first.pid, second.pid, "a worker is struck once");
    assert_eq!(plan.step(&seen(40.0, &pair(), &[])), Command::Wait, "nobody is left");
    let back = [worker(0, 12, 50.0)];
    assert_eq!(plan.step(&seen(50.0, &back, &[])), Command::Wait, "it has just begun");
    assert_eq!(plan.step(&seen(54.9, &back, &[])), Command::Wait);
    strike(&mut plan, &seen(55.1, &back, &[]));
}

#[test]
fn a_worker_that_had_just_ended_does_not_count() {
    let mut plan = Plan::new(Rules { most: 1, ..rules() }, 0.0);
    plan.step(&seen(0.0, &pair(), &[]));
    let drawn = plan.step(&seen(5.0, &pair(), &[]));
    assert!(matches!(drawn, Command::Strike(..)));
    // Nobody told that it was struck: the same once more.
    assert_eq!(plan.step(&seen(5.1, &pair(), &[])), drawn);
    strike(&mut plan, &seen(5.2, &pair(), &[]));
    assert_eq!(plan.step(&seen(50.0, &pair(), &[])), Command::Wait, "one was allowed");
}

#[test]
fn what_is_drawn_follows_from_the_seed_and_not_from_process_ids() {
    let history = |seed: u64, pid: u32| -> Vec<(String, Kind)> {
        let kinds = vec![Kind::Kill, Kind::Stop, Kind::Term];
        let mut plan = Plan::new(Rules { seed, kinds, ..rules() }, 0.0);
        plan.step(&seen(0.0, &pair(), &[]));
        for n in 1..20 {
            let workers = [worker(1, pid * n, 0.0), worker(0, pid * n + 1, 0.0)];
            strike(&mut plan, &seen(5.0 * f64::from(n), &workers, &[line(n.into(), 0.0)]));
        }
        plan.faults.into_iter().map(|fault| (fault.worker, fault.kind)).collect()
    };
    assert_eq!(history(1, 100), history(1, 777));
    assert_ne!(history(1, 100), history(2, 100));
    let drawn = history(1, 100);
    for rank in ["train rank 0", "train rank 1"] {
        for kind in [Kind::Kill, Kind::Stop, Kind::Term] {
            assert!(drawn.contains(&(rank.to_owned(), kind)), "{rank} {kind:?}: {drawn:?}");
        }
    }
}

/// A plan that has struck a worker at 5.0, when step 40 was the newest; and who took its place at 5.5.
fn struck_at_step_40() -> (Plan, Vec<Worker>) {
    let mut plan = Plan::new(rules(), 0.0);
    plan.step(&seen(0.0, &pair(), &[]));
    let victim = strike(&mut plan, &seen(5.0, &pair(), &[line(30, 3.0), line(40, 4.9)]));
    let mut workers = pair();
    workers.retain(|worker| worker.pid != victim.pid);
    workers.push(Worker { pid: 12, started: 5.5, ..victim });
    (plan, workers)
}

#[test]
fn recovery_is_the_old_step_by_a_new_worker() {
    let (mut plan, workers) = struck_at_step_40();
    // On its way when the worker was struck.
    plan.step(&seen(5.2, &workers[..1], &[line(30, 3.0), line(40, 4.9), line(41, 5.01)]));
    assert_eq!(plan.faults[0].recovery, None);
    // Training goes on from step 30, with lines at 32 and 42.
    plan.step(&seen(6.0, &workers, &[line(30, 3.0), line(32, 5.9)]));
    assert_eq!(plan.faults[0].recovery, None, "it is not yet where it was");
    plan.step(&seen(8.0, &workers, &[line(30, 3.0), line(32, 5.9), line(42, 7.5)]));
    assert_eq!(plan.faults[0].recovery, Some(Recovery { seconds: 2.5, lost_steps: 10 }));
    assert_eq!((plan.restarts, plan.step_reached()), (1, Some(42)));
}

#[test]
fn where_others_have_kept_all_no_step_is_lost() {
    let (mut plan, workers) = struck_at_step_40();
    plan.step(&seen(6.0, &workers, &[line(30, 3.0), line(40, 4.9), line(43, 5.75)]));
    assert_eq!(plan.faults[0].recovery, Some(Recovery { seconds: 0.75, lost_steps: 0 }));
}

#[test]
fn a_training_that_begins_anew_has_lost_all_steps() {
    let (mut plan, workers) = struck_at_step_40();
    plan.step(&seen(9.0, &workers, &[line(20, 7.0), line(40, 8.0)]));
    assert_eq!(plan.faults[0].recovery, Some(Recovery { seconds: 3.0, lost_steps: 40 }));
}

#[test]
fn workers_that_start_together_are_one_restart() {
    let (mut plan, _) = struck_at_step_40();
    plan.step(&seen(5.6, &[worker(0, 20, 5.5)], &[]));
    plan.step(&seen(5.7, &[worker(0, 20, 5.5), worker(1, 21, 5.6)], &[]));
    assert_eq!(plan.restarts, 1);
    let again = [worker(0, 20, 5.5), worker(1, 21, 5.6)];
    let victim = strike(&mut plan, &seen(10.1, &again, &[]));
    plan.step(&seen(10.5, &[Worker { pid: 30, ..victim }], &[]));
    assert_eq!(plan.restarts, 2);
}

#[test]
fn a_second_training_of_the_same_name_is_no_restart() {
    let mut plan = Plan::new(rules(), 0.0);
    plan.step(&seen(0.0, &pair(), &[]));
    plan.step(&seen(1.0, &[worker(0, 20, 0.5), worker(1, 21, 0.5)], &[]));
    assert_eq!(plan.restarts, 0);
}

#[test]
fn steps_that_are_made_again_are_no_progress() {
    let mut plan = Plan::new(Rules { patience: 30.0, ..rules() }, 0.0);
    let mut pid = 10;
    let mut now = 0.0;
    // It comes to step 12 at best, and falls back to 10 with each signal.
    while now < 30.0 {
        let workers = [worker(0, pid, now)];
        let sighting = seen(now, &workers, &[line(10, 0.0), line(12, now)]);
        if let Command::Strike(worker, kind) = plan.step(&sighting) {
            plan.struck(worker, kind, &sighting, now);
            pid += 1;
        }
        now += 1.0;
    }
    assert!(plan.faults.len() >= 5, "{:?}", plan.faults);
    let last = seen(30.5, &[worker(0, pid, 30.0)], &[line(10, 0.0), line(12, 30.0)]);
    assert_eq!(plan.step(&last), Command::GiveUp);

    let mut moving = Plan::new(Rules { patience: 30.0, most: 0, ..rules() }, 0.0);
    for second in 0..100 {
        let lines = [line(second / 20, second as f64)];
        assert_eq!(moving.step(&seen(second as f64, &[], &lines)), Command::Wait);
    }
}
