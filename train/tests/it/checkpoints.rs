//! When checkpoints are taken, what is in them, and what happens when one cannot be written.

use crate::Test;
use crate::digits::{Config, Harm, How, Outcome, Place, copy, is_of_time, train};
use mobula_core::checkpoint::Checkpoint;
use mobula_core::{Placement, RunDir, Runtime};
use mobula_train::optim::{Clip, LossScaleOptions, Mode, PlateauOptions, Schedule, UpdaterOptions};
use mobula_train::{
    BestCheckpoints, CheckpointConfig, Error, SavedState, ScalingConfig, Trainer, TrainingResult,
};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("checkpoints::a_run_goes_on_from_every_step_to_the_same_bits", every_step),
    ("checkpoints::what_a_lost_worker_gets_is_all_that_a_checkpoint_has", healed),
    ("checkpoints::writing_in_the_background_changes_nothing", in_background),
    ("checkpoints::the_best_stay", best),
    ("checkpoints::one_that_cannot_be_written_costs_no_training", unwritten),
    ("checkpoints::the_last_one_has_to_be_written", last_unwritten),
    ("checkpoints::never_is_not_a_number_of_steps", zero),
];

/// Ten steps an epoch, and all that an updater can remember.
fn config(epochs: u64) -> Config {
    let updater = UpdaterOptions {
        schedule: Some(Schedule::warmup(7).then(Schedule::cosine(40))),
        plateau: Some(PlateauOptions { patience: 0, ..Default::default() }),
        clip: Some(Clip::Norm(0.5)),
        ema: Some(0.9),
        loss_scale: Some(LossScaleOptions { growth_interval: 7, ..Default::default() }),
        ..Default::default()
    };
    Config { batch_size: 9, dropout: 0.2, updater: Some(updater), ..Config::new(epochs) }
}

fn run_in(root: &Path, name: &str) -> RunDir {
    RunDir::create(root, name, 5, &()).expect("run")
}

fn trainer(config: Config, checkpoints: CheckpointConfig, run: &RunDir) -> Trainer<Outcome> {
    let scaling = ScalingConfig { placement: Placement::Thread, ..ScalingConfig::workers(2) };
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false).with_run(run);
    trainer.with_scaling(scaling).with_checkpoints(checkpoints)
}

fn fit(runtime: &Runtime, config: Config, checkpoints: CheckpointConfig, run: &RunDir) -> Fit {
    trainer(config, checkpoints, run).fit(runtime)
}

type Fit = Result<TrainingResult<Outcome>, Error>;

/// All that a checkpoint holds, but for the time that steps took.
fn content(checkpoint: &Checkpoint) -> Vec<Content> {
    let mut saved: SavedState = checkpoint.json("state.json").expect("state");
    saved.tally.elapsed = Duration::ZERO;
    saved.metrics.retain(|name, _| !is_of_time(name));
    let saved = Content::from([("state".to_owned(), serde_json::to_vec(&saved).expect("JSON"))]);
    let names = ["model.safetensors", "optimizer.safetensors", "ema.safetensors"];
    names.into_iter().map(|name| tensors(&checkpoint.file(name))).chain([saved]).collect()
}

type Content = BTreeMap<String, Vec<u8>>;

/// Tensors by name, and metadata, whose order in the file is any.
fn tensors(path: &Path) -> Content {
    let bytes = std::fs::read(path).expect("a file");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a header");
    let tensors = SafeTensors::deserialize(&bytes).expect("tensors");
    let tensors = tensors.iter().map(|(name, tensor)| (name.to_owned(), tensor.data().to_vec()));
    let metadata = header.metadata().clone().unwrap_or_default();
    let metadata = metadata.into_iter().map(|(key, value)| (key, value.into_bytes()));
    tensors.chain(metadata).collect()
}

/// Whatever step of fifty a run ended at: weights, moments, averages, schedule, plateau, the scale of the
/// loss, the place in the epoch and the mean loss of it are in the end those of the run that did not.
fn every_step(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "whole");
    let whole = fit(runtime, config(5), of_all_steps(), &run).expect("fit");
    let whole = content(&whole.checkpoint.expect("checkpoint"));
    let paths = run.checkpoints(100).paths().expect("paths");
    assert_eq!(paths.len(), 50);
    for (at, path) in paths.iter().enumerate() {
        let run = run_in(root.path(), &format!("from-{at}"));
        let name = path.file_name().expect("name");
        copy(path, &run.checkpoints(1).dir().join(name));
        let resumed = fit(runtime, config(5), CheckpointConfig::default(), &run).expect("fit");
        assert_eq!(resumed.values[0].began_at, at as u64 + 1);
        assert!(content(&resumed.checkpoint.expect("checkpoint")) == whole, "from step {}", at + 1);
    }
    // The control: one more epoch is another result.
    let run = run_in(root.path(), "longer");
    let longer = fit(runtime, config(6), CheckpointConfig::default(), &run).expect("fit");
    assert!(content(&longer.checkpoint.expect("checkpoint")) != whole);
}

/// One of three workers is killed within an epoch, another time in the validation behind one.
fn healed(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let fit = |name, harm| {
        let run = run_in(root.path(), name);
        let trainer = Trainer::new(train::remote(Config { harm, ..config(3) })).with_run(&run);
        let trainer = trainer.with_logs_shown(false).with_scaling(ScalingConfig::workers(3));
        let fit = trainer.fit(runtime).expect("fit");
        let epochs = run.metrics().expect("metrics").into_iter();
        let epochs = epochs.filter_map(|line| line.values.get("epoch").map(|e| (*e, line.step)));
        assert_eq!(epochs.collect::<Vec<_>>(), [(1.0, 10), (2.0, 20), (3.0, 30)]);
        (content(&fit.checkpoint.expect("checkpoint")), fit.restarts)
    };
    let whole = fit("whole", Harm::None);
    for (name, place) in [("forward", Place::Forward), ("validation", Place::Validation)] {
        let places = vec![(place, root.path().join(format!("{name}-marker")))];
        let killed = fit(name, Harm::Once { how: How::Kill, places });
        assert_eq!((whole.1, killed.1), (0, 1));
        assert!(killed.0 == whole.0, "{name}");
    }
}

fn of_all_steps() -> CheckpointConfig {
    CheckpointConfig { every_steps: Some(1), keep: 100, asynchronous: false, ..Default::default() }
}

fn in_background(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let checkpoints = |asynchronous| {
        let run = run_in(root.path(), if asynchronous { "background" } else { "waited-for" });
        let checkpoints = CheckpointConfig { asynchronous, ..of_all_steps() };
        // So large that its copy takes about as long as a step: it would be torn if none waited.
        let config = Config { hidden: 20_000, ..config(3) };
        fit(runtime, config, checkpoints, &run).expect("fit");
        let paths = run.checkpoints(100).paths().expect("paths");
        let open = |path| Checkpoint::open(path).expect("valid");
        paths.into_iter().map(open).map(|one| (one.step(), content(&one))).collect()
    };
    let (some, all): (BTreeMap<_, _>, BTreeMap<_, _>) = (checkpoints(true), checkpoints(false));
    assert!(all.keys().copied().eq(1..=30));
    // One is written at a time; what is due meanwhile waits. How many there are depends on the disk.
    assert!([1, 30].iter().all(|step| some.contains_key(step)), "{:?}", some.keys());
    for (step, mut content) in some {
        let mut expected = all[&step].clone();
        if step == 10 || step == 20 {
            // Of the step, if it was still being written when that of the epoch was due.
            for content in [&mut content, &mut expected] {
                content.retain(|file| !file.contains_key("state"));
            }
        }
        let differ = content.iter().zip(&expected).filter(|(file, expected)| file != expected);
        let names: Vec<_> = differ.flat_map(|(file, _)| file.keys()).collect();
        assert!(content == expected, "at step {step}: {names:?}");
    }
}

/// The first epochs have the highest losses: old when the training ends.
fn best(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let best = BestCheckpoints { metric: "loss".to_owned(), mode: Mode::Max, keep: 2 };
    let checkpoints = CheckpointConfig {
        every_steps: Some(7),
        keep: 1,
        best: Some(best),
        asynchronous: false,
        ..Default::default()
    };
    let fit = fit(runtime, Config::new(6), checkpoints.clone(), &run).expect("fit");
    assert_eq!(fit.best_checkpoint.expect("the best").step(), 6);
    assert_eq!(fit.checkpoint.expect("the last").step(), 36);
    let paths = run.checkpoints(1).paths().expect("paths");
    let steps: Vec<_> = paths.iter().map(|p| Checkpoint::open(p).expect("valid").step()).collect();
    assert_eq!(steps, [6, 12, 35, 36], "of the newest two, for the loss of a worker");
    let none = BestCheckpoints { metric: "beauty".to_owned(), mode: Mode::Max, keep: 1 };
    let checkpoints = CheckpointConfig { best: Some(none), ..checkpoints };
    let run = run_in(root.path(), "none");
    let error =
        trainer(Config::new(1), checkpoints, &run).fit(runtime).expect_err("no such metric");
    let text = error.to_string();
    assert!(text.contains("the best checkpoint depends on the metric \"beauty\", but"), "{text}");
    assert!(text.contains("accuracy") && text.contains("loss"), "{text}");
}

/// As a full disk would: the folder that it is to be written to cannot be made.
fn spoil(run: &RunDir, step: u64) {
    let dir = run.checkpoints(1).dir().to_owned();
    std::fs::create_dir_all(&dir).expect("folder");
    std::fs::write(dir.join(format!(".tmp-step-{step:010}")), "in the way").expect("file");
}

fn unwritten(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let whole = run_in(root.path(), "whole");
    let whole = fit(runtime, config(3), CheckpointConfig::default(), &whole).expect("fit");
    let run = run_in(root.path(), "spoilt");
    // If the one before it is still being written, it is taken later.
    (20..30).for_each(|step| spoil(&run, step));
    let keep = CheckpointConfig { keep: 9, ..Default::default() };
    let spoilt = fit(runtime, config(3), keep, &run).expect("goes on");
    assert_eq!(spoilt.values[0].weights, whole.values[0].weights);
    let paths = run.checkpoints(9).paths().expect("paths");
    let steps: Vec<_> = paths.iter().map(|p| Checkpoint::open(p).expect("valid").step()).collect();
    assert_eq!(steps, [10, 30]);
}

fn last_unwritten(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "spoilt");
    spoil(&run, 30);
    let waited_for = CheckpointConfig { asynchronous: false, ..Default::default() };
    let error = fit(runtime, config(3), waited_for, &run).expect_err("is lost");
    let text = error.to_string();
    assert!(text.contains(".tmp-step-0000000030"), "{text}");
    let latest = run.checkpoints(2).latest().expect("latest").expect("a checkpoint");
    assert_eq!(latest.step(), 20, "the one before it stays");
}

fn zero(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = run_in(root.path(), "r");
    let every = CheckpointConfig { every_steps: Some(0), ..Default::default() };
    let error = fit(runtime, config(1), every, &run).expect_err("zero").to_string();
    assert_eq!(error, "option every_steps is 0, expected at least 1, or none");
}
