use crate::program::mobula;
use mobula::RunDir;
use mobula::run::RunState;
use std::collections::BTreeMap;
use std::path::Path;

fn root(folder: &Path) -> &str {
    folder.to_str().expect("a path in UTF-8")
}

/// A finished run with metrics, a log and two checkpoints.
fn make_run(root: &Path, name: &str) -> RunDir {
    let run = RunDir::create(root, name, 7, &serde_json::json!({"lr": 0.1})).expect("a run");
    let mut metrics = run.metrics_writer().expect("metrics");
    for (step, accuracy) in [(10, 0.5), (20, 0.875)] {
        let values = [("accuracy", accuracy), ("loss", 1.0 - accuracy), ("step/loss", 9.0)];
        let values = values.map(|(name, value)| (name.to_owned(), value));
        metrics.log(step, &BTreeMap::from(values)).expect("a line");
        let save = |dir: &Path| {
            std::fs::write(dir.join("model.safetensors"), vec![1u8; 4096]).expect("a file");
            Ok(())
        };
        run.checkpoints(5).save(step, save).expect("a checkpoint");
    }
    std::fs::write(run.log_path(0), "hello\n").expect("a log");
    run.set_state(RunState::Finished).expect("a state");
    run
}

fn cut_in_half(file: &Path) {
    let bytes = std::fs::read(file).expect("a file");
    std::fs::write(file, &bytes[..bytes.len() / 2]).expect("write");
}

#[test]
fn a_folder_without_runs_is_no_error() {
    let folder = tempfile::tempdir().expect("temporary folder");
    for place in [folder.path(), &folder.path().join("missing")] {
        let listed = mobula(&["runs", "ls", "--root", root(place)]);
        assert_eq!(listed.code, Some(0));
        assert!(listed.stdout.contains("there are no runs in"), "{listed:?}");
        let listed = mobula(&["runs", "ls", "--json", "--root", root(place)]);
        assert_eq!(listed.json(), serde_json::json!([]));
    }
}

#[test]
fn runs_are_listed_with_state_metrics_and_newest_checkpoint() {
    let folder = tempfile::tempdir().expect("temporary folder");
    make_run(folder.path(), "digits");
    let listed = mobula(&["runs", "ls", "--root", root(folder.path())]);
    let line = listed.stdout.lines().find(|line| line.contains("digits")).expect("the run");
    for part in ["finished", "20", "accuracy 0.8750  loss 0.1250"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(!line.contains("step/loss"), "{line}");

    let listed = mobula(&["runs", "ls", "--json", "--root", root(folder.path())]).json();
    assert_eq!(listed[0]["state"], "finished");
    assert_eq!(listed[0]["checkpoint"], 20);
    assert_eq!(listed[0]["metrics"]["accuracy"], 0.875);
}

#[test]
fn a_run_with_damaged_files_does_not_hide_the_others() {
    let folder = tempfile::tempdir().expect("temporary folder");
    make_run(folder.path(), "good");
    let bad = make_run(folder.path(), "bad");
    cut_in_half(&bad.path().join("run.json"));
    cut_in_half(&bad.path().join("status.json"));
    let listed = mobula(&["runs", "ls", "--root", root(folder.path())]);
    assert_eq!(listed.code, Some(0), "{listed:?}");
    assert!(listed.stdout.contains("good") && listed.stdout.contains("unknown"), "{listed:?}");
    let shown = mobula(&["runs", "show", "bad", "--root", root(folder.path())]);
    assert!(shown.error().contains("run.json"), "{shown:?}");
}

#[test]
fn a_run_that_is_not_there_is_answered_with_those_that_are() {
    let folder = tempfile::tempdir().expect("temporary folder");
    make_run(folder.path(), "digits");
    let shown = mobula(&["runs", "show", "digit", "--root", root(folder.path())]);
    assert!(shown.error().starts_with("there is no run \"digit\" in "), "{shown:?}");
    assert!(shown.error().ends_with("there are: digits"), "{shown:?}");
}

#[test]
fn a_run_is_shown_by_name_and_by_folder() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let run = make_run(folder.path(), "digits");
    let by_name = mobula(&["runs", "show", "digits", "--root", root(folder.path())]);
    assert_eq!(by_name.code, Some(0), "{by_name:?}");
    for part in ["finished since", "seed         7", r#"{"lr":0.1}"#, "at step 20", "rank-0.log"] {
        assert!(by_name.stdout.contains(part), "{part}: {}", by_name.stdout);
    }
    let by_folder = mobula(&["runs", "show", root(run.path())]);
    assert_eq!(by_folder.stdout, by_name.stdout);
}

#[test]
fn a_checkpoint_cut_in_half_is_shown_as_invalid() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let run = make_run(folder.path(), "digits");
    let newest = run.checkpoints(5).paths().expect("paths")[1].join("model.safetensors");
    cut_in_half(&newest);

    let place = ["--root", root(folder.path())];
    let shown = mobula(&[["runs", "show"], ["digits", place[0]], [place[1], "--json"]].concat());
    let checkpoints = shown.json()["checkpoints"].clone();
    assert_eq!(checkpoints[0]["valid"], true);
    assert_eq!(checkpoints[1]["valid"], false);
    let reason = checkpoints[1]["reason"].as_str().expect("a reason");
    assert!(reason.contains("model.safetensors has 2048 bytes"), "{reason}");

    let shown = mobula(&["runs", "show", "digits", "--root", root(folder.path())]);
    assert!(shown.stdout.contains("step-0000000010          valid"), "{}", shown.stdout);
    assert!(shown.stdout.contains("step-0000000020          invalid: model.safe"), "{shown:?}");
    let listed = mobula(&["runs", "ls", "--json", "--root", root(folder.path())]).json();
    assert_eq!(listed[0]["checkpoint"], 10, "the newest valid one");
}
