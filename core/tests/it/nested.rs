//! Tasks that are submitted by what runs in a worker process.

use crate::Test;
use crate::driver::{assert_gone, wait_for_file};
use mobula_core::value::Blob;
use mobula_core::{
    ActorOptions, Error, Group, GroupOptions, Member, Placement, Resources, Runtime, Task, collect,
    remote,
};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const LARGE: usize = 4 << 20;

pub(crate) const TESTS: &[Test] = &[
    ("nested::a_tree_of_tasks_needs_no_more_cpus_than_there_are", tree),
    ("nested::large_results_are_passed_on_without_being_looked_at", large),
    ("nested::errors_keep_their_kind", errors),
    ("nested::what_a_cancelled_task_has_submitted_is_cancelled", cancelled),
    ("nested::what_a_lost_task_has_submitted_is_cancelled", lost),
    ("nested::actors_and_members_submit_too", actors_and_members),
    ("nested::a_worker_has_threads_of_its_own", threads),
    ("nested::threads_of_a_worker_may_wait_for_its_driver", threads_that_wait),
    ("nested::concurrent_calls_lend_and_take_back", concurrent_calls),
    ("nested::async_code_may_submit", async_code),
    ("nested::there_is_no_runtime_outside_of_tasks", outside),
];

/// Counts the leaves of a binary tree, a process task a node.
#[remote(crate = mobula_core)]
fn leaves(depth: u32) -> Result<u64, Error> {
    if depth == 0 {
        return Ok(1);
    }
    let runtime = Runtime::current()?;
    let half = || runtime.submit(leaves::remote(depth - 1).on(Placement::Process));
    let (left, right) = (half(), half());
    Ok(*left.get()? + *right.get()?)
}

fn tree(runtime: &Runtime) {
    // 63 tasks of one CPU each, of which all but the leaves wait for others.
    let task = leaves::remote(5).on(Placement::Process);
    assert_eq!(*runtime.submit(task).get_timeout(LONG).expect("no deadlock"), 32);
}

#[remote(crate = mobula_core)]
fn make(byte: u8) -> Result<Blob, Error> {
    Ok(vec![byte; LARGE].into())
}

#[remote(crate = mobula_core)]
fn length(blobs: Vec<Blob>, extra: Blob) -> Result<usize, Error> {
    Ok(blobs.iter().chain([&extra]).map(|blob| blob.0.len()).sum())
}

#[remote(crate = mobula_core)]
fn pass_on(own: Blob) -> Result<(usize, u8), Error> {
    let runtime = Runtime::current()?;
    let made = runtime.submit(make::remote(7).on(Placement::Process));
    // Before it is there, and a value of this process beside it.
    let length = runtime.submit(length::remote(vec![own], &made).on(Placement::Process));
    Ok((*length.get()?, made.get()?.0[LARGE - 1]))
}

fn large(runtime: &Runtime) {
    let own = Blob::from(vec![1; LARGE]);
    let task = pass_on::remote(own).on(Placement::Process);
    assert_eq!(*runtime.submit(task).get_timeout(LONG).expect("passes"), (2 * LARGE, 7));
}

#[remote(crate = mobula_core)]
fn fail(how: String) -> Result<(), String> {
    match how.as_str() {
        "panic" => panic!("as told"),
        "abort" => std::process::abort(),
        _ => Err("as told".to_owned()),
    }
}

#[remote(crate = mobula_core)]
fn describe_failures() -> Result<Vec<String>, Error> {
    let runtime = Runtime::current()?;
    let failure = |how: &str| {
        let failed = runtime.submit(fail::remote(how.to_owned()).on(Placement::Process));
        let kind = match failed.get() {
            Ok(_) => "fine",
            Err(Error::TaskFailed { .. }) => "failed",
            Err(Error::TaskPanicked { .. }) => "panicked",
            Err(Error::WorkerLost { .. }) => "lost",
            Err(_) => "something else",
        };
        kind.to_owned()
    };
    Ok(["error", "panic", "abort"].map(failure).to_vec())
}

fn errors(runtime: &Runtime) {
    let task = describe_failures::remote().on(Placement::Process);
    let kinds = runtime.submit(task).get_timeout(LONG).expect("describes");
    assert_eq!(*kinds, ["failed", "panicked", "lost"]);
}

#[remote(crate = mobula_core)]
fn outer(folder: String) -> Result<(), Error> {
    let runtime = Runtime::current()?;
    let inner = runtime.submit(inner::remote(folder.clone()).on(Placement::Process));
    tell(&folder, "outer");
    inner.get().map(drop)
}

#[remote(crate = mobula_core)]
fn inner(folder: String) -> Result<(), Error> {
    tell(&folder, "inner");
    loop {
        std::thread::park();
    }
}

/// Written beside and renamed, so that who reads it reads all of it.
fn tell(folder: &str, name: &str) {
    let path = std::path::Path::new(folder).join(name);
    let draft = path.with_extension("tmp");
    let text = std::process::id().to_string();
    std::fs::write(&draft, text).and_then(|()| std::fs::rename(&draft, &path)).expect("writes");
}

fn cancelled(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().to_str().expect("UTF-8").to_owned();
    let task = runtime.submit(outer::remote(path).on(Placement::Process));
    let pids = ["outer", "inner"].map(|name| wait_for_file(&folder.path().join(name)));
    task.cancel();
    pids.iter().for_each(|pid| assert_gone(pid));
}

fn lost(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().to_str().expect("UTF-8").to_owned();
    let task = runtime.submit(outer::remote(path).on(Placement::Process));
    let [outer, inner] = ["outer", "inner"].map(|name| wait_for_file(&folder.path().join(name)));
    let pid = rustix::process::Pid::from_raw(outer.parse().expect("a number")).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill -9");
    assert!(matches!(task.get_timeout(LONG), Err(Error::WorkerLost { .. })));
    assert_gone(&inner);
}

struct Asker;

#[remote(crate = mobula_core)]
impl Asker {
    fn new() -> Result<Self, Error> {
        Ok(Self)
    }

    fn ask(&mut self, depth: u32) -> Result<u64, Error> {
        let task = leaves::remote(depth).on(Placement::Process);
        Ok(*Runtime::current()?.submit(task).get()?)
    }
}

#[remote(crate = mobula_core)]
fn member(member: Member, depth: u32) -> Result<u64, Error> {
    let task = leaves::remote(depth + member.rank() as u32).on(Placement::Process);
    Ok(*Runtime::current()?.submit(task).get()?)
}

fn actors_and_members(runtime: &Runtime) {
    for placement in [Placement::Thread, Placement::Process] {
        let options = ActorOptions { placement, ..ActorOptions::new("asker") };
        let asker = runtime.spawn(Asker::remote().with_options(options)).expect("starts");
        assert_eq!(*asker.ask(2).get_timeout(LONG).expect("answers"), 4);
    }
    // They hold all CPUs there are, and lend them while they wait.
    for placement in [Placement::Thread, Placement::Process] {
        let options = GroupOptions { placement, ..GroupOptions::new("askers", 4) };
        let group: Group<u64> = runtime.group(&options, &member::remote(1)).expect("starts");
        assert_eq!(group.join(LONG).expect("answers"), [2, 4, 8, 16], "{placement:?}");
    }
}

#[remote(crate = mobula_core)]
fn on_threads() -> Result<u32, Error> {
    let runtime = Runtime::current()?;
    let parts = (0..4).map(|i| runtime.submit(Task::new("part", move || Ok::<_, Error>(i))));
    let parts: Vec<_> = parts.collect();
    Ok(collect(&parts)?.iter().map(|part| **part).sum())
}

fn threads(runtime: &Runtime) {
    let task = on_threads::remote().on(Placement::Process);
    assert_eq!(*runtime.submit(task).get_timeout(LONG).expect("sums"), 6);
}

/// A thread of the worker waits for the driver, and the call for the thread.
#[remote(crate = mobula_core)]
fn wait_through_a_thread() -> Result<u64, Error> {
    let runtime = Runtime::current()?;
    let inner = runtime.clone();
    let thread = runtime.submit(Task::new("thread", move || {
        Ok::<_, Error>(*inner.submit(leaves::remote(1).on(Placement::Process)).get()?)
    }));
    Ok(*thread.get()?)
}

fn threads_that_wait(runtime: &Runtime) {
    // It holds all CPUs there are.
    let all = runtime.resources();
    let task = wait_through_a_thread::remote().on(Placement::Process);
    let task = task.with_resources(Resources::cpus(all.cpus));
    let sum = runtime.submit(task).get_timeout(LONG);
    assert_eq!(*sum.unwrap_or_else(|e| panic!("{e}: {:#?}", runtime.status())), 2);
}

struct Many;

#[remote(crate = mobula_core)]
impl Many {
    fn new() -> Result<Self, Error> {
        Ok(Self)
    }

    fn ask(&self, rounds: u32) -> Result<u64, Error> {
        let runtime = Runtime::current()?;
        let ask = |_| Ok(*runtime.submit(leaves::remote(1).on(Placement::Process)).get()?);
        (0..rounds).map(ask).sum()
    }
}

fn concurrent_calls(runtime: &Runtime) {
    let actor = Many::remote().on(Placement::Process).with_concurrency(3);
    let actor = runtime.spawn(actor).expect("starts");
    let calls: Vec<_> = (0..6).map(|_| actor.ask(10)).collect();
    // Others want the CPUs that are lent and taken back all the time.
    let others: Vec<_> =
        (0..60).map(|_| runtime.submit(leaves::remote(0).on(Placement::Process))).collect();
    for call in calls {
        assert_eq!(*call.get_timeout(LONG).expect("no deadlock"), 20);
    }
    collect(&others).expect("run");
}

#[remote(crate = mobula_core)]
fn submit_from_async_code() -> Result<u64, Error> {
    let runtime = Runtime::current()?;
    let build = tokio::runtime::Builder::new_current_thread().build();
    let tokio = build.map_err(|error| Error::system("starting a runtime", error))?;
    let submitted =
        tokio.block_on(async { runtime.submit(leaves::remote(1).on(Placement::Process)) });
    // What is on its way does not depend on whoever was there when it was submitted.
    drop(tokio);
    Ok(*submitted.get()?)
}

fn async_code(runtime: &Runtime) {
    let task = submit_from_async_code::remote().on(Placement::Process);
    assert_eq!(*runtime.submit(task).get_timeout(LONG).expect("arrives"), 2);
}

fn outside(_: &Runtime) {
    assert!(matches!(Runtime::current(), Err(Error::NoCurrentRuntime)));
}
