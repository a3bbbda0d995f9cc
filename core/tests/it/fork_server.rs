//! Where worker processes come from, and that nothing which they have started outlives their
//! driver. Drivers of their own: this binary, started again.

use crate::Test;
use crate::driver::{assert_gone, wait_for_file};
use mobula_core::status::ActorState;
use mobula_core::{ActorOptions, Placement, Resources, RestartPolicy, Runtime, Task, remote};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const MODE: &str = "MOBULA_TEST_FORKS";
const FOLDER: &str = "MOBULA_TEST_FOLDER";
const LONG: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    ("fork_server::what_a_task_started_ends_with_a_killed_driver", killed_driver),
    ("fork_server::what_a_task_started_ends_with_a_driver_that_returns", returned_driver),
    ("fork_server::what_a_task_started_ends_when_the_runtime_is_shut_down", shut_down),
    ("fork_server::what_a_task_started_ends_with_its_killed_worker", killed_worker),
    ("fork_server::a_killed_one_loses_its_workers_and_is_replaced", killed_server),
    ("fork_server::an_actor_is_not_locked_while_one_starts", slow_start),
    ("fork_server::a_peak_is_exact_and_the_workers_own", peak),
    ("fork_server::a_program_with_threads_starts_each_worker_by_itself", with_threads),
    ("fork_server::threads_that_were_joined_do_not_count", joined_threads),
    ("fork_server::one_that_is_killed_while_it_starts_is_missed_once", killed_early),
    ("fork_server::a_worker_begins_where_its_driver_is_with_nothing_else", begins),
    ("fork_server::a_program_that_a_worker_starts_is_a_driver_of_its_own", nested_driver),
];

/// Whether this process was started by a test of this module.
pub(crate) fn requested() -> bool {
    std::env::var_os(MODE).is_some()
}

/// The driver program under test.
pub(crate) fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mode = std::env::var(MODE)?;
    if mode == "threads" {
        std::thread::spawn(std::thread::park);
    }
    if mode == "joined" {
        join_threads();
    }
    if mode == "stumble" && std::env::var_os("MOBULA_FORK_SERVER_FD").is_some() {
        let marker = PathBuf::from(std::env::var(FOLDER)?).join("marker");
        if std::fs::File::create_new(marker).is_ok() {
            std::process::abort();
        }
    }
    if mode == "hold" && std::env::var_os("MOBULA_FORK_SERVER_FD").is_some() {
        hold(&PathBuf::from(std::env::var(FOLDER)?));
    }
    let runtime = mobula_core::init_with(Resources::cpus(2.0))?;
    match mode.as_str() {
        "wait" | "return" | "shut down" => {
            let folder = PathBuf::from(std::env::var(FOLDER)?);
            let _task = runtime.submit(on_process(start_programs::remote(folder.clone())));
            let [worker, near, far] = programs(&folder);
            if mode == "wait" {
                std::thread::park();
            }
            if mode == "shut down" {
                let server = parent(&worker);
                runtime.shutdown();
                [worker, near, far, server].iter().for_each(|pid| assert_gone(pid));
            }
        }
        "lose" => lose_server(&runtime)?,
        "hold" => start_slowly(&runtime, &PathBuf::from(std::env::var(FOLDER)?))?,
        "peak" => {
            touch(400 << 20);
            let end = |task| runtime.submit(on_process(task)).get_timeout(LONG);
            println!("small: {}", end(touch_and_abort::remote(1)).expect_err("it aborts"));
            println!("large: {}", end(touch_and_abort::remote(300)).expect_err("it aborts"));
        }
        "threads" => {
            let (_, parent) = *runtime.submit(on_process(about::remote())).get_timeout(LONG)?;
            assert_eq!(parent, std::process::id(), "there is nobody between them");
        }
        "joined" => assert_ne!(parent_of_a_worker(&runtime, 1.0)?, std::process::id()),
        "stumble" => {
            assert_eq!(parent_of_a_worker(&runtime, 1.0)?, std::process::id(), "it is missed");
            assert_ne!(parent_of_a_worker(&runtime, 2.0)?, std::process::id(), "it is there");
        }
        "begin" => {
            runtime.submit(on_process(about::remote())).get_timeout(LONG)?;
            std::env::set_current_dir("/")?;
            // The one that is warm began elsewhere.
            let task = on_process(surroundings::remote());
            let task = task.with_resources(Resources::cpus(2.0));
            let begun = runtime.submit(task).get_timeout(LONG)?;
            println!("in {} with {:?}", begun.0.display(), begun.1);
        }
        _ => {
            let _ = *runtime.submit(on_process(about::remote())).get_timeout(LONG)?;
        }
    }
    println!("done");
    Ok(())
}

fn on_process<T>(task: Task<T>) -> Task<T> {
    task.on(Placement::Process)
}

/// The process, and its parent.
#[remote(crate = mobula_core)]
fn about() -> (u32, u32) {
    (std::process::id(), std::os::unix::process::parent_id())
}

/// Starts a program, and one that leaves it and its process group; says their ids, and stays.
#[remote(crate = mobula_core)]
fn start_programs(folder: PathBuf) -> Result<(), std::io::Error> {
    let script = "say() { echo $2 >$1.tmp; mv $1.tmp $1; }
        sleep 600 & say near $!
        (setsid sh -c 'echo $$ >far.tmp; mv far.tmp far; exec sleep 600' &)
        say worker $PPID
        wait";
    Command::new("sh").args(["-c", script]).current_dir(folder).status().map(drop)
}

/// The ids that `start_programs` says: of the worker, and of what it has started.
fn programs(folder: &Path) -> [String; 3] {
    ["worker", "near", "far"].map(|name| wait_for_file(&folder.join(name)).trim().to_owned())
}

/// Of a new worker, if none was asked for with so many CPUs before.
fn parent_of_a_worker(runtime: &Runtime, cpus: f64) -> Result<u32, mobula_core::Error> {
    let task = on_process(about::remote()).with_resources(Resources::cpus(cpus));
    Ok(runtime.submit(task).get_timeout(LONG)?.1)
}

/// The last of them have just ended.
fn join_threads() {
    let threads: Vec<_> = (0..64).map(|_| std::thread::spawn(|| {})).collect();
    threads.into_iter().for_each(|thread| drop(thread.join()));
}

fn touch(bytes: usize) {
    std::hint::black_box(vec![1u8; bytes]);
}

#[remote(crate = mobula_core)]
fn touch_and_abort(mebibytes: usize) {
    touch(mebibytes << 20);
    std::process::abort();
}

/// The folder of the process, and what it has open that only a fork server needs.
#[remote(crate = mobula_core)]
fn surroundings() -> Result<(PathBuf, Vec<PathBuf>), std::io::Error> {
    let links = std::fs::read_dir("/proc/self/fd")?.flatten();
    let targets = links.filter_map(|link| std::fs::read_link(link.path()).ok());
    let is_servers = |target: &PathBuf| {
        let target = target.to_string_lossy();
        target.contains("signalfd") || target.contains("pidfd")
    };
    Ok((std::env::current_dir()?, targets.filter(is_servers).collect()))
}

#[remote(crate = mobula_core)]
fn drive(mode: String) -> Result<String, std::io::Error> {
    let output = program(&mode).stderr(Stdio::piped()).output()?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

fn lose_server(runtime: &Runtime) -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let task = runtime.submit(on_process(start_programs::remote(folder.path().to_owned())));
    let [worker, near, far] = programs(folder.path());
    let first = parent(&worker);
    kill(&first);
    // Nobody is left to know of this one.
    kill(&far);
    println!("first: {}", task.get_timeout(LONG).expect_err("it is lost"));
    assert_gone(&worker);
    assert_gone(&near);
    let (_, second) = *runtime.submit(on_process(about::remote())).get_timeout(LONG)?;
    assert_ne!(second.to_string(), first);
    assert_ne!(second, std::process::id());
    Ok(())
}

/// The second fork server does not come to `init()` before it is let.
fn hold(folder: &Path) {
    if std::fs::File::create_new(folder.join("first")).is_err() {
        std::fs::write(folder.join("second"), "").expect("say so");
        wait_for_file(&folder.join("go"));
    }
}

struct Orphan;

#[remote(crate = mobula_core)]
impl Orphan {
    fn new() -> Self {
        Self
    }

    fn parent(&self) -> u32 {
        std::os::unix::process::parent_id()
    }
}

fn start_slowly(runtime: &Runtime, folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let options = ActorOptions {
        placement: Placement::Process,
        restart: RestartPolicy::at_most(1),
        ..ActorOptions::new("orphan")
    };
    let orphan = runtime.spawn(Orphan::remote().with_options(options))?;
    let first = *orphan.parent().get_timeout(LONG)?;
    kill(&first.to_string());
    wait_for_file(&folder.join("second"));
    // None of this waits.
    assert_eq!(orphan.actor().pid(), None);
    assert_eq!(runtime.status().actors[0].state, ActorState::Starting);
    let parent = orphan.parent();
    std::fs::write(folder.join("go"), "")?;
    let second = *parent.get_timeout(LONG)?;
    assert!(second != first && second != std::process::id(), "{first}, then {second}");
    Ok(())
}

fn program(mode: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.env(MODE, mode).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

fn start(mode: &str, folder: &Path) -> Child {
    program(mode).env(FOLDER, folder).spawn().expect("start the driver")
}

/// What a driver prints.
fn printed(mode: &str) -> String {
    let output = program(mode).stderr(Stdio::piped()).output().expect("start the driver");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn parent(pid: &str) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let fields = stat.rsplit(") ").next().expect("a bracket");
    fields.split(' ').nth(1).expect("a parent").to_owned()
}

fn kill(pid: &str) {
    let pid = Pid::from_raw(pid.parse().expect("a number")).expect("a process");
    kill_process(pid, Signal::KILL).expect("kill -9");
}

fn killed_driver(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut driver = start("wait", folder.path());
    let pids = programs(folder.path());
    driver.kill().expect("kill -9");
    driver.wait().expect("reap");
    pids.iter().for_each(|pid| assert_gone(pid));
}

fn returned_driver(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut driver = start("return", folder.path());
    let pids = programs(folder.path());
    assert!(driver.wait().expect("reap").success());
    pids.iter().for_each(|pid| assert_gone(pid));
}

fn shut_down(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    assert!(start("shut down", folder.path()).wait().expect("reap").success());
}

fn killed_worker(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let task = runtime.submit(on_process(start_programs::remote(folder.path().to_owned())));
    let [worker, near, far] = programs(folder.path());
    kill(&worker);
    let error = task.get_timeout(LONG).expect_err("it is lost").to_string();
    assert!(error.contains("killed by signal 9 (SIGKILL)"), "{error}");
    assert_gone(&near);
    // It left the worker's group: it would end with the driver.
    kill(&far);
}

fn killed_server(_: &Runtime) {
    let said = printed("lose");
    let reason = "the fork server that its process came from was killed by signal 9 (SIGKILL)";
    assert!(said.contains(reason) && said.contains("done"), "{said}");
}

fn slow_start(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    assert!(start("hold", folder.path()).wait().expect("reap").success());
}

fn peak(_: &Runtime) {
    let said = printed("peak");
    let megabytes = |which: &str| -> u64 {
        let line = said.lines().find(|line| line.starts_with(which)).expect("a line");
        let number = line.split("peak resident memory ").nth(1).expect("a peak");
        number.trim_end_matches(" MB").parse().expect("a number")
    };
    assert!(megabytes("small") < 100, "{said}");
    assert!((314..414).contains(&megabytes("large")), "{said}");
}

fn with_threads(_: &Runtime) {
    let said = printed("threads");
    assert!(said.contains("done"), "{said}");
    assert_eq!(said.matches("no fork server: each worker process").count(), 1, "{said}");
    assert!(said.contains("the program has 2 threads when it calls init()"), "{said}");
}

fn joined_threads(_: &Runtime) {
    let said = printed("joined");
    assert!(said.contains("done"), "{said}");
}

fn killed_early(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut driver = program("stumble");
    let output = driver.env(FOLDER, folder.path()).stderr(Stdio::piped()).output().expect("start");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(said.contains("done"), "{said}");
    assert_eq!(said.matches("no fork server: a worker process").count(), 1, "{said}");
    assert!(said.contains("was killed by signal 6 (SIGABRT) before it served"), "{said}");
}

fn begins(_: &Runtime) {
    let said = printed("begin");
    assert!(said.contains("in / with []"), "{said}");
}

fn nested_driver(runtime: &Runtime) {
    let said = runtime.submit(on_process(drive::remote("plain".to_owned()))).get_timeout(LONG);
    let said = said.expect("output");
    assert!(said.contains("done"), "{said}");
}
