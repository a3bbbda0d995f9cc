use crate::program::mobula;
use std::path::{Path, PathBuf};

/// A sweep whose program is a line of shell: two measurements that depend on the parameter.
fn sweep_file(folder: &Path, script: &str) -> PathBuf {
    let file = folder.join("sweep.yaml");
    let text = format!(
        "name: tiny\ncommand: [sh, -c, '{script}']\nmethod: grid\n\
         metric: {{name: score, goal: maximize}}\nparameters:\n  x: {{values: [1, 3, 2]}}\n"
    );
    std::fs::write(&file, text).expect("write");
    file
}

const SCRIPT: &str = r#"echo "{\"step\": 1, \"score\": 0}"; echo "{\"step\": 2, \"score\": ${x}}""#;

fn run(file: &Path, root: &Path, more: &[&str]) -> crate::program::Finished {
    let (file, root) = (file.to_str().expect("UTF-8"), root.to_str().expect("UTF-8"));
    mobula(&[&["sweep", "run", file, "--root", root], more].concat())
}

#[test]
fn the_best_trial_of_a_sweep_is_found_and_recorded() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let (file, root) = (sweep_file(folder.path(), SCRIPT), folder.path().join("runs"));
    let swept = run(&file, &root, &[]);
    assert_eq!(swept.code, Some(0), "{swept:?}");
    assert!(swept.stdout.contains("best: trial 1, score 3 at step 2, x=3"), "{swept:?}");
    assert!(root.join("tiny/study.journal").is_file());
    assert!(root.join("tiny/trial-2/logs/rank-0.log").is_file());

    // The same again only reads the journal.
    let again = run(&file, &root, &["--json"]).json();
    assert_eq!(again["best"]["trial"], 1);
    assert_eq!(again["best"]["params"]["x"], 3);
    assert_eq!(again["trials"].as_array().map(Vec::len), Some(3));
}

#[test]
fn programs_that_fail_and_files_that_are_wrong_are_one_line() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let root = folder.path().join("runs");
    let missing = run(&folder.path().join("none.yaml"), &root, &[]);
    assert!(missing.error().contains("none.yaml"), "{missing:?}");

    let file = sweep_file(folder.path(), "exit 3");
    let failed = run(&file, &root, &[]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    let last = failed.stderr.lines().last().expect("a line");
    assert!(last.starts_with("error: ") && last.contains("exit status: 3"), "{last}");

    std::fs::write(&file, "name: tiny\ncommand: [x]\ncolour: blue\n").expect("write");
    let wrong = run(&file, &root, &[]);
    assert!(wrong.error().contains("colour"), "{wrong:?}");
}
