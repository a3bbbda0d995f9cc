//! Groups in processes that belong to what runs in a worker process.

use crate::driver::{assert_gone, wait_for_file, wait_for_text};
use crate::nodes::Launch;
use crate::{Test, nodes};
use mobula_core::group::decode_report;
use mobula_core::value::Blob;
use mobula_core::{
    BoxError, Error, Group, GroupEvent, GroupOptions, Member, OnLoss, Placement, PlacementStrategy,
    Resources, RestartPolicy, Runtime, Task, TaskOptions, remote,
};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);
const LARGE: usize = 4 << 20;

pub(crate) const TESTS: &[Test] = &[
    ("nested_groups::a_task_talks_with_its_group", talk),
    ("nested_groups::reports_come_in_order_however_many", many_reports),
    ("nested_groups::whoever_runs_in_a_worker_may_hold_a_group_of_all_cpus", everywhere),
    ("nested_groups::two_tasks_with_groups_share_two_cpus", two_cpus),
    ("nested_groups::a_lost_member_is_replaced_and_its_task_told", restart),
    ("nested_groups::members_end_with_the_task_that_is_killed", killed),
    ("nested_groups::members_end_with_the_task_that_is_cancelled", cancelled),
    ("nested_groups::members_end_with_the_handle", dropped),
    ("nested_groups::errors_of_members_keep_their_kind_and_their_causes", errors),
    ("nested_groups::what_cannot_be_started_is_refused_as_in_the_driver", refused),
    ("nested_groups::an_actor_holds_a_group_from_call_to_call", actor),
    ("nested_groups::members_are_on_all_machines", machines),
];

fn options(name: &str, size: usize) -> GroupOptions {
    GroupOptions { show_logs: false, ..GroupOptions::new(name, size) }
}

/// What a task in a process gives.
fn run<T: Send + Sync + Clone + 'static>(runtime: &Runtime, task: Task<T>) -> T {
    let result = runtime.submit(task.on(Placement::Process)).get_timeout(LONG);
    T::clone(&result.unwrap_or_else(|error| panic!("{error}: {:#?}", runtime.status())))
}

/// The next event, which is to be a report.
fn report<T: std::fmt::Debug, R: serde::de::DeserializeOwned>(group: &mut Group<T>) -> (usize, R) {
    match group.next_event(LONG) {
        Some(GroupEvent::Report { rank, payload }) => (rank, decode_report(&payload).expect("one")),
        other => panic!("expected a report: {other:?}"),
    }
}

/// The next reports of two members, by rank.
fn both<T: std::fmt::Debug, R: serde::de::DeserializeOwned>(group: &mut Group<T>) -> [R; 2] {
    let mut reports = [report(group), report(group)];
    reports.sort_by_key(|(rank, _)| *rank);
    assert_eq!(reports.each_ref().map(|(rank, _)| *rank), [0, 1]);
    reports.map(|(_, report)| report)
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid as i32).expect("a process id");
    kill_process(pid, Signal::KILL).expect("kill -9");
}

/// Reports what it is told, until it is told to stop; gives much.
#[remote(crate = mobula_core)]
fn echo(member: Member, greeting: Blob) -> Result<Blob, BoxError> {
    println!("rank {} hears {} bytes", member.rank(), greeting.0.len());
    member.report(&("runs".to_owned(), std::process::id()))?;
    while !member.stop_requested() {
        if let Some(message) = member.next_message::<String>()? {
            member.report(&(message, std::process::id()))?;
        }
        std::thread::yield_now();
    }
    Ok(vec![member.rank() as u8; greeting.0.len()].into())
}

#[remote(crate = mobula_core)]
fn talk_with_two(logs: PathBuf) -> Result<Vec<u8>, Error> {
    let options = GroupOptions { log_dir: Some(logs), ..options("talkers", 2) };
    let greeting = Blob::from(vec![7; LARGE]);
    let mut group = Runtime::current()?.group(&options, &echo::remote(greeting))?;
    let began: [(String, u32); 2] = both(&mut group);
    assert_eq!(group.pids(), began.map(|(_, pid)| Some(pid)), "in processes of their own");
    for message in ["go on", "go further"] {
        group.tell(&message)?;
        let heard: [(String, u32); 2] = both(&mut group);
        assert_eq!(heard.map(|(heard, _)| heard), [message; 2]);
    }
    assert!(group.next_event(Duration::from_millis(1)).is_none(), "nothing else");
    group.stop();
    let values = group.join(LONG)?;
    assert!(values.iter().all(|value| value.0.len() == LARGE));
    Ok(values.iter().map(|value| value.0[LARGE - 1]).collect())
}

fn talk(runtime: &Runtime) {
    let logs = tempfile::tempdir().expect("temporary folder");
    assert_eq!(run(runtime, talk_with_two::remote(logs.path().to_owned())), [0, 1]);
    for rank in 0..2 {
        let expected = format!("rank {rank} hears {LARGE} bytes\n");
        wait_for_text(&logs.path().join(format!("rank-{rank}.log")), &expected);
    }
}

#[remote(crate = mobula_core)]
fn count(member: Member, to: u64) -> Result<(), BoxError> {
    Ok((0..to).try_for_each(|n| member.report(&n))?)
}

#[remote(crate = mobula_core)]
fn hear_two_count(to: u64) -> Result<[u64; 2], Error> {
    let mut group = Runtime::current()?.group(&options("counters", 2), &count::remote(to))?;
    let (mut heard, mut finished) = ([0; 2], 0);
    while finished < 2 {
        match group.next_event(LONG) {
            Some(GroupEvent::Report { rank, payload }) => {
                assert_eq!(decode_report::<u64>(&payload)?, heard[rank]);
                heard[rank] += 1;
            }
            Some(GroupEvent::Finished { .. }) => finished += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(group.next_event(LONG).is_none(), "it is over");
    Ok(heard)
}

fn many_reports(runtime: &Runtime) {
    assert_eq!(run(runtime, hear_two_count::remote(2000)), [2000; 2]);
}

/// Gives what all members have given.
#[remote(crate = mobula_core)]
fn meet(member: Member, base: u8) -> Result<Vec<u8>, BoxError> {
    let all = member.all_gather("meet", &[base + member.rank() as u8], LONG)?;
    Ok(all.iter().map(|value| value[0]).collect())
}

fn hold_group(size: usize, base: u8) -> Result<Vec<Vec<u8>>, Error> {
    Runtime::current()?.group(&options("held", size), &meet::remote(base))?.join(LONG)
}

#[remote(crate = mobula_core)]
fn hold(size: usize, base: u8) -> Result<Vec<Vec<u8>>, Error> {
    hold_group(size, base)
}

#[remote(crate = mobula_core)]
fn hold_as_member(member: Member, size: usize) -> Result<Vec<Vec<u8>>, Error> {
    hold_group(size, member.rank() as u8)
}

/// A thread of the worker holds the group.
#[remote(crate = mobula_core)]
fn hold_on_a_thread(size: usize) -> Result<Vec<Vec<u8>>, Error> {
    let thread = Task::new("thread", move || hold_group(size, 1));
    Runtime::current()?.submit(thread).get().map(|values| values.to_vec())
}

/// The members are threads of the worker.
#[remote(crate = mobula_core)]
fn hold_threads() -> Result<Vec<Vec<u8>>, Error> {
    let options = GroupOptions { placement: Placement::Thread, ..options("threads", 1) };
    Runtime::current()?.group(&options, &meet::remote(5))?.join(LONG)
}

fn everywhere(runtime: &Runtime) {
    // All CPUs there are: nobody gets them whose parent keeps its own.
    let all = |base| vec![vec![base, base + 1, base + 2, base + 3]; 4];
    let two = [3, 7].map(|base| runtime.submit(hold::remote(4, base).on(Placement::Process)));
    assert_eq!(two.map(|task| task.get_timeout(LONG).expect("meets").to_vec()), [all(3), all(7)]);
    let group = runtime.group(&options("holders", 2), &hold_as_member::remote(4)).expect("starts");
    assert_eq!(group.join(LONG).expect("meets"), [all(0), all(1)]);
    assert_eq!(run(runtime, hold_on_a_thread::remote(4)), all(1));
    assert_eq!(run(runtime, hold_threads::remote()), [[5]]);
}

fn two_cpus(_: &Runtime) {
    Launch::start("groups of tasks", &[1], |_, _| {}).succeed();
}

fn machines(_: &Runtime) {
    Launch::start("groups of tasks elsewhere", &[1, 1], |_, _| {}).succeed();
}

/// What the driver of two CPUs does.
pub(crate) fn on_two_cpus(runtime: &Runtime) {
    assert_eq!(runtime.resources(), Resources::cpus(2.0));
    let tasks = [3, 7, 9].map(|base| runtime.submit(hold::remote(2, base).on(Placement::Process)));
    for (task, base) in tasks.iter().zip([3, 7, 9]) {
        let values = task.get_timeout(LONG).expect("no deadlock");
        assert_eq!(*values, vec![vec![base, base + 1]; 2]);
    }
    let folder = PathBuf::from(std::env::var("MOBULA_TEST_DIR").expect("a folder"));
    let task = runtime.submit(wait_for_two::remote(folder.clone()).on(Placement::Process));
    let (parent, members) = family(&folder);
    let names = |runtime: &Runtime| {
        let mut names: Vec<_> = runtime.status().workers.into_iter().map(|w| w.name).collect();
        names.retain(|name| name.contains("lasting"));
        names.sort();
        names
    };
    assert_eq!(names(runtime), ["lasting rank 0", "lasting rank 1"]);
    assert_eq!(runtime.free_resources(), Resources::default(), "they have both CPUs");
    kill(parent);
    assert!(matches!(task.get_timeout(LONG), Err(Error::WorkerLost { .. })));
    members.iter().for_each(|pid| assert_gone(pid));
    let deadline = Instant::now() + LONG;
    while runtime.free_resources() != runtime.resources() || !names(runtime).is_empty() {
        assert!(Instant::now() < deadline, "{:#?}", runtime.status());
        std::thread::yield_now();
    }
}

#[remote(crate = mobula_core)]
fn machine(member: Member, blob: Blob) -> Result<(u32, Blob), BoxError> {
    member.report(&blob.0.len())?;
    // Nobody has finished before all have said so.
    member.all_gather("meet", b"", LONG)?;
    Ok((nodes::machine(), blob))
}

#[remote(crate = mobula_core)]
fn spread_two() -> Result<(u32, Vec<u32>), Error> {
    let strategy = PlacementStrategy::StrictSpread;
    let options = GroupOptions { strategy, ..options("spread", 2) };
    let blob = Blob::from(vec![1; LARGE]);
    let mut group = Runtime::current()?.group(&options, &machine::remote(blob))?;
    assert_eq!(both::<_, usize>(&mut group), [LARGE; 2]);
    let values = group.join(LONG)?;
    assert!(values.iter().all(|(_, blob)| blob.0.len() == LARGE));
    Ok((nodes::machine(), values.iter().map(|(machine, _)| *machine).collect()))
}

/// What the driver of two machines does.
pub(crate) fn on_two_machines(runtime: &Runtime) {
    let mut holders = Vec::new();
    for node in runtime.nodes() {
        let options = TaskOptions { node: Some(node.node), ..TaskOptions::default() };
        let (holder, mut members) = run(runtime, spread_two::remote().with_options(options));
        assert!(members.contains(&holder), "one beside it: {holder}, {members:?}");
        members.dedup();
        assert_eq!(members.len(), 2, "one elsewhere");
        holders.push(holder);
    }
    holders.dedup();
    assert_eq!(holders.len(), 2, "a task on each machine");
}

/// Says what it was given, and waits to be told to stop.
#[remote(crate = mobula_core)]
fn say_context(member: Member) -> Result<(u64, String), BoxError> {
    member.report(&(member.context::<String>()?, std::process::id()))?;
    while !member.stop_requested() {
        member.check_generation()?;
        std::thread::yield_now();
    }
    Ok((member.generation(), member.context()?))
}

#[remote(crate = mobula_core)]
fn lose_a_member(all: bool) -> Result<Vec<(u64, String)>, Error> {
    let options = GroupOptions {
        restart: RestartPolicy::at_most(1),
        on_loss: if all { OnLoss::RestartAll } else { OnLoss::ReplaceLost },
        ..options("phoenix", 2)
    };
    let options = options.with_context(&"first")?;
    let mut group = Runtime::current()?.group(&options, &say_context::remote())?;
    let before: [(String, u32); 2] = both(&mut group);
    assert!(before.iter().all(|(context, _)| context == "first"));
    kill(before[1].1);
    let Some(GroupEvent::Restarting { generation: 1, replaced, error }) = group.next_event(LONG)
    else {
        panic!("expected a restart");
    };
    assert_eq!(replaced, if all { vec![0, 1] } else { vec![1] });
    assert!(error.is_retryable() && error.to_string().contains("phoenix rank 1"), "{error}");
    assert_eq!(group.generation(), 1);
    // The members of the new generation are not there until this was said.
    group.set_context(&"second")?;
    let after: [(String, u32); 2] = both(&mut group);
    assert!(after.iter().all(|(context, _)| context == "second"));
    assert_eq!(before[0].1 == after[0].1, !all, "a survivor stays where it is");
    assert_ne!(before[1].1, after[1].1);
    assert_eq!(group.pids(), after.map(|(_, pid)| Some(pid)));
    group.stop();
    group.join(LONG)
}

fn restart(runtime: &Runtime) {
    for all in [true, false] {
        let values = run(runtime, lose_a_member::remote(all));
        assert_eq!(values, vec![(1, "second".to_owned()); 2], "{all}");
    }
}

#[remote(crate = mobula_core)]
fn stay(member: Member) -> Result<(), BoxError> {
    member.report(&std::process::id())?;
    loop {
        std::thread::park();
    }
}

#[remote(crate = mobula_core)]
fn wait_for_two(folder: PathBuf) -> Result<(), Error> {
    let mut group = Runtime::current()?.group(&options("lasting", 2), &stay::remote())?;
    let members: [u32; 2] = both(&mut group);
    let family = format!("{} {} {}", std::process::id(), members[0], members[1]);
    let draft = folder.join("family.tmp");
    let written = std::fs::write(&draft, family);
    written.and_then(|()| std::fs::rename(&draft, folder.join("family"))).expect("writes");
    loop {
        // Longer than the test waits for its end.
        assert!(group.next_event(10 * LONG).is_none(), "nothing happens");
    }
}

/// The process of `wait_for_two`, and those of its members.
fn family(folder: &Path) -> (u32, [String; 2]) {
    let text = wait_for_file(&folder.join("family"));
    let pids: Vec<String> = text.split(' ').map(str::to_owned).collect();
    let [parent, members @ ..] = <[String; 3]>::try_from(pids).expect("three");
    (parent.parse().expect("a process id"), members)
}

fn killed(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let task = wait_for_two::remote(folder.path().to_owned()).on(Placement::Process);
    let task = runtime.submit(task);
    let (parent, members) = family(folder.path());
    kill(parent);
    assert!(matches!(task.get_timeout(LONG), Err(Error::WorkerLost { .. })));
    members.iter().for_each(|pid| assert_gone(pid));
}

fn cancelled(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let task = wait_for_two::remote(folder.path().to_owned()).on(Placement::Process);
    let task = runtime.submit(task);
    let (parent, members) = family(folder.path());
    task.cancel();
    assert_gone(&parent.to_string());
    members.iter().for_each(|pid| assert_gone(pid));
}

#[remote(crate = mobula_core)]
fn drop_early() -> Result<Vec<Vec<u8>>, Error> {
    let mut group = Runtime::current()?.group(&options("short", 2), &stay::remote())?;
    let members: [u32; 2] = both(&mut group);
    drop(group);
    members.iter().for_each(|pid| assert_gone(&pid.to_string()));
    // What they held is free again.
    hold_group(4, 0)
}

fn dropped(runtime: &Runtime) {
    assert_eq!(run(runtime, drop_early::remote()), vec![vec![0, 1, 2, 3]; 4]);
}

#[remote(crate = mobula_core)]
fn fail(member: Member, how: String) -> Result<(), BoxError> {
    match how.as_str() {
        "error" => Err(Error::layer(std::io::Error::other("the disk is full")).into()),
        "panic" => panic!("as told to rank {}", member.rank()),
        _ => std::process::abort(),
    }
}

#[remote(crate = mobula_core)]
fn see_it_fail(how: String) -> Result<String, Error> {
    let group = Runtime::current()?.group(&options("frail", 1), &fail::remote(how))?;
    Ok(match group.join(LONG) {
        Err(error @ Error::TaskFailed { .. }) => format!("failed: {error}"),
        Err(error @ Error::TaskPanicked { .. }) => format!("panicked: {error}"),
        Err(error @ Error::WorkerLost { .. }) => format!("lost: {error}"),
        other => format!("something else: {other:?}"),
    })
}

fn errors(runtime: &Runtime) {
    for (how, kind, cause) in [
        ("error", "failed: ", "the disk is full"),
        ("panic", "panicked: ", "as told to rank 0"),
        ("abort", "lost: ", "signal"),
    ] {
        let said = run(runtime, see_it_fail::remote(how.to_owned()));
        assert!(said.starts_with(kind) && said.contains("frail rank 0"), "{said}");
        assert!(said.contains(cause), "{said}");
    }
}

#[remote(crate = mobula_core)]
fn ask_too_much() -> Result<[String; 3], Error> {
    use std::os::unix::ffi::OsStrExt;
    let runtime = Runtime::current()?;
    let start = |options: GroupOptions| {
        let started = runtime.group(&options, &meet::remote(0));
        started.map_or_else(|error| error.to_string(), |_| "it runs".to_owned())
    };
    let placement_timeout = Duration::from_millis(1);
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"not \xff UTF-8"));
    Ok([
        start(options("many", 5)),
        start(GroupOptions { placement_timeout, ..options("late", 4) }),
        start(GroupOptions { log_dir: Some(path), ..options("odd", 1) }),
    ])
}

fn refused(runtime: &Runtime) {
    // Somebody has a CPU all the while.
    let holder = runtime.group(&options("holder", 1), &stay::remote()).expect("starts");
    let [many, late, odd] = run(runtime, ask_too_much::remote());
    assert!(many.contains("cannot place 5 CPU: this machine has 4 CPU"), "{many}");
    assert!(late.starts_with("late waited 1ms for 4 CPU"), "{late}");
    assert!(odd.contains("the options of a group") && odd.contains("UTF-8"), "{odd}");
    drop(holder);
}

#[derive(Default)]
struct Holder(Option<Group<Blob>>);

#[remote(crate = mobula_core)]
impl Holder {
    fn new() -> Self {
        Self::default()
    }

    fn start(&mut self) -> Result<[u32; 2], Error> {
        let blob = Blob::from(vec![1; 16]);
        let mut group = Runtime::current()?.group(&options("kept", 2), &echo::remote(blob))?;
        let began: [(String, u32); 2] = both(&mut group);
        self.0 = Some(group);
        Ok(began.map(|(_, pid)| pid))
    }

    fn tell(&mut self, message: String) -> Result<[String; 2], Error> {
        let group = self.0.as_mut().expect("it has started");
        group.tell(&message)?;
        let heard: [(String, u32); 2] = both(group);
        Ok(heard.map(|(heard, _)| heard))
    }
}

fn actor(runtime: &Runtime) {
    let holder = runtime.spawn(Holder::remote().on(Placement::Process)).expect("starts");
    let members = *holder.start().get_timeout(LONG).expect("starts a group");
    let heard = holder.tell("go on".to_owned()).get_timeout(LONG).expect("tells it");
    assert_eq!(*heard, ["go on"; 2]);
    // It ends with its actor.
    drop(holder);
    members.iter().for_each(|pid| assert_gone(&pid.to_string()));
}
