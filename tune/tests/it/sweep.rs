//! Sweep files: reading them, and running real processes from them.

use mobula_core::{Resources, Runtime};
use mobula_tune::{Error, StopHandle, Sweep, TrialState};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

fn runtime() -> Runtime {
    Runtime::local(Resources::cpus(2.0)).expect("a local runtime")
}

/// A sweep over `x` whose command is a shell script; extra lines go at the end of the file.
fn sweep(script: &str, extra: &str) -> Sweep {
    let command = serde_json::to_string(&["sh", "-c", script, "trial", "${args}"]).expect("encode");
    let yaml = format!(
        "name: demo\ncommand: {command}\nmethod: grid\n\
         metric: {{name: accuracy, goal: maximize}}\nparameters:\n  x: {{values: [1, 2, 3]}}\n{extra}"
    );
    Sweep::parse(&yaml).expect("a sweep file")
}

fn alive(pid_file: &Path) -> bool {
    let pid = fs::read_to_string(pid_file).expect("the script's pid");
    let state = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    !state.is_empty() && !state.contains(") Z ")
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen in 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_full_file_is_understood() {
    let text = r#"
name: digits
command: [cargo, run, --, "${args}"]
method: tpe
metric: {name: accuracy, goal: maximize}
parameters:
  lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-1}
  dropout: {min: 0.0, max: 0.5}
  layers: {min: 1, max: 4}
  units: {distribution: log_int_uniform_values, min: 8, max: 512}
  opt: {values: [adam, sgd]}
  epochs: {value: 9}
scheduler: {type: asha, mode: stopping, max_t: 9, grace_period: 1, reduction_factor: 3}
run_cap: 16
startup_trials: 5
seed: 7
max_concurrent: 2
max_retries: 1
resources: {cpu: 1, gpu: 0}
"#;
    let sweep = Sweep::parse(text).expect("a sweep file");
    let names: Vec<String> = sweep.space().parameters().iter().map(ToString::to_string).collect();
    let expected = [
        "lr in log 0.0001..0.1",
        "dropout in 0..0.5",
        "layers in integers 1..4",
        "units in log integers 8..512",
        "opt of [adam, sgd]",
        "epochs of [9]",
    ];
    assert_eq!(names, expected);
}

#[test]
fn mistakes_are_named_with_the_way_out() {
    let base = "name: n\ncommand: [./t]\nmetric: {name: a, goal: maximize}\nparameters:\n";
    let check = |rest: &str, expected: &[&str]| {
        let text = Sweep::parse(&format!("{base}{rest}")).expect_err("a bad file").to_string();
        assert!(expected.iter().all(|part| text.contains(part)), "{text}");
    };
    check("  x: {min: 0, max: 1}\nrun_cat: 3\n", &["unknown field `run_cat`", "run_cap", "line 6"]);
    check("  x: {mim: 0, max: 1}\n", &["unknown field `mim`", "`min`", "line 5"]);
    check(
        "  x: {distribution: normal, mu: 0}\n",
        &["unknown variant `normal`", "log_uniform_values"],
    );
    check("  x: {min: 0}\n", &["parameters.x", "has min; expected"]);
    check("  x: {min: 1.0, max: 0.5}\n", &["\"x\"", "1..0.5"]);
    check("  x: {min: a, max: b}\n", &["parameters.x", "expected numbers"]);
    check("  x: {values: []}\n", &["\"x\" is a choice of no values"]);
    check("  x: 3\n", &["line 5"]);
    check("  x: {value: 1}\nmethod: bayes\n", &["unknown variant `bayes`", "tpe", "line 6"]);
    check("  x: {value: 1}\nscheduler: {type: asha}\n", &["max_t"]);
    let command = "name: n\ncommand: [./t, \"${y}\"]\nmetric: {name: a, goal: maximize}\nparameters: {x: {value: 1}}\n";
    let text = Sweep::parse(command).expect_err("no y").to_string();
    assert!(text.contains("no ${y}; available: args, params_json, x"), "{text}");
    let missing = Sweep::load("/nonexistent/sweep.yaml").expect_err("missing").to_string();
    assert!(missing.contains("/nonexistent/sweep.yaml"), "{missing}");
}

/// The metric comes from the printed lines or from metrics.jsonl; each trial has its own folder.
#[test]
fn a_grid_of_processes_is_run_and_read() {
    let root = tempfile::tempdir().expect("temporary folder");
    let script = r#"x=$${1#--x=}; echo "starting $x" >&2
        if [ $x = 2 ]; then echo '{"step":1,"time":0.5,"accuracy":0.2}' > $MOBULA_RUN_DIR/metrics.jsonl
        else echo "{\"step\":1,\"accuracy\":0.$x}"; fi"#;
    let grid = sweep(script, "").run(&runtime(), root.path()).expect("a sweep");
    let values: Vec<f64> = grid.trials().iter().map(|t| t.value).collect();
    assert_eq!(values, [0.1, 0.2, 0.3]);
    assert_eq!(grid.best().expect("best").params.int("x").expect("x"), 3);
    let log =
        fs::read_to_string(root.path().join("demo/trial-2/logs/rank-0.log")).expect("the log");
    assert!(log.contains("starting 3"), "{log}");
    // A second run has nothing to do and says the same.
    let again = sweep("exit 1", "").run(&runtime(), root.path()).expect("finished already");
    assert_eq!(again.best().expect("best").number, 2);
}

#[test]
fn a_command_that_fails_shows_the_end_of_its_log() {
    let root = tempfile::tempdir().expect("temporary folder");
    let script = r#"if [ $1 = --x=2 ]; then echo "no such file: train.csv" >&2; exit 3; fi
        echo '{"accuracy":0.5}'"#;
    let grid = sweep(script, "").run(&runtime(), root.path()).expect("two trials are fine");
    assert_eq!((grid.count(TrialState::Complete), grid.count(TrialState::Failed)), (2, 1));
    let error = grid.trials()[1].error.clone().expect("an error");
    assert!(
        error.contains("exit status: 3") && error.contains("no such file: train.csv"),
        "{error}"
    );
    let root = tempfile::tempdir().expect("temporary folder");
    let missing = "name: m\ncommand: [/nonexistent/program]\nmetric: {name: a, goal: minimize}\nparameters: {x: {values: [1]}}\n";
    let error = Sweep::parse(missing).expect("a sweep file").run(&runtime(), root.path());
    assert!(error.expect_err("cannot start").to_string().contains("/nonexistent/program"));
}

/// ASHA's stop ends the whole process group, also a child that ignores SIGTERM.
#[test]
fn a_pruned_trial_leaves_no_process_behind() {
    let root = tempfile::tempdir().expect("temporary folder");
    let script = r#"x=$${1#--x=}
        if [ $x = 1 ]; then echo '{"step":1,"accuracy":0.9}'; exit; fi
        (trap '' TERM; echo $$ > $MOBULA_RUN_DIR/leader; sh -c 'echo $$ > $MOBULA_RUN_DIR/child; sleep 600') &
        while [ ! -s $MOBULA_RUN_DIR/child ]; do sleep 0.01; done
        echo '{"step":1,"accuracy":0.1}'; wait"#;
    let extra = "max_concurrent: 1\nscheduler: {type: asha, max_t: 9, reduction_factor: 3}\n";
    let grid = sweep(script, extra).run(&runtime(), root.path()).expect("a sweep");
    assert_eq!((grid.count(TrialState::Complete), grid.count(TrialState::Pruned)), (1, 2));
    for trial in ["trial-1", "trial-2"] {
        let folder = root.path().join("demo").join(trial);
        eventually("the end of the group", || {
            !alive(&folder.join("leader")) && !alive(&folder.join("child"))
        });
    }
}

/// Stopped in the middle, the interrupted trial runs again with its parameters; its first attempt
/// is set aside.
#[test]
fn a_stopped_sweep_ends_its_processes_and_resumes() {
    let root = tempfile::tempdir().expect("temporary folder");
    let marker = root.path().join("second");
    let script = format!(
        r#"echo $$ > $MOBULA_RUN_DIR/pid; echo "{{\"step\":1,\"accuracy\":0.5}}"
        if [ $1 = --x=2 ] && [ ! -e {0} ]; then touch {0}; sleep 600; fi"#,
        marker.display()
    );
    let plain = sweep(&script, "max_concurrent: 1\n");
    let stop = StopHandle::default();
    let folder = plain.folder(root.path());
    let first = {
        let (sweep, root, runtime) = (plain.clone(), root.path().to_owned(), runtime());
        let stop = stop.clone();
        std::thread::spawn(move || sweep.run_until(&runtime, root, stop))
    };
    eventually("the second trial", || marker.exists());
    stop.stop();
    let stopped = first.join().expect("no panic");
    assert!(
        matches!(stopped, Err(Error::Interrupted { finished: 1, trials: 3, .. })),
        "{stopped:?}"
    );
    eventually("the end of the trial", || !alive(&folder.join("trial-1/pid")));

    let grid = plain.run(&runtime(), root.path()).expect("resumed");
    assert_eq!(grid.count(TrialState::Complete), 3);
    assert!(folder.join("trial-1.attempt-1").is_dir());
}

const KILLED_ROOT: &str = "MOBULA_TEST_SWEEP_ROOT";

fn endless() -> Sweep {
    let script = r#"echo $$ > $MOBULA_RUN_DIR/leader; trap '' TERM
        sh -c 'echo $$ > $MOBULA_RUN_DIR/child; sleep 600' & wait"#;
    sweep(script, "max_concurrent: 2\n")
}

/// Not a test by itself: the program that the next test kills.
#[test]
fn driver_to_be_killed() {
    if let Ok(root) = std::env::var(KILLED_ROOT) {
        let _ = endless().run(&runtime(), root);
    }
}

/// kill -9 of the driver ends its trials with everything they started; the journal resumes.
#[test]
fn a_killed_driver_leaves_no_process_behind() {
    let root = tempfile::tempdir().expect("temporary folder");
    let mut driver = std::process::Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "sweep::driver_to_be_killed"])
        .env(KILLED_ROOT, root.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("the driver");
    let file = |name: &str| root.path().join("demo").join(name);
    let written =
        |name: &str| fs::read_to_string(file(name)).is_ok_and(|text| text.ends_with('\n'));
    let pids = ["trial-0/leader", "trial-0/child", "trial-1/leader", "trial-1/child"];
    eventually("the start of two trials", || pids.iter().all(|name| written(name)));
    assert!(pids.iter().all(|name| alive(&file(name))));
    driver.kill().expect("SIGKILL");
    driver.wait().expect("the driver's end");
    eventually("the end of both groups", || pids.iter().all(|name| !alive(&file(name))));

    let quick = sweep("echo '{\"accuracy\":0.5}'", "max_concurrent: 2\n");
    let grid = quick.run(&runtime(), root.path()).expect("resumed");
    assert_eq!((grid.trials().len(), grid.count(TrialState::Complete)), (3, 3));
}
