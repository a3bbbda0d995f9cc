//! What happens to workers when their driver goes: this binary, started again as a driver that is
//! then killed in several ways.

use crate::Test;
use mobula_core::{GroupOptions, Member, Runtime, remote};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const MODE: &str = "MOBULA_TEST_DRIVER";
const LONG: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    ("driver::a_killed_driver_leaves_no_child", killed),
    ("driver::an_interrupted_driver_leaves_no_child_and_says_how_to_resume", interrupted),
    ("driver::a_driver_that_returns_leaves_no_child", returned),
    ("driver::a_program_that_forgot_init_stops_and_forks_no_further", forgotten),
];

/// Whether this process was started by a test of this module.
pub(crate) fn requested() -> bool {
    std::env::var_os(MODE).is_some()
}

/// The driver program under test.
pub(crate) fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mode = std::env::var(MODE)?;
    let was_started = |variable| std::env::var_os(variable).is_some();
    let is_worker = was_started("MOBULA_WORKER_FD") || was_started("MOBULA_FORK_SERVER_FD");
    if mode.starts_with("forgotten") && is_worker {
        // A main() that calls init() only in some branch which its workers do not take.
        Runtime::local(mobula_core::Resources::cpus(1.0))?;
        return Err("a worker got a runtime of its own".into());
    }
    let runtime = mobula_core::init()?;
    if mode == "forgotten task" {
        let task = crate::tasks::hypotenuse::remote(3.0, 4.0).on(mobula_core::Placement::Process);
        return Err(format!("{:?}", runtime.submit(task).get_timeout(LONG)).into());
    }
    let dir = std::env::var("MOBULA_TEST_DIR")?;
    let _hint = mobula_core::on_interrupt(|| Some("Resume with: again".to_owned()));
    let options = GroupOptions::new("orphans", 2);
    let mut group = runtime.group(&options, &linger::remote(dir))?;
    let event = group.next_event(LONG);
    match mode.as_str() {
        "returned" => Ok(()),
        "forgotten" => Err(format!("{event:?}").into()),
        _ => loop {
            std::thread::park();
        },
    }
}

#[remote(crate = mobula_core)]
fn linger(member: Member, dir: String) -> Result<(), std::io::Error> {
    let file = Path::new(&dir).join(member.rank().to_string());
    std::fs::write(file.with_extension("tmp"), std::process::id().to_string())?;
    std::fs::rename(file.with_extension("tmp"), &file)?;
    if member.rank() == 1 {
        wait_for_file(&Path::new(&dir).join("0"));
        let _ = member.report(&"both run");
    }
    loop {
        std::thread::park();
    }
}

fn start(mode: &str, dir: &Path) -> Child {
    let exe = std::env::current_exe().expect("this binary");
    // Shells start background jobs with SIGINT ignored, and the driver would inherit that.
    let mut command = Command::new("env");
    command.arg("--default-signal=INT").arg(exe);
    command.env(MODE, mode).env("MOBULA_TEST_DIR", dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().expect("start the driver")
}

fn workers(dir: &Path) -> [String; 2] {
    ["0", "1"].map(|rank| wait_for_file(&dir.join(rank)))
}

fn killed(_: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut driver = start("wait", dir.path());
    let workers = workers(dir.path());
    driver.kill().expect("kill -9");
    driver.wait().expect("reap");
    workers.iter().for_each(|pid| assert_gone(pid));
}

fn interrupted(_: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut driver = start("wait", dir.path());
    let workers = workers(dir.path());
    let pid = rustix::process::Pid::from_child(&driver);
    let begun = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("interrupt");
    let status = wait(&mut driver);
    // The promise is 2 s; the margin is for a machine that does other things too.
    assert!(begun.elapsed() < Duration::from_secs(20), "took {:?}", begun.elapsed());
    assert_eq!(status.code(), Some(130));
    let said = std::io::read_to_string(driver.stderr.take().expect("piped")).expect("read");
    assert!(said.contains("Interrupted") && said.contains("Resume with: again"), "{said}");
    workers.iter().for_each(|pid| assert_gone(pid));
}

fn returned(_: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut driver = start("returned", dir.path());
    let workers = workers(dir.path());
    assert!(wait(&mut driver).success());
    workers.iter().for_each(|pid| assert_gone(pid));
}

fn forgotten(_: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut driver = start("forgotten", dir.path());
    assert!(!wait(&mut driver).success());
    let said = std::io::read_to_string(driver.stderr.take().expect("piped")).expect("read");
    assert!(said.contains("did not call mobula::init() first"), "{said}");
    assert!(said.contains("exited with code 2"), "{said}");
    assert!(!dir.path().join("0").exists(), "the function must not have run");
}

/// Its worker ends before it begins, and is not started again and again.
pub(crate) fn a_task_in_a_program_that_forgot_init() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut driver = start("forgotten task", dir.path());
    assert!(!wait(&mut driver).success());
    let said = std::io::read_to_string(driver.stderr.take().expect("piped")).expect("read");
    assert!(said.contains("WorkerLost") && said.contains("exited with code 2"), "{said}");
}

fn wait(driver: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(status) = driver.try_wait().expect("wait") {
            return status;
        }
        assert!(Instant::now() < deadline, "the driver does not end");
        std::thread::yield_now();
    }
}

/// The text of a file, once it is there.
pub(crate) fn wait_for_file(path: &Path) -> String {
    let deadline = Instant::now() + LONG;
    loop {
        if let Ok(text) = std::fs::read_to_string(path) {
            return text;
        }
        assert!(Instant::now() < deadline, "{} does not appear", path.display());
        std::thread::yield_now();
    }
}

pub(crate) fn wait_for_text(path: &Path, expected: &str) {
    let deadline = Instant::now() + LONG;
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if text == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{} has {text:?}", path.display());
        std::thread::yield_now();
    }
}

/// Waits until a process is gone (or a zombie that its adoptive parent has yet to reap).
pub(crate) fn assert_gone(pid: &str) {
    let deadline = Instant::now() + LONG;
    let stat = Path::new("/proc").join(pid).join("stat");
    while std::fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z ")) {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        std::thread::yield_now();
    }
}
