//! `mobula status` as a user meets it, and the commands of its guide. The program that is asked is
//! this binary, so `init()` comes first and the harness is libtest-mimic.

#[path = "../cli/program.rs"]
mod program;

use libtest_mimic::{Arguments, Trial};
use mobula::run::RunState;
use mobula::{Resources, RunDir, Runtime, Task};
use program::{Finished, mobula};
use serde_json::Value;

const GUIDE: &str = include_str!("../../docs/guides/status.md");

type Test = (&'static str, fn(&Runtime));

const TESTS: &[Test] = &[
    ("the_commands_of_the_guide", guide),
    ("one_program_as_tables", tables),
    ("one_program_as_json_and_for_prometheus", json),
    ("a_run_names_its_program", run),
    ("who_does_not_run_is_one_line", errors),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let total = Resources::cpus(3.0).with_custom("desk", 2.0);
    let runtime = mobula::init_with(total)?;
    runtime.submit(Task::new("answer", || Ok::<_, String>(42))).get()?;
    let trials = TESTS.iter().map(|(name, test)| {
        let runtime = runtime.clone();
        Trial::test(*name, move || {
            test(&runtime);
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

fn own_pid() -> String {
    std::process::id().to_string()
}

fn succeeded(ran: Finished) -> Finished {
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran
}

/// Each command in the guide's blocks, as it stands there.
fn guide(_: &Runtime) {
    let blocks = GUIDE.split("```text\n").skip(1).filter_map(|block| block.split("```").next());
    let commands: Vec<&str> = blocks.flat_map(str::lines).collect();
    assert_eq!(commands.len(), 2, "{commands:?}");
    for command in commands {
        let words: Vec<&str> = command.split_whitespace().collect();
        assert_eq!(words[0], "mobula");
        let ran = succeeded(mobula(&words[1..]));
        assert!(ran.stdout.contains(&own_pid()), "{ran:?}");
    }
    let all = mobula(&["status", "--json"]).json();
    let pids = |all: &Value| -> Vec<u64> {
        let programs = all.as_array().expect("an array").iter();
        programs.filter_map(|program| program["program"]["pid"].as_u64()).collect()
    };
    assert!(pids(&all).contains(&u64::from(std::process::id())), "{all}");
}

fn tables(_: &Runtime) {
    let shown = succeeded(mobula(&["status", "--pid", &own_pid()])).stdout;
    let lines: Vec<String> =
        shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let has = |end: &str| assert!(lines.iter().any(|line| line.ends_with(end)), "{end}:\n{shown}");
    has("node resource total free");
    has("CPU 3 3");
    has("desk 2 2");
    has("waiting running finished failed cancelled");
    has("0 0 1 0 0");
    has("on disk");
}

fn json(_: &Runtime) {
    let status = mobula(&["status", "--pid", &own_pid(), "--json"]).json();
    assert_eq!(status["program"]["pid"], std::process::id());
    assert_eq!(status["tasks"]["finished"], 1);
    assert_eq!(status["nodes"][0]["total"]["custom"]["desk"], 2.0);
    let metrics = succeeded(mobula(&["status", "--pid", &own_pid(), "--prometheus"])).stdout;
    let line = r#"mobula_tasks_ended_total{state="finished"} 1"#;
    assert!(metrics.lines().any(|found| found == line), "{metrics}");
}

fn run(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(folder.path(), "digits", 7, &()).expect("a run");
    let path = run.path().to_str().expect("UTF-8");
    let status = mobula(&["status", "--run", path, "--json"]).json();
    assert_eq!(status["program"]["pid"], std::process::id());
    run.set_state(RunState::Finished).expect("written");
    let ended = mobula(&["status", "--run", path]);
    assert!(ended.error().contains("the run's state is finished"), "{ended:?}");
    let missing = mobula(&["status", "--run", folder.path().to_str().expect("UTF-8")]);
    assert!(missing.error().ends_with("is not a run: it has no run.json"), "{missing:?}");
}

fn errors(_: &Runtime) {
    // No process has so large an id.
    let asked = mobula(&["status", "--pid", "4294967295"]);
    assert!(asked.error().contains("process id 4294967295"), "{asked:?}");
}
