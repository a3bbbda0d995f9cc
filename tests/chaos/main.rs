//! `mobula chaos` as a user meets it. The program that it disturbs is this binary, so `init()` comes
//! first and the harness is libtest-mimic.

#[path = "../cli/program.rs"]
mod command;
mod program;

use command::{Finished, Running, command, finish};
use libtest_mimic::{Arguments, Trial};
use mobula::{BoxError, Resources, RunDir};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

type Test = (&'static str, fn());

const TESTS: &[Test] = &[
    ("a_program_that_survives_has_the_same_weights", survives),
    ("all_that_is_made_again_is_told", starts_all_again),
    ("other_weights_are_told_and_are_no_success", other_weights),
    ("a_program_that_dies_of_a_signal_does_not_survive", dies),
    ("who_sends_no_signal_has_shown_nothing", no_signal),
    ("a_program_that_makes_no_run_is_told_how", no_run),
    ("a_program_that_fails_by_itself_is_not_disturbed", fails_alone),
    ("a_program_that_stands_still_is_ended", stands_still),
    ("ctrl_c_ends_the_program_too", interrupted),
];

fn main() -> Result<(), BoxError> {
    // As many as the workers need, however few this machine has.
    let runtime = mobula::init_with(Resources::cpus(4.0))?;
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some((role, words)) = words.split_first()
        && role == program::ROLE
    {
        return program::run(&runtime, words);
    }
    let trial = |(name, test): &Test| {
        let test = *test;
        Trial::test(*name, move || {
            test();
            Ok(())
        })
    };
    libtest_mimic::run(&Arguments::from_args(), TESTS.iter().map(trial).collect()).exit();
}

/// `mobula chaos` with these options, on the program that is this binary.
fn chaos(runs: &Path, options: &[&str], words: &[&str]) -> Command {
    let program = std::env::current_exe().expect("this binary");
    let program = program.to_str().expect("UTF-8");
    on(runs, options, &[&[program, program::ROLE], words].concat())
}

/// `mobula chaos` with these options, on any program.
fn on(runs: &Path, options: &[&str], program: &[&str]) -> Command {
    let runs = ["chaos", "--runs", runs.to_str().expect("UTF-8")];
    command(&[&runs, options, &["--"], program].concat())
}

/// What was printed for a program that did not survive.
fn not_survived(ran: Finished) -> Value {
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|_| panic!("{ran:?}"));
    assert_eq!(report["survived"], false, "{report}");
    report
}

fn problem(report: &Value) -> &str {
    report["problems"][0].as_str().expect("a problem")
}

fn survives() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = ["--kill-every", "600ms", "--faults", "2", "--json"];
    let report = finish(chaos(folder.path(), &options, &["epochs=25"])).json();
    assert_eq!(report["survived"], true, "{report}");
    assert_eq!(report["signals"], serde_json::json!({ "KILL": 2 }), "{report}");
    assert_eq!(report["restarts"], 2, "{report}");
    assert_eq!(report["weights"]["different"], serde_json::json!([]), "{report}");
    assert_eq!(report["weights"]["steps"], serde_json::json!([500, 500]), "{report}");
    assert_eq!(report["disturbed"]["exit_code"], 0, "{report}");
    for fault in report["faults"].as_array().expect("faults") {
        let seconds = fault["recovery_seconds"].as_f64().expect("it was seen to recover");
        assert!(seconds > 0.0 && fault["worker"].as_str().expect("a name").contains(" rank "));
        // The other worker has kept all; a progress report that was on its way may be in between.
        assert!(fault["lost_steps_at_most"].as_u64().expect("a number") <= 20, "{report}");
    }
    // Both runs stay where they were asked to be.
    let [reference, disturbed] = ["reference", "disturbed"].map(|name| {
        let run = RunDir::open(folder.path().join(name)).expect("a run");
        let latest = run.checkpoints(2).latest().expect("checkpoints").expect("a checkpoint");
        std::fs::read(latest.file("model.safetensors")).expect("weights")
    });
    assert_eq!(reference, disturbed);
}

/// From the newest checkpoint, of the end of an epoch; one may not be there yet. The first SIGSEGV from
/// outside ends no Rust program.
fn starts_all_again() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = ["--kill-every", "500ms", "--signals", "SEGV", "--faults", "1", "--json"];
    let report = finish(chaos(folder.path(), &options, &["epochs=12", "restart-all"])).json();
    assert_eq!((&report["survived"], &report["restarts"]), (&true.into(), &1.into()), "{report}");
    let fault = &report["faults"][0];
    assert!(fault["recovery_seconds"].as_f64() > Some(0.0), "{report}");
    let (step, lost) = (fault["step"].as_u64(), fault["lost_steps_at_most"].as_u64());
    assert!(lost.is_some() && lost <= step, "{report}");
}

fn other_weights() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = ["--kill-every", "300ms", "--faults", "1", "--json", "--chdir"];
    let words = ["epochs=10", "any-seed", "own-run"];
    let report = not_survived(finish(chaos(folder.path(), &options, &words)));
    assert_eq!(problem(&report), "the weights differ", "{report}");
    let different = report["weights"]["different"].as_array().expect("tensors");
    assert!(different.iter().any(|tensor| tensor["largest"].as_f64() > Some(1e-3)), "{report}");
    assert_eq!(report["disturbed"]["exit_code"], 0, "{report}");
    assert!(folder.path().join("disturbed/runs/mine/run.json").exists());
}

fn dies() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = ["--kill-every", "200ms", "--faults", "1", "--no-reference"];
    let ran = finish(chaos(folder.path(), &options, &["max-failures=0"]));
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let last = ran.stdout.lines().last().expect("a verdict");
    let expected = "it did not survive: the disturbed run failed after 1 signal(s): exit status: 1";
    assert_eq!(last, expected, "{ran:?}");
    assert!(ran.stdout.contains("not seen"), "there was no recovery: {ran:?}");
}

fn no_signal() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = ["--kill-every", "1h", "--no-reference", "--json"];
    let report = not_survived(finish(chaos(folder.path(), &options, &["epochs=2"])));
    assert!(problem(&report).starts_with("no signal was sent"), "{report}");
    assert_eq!(report["weights"], Value::Null);
}

fn no_run() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let ran = finish(on(folder.path(), &[], &["true"]));
    let (start, hint) = ("the program (exit status: 0) made no run in", "`RunDir::of_program`");
    let line = last_line(&ran);
    assert!(line.contains(start) && line.contains(hint) && line.contains("--chdir"), "{ran:?}");
    assert!(!folder.path().join("reference").exists(), "nothing is left: {ran:?}");
}

fn fails_alone() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let ran = finish(on(folder.path(), &[], &["sh", "-c", "exit 3"]));
    let expected = "error: the program failed before any signal was sent: exit status: 3";
    assert_eq!(last_line(&ran), expected, "{ran:?}");
}

fn stands_still() {
    let folder = tempfile::tempdir().expect("temporary folder");
    // What it has started is ended with it.
    let script = "sleep 600 & echo $! > pid; wait";
    let options = ["--patience", "1.5s", "--chdir"];
    let ran = finish(on(folder.path(), &options, &["sh", "-c", script]));
    assert!(last_line(&ran).contains("for 1.5 s the program has come no further than"), "{ran:?}");
    assert_gone(&folder.path().join("reference/pid"));
}

fn interrupted() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let script = "sleep 600 & echo $! > pid; echo started >&2; wait";
    let mut running = Running::of(on(folder.path(), &["--chdir"], &["sh", "-c", script]));
    while !running.stderr.recv_timeout(Duration::from_secs(60)).expect("a line").contains("started")
    {
    }
    running.interrupt();
    assert_eq!(running.wait(Duration::from_secs(60)).code(), Some(130));
    assert_gone(&folder.path().join("reference/pid"));
}

fn last_line(ran: &Finished) -> &str {
    assert_eq!(ran.code, Some(1), "{ran:?}");
    ran.stderr.lines().last().expect("a line on stderr")
}

/// A process that was killed is gone, or about to be reaped by whoever adopted it.
fn assert_gone(file: &Path) {
    let pid = std::fs::read_to_string(file).expect("its id");
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    assert!(state.is_empty() || state.starts_with(['Z', 'X']), "it still runs: {stat}");
}
