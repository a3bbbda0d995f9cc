//! What `--print` shows, word for word. `UPDATE_GOLDEN=1` writes the files anew.

use crate::Test;
use crate::program::{Finished, command, finish};
use std::path::Path;
use std::process::Command;

pub(crate) const TESTS: &[Test] = &[
    ("print::the_script_for_slurm", the_script_for_slurm),
    ("print::the_manifest_for_kubernetes", the_manifest_for_kubernetes),
    ("print::what_cannot_be_is_refused", what_cannot_be_is_refused),
];

fn launch(folder: &Path, words: &[&str]) -> Finished {
    let mut command = command(&[&["launch"], words].concat());
    command.current_dir(folder);
    finish(command)
}

/// The same text as in `tests/launch/golden`, but for the folder.
fn check_golden(name: &str, folder: &Path, printed: &Finished) {
    assert_eq!(printed.code, Some(0), "{printed:?}");
    let folder = folder.canonicalize().expect("the folder");
    let text = printed.stdout.replace(folder.to_str().expect("UTF-8"), "/home/me/project");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/launch/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&file, &text).expect("write");
    }
    assert_eq!(text, std::fs::read_to_string(&file).expect("the golden file"), "{name}");
}

fn the_script_for_slurm() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = [
        "--slurm",
        "--print",
        "--name",
        "digits",
        "--nodes",
        "3",
        "--cpus-per-task",
        "8",
        "--gpus-per-node",
        "2",
        "--mem",
        "64G",
        "--time",
        "4:00:00",
        "--partition",
        "gpu",
        "--account",
        "me",
        "--max-restarts",
        "3",
        "--sbatch=--exclusive",
        "--",
        "./program",
        "--name",
        "it's digits",
    ];
    let printed = launch(folder.path(), &options);
    check_golden("slurm.sh", folder.path(), &printed);
    assert!(!folder.path().join("runs").exists(), "printing writes nothing");
    // At the least it is a script.
    let file = folder.path().join("job.sh");
    std::fs::write(&file, &printed.stdout).expect("write");
    let checked = Command::new("bash").arg("-n").arg(&file).output().expect("bash");
    assert!(checked.status.success() && checked.stderr.is_empty(), "{checked:?}");
}

fn the_manifest_for_kubernetes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let options = [
        "--kubernetes",
        "--print",
        "--name",
        "digits",
        "--image",
        "registry.example.org/digits:1",
        "--nodes",
        "3",
        "--cpus-per-task",
        "8",
        "--gpus-per-node",
        "2",
        "--mem",
        "64Gi",
        "--max-restarts",
        "3",
        "--volume-claim",
        "shared-runs",
        "--",
        "/app/program",
        "--name",
        "it's \"digits\": $(HOME)",
    ];
    check_golden("kubernetes.yaml", folder.path(), &launch(folder.path(), &options));
    let least = ["--kubernetes", "--print", "--name", "one", "--image", "i", "--", "/app/program"];
    check_golden("kubernetes-least.yaml", folder.path(), &launch(folder.path(), &least));
}

fn what_cannot_be_is_refused() {
    let folder = tempfile::tempdir().expect("temporary folder");
    for (options, expected) in [
        (&["--slurm", "--print", "--name", "a b"][..], "\"a b\" is no name for a job"),
        (&["--slurm", "--print", "--time", "1 hour"], "--time is \"1 hour\""),
        (&["--slurm", "--print", "--sbatch=exclusive"], "no option of sbatch"),
        (
            &["--kubernetes", "--print", "--image", "i", "--name", "A"],
            "no name for a job of Kubernetes",
        ),
    ] {
        let refused = launch(folder.path(), &[options, &["--", "true"]].concat());
        assert!(refused.error().contains(expected), "{refused:?}");
    }
    // What the command line itself cannot mean.
    for options in [
        &["--workers", "0", "--", "true"][..],
        &["--workers", "2", "--slurm", "--", "true"],
        &["--nodes", "2", "--", "true"],
        &["--slurm", "--kubernetes", "--print", "--", "true"],
        &["--kubernetes", "--image", "i", "--", "true"],
        &["--kubernetes", "--print", "--", "true"],
        &["--print", "--", "true"],
        &["--workers", "2"],
    ] {
        let refused = launch(folder.path(), options);
        assert_eq!(refused.code, Some(2), "{options:?}: {refused:?}");
    }
}
