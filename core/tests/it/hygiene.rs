//! What a driver does with its worker processes beside their work: how long they idle, what they
//! are bound to, what it says of their ends. Drivers with an environment of their own: this
//! binary, started again.

use crate::Test;
use crate::driver::{assert_gone, wait_for_file};
use mobula_core::{Placement, Resources, Runtime, Task, TaskOptions, remote};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MODE: &str = "MOBULA_TEST_HYGIENE";
const FOLDER: &str = "MOBULA_TEST_FOLDER";

pub(crate) const TESTS: &[Test] = &[
    ("hygiene::an_idle_worker_ends_after_its_time", idle),
    ("hygiene::an_idle_worker_leaves_its_gpu_to_who_wants_it", gpus),
    ("hygiene::workers_are_bound_to_cpus_of_their_own_if_asked", bound),
    ("hygiene::a_setting_that_is_none_is_refused", wrong_setting),
    ("hygiene::an_end_names_the_signal_and_the_peak", ends),
    ("hygiene::a_worker_over_its_memory_limit_dies_though_its_driver_looks_away", unwatched),
];

/// Whether this process was started by a test of this module.
pub(crate) fn requested() -> bool {
    std::env::var_os(MODE).is_some()
}

/// The driver program under test.
pub(crate) fn run() -> Result<(), Box<dyn std::error::Error>> {
    let runtime = mobula_core::init_with(Resources::cpus(2.0).with_gpus(1.0))?;
    let mode = std::env::var(MODE)?;
    match mode.as_str() {
        "idle" => {
            let pid = runtime.submit(on_process(about::remote(), 1.0, 0.0)).get()?.0;
            assert_gone(&pid.to_string());
        }
        "gpus" => {
            let run = |cpus, gpus| runtime.submit(on_process(about::remote(), cpus, gpus)).get();
            let (first, other) = (run(1.0, 1.0)?.0, run(1.0, 0.0)?.0);
            assert_eq!(first, run(1.0, 1.0)?.0, "the same kind finds it warm");
            let second = run(2.0, 1.0)?.0;
            assert_ne!(first, second);
            assert_gone(&first.to_string());
            assert_eq!(other, run(1.0, 0.0)?.0, "who had no GPU is left alone");
        }
        "bound" => {
            let run = |cpus| runtime.submit(on_process(about::remote(), cpus, 0.0)).get();
            let (whole, half) = (run(1.0)?.1.clone(), run(0.5)?.1.clone());
            assert!(whole.parse::<usize>().is_ok(), "one CPU, got {whole}");
            let all = own_cpus();
            assert_eq!(half, all, "a shared CPU binds to nothing");
        }
        "memory" => {
            let folder = PathBuf::from(std::env::var(FOLDER)?);
            let limit = TaskOptions { memory_limit: Some(100 << 20), ..TaskOptions::default() };
            let task = take_when_told::remote(folder).with_options(limit).on(Placement::Process);
            println!("{}", runtime.submit(task).get().expect_err("over its limit"));
        }
        _ => return Err("it should not have started".into()),
    }
    println!("done");
    Ok(())
}

fn on_process<T>(task: Task<T>, cpus: f64, gpus: f64) -> Task<T> {
    task.on(Placement::Process).with_resources(Resources::cpus(cpus).with_gpus(gpus))
}

/// The process, and the CPUs that it may use.
#[remote(crate = mobula_core)]
fn about() -> (u32, String) {
    (std::process::id(), own_cpus())
}

fn own_cpus() -> String {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.unwrap_or_default().trim().to_owned()
}

/// Says its process and its cgroups; then takes a lot of memory, and keeps it until it is killed.
#[remote(crate = mobula_core)]
fn take_when_told(folder: PathBuf) -> Result<usize, std::io::Error> {
    let groups = std::fs::read_to_string("/proc/self/cgroup")?;
    let cgroup =
        groups.lines().find_map(|line| line.split_once(":memory:").or(line.split_once("0::")));
    let said = format!("{} {}", std::process::id(), cgroup.map_or("", |(_, path)| path));
    std::fs::write(folder.join("said.tmp"), said)?;
    std::fs::rename(folder.join("said.tmp"), folder.join("said"))?;
    wait_for_file(&folder.join("go"));
    let taken = vec![1u8; 200 << 20];
    loop {
        std::hint::black_box(&taken);
        std::thread::yield_now();
    }
}

/// Runs a driver with these variables; what it printed.
fn drive(mode: &str, variables: &[(&str, &str)]) -> String {
    printed(driver(mode, variables))
}

fn driver(mode: &str, variables: &[(&str, &str)]) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.env(MODE, mode).envs(variables.iter().copied()).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start the driver")
}

fn printed(driver: Child) -> String {
    let output = driver.wait_with_output().expect("wait for the driver");
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}

fn idle(_: &Runtime) {
    let said = drive("idle", &[("MOBULA_IDLE_WORKER_SECONDS", "0.01")]);
    assert!(said.contains("done"), "{said}");
}

fn gpus(_: &Runtime) {
    let variables = [("MOBULA_IDLE_WORKER_SECONDS", "3600"), ("CUDA_VISIBLE_DEVICES", "0")];
    let said = drive("gpus", &variables);
    assert!(said.contains("done"), "{said}");
}

fn bound(_: &Runtime) {
    let said = drive("bound", &[("MOBULA_CPU_AFFINITY", "1")]);
    assert!(said.contains("done"), "{said}");
}

fn wrong_setting(_: &Runtime) {
    for variable in ["MOBULA_IDLE_WORKER_SECONDS", "MOBULA_CPU_AFFINITY"] {
        let said = drive("wrong", &[(variable, "often")]);
        assert!(said.contains(variable) && said.contains("often"), "{said}");
    }
}

#[remote(crate = mobula_core)]
fn abort() -> u64 {
    std::process::abort();
}

/// How large the peak is depends on when it was looked at.
fn ends(runtime: &Runtime) {
    let error = runtime.submit(abort::remote().on(Placement::Process)).get();
    let error = error.expect_err("it aborts").to_string();
    assert!(error.contains("killed by signal 6 (SIGABRT), peak resident memory "), "{error}");
    assert!(error.ends_with(" MB"), "{error}");
}

/// A driver that is stopped looks at nothing: then only a cgroup can end its worker, where there is
/// one.
fn unwatched(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().to_str().expect("text");
    let driver = driver("memory", &[(FOLDER, path), ("MOBULA_OBJECT_BYTES", "1000000")]);
    let said = wait_for_file(&folder.path().join("said"));
    let (worker, cgroup) = said.split_once(' ').expect("two words");
    let is_confined = cgroup.contains("/mobula-");
    let pid = Pid::from_child(&driver);
    if is_confined {
        kill_process(pid, Signal::STOP).expect("stops");
    }
    std::fs::write(folder.path().join("go"), "").expect("write");
    if is_confined {
        assert_gone(worker);
        kill_process(pid, Signal::CONT).expect("goes on");
    }
    let said = printed(driver);
    assert!(said.contains("over its limit of 100 MiB") && said.contains("done"), "{said}");
    let left = Path::new("/sys/fs/cgroup/memory").join(cgroup.trim_start_matches('/'));
    let deadline = Instant::now() + Duration::from_secs(60);
    while is_confined && left.exists() {
        assert!(Instant::now() < deadline, "{} is left", left.display());
        std::thread::yield_now();
    }
}
