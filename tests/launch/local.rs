//! `mobula launch --workers`: copies on this machine.

use crate::Test;
use crate::program::{Finished, Running, mobula};
use crate::rank::{ROLE, check_agreement, program, told};
use crate::slurm::poll;
use mobula::world::Launcher;
use rustix::process::{Pid, Signal, kill_process};
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("local::four_copies_agree", four_copies_agree),
    ("local::one_failure_ends_all", one_failure_ends_all),
    ("local::a_program_that_cannot_start", a_program_that_cannot_start),
    ("local::copies_are_started_again", copies_are_started_again),
    ("local::ctrl_c_is_passed_on", ctrl_c_is_passed_on),
    ("local::who_does_not_end_is_killed", who_does_not_end_is_killed),
    ("local::nothing_survives_a_launcher_that_is_killed", nothing_survives_a_killed_launcher),
    ("local::output_is_complete_and_has_its_rank", output_is_complete_and_has_its_rank),
];

const DEADLINE: Duration = Duration::from_secs(30);

fn launch(options: &[&str], command: &[&str]) -> Finished {
    mobula(&[&["launch"], options, &["--"], command].concat())
}

fn start(options: &[&str], script: &str) -> Running {
    Running::start(&[&["launch"], options, &["--", "sh", "-c", script]].concat())
}

fn four_copies_agree() {
    let program = program();
    let first = launch(&["--workers", "4"], &[&program, ROLE, "resolve", "a b"]);
    let ranks = told(&first.stdout);
    assert_eq!(first.code, Some(0), "{first:?}");
    assert_eq!(check_agreement(&ranks), [4], "{first:?}");
    for told in &ranks {
        assert_eq!(told.world.launcher, Launcher::Torchrun);
        assert_eq!(told.master, Some(format!("127.0.0.1:{}", told.world.master_port)));
        assert_eq!(told.variables["MOBULA_SECRET"], ranks[0].variables["MOBULA_SECRET"]);
        assert_eq!(told.arguments, ["resolve", "a b"]);
    }
    let second = launch(&[], &[&program, ROLE]);
    let others = told(&second.stdout);
    assert_eq!(check_agreement(&others), [1], "{second:?}");
    assert_ne!(others[0].variables["MOBULA_SECRET"], ranks[0].variables["MOBULA_SECRET"]);
}

fn one_failure_ends_all() {
    // The others would wait for ever; so would their children.
    let script = "[ $RANK = 1 ] && exit 7; sleep 1000 & wait";
    let failed = launch(&["--workers", "3"], &["sh", "-c", script]);
    assert_eq!(failed.code, Some(7), "{failed:?}");
    assert_eq!(failed.stderr, "rank 1 failed with exit code 7\n");
    // As a shell tells a signal.
    let killed =
        launch(&["--workers", "2"], &["sh", "-c", "[ $RANK = 1 ] || kill -KILL $$; sleep 1000"]);
    assert_eq!(killed.code, Some(137), "{killed:?}");
}

fn a_program_that_cannot_start() {
    let failed = launch(&[], &["./no such program"]);
    assert_eq!(failed.code, Some(127), "{failed:?}");
    assert!(failed.stderr.contains("[rank 0] cannot start ./no such program: No such file"));
}

fn copies_are_started_again() {
    let program = program();
    let ran =
        launch(&["--workers", "2", "--max-restarts", "3"], &[&program, ROLE, "fail-at-first"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let told = told(&ran.stdout);
    let again: Vec<_> = told.into_iter().filter(|t| t.world.restart_count == 1).collect();
    assert_eq!(check_agreement(&again), [2], "{ran:?}");

    let given_up = launch(&["--max-restarts", "1"], &["sh", "-c", "echo $RESTART_COUNT; exit 5"]);
    assert_eq!((given_up.code, given_up.stdout.as_str()), (Some(5), "[rank 0] 0\n[rank 0] 1\n"));
}

fn ctrl_c_is_passed_on() {
    let script = "trap 'echo bye; exit 0' INT; echo ready; while :; do sleep 1000 & wait; done";
    let mut running = start(&["--workers", "2"], script);
    running.line_with("ready");
    running.line_with("ready");
    running.interrupt();
    running.line_with("bye");
    running.line_with("bye");
    assert_eq!(running.wait(DEADLINE).code(), Some(130));
}

fn who_does_not_end_is_killed() {
    let script =
        "trap '' TERM INT; [ $RANK = 1 ] && exit 3; echo ready; while :; do sleep 1000; done";
    let mut running = start(&["--workers", "2", "--grace", "0"], script);
    assert_eq!(running.wait(DEADLINE).code(), Some(3));

    // Who asks twice does not wait for the end of the grace.
    let script = "trap '' INT; echo ready; while :; do sleep 1000; done";
    let mut running = start(&["--grace", "3600"], script);
    running.line_with("ready");
    let mut end = None;
    let ended = || {
        running.interrupt();
        end = running.ended();
        end.map(drop)
    };
    poll(DEADLINE, ended).expect("it ends");
    assert_eq!(end.and_then(|status| status.code()), Some(130));
}

fn nothing_survives_a_killed_launcher() {
    // A shell and a process that it has started, which do not care for signals.
    let script = "trap '' TERM INT HUP; sleep 1000 & echo pids $$ $!; wait";
    let running = start(&["--workers", "2"], script);
    let lines = [running.line_with("pids"), running.line_with("pids")];
    let words = lines.iter().flat_map(|line| line.split_whitespace());
    let pids: Vec<i32> = words.filter_map(|word| word.parse().ok()).collect();
    assert_eq!(pids.len(), 4, "{lines:?}");
    assert!(pids.iter().all(|pid| is_alive(*pid)));
    kill_process(running.id(), Signal::KILL).expect("the launcher");
    let gone = || (!pids.iter().any(|pid| is_alive(*pid))).then_some(());
    let left = || {
        pids.iter().filter(|pid| is_alive(**pid)).for_each(|pid| {
            // Not for ever, though the test has failed.
            let _ = Pid::from_raw(*pid).map(|pid| kill_process(pid, Signal::KILL));
        })
    };
    poll(DEADLINE, gone).unwrap_or_else(|| {
        left();
        panic!("some of {pids:?} live on")
    });
}

/// A process that has ended but that nobody has waited for is a zombie.
fn is_alive(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // After the name, which is in parentheses and may be anything.
    status.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn output_is_complete_and_has_its_rank() {
    // More than a pipe holds, on both streams, and a last line without an end.
    let script = "seq 20000; seq 20000 >&2; printf end";
    let ran = launch(&["--workers", "2"], &["sh", "-c", script]);
    assert_eq!(ran.code, Some(0));
    let numbers = || (1..=20_000).map(|n| n.to_string());
    for rank in 0..2 {
        let prefix = format!("[rank {rank}] ");
        let of_rank = |text: &str| -> Vec<String> {
            text.lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).collect()
        };
        assert!(of_rank(&ran.stdout).into_iter().eq(numbers().chain(["end".to_owned()])));
        assert!(of_rank(&ran.stderr).into_iter().eq(numbers()));
    }
}
