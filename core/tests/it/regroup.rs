//! Groups that go on after the loss of members: everyone anew, or only who was lost.

use crate::Test;
use mobula_core::group::decode_report;
use mobula_core::{
    BoxError, Error, Group, GroupEvent, GroupOptions, Member, OnLoss, RestartPolicy, Runtime,
    remote,
};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    ("regroup::all_members_begin_anew", restart_all),
    ("regroup::only_the_lost_member_is_replaced", replace_lost),
    ("regroup::survivors_meet_the_new_member_with_what_they_have", rendezvous),
    ("regroup::who_had_finished_is_asked_again", finished_again),
    ("regroup::who_had_finished_and_is_gone_is_replaced_too", finished_and_gone),
    ("regroup::a_survivor_that_gives_up_early_is_called_again", early),
    ("regroup::a_new_generation_gets_a_new_context", context),
    ("regroup::what_an_old_generation_says_does_not_count", stale),
    ("regroup::what_an_old_generation_asks_is_not_answered", unanswered),
    ("regroup::a_stop_reaches_those_who_come_later", stop),
    ("regroup::too_many_losses_are_the_end", too_many),
    ("regroup::an_error_is_no_loss", error_is_no_loss),
];

/// Says who it is, and works until all are of the generation that it is told to wait for.
#[remote(crate = mobula_core)]
fn work_until(member: Member, last: u64) -> Result<(u64, u32), BoxError> {
    member.report(&std::process::id())?;
    while member.generation() < last {
        member.check_generation()?;
        std::thread::yield_now();
    }
    member.all_gather("end", b"", LONG)?;
    Ok((member.generation(), std::process::id()))
}

fn options(on_loss: OnLoss, size: usize) -> GroupOptions {
    GroupOptions {
        on_loss,
        restart: RestartPolicy::at_most(2),
        show_logs: false,
        ..GroupOptions::new("gang", size)
    }
}

/// Waits for so many reports; gives them by rank.
fn reports<T: std::fmt::Debug, R: serde::de::DeserializeOwned>(
    group: &mut Group<T>,
    count: usize,
) -> Vec<(usize, R)> {
    let next = |_| match group.next_event(LONG) {
        Some(GroupEvent::Report { rank, payload }) => {
            (rank, decode_report(&payload).expect("decodes"))
        }
        other => panic!("{other:?}"),
    };
    let mut reports: Vec<(usize, R)> = (0..count).map(next).collect();
    reports.sort_by_key(|(rank, _)| *rank);
    reports
}

fn kill<T>(group: &Group<T>, rank: usize) {
    let pid = group.pids()[rank].expect("a process");
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
}

/// The next event, which is to be a restart.
fn restarting<T: std::fmt::Debug>(group: &mut Group<T>) -> (u64, Vec<usize>, Error) {
    match group.next_event(LONG) {
        Some(GroupEvent::Restarting { generation, replaced, error }) => {
            (generation, replaced, error)
        }
        other => panic!("{other:?}"),
    }
}

fn restart_all(runtime: &Runtime) {
    let options = options(OnLoss::RestartAll, 3);
    let mut group = runtime.group(&options, &work_until::remote(1)).expect("starts");
    let before = reports::<_, u32>(&mut group, 3);
    kill(&group, 1);
    let (generation, replaced, error) = restarting(&mut group);
    assert_eq!((generation, replaced), (1, vec![0, 1, 2]));
    assert!(error.to_string().contains("gang rank 1 was lost"), "{error}");
    let after = reports::<_, u32>(&mut group, 3);
    assert!(before.iter().zip(&after).all(|(before, after)| before.1 != after.1));
    assert_eq!(group.generation(), 1);
    let values = group.join(LONG).expect("ends");
    assert_eq!(values, after.iter().map(|(_, pid)| (1, *pid)).collect::<Vec<_>>());
    for (_, pid) in before {
        crate::driver::assert_gone(&pid.to_string());
    }
}

fn replace_lost(runtime: &Runtime) {
    let options = options(OnLoss::ReplaceLost, 3);
    let mut group = runtime.group(&options, &work_until::remote(2)).expect("starts");
    let mut pids: Vec<u32> = reports(&mut group, 3).into_iter().map(|(_, pid)| pid).collect();
    for (lost, generation) in [(1, 1), (0, 2)] {
        kill(&group, lost);
        assert_eq!(restarting(&mut group).0, generation);
        // Those that were not lost are called again where they are.
        let again: Vec<(usize, u32)> = reports(&mut group, 3);
        for (rank, pid) in again {
            assert_eq!(pid != pids[rank], rank == lost, "rank {rank}, generation {generation}");
            pids[rank] = pid;
        }
    }
    let values = group.join(LONG).expect("ends");
    assert_eq!(values, pids.iter().map(|pid| (2, *pid)).collect::<Vec<_>>());
}

/// Who was new at each of its meetings, until as many generations have been.
#[remote(crate = mobula_core)]
fn remember(member: Member, last: u64) -> Result<Vec<Vec<usize>>, BoxError> {
    let mut meetings = Vec::new();
    loop {
        let meeting = member.rendezvous(LONG)?;
        meetings.push(meeting.started);
        member.report(&meeting.generation)?;
        if meeting.generation == last {
            return Ok(meetings);
        }
        while member.check_generation().is_ok() {
            std::thread::yield_now();
        }
    }
}

fn rendezvous(runtime: &Runtime) {
    let options = options(OnLoss::ReplaceLost, 3);
    let mut group = runtime.group(&options, &remember::remote(2)).expect("starts");
    for (lost, generation) in [(1, 0), (2, 1)] {
        assert_eq!(reports(&mut group, 3), [0, 1, 2].map(|rank| (rank, generation)));
        kill(&group, lost);
        assert_eq!(restarting(&mut group).1, [lost]);
    }
    let values = group.join(LONG).expect("ends");
    let all = || vec![0, 1, 2];
    assert_eq!(values[0], [all(), vec![1], vec![2]], "a survivor of both losses");
    assert_eq!(values[1], [all(), vec![2]], "its first meeting is in generation 1");
    assert_eq!(values[2], [all()]);
}

/// In generation 0 rank 1 gives its part and is lost; the other one gives its own when it knows that.
#[remote(crate = mobula_core)]
fn ask_again(member: Member) -> Result<Vec<u8>, BoxError> {
    let generation = member.generation() as u8;
    if generation == 0 && member.rank() == 1 {
        let early = member.all_gather("key", &[generation], Duration::ZERO);
        member.report(&early.is_err())?;
        loop {
            std::thread::yield_now();
        }
    }
    while generation == 0 && member.check_generation().is_ok() {
        std::thread::yield_now();
    }
    let all = member.all_gather("key", &[generation], LONG)?;
    Ok(all.iter().map(|value| value[0]).collect())
}

fn unanswered(runtime: &Runtime) {
    let options = options(OnLoss::ReplaceLost, 2);
    let mut group = runtime.group(&options, &ask_again::remote()).expect("starts");
    assert_eq!(reports(&mut group, 1), [(1, true)]);
    kill(&group, 1);
    assert_eq!(restarting(&mut group).1, [1]);
    assert_eq!(group.join(LONG).expect("ends"), [[1, 1], [1, 1]]);
}

/// Rank 0 ends at once; the other one goes on until it is lost.
#[remote(crate = mobula_core)]
fn first_ends_early(member: Member) -> Result<u64, BoxError> {
    member.report(&std::process::id())?;
    while member.rank() == 1 && member.generation() == 0 {
        std::thread::yield_now();
    }
    Ok(member.generation())
}

fn finished_again(runtime: &Runtime) {
    let options = options(OnLoss::ReplaceLost, 2);
    let mut group = runtime.group(&options, &first_ends_early::remote()).expect("starts");
    let mut pids = Vec::new();
    let mut has_finished = false;
    while pids.len() < 2 || !has_finished {
        match group.next_event(LONG) {
            Some(GroupEvent::Report { rank, payload }) => {
                pids.push((rank, decode_report::<u32>(&payload).expect("decodes")));
            }
            Some(GroupEvent::Finished { rank: 0, value: 0 }) => has_finished = true,
            other => panic!("{other:?}"),
        }
    }
    kill(&group, 1);
    assert_eq!(restarting(&mut group).1, [1]);
    let (mut again, mut values) = (Vec::new(), Vec::new());
    while values.len() < 2 {
        match group.next_event(LONG) {
            Some(GroupEvent::Report { rank, payload }) => {
                again.push((rank, decode_report::<u32>(&payload).expect("decodes")));
            }
            Some(GroupEvent::Finished { value, .. }) => values.push(value),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(values, [1, 1]);
    again.sort_unstable();
    assert!(pids.contains(&again[0]), "in the process that it had");
    assert!(!pids.contains(&again[1]));
}

fn finished_and_gone(runtime: &Runtime) {
    let options = options(OnLoss::ReplaceLost, 2);
    let mut group = runtime.group(&options, &first_ends_early::remote()).expect("starts");
    let (mut reports, mut has_finished) = (0, false);
    while reports < 2 || !has_finished {
        match group.next_event(LONG) {
            Some(GroupEvent::Report { .. }) => reports += 1,
            Some(GroupEvent::Finished { rank: 0, value: 0 }) => has_finished = true,
            other => panic!("{other:?}"),
        }
    }
    let pid = group.pids()[0].expect("a process");
    kill(&group, 0);
    crate::driver::assert_gone(&pid.to_string());
    kill(&group, 1);
    let values = group.join(LONG).expect("goes on");
    assert!(values.iter().all(|generation| *generation > 0), "{values:?}");
}

/// Rank 0 fails as soon as rank 1 is gone, as one whose connection breaks would.
#[remote(crate = mobula_core)]
fn fail_with_the_other(member: Member) -> Result<u64, BoxError> {
    let all = member.all_gather("pids", &std::process::id().to_le_bytes(), LONG)?;
    member.report(&())?;
    if member.generation() > 0 {
        return Ok(member.generation());
    }
    let other = u32::from_le_bytes(all[1][..].try_into()?);
    let is_alive = || std::path::Path::new(&format!("/proc/{other}")).exists();
    while member.rank() == 1 || is_alive() {
        std::thread::yield_now();
    }
    Err("the connection to rank 1 broke".into())
}

fn early(runtime: &Runtime) {
    let options = options(OnLoss::ReplaceLost, 2);
    let mut group = runtime.group(&options, &fail_with_the_other::remote()).expect("starts");
    reports::<_, ()>(&mut group, 2);
    kill(&group, 1);
    assert_eq!(group.join(LONG).expect("it was no error of its own"), [1, 1]);
}

/// Gives the context that it finds, in the last generation.
#[remote(crate = mobula_core)]
fn look_at_context(member: Member) -> Result<String, BoxError> {
    member.report(&())?;
    while member.generation() == 0 {
        member.check_generation()?;
        std::thread::yield_now();
    }
    Ok(member.context()?)
}

fn context(runtime: &Runtime) {
    for on_loss in [OnLoss::RestartAll, OnLoss::ReplaceLost] {
        let options = options(on_loss, 2).with_context(&"first").expect("encodes");
        let mut group = runtime.group(&options, &look_at_context::remote()).expect("starts");
        reports::<_, ()>(&mut group, 2);
        kill(&group, 0);
        restarting(&mut group);
        group.set_context(&"second").expect("encodes");
        assert_eq!(group.join(LONG).expect("ends"), ["second", "second"], "{on_loss:?}");
    }
}

/// Rank 0 reports, as long as it takes to be lost or called again; then once more.
#[remote(crate = mobula_core)]
fn chatter(member: Member) -> Result<u64, BoxError> {
    while member.check_generation().is_ok() && member.generation() == 0 {
        member.report(&member.generation())?;
    }
    if member.generation() == 0 {
        // In vain: there is a newer generation.
        return Ok(7);
    }
    member.report(&member.generation())?;
    Ok(member.generation())
}

fn stale(runtime: &Runtime) {
    let options = options(OnLoss::ReplaceLost, 2);
    let mut group = runtime.group(&options, &chatter::remote()).expect("starts");
    let (mut generation, mut is_killed) = (0, false);
    let mut values = Vec::new();
    while values.len() < 2 {
        match group.next_event(LONG) {
            Some(GroupEvent::Report { payload, .. }) => {
                let said: u64 = decode_report(&payload).expect("decodes");
                assert_eq!(said, generation, "a report of a generation that is over");
                if !is_killed {
                    is_killed = true;
                    kill(&group, 1);
                }
            }
            Some(GroupEvent::Restarting { generation: new, .. }) => generation = new,
            Some(GroupEvent::Finished { value, .. }) => values.push(value),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(values, [1, 1]);
}

#[remote(crate = mobula_core)]
fn until_stopped(member: Member) -> Result<u64, BoxError> {
    member.report(&())?;
    // The first generation does not obey.
    while member.generation() == 0 || !member.stop_requested() {
        member.check_generation()?;
        std::thread::yield_now();
    }
    Ok(member.generation())
}

fn stop(runtime: &Runtime) {
    let mut group =
        runtime.group(&options(OnLoss::RestartAll, 2), &until_stopped::remote()).expect("starts");
    reports::<_, ()>(&mut group, 2);
    group.stop();
    kill(&group, 0);
    assert_eq!(group.join(LONG).expect("ends"), [1, 1]);
}

#[remote(crate = mobula_core)]
fn die(member: Member) -> Result<(), BoxError> {
    if member.rank() == 1 {
        let pid = rustix::process::getpid();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    member.all_gather("never", b"", LONG)?;
    Ok(())
}

fn too_many(runtime: &Runtime) {
    for on_loss in [OnLoss::RestartAll, OnLoss::ReplaceLost] {
        let mut group = runtime.group(&options(on_loss, 2), &die::remote()).expect("starts");
        let mut generations = Vec::new();
        let error = loop {
            match group.next_event(LONG) {
                Some(GroupEvent::Restarting { generation, .. }) => generations.push(generation),
                Some(GroupEvent::Failed { rank: 1, error }) => break error,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(generations, [1, 2]);
        assert!(error.is_retryable() && error.to_string().contains("signal 9"), "{error}");
    }
}

#[remote(crate = mobula_core)]
fn fail(member: Member) -> Result<(), BoxError> {
    if member.rank() == 1 {
        return Err("no".into());
    }
    Ok(())
}

fn error_is_no_loss(runtime: &Runtime) {
    let group = runtime.group(&options(OnLoss::RestartAll, 2), &fail::remote()).expect("starts");
    let error = group.join(LONG).expect_err("fails").to_string();
    assert!(error.contains("gang rank 1 failed: no"), "{error}");
}
