//! Groups: ranks, gathering, reports, stopping, losses.

use crate::Test;
use mobula_core::group::decode_report;
use mobula_core::{
    BoxError, Error, Group, GroupEvent, GroupOptions, Member, Placement, Resources, Runtime, remote,
};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    ("groups::members_gather_in_rank_order", gather),
    ("groups::a_member_is_the_first_of_its_own_pool", own_pools),
    ("groups::reports_arrive_from_every_rank", reports),
    ("groups::a_running_member_hears_stop", stop),
    ("groups::a_computing_member_hears_messages_in_order", messages),
    ("groups::a_killed_member_is_named", killed_member),
    ("groups::output_is_captured_per_rank", logs),
    ("groups::a_world_that_never_fits_is_refused", never_fits),
    ("groups::without_init_no_process_is_started", without_init),
    ("groups::a_member_that_waits_in_vain_times_out", gather_timeout),
];

#[remote(crate = mobula_core)]
fn meet(member: Member, base: u8) -> Result<Vec<u8>, BoxError> {
    let mine = [base + member.rank() as u8];
    let parts = member.all_gather("meet", &mine, LONG)?;
    Ok(parts.iter().map(|part| part[0]).collect())
}

#[remote(crate = mobula_core)]
fn report_thrice(member: Member) -> Result<(), BoxError> {
    for i in 0..3u64 {
        member.report(&(member.rank(), i))?;
    }
    Ok(())
}

/// Computes, and does what it is told between two steps.
#[remote(crate = mobula_core)]
fn sum_what_it_is_told(member: Member) -> Result<Vec<(String, u64)>, BoxError> {
    member.report(&"running")?;
    let mut told = Vec::new();
    while !member.stop_requested() {
        if let Some(message) = member.next_message()? {
            told.push(message);
            member.report(&told.len())?;
        }
        std::thread::yield_now();
    }
    Ok(told)
}

fn messages(runtime: &Runtime) {
    for placement in [Placement::Thread, Placement::Process] {
        let mut group =
            runtime.group(&options(placement, 2), &sum_what_it_is_told::remote()).expect("starts");
        let mut reports = 0;
        let mut wait_for = |group: &mut Group<_>, count| {
            while reports < count {
                match group.next_event(LONG) {
                    Some(GroupEvent::Report { .. }) => reports += 1,
                    other => panic!("{other:?}"),
                }
            }
        };
        wait_for(&mut group, 2);
        group.tell(&("checkpoint", 7)).expect("encodes");
        group.tell(&("checkpoint", 8)).expect("encodes");
        wait_for(&mut group, 6);
        group.stop();
        let expected = vec![("checkpoint".to_owned(), 7), ("checkpoint".to_owned(), 8)];
        assert_eq!(group.join(LONG).expect("ends"), [expected.clone(), expected]);
    }
}

#[remote(crate = mobula_core)]
fn until_stopped(member: Member) -> Result<String, BoxError> {
    member.report(&"running")?;
    while !member.stop_requested() {
        std::thread::yield_now();
    }
    Ok("stopped".to_owned())
}

#[remote(crate = mobula_core)]
fn print_rank(member: Member) -> Result<(), BoxError> {
    println!("out of {}", member.rank());
    eprintln!("err of {}", member.rank());
    Ok(())
}

#[remote(crate = mobula_core)]
fn only_rank_0_gathers(member: Member) -> Result<(), BoxError> {
    if member.rank() == 0 {
        member.all_gather("alone", b"", Duration::from_millis(10))?;
    }
    Ok(())
}

fn options(placement: Placement, size: usize) -> GroupOptions {
    GroupOptions { placement, show_logs: false, ..GroupOptions::new("test", size) }
}

/// Its place among the threads of its rayon pool.
#[remote(crate = mobula_core)]
fn place_in_pool(_member: Member) -> Option<usize> {
    rayon::current_thread_index()
}

fn own_pools(runtime: &Runtime) {
    for placement in [Placement::Thread, Placement::Process] {
        let group = runtime.group(&options(placement, 2), &place_in_pool::remote()).expect("group");
        assert_eq!(group.join(LONG).expect("join"), [Some(0), Some(0)], "{placement:?}");
    }
}

fn gather(runtime: &Runtime) {
    for placement in [Placement::Thread, Placement::Process] {
        let group = runtime.group(&options(placement, 2), &meet::remote(10)).expect("group");
        let values = group.join(LONG).expect("join");
        assert_eq!(values, [[10, 11], [10, 11]], "{placement:?}");
    }
}

fn reports(runtime: &Runtime) {
    let mut group =
        runtime.group(&options(Placement::Process, 2), &report_thrice::remote()).expect("group");
    let (mut seen, mut finished) = (vec![Vec::new(); 2], 0);
    while finished < 2 {
        match group.next_event(LONG).expect("an event in time") {
            GroupEvent::Report { rank, payload } => {
                let (who, i): (usize, u64) = decode_report(&payload).expect("decode");
                assert_eq!(who, rank);
                seen[rank].push(i);
            }
            GroupEvent::Finished { .. } => finished += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, [[0, 1, 2], [0, 1, 2]]);
}

fn stop(runtime: &Runtime) {
    for placement in [Placement::Thread, Placement::Process] {
        let mut group =
            runtime.group(&options(placement, 1), &until_stopped::remote()).expect("group");
        assert!(matches!(group.next_event(LONG), Some(GroupEvent::Report { .. })));
        group.stop();
        assert_eq!(group.join(LONG).expect("join"), ["stopped"], "{placement:?}");
    }
}

fn killed_member(runtime: &Runtime) {
    let mut group =
        runtime.group(&options(Placement::Process, 2), &until_stopped::remote()).expect("group");
    let mut running = 0;
    while running < 2 {
        let Some(GroupEvent::Report { .. }) = group.next_event(LONG) else {
            panic!("expected a report of every member");
        };
        running += 1;
    }
    let pid = group.pids()[1].expect("a process");
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
    let Some(GroupEvent::Failed { rank: 1, error }) = group.next_event(LONG) else {
        panic!("expected the loss of rank 1");
    };
    assert!(error.is_retryable() && error.to_string().contains("test rank 1 was lost"), "{error}");
    let survivor = group.pids()[0].expect("a process");
    drop(group);
    crate::driver::assert_gone(&survivor.to_string());
}

fn logs(runtime: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let options =
        GroupOptions { log_dir: Some(dir.path().to_owned()), ..options(Placement::Process, 2) };
    runtime.group(&options, &print_rank::remote()).expect("group").join(LONG).expect("join");
    for rank in 0..2 {
        let expected = format!("out of {rank}\nerr of {rank}\n");
        crate::driver::wait_for_text(&dir.path().join(format!("rank-{rank}.log")), &expected);
    }
}

fn never_fits(runtime: &Runtime) {
    let options =
        GroupOptions { resources: Resources::cpus(16.0), ..options(Placement::Process, 4) };
    let error = runtime.group(&options, &meet::remote(0)).expect_err("64 > 4").to_string();
    assert!(error.contains("cannot place 64 CPU: this machine has 4 CPU"), "{error}");
}

fn without_init(_: &Runtime) {
    let runtime = Runtime::local(Resources::cpus(2.0)).expect("runtime");
    let error = runtime.group(&options(Placement::Process, 2), &meet::remote(0));
    assert!(matches!(error, Err(Error::InitMissing)));
    let error =
        runtime.submit(crate::tasks::hypotenuse::remote(1.0, 1.0).on(Placement::Process)).get();
    assert!(matches!(error, Err(Error::InitMissing)));
}

fn gather_timeout(runtime: &Runtime) {
    let group = runtime
        .group(&options(Placement::Thread, 2), &only_rank_0_gathers::remote())
        .expect("group");
    let error = group.join(LONG).expect_err("nobody else comes").to_string();
    assert!(error.contains("rank 0 waiting for all members at \"alone\""), "{error}");
}
