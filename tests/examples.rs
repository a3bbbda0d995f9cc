//! The examples as a user meets them: run as programs, on small data. CI runs `pipeline` in full.
#![cfg(all(feature = "data", feature = "serve", feature = "train", feature = "tune"))]

#[path = "examples/idx.rs"]
mod idx;
#[path = "examples/program.rs"]
mod program;

use program::{Outcome, example};

/// The number behind `accuracy` in what a program printed.
fn accuracy(outcome: &Outcome) -> f64 {
    let after = outcome.stdout.split("accuracy ").nth(1).unwrap_or_default();
    let number = after.split_whitespace().next().unwrap_or_default();
    number.parse().unwrap_or_else(|_| panic!("no accuracy in {outcome}"))
}

#[test]
fn tabular_tells_penguins_apart_and_resumes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let train = |epochs| {
        let outcome =
            example("tabular").args(["--epochs", epochs, "--run", "p"]).run(folder.path());
        assert_eq!(outcome.code, Some(0), "{outcome}");
        outcome
    };
    let first = train("15");
    assert!(accuracy(&first) >= 0.95, "{first}");
    assert!(first.stdout.contains("species: Adelie, Chinstrap, Gentoo"), "{first}");
    assert!(!first.stderr.contains("continuing"), "{first}");

    let second = train("17");
    assert!(second.stderr.contains("p: continuing from step"), "{second}");
    assert!(accuracy(&second) >= 0.95, "{second}");
}

#[test]
fn tabular_is_a_trial_where_a_sweep_says_so() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let trial = folder.path().join("trial-0");
    let outcome = example("tabular")
        .args(["--validate", "--workers=1", "--epochs=2", "--lr=0.003", "--width=8"])
        .env(mobula::run::RUN_DIR_VARIABLE, &trial)
        .run(folder.path());
    assert_eq!(outcome.code, Some(0), "{outcome}");
    let run = mobula::RunDir::open(&trial).expect("the trial's run");
    assert_eq!(run.info().expect("run.json").config["lr"], 0.003);
    let measured = run.metrics().expect("metrics.jsonl");
    let epochs = measured.iter().filter(|line| line.values.contains_key("accuracy")).count();
    assert_eq!(epochs, 2, "{outcome}");
    assert!(!folder.path().join("runs").exists(), "{outcome}");
}

#[test]
fn the_sweep_file_gives_flags_that_tabular_knows() {
    use mobula::tune::{ParamValue, Sweep};
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/sweep.yaml");
    let sweep = Sweep::load(path).expect("a sweep file");
    let given = [
        ("lr", ParamValue::Float(0.01)),
        ("width", ParamValue::Int(8)),
        ("dropout", ParamValue::Float(0.0)),
    ];
    let names: Vec<_> = sweep.space().parameters().iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, given.each_ref().map(|(name, _)| *name));
    let params = given.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let command = sweep.command(&params).expect("a command line");
    let flags = command.iter().skip_while(|argument| *argument != "--").skip(1);

    let folder = tempfile::tempdir().expect("temporary folder");
    let outcome = example("tabular").args(flags).args(["--help"]).run(folder.path());
    assert_eq!(outcome.code, Some(0), "{outcome}");
}

#[test]
fn fashion_mnist_says_what_is_missing() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let data = folder.path().join("nowhere");
    let outcome =
        example("fashion_mnist").args(["--data".as_ref(), data.as_os_str()]).run(folder.path());
    assert_eq!(outcome.code, Some(2), "{outcome}");
    let files = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"];
    for said in
        files.into_iter().chain(["nowhere", "apt-get install dataset-fashion-mnist", "--data"])
    {
        assert!(outcome.stderr.contains(said), "no {said} in {outcome}");
    }
    assert!(!folder.path().join("runs").exists(), "{outcome}");
}

#[test]
fn fashion_mnist_learns_from_tiny_files() {
    let folder = tempfile::tempdir().expect("temporary folder");
    idx::write_dataset(folder.path(), 256, 64);
    let outcome = example("fashion_mnist")
        .args(["--data", ".", "--workers", "2", "--epochs", "3", "--batch-size", "16"])
        .args(["--run", "tiny"])
        .run(folder.path());
    assert_eq!(outcome.code, Some(0), "{outcome}");
    assert!(outcome.stdout.contains("256 images to train on, 64 to test on"), "{outcome}");
    // Ten classes: chance is 0.1.
    assert!(accuracy(&outcome) >= 0.9, "{outcome}");
    let run = mobula::RunDir::open(folder.path().join("runs/tiny")).expect("the run");
    let newest = run.checkpoints(2).latest().expect("checkpoints").expect("a checkpoint");
    assert_eq!(newest.step(), 3 * 256 / 16);
}

#[test]
fn pipeline_describes_itself() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let outcome = example("pipeline").args(["--help"]).run(folder.path());
    assert_eq!(outcome.code, Some(0), "{outcome}");
    assert!(outcome.stdout.contains("--keep-serving"), "{outcome}");
}
