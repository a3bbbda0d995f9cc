//! A disk that is full, and a driver that is gone: this program, started again as a driver that is
//! limited or killed.

use crate::Test;
use crate::digits::{Config, Harm, Outcome, limit_files, train};
use mobula_core::checkpoint::Checkpoint;
use mobula_core::{Flow, Resources, RunDir, Runtime};
use mobula_train::{CheckpointConfig, Error, ScalingConfig, Trainer, TrainingResult};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Makes this program such a driver, with a folder of its own, in which it finds what to train.
const FOLDER: &str = "MOBULA_TEST_LIMITS";
const LONG: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    ("limits::a_full_disk_costs_a_checkpoint_and_no_training", full_disk),
    ("limits::a_full_disk_costs_metrics_and_no_training", full_metrics),
    ("limits::a_last_checkpoint_that_finds_no_room_is_an_error", full_at_last),
    ("limits::a_killed_driver_takes_its_workers_along_and_the_run_goes_on", killed_driver),
];

pub(crate) fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

/// The driver. It ends well if the training does.
pub(crate) fn run(folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let runtime = mobula_core::init_with(Resources::cpus(2.0))?;
    let config = serde_json::from_slice(&std::fs::read(folder.join("config"))?)?;
    fit(&runtime, config, &run_in(folder))?;
    Ok(())
}

fn run_in(folder: &Path) -> RunDir {
    RunDir::open_or_create(folder, "run", 5, &()).expect("run")
}

/// Checkpoints in the background, all of which are kept.
fn fit(runtime: &Runtime, config: Config, run: &RunDir) -> Result<TrainingResult<Outcome>, Error> {
    let fills_metrics = config.harm == Harm::FullMetrics;
    let checkpoints = CheckpointConfig { keep: 9, ..CheckpointConfig::default() };
    let trainer = Trainer::new(train::remote(config)).with_run(run).with_checkpoints(checkpoints);
    let trainer = trainer.with_logs_shown(false).with_scaling(ScalingConfig::workers(2));
    trainer.fit_with(runtime, |report| {
        if fills_metrics {
            // In the middle of the next line.
            let length = std::fs::metadata(run.path().join("metrics.jsonl"))?.len();
            limit_files((report.epoch == 1).then_some(length + 10));
        }
        Ok(Flow::Continue)
    })
}

/// Of six steps an epoch, and weights of a megabyte.
fn config(harm: Harm) -> Config {
    Config { hidden: 20_000, harm, ..Config::new(3) }
}

fn start(folder: &Path, config: &Config) -> Child {
    let config = serde_json::to_vec(config).expect("JSON");
    std::fs::write(folder.join("config"), config).expect("config");
    // A file that grows beyond its limit would end the process, which a full disk does not.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; exec \"$0\""]);
    command.arg(std::env::current_exe().expect("this binary")).env(FOLDER, folder);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().expect("starts")
}

/// Whether it ended well, and what it said.
fn end(driver: Child) -> (bool, String) {
    let ended = driver.wait_with_output().expect("ends");
    (ended.status.success(), String::from_utf8_lossy(&ended.stderr).into_owned())
}

/// The steps of the checkpoints, all of which are valid, and beside which there is nothing.
fn steps(run: &RunDir) -> Vec<u64> {
    let entries = std::fs::read_dir(run.checkpoints(9).dir()).expect("list");
    let names = entries.map(|entry| entry.expect("entry").path());
    let mut steps: Vec<u64> = names.map(|p| Checkpoint::open(p).expect("valid").step()).collect();
    steps.sort_unstable();
    steps
}

fn weights(checkpoint: &Checkpoint) -> Vec<u8> {
    std::fs::read(checkpoint.file("model.safetensors")).expect("weights")
}

/// As they are where nothing happens.
fn undisturbed(runtime: &Runtime) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("temporary folder");
    let whole = fit(runtime, config(Harm::None), &run_in(folder.path())).expect("fit");
    weights(&whole.checkpoint.expect("checkpoint"))
}

fn full_disk(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let (is_well, said) = end(start(folder.path(), &config(Harm::FullDisk { epoch: 1 })));
    assert!(is_well, "{said}");
    let told = "a checkpoint was not written, the one before it stays";
    assert!(said.contains(told) && said.contains("model.safetensors"), "{said}");
    let run = run_in(folder.path());
    assert_eq!(steps(&run), [6, 18]);
    let last = run.checkpoints(9).latest().expect("latest").expect("a checkpoint");
    assert_eq!(weights(&last), undisturbed(runtime));
}

fn full_metrics(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let (is_well, said) = end(start(folder.path(), &config(Harm::FullMetrics)));
    assert!(is_well, "{said}");
    let told = "metrics are not written, training goes on: cannot append to";
    assert_eq!(said.matches(told).count(), 1, "{said}");
    let run = run_in(folder.path());
    let metrics = run.metrics().expect("metrics");
    let epochs: Vec<_> = metrics.iter().filter_map(|line| line.values.get("epoch")).collect();
    assert_eq!(epochs, [&1.0, &3.0]);
    let text = std::fs::read_to_string(run.path().join("metrics.jsonl")).expect("text");
    assert_eq!(text.lines().count(), metrics.len(), "half a line is left: {text}");
    let last = run.checkpoints(9).latest().expect("latest").expect("a checkpoint");
    assert_eq!(weights(&last), undisturbed(runtime));
}

fn full_at_last(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let (is_well, said) = end(start(folder.path(), &config(Harm::FullDisk { epoch: 2 })));
    assert!(!is_well && said.contains("model.safetensors"), "{said}");
    let run = run_in(folder.path());
    assert_eq!(steps(&run), [6, 12]);
    let fit = fit(runtime, config(Harm::None), &run).expect("goes on with more room");
    assert_eq!(fit.values[0].began_at, 12);
    assert_eq!(weights(&fit.checkpoint.expect("checkpoint")), undisturbed(runtime));
}

fn killed_driver(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let harm = Harm::Wait { at_step: 15, folder: folder.path().to_owned() };
    let mut driver = start(folder.path(), &config(harm));
    let pids = ["0", "1"].map(|rank| text_of(&folder.path().join(rank)));
    let run = run_in(folder.path());
    // It is written in the background.
    until("a checkpoint", || run.checkpoints(9).paths().is_ok_and(|paths| !paths.is_empty()));
    let is_ours = |pid: &str| family(folder.path()).iter().any(|other| other == pid);
    assert!(pids.iter().all(|pid| is_ours(pid)), "the control: they are seen");
    driver.kill().expect("kill -9");
    driver.wait().expect("reap");
    // Fork server included.
    until("the end of all its processes", || family(folder.path()).is_empty());

    let newest = run.checkpoints(9).latest().expect("latest").expect("a checkpoint").step();
    let fit = fit(runtime, config(Harm::None), &run).expect("goes on");
    assert!(fit.values.iter().all(|rank| rank.began_at == newest), "from step {newest}");
    assert_eq!(steps(&run).last(), Some(&18));
    assert_eq!(weights(&fit.checkpoint.expect("checkpoint")), undisturbed(runtime));
}

/// The processes that have the folder in their environment, but for zombies, which have none.
fn family(folder: &Path) -> Vec<String> {
    let mark = format!("{FOLDER}={}", folder.display());
    let entries = std::fs::read_dir("/proc").expect("processes").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let pids = pids.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()));
    let is_one = |pid: &String| {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    pids.filter(is_one).collect()
}

fn text_of(path: &Path) -> String {
    until(&path.display().to_string(), || path.exists());
    std::fs::read_to_string(path).expect("text")
}

fn until(what: &str, is_there: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_there() {
        assert!(Instant::now() < deadline, "no {what}");
        std::thread::yield_now();
    }
}
