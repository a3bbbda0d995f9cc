use crate::program::mobula;

#[test]
fn help_lists_the_commands_that_there_are() {
    let help = mobula(&["--help"]);
    assert_eq!(help.code, Some(0));
    for command in ["doctor", "runs", "sweep", "serve", "new"] {
        assert!(help.stdout.contains(&format!("\n  {command} ")), "{command}: {}", help.stdout);
    }
}

#[test]
fn bad_arguments_end_with_2() {
    assert_eq!(mobula(&["launch"]).code, Some(2));
    assert_eq!(mobula(&["serve"]).code, Some(2));
}

#[test]
fn doctor_starts_a_worker_process() {
    let report = mobula(&["doctor"]);
    assert_eq!(report.code, Some(0), "{report:?}");
    let worker = report.stdout.lines().find(|line| line.contains("worker process"));
    let worker = worker.expect("a line for the worker");
    assert!(worker.starts_with("ok ") && worker.contains(" ms"), "{worker}");
}

#[test]
fn doctor_as_json_has_the_same_checks() {
    let report = mobula(&["doctor", "--json"]).json();
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    let checks = report["checks"].as_array().expect("an array");
    let names: Vec<_> = checks.iter().filter_map(|check| check["name"].as_str()).collect();
    for name in ["system", "CPUs", "threads", "memory", "CUDA", "worker process"] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    for check in checks.iter().filter(|check| check["status"] == "warn") {
        assert!(check["hint"].is_string(), "a warning has a way out: {check}");
    }
}

#[test]
fn doctor_warns_of_too_many_threads() {
    let mut command = crate::program::command(&["doctor"]);
    let output = command.env("RAYON_NUM_THREADS", "4096").output().expect("doctor");
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.contains(" threads ")).expect("the check");
    assert!(line.starts_with("warn ") && line.contains("4096"), "{line}");
}
