//! Fashion-MNIST to 90 % test accuracy on two workers: ours against PyTorch DDP over gloo, from the same
//! weights and over the same batches, for several of both.

use super::survival::{answer, script};
use super::train::Bench;
use super::{Case, case, median, peers};
use crate::command;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const WORKERS: &str = "2";
/// More than it takes, and as many as a fixture has the order of.
const EPOCHS: &str = "15";
const TARGET: f64 = 0.90;
/// By how much the sides may differ after the first epoch: 200 of the images, for rounding that has grown.
const AGREEMENT: f64 = 0.02;

const INSTALLED: &str = "/usr/share/datasets/fashion-mnist";
const FILES: [&str; 4] = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
];

/// What a side prints: after each epoch.
#[derive(Deserialize)]
struct Curve {
    name: String,
    accuracies: Vec<f64>,
    /// Since the training began, with the data in memory.
    seconds: Vec<f64>,
}

/// One training.
struct Trained {
    first_accuracy: f64,
    epochs: f64,
    epoch_seconds: f64,
    /// To the target, from the first step on, and from the start of the program to its end.
    seconds: f64,
    wall: f64,
}

struct Sides<'a> {
    bench: &'a Bench,
    data: PathBuf,
}

pub(super) fn cases(bench: &Bench, quick: bool) -> Result<Vec<Case>> {
    let sides = Sides { bench, data: data()? };
    let (mode, name) = sides.faster_peer()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for seed in 1..=if quick { 1 } else { 5 } {
        let fixture = sides.fixture(seed)?;
        let (one, other) = (sides.train(None, &fixture)?, sides.train(Some(mode), &fixture)?);
        let [a, b] = [&one, &other].map(|side| side.first_accuracy);
        ensure!((a - b).abs() < AGREEMENT, "the first epoch ends at {a} and, the peer's, at {b}");
        ours.push(one);
        theirs.push(other);
    }
    let middle =
        |all: &[Trained], of: fn(&Trained) -> f64| median(&all.iter().map(of).collect::<Vec<_>>());
    let both = |what: &str, unit, of: fn(&Trained) -> f64| {
        let peer = Some((middle(&theirs, of), name.clone()));
        case(format!("fashion, {what}"), unit, middle(&ours, of), peer, false)
    };
    Ok(vec![
        both("epochs to 90 %", "epochs", |one| one.epochs),
        both("an epoch with evaluation", "s", |one| one.epoch_seconds),
        both("training to 90 %", "s", |one| one.seconds),
        both("program start to end", "s", |one| one.wall),
    ])
}

impl Sides<'_> {
    /// By one epoch of each.
    fn faster_peer(&self) -> Result<(&'static str, String)> {
        let fixture = self.fixture(1)?;
        let mut fastest: Option<(f64, &'static str, String)> = None;
        for mode in ["eager", "channels-last"] {
            let curve: Curve = answer(self.command(Some(mode), &fixture, "1"))?;
            let seconds = *curve.seconds.last().context("an epoch")?;
            eprintln!("{}: {seconds:.1} s for an epoch", curve.name);
            if fastest.as_ref().is_none_or(|fastest| seconds < fastest.0) {
                fastest = Some((seconds, mode, curve.name));
            }
        }
        fastest.map(|(_, mode, name)| (mode, name)).context("a mode")
    }

    fn fixture(&self, seed: u64) -> Result<PathBuf> {
        let path = self.bench.scratch.path().join(format!("fashion-{seed}.safetensors"));
        if !path.exists() {
            let mut write = Command::new(&self.bench.ours);
            write.args(["fashion-fixture", &seed.to_string()]).arg(&path);
            command::run(write)?;
        }
        Ok(path)
    }

    fn command(&self, peer_mode: Option<&str>, fixture: &Path, epochs: &str) -> Command {
        let mut command = match peer_mode {
            Some(mode) => {
                let mut peer = Command::new(&self.bench.python);
                peer.args([&script("peer_fashion.py"), mode]);
                peer
            }
            None => {
                let mut ours = Command::new(&self.bench.ours);
                ours.arg("fashion");
                ours
            }
        };
        command.arg(&self.data).arg(fixture).args([WORKERS, epochs]);
        command
    }

    fn train(&self, peer_mode: Option<&str>, fixture: &Path) -> Result<Trained> {
        let start = Instant::now();
        let Curve { name, accuracies, seconds } = answer(self.command(peer_mode, fixture, EPOCHS))?;
        let wall = start.elapsed().as_secs_f64();
        let reached = accuracies.last().copied().unwrap_or(0.0);
        ensure!(reached >= TARGET, "{name} has come to {reached} in {EPOCHS} epochs");
        let (epochs, seconds) = (seconds.len() as f64, *seconds.last().context("an epoch")?);
        eprintln!("{name}: {reached:.4} after {epochs} epochs, {seconds:.1} s, {wall:.1} s in all");
        let first_accuracy = accuracies[0];
        Ok(Trained { first_accuracy, epochs, epoch_seconds: seconds / epochs, seconds, wall })
    }
}

/// A folder with the four files, unzipped.
fn data() -> Result<PathBuf> {
    let folder = peers::cache()?.join("fashion-mnist");
    if FILES.iter().all(|file| folder.join(file).exists()) {
        return Ok(folder);
    }
    std::fs::create_dir_all(&folder)?;
    let zipped = match Path::new(INSTALLED).exists() {
        true => PathBuf::from(INSTALLED),
        false => download(&folder)?,
    };
    for file in FILES {
        let part = folder.join(format!("{file}.part"));
        let mut unzip = Command::new("gzip");
        unzip.arg("-dc").arg(zipped.join(format!("{file}.gz"))).stdout(File::create(&part)?);
        let status = unzip.stdin(Stdio::null()).status().context("cannot start gzip")?;
        ensure!(status.success(), "gzip has not unzipped {file} ({status})");
        std::fs::rename(&part, folder.join(file))?;
    }
    Ok(folder)
}

/// Debian's package, which needs no root to be unpacked.
fn download(folder: &Path) -> Result<PathBuf> {
    const PACKAGE: &str = "dataset-fashion-mnist";
    let mut apt = Command::new("apt-get");
    apt.args(["download", PACKAGE]).current_dir(folder);
    let hint =
        || format!("getting {PACKAGE}: elsewhere than on Debian, put its files into {INSTALLED}");
    command::run(apt).with_context(hint)?;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            let mut unpack = Command::new("dpkg");
            unpack.arg("-x").arg(&path).arg(folder);
            command::run(unpack)?;
            std::fs::remove_file(&path)?;
        }
    }
    Ok(folder.join(INSTALLED.trim_start_matches('/')))
}
