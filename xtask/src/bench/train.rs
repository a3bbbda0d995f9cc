//! Layer `train`: sums over workers and data-parallel steps, ours against PyTorch's
//! `DistributedDataParallel` over Gloo on the CPU, with one thread a worker on both sides.

use super::agreement::same_loss;
use super::worker::Worker;
use super::{Case, Scratch, case, fashion, link, median, peers, survival};
use crate::command;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// Steps at the start of a round that are not counted.
const WARM_UP: usize = 3;

/// What ranks of different sides have after a round differs by rounding that has grown.
const ROUND_LOSS: f64 = 0.05;

/// Numbers of a sum with their label, and how often it is done in a round.
const SUMS: &[(usize, &str, usize)] =
    &[(1024, "4 KiB", 1000), (1 << 18, "1 MiB", 200), (25 << 18, "25 MiB", 30)];

/// A model with its label, the rows of its global batch, and the measured steps of a round.
const MODELS: &[(&str, &str, usize, usize)] = &[
    ("mlp", "mlp, batch 256", 256, 60),
    ("cnn", "cnn, batch 256", 256, 12),
    ("transformer-32", "transformer, batch 32", 32, 4),
];

pub(super) struct Bench {
    pub(super) scratch: Scratch,
    pub(super) ours: PathBuf,
    pub(super) python: PathBuf,
    peer: String,
    pub(super) rounds: usize,
}

pub(super) fn run(quick: bool, only: &str) -> Result<Vec<Case>> {
    let folder = command::root().join("bench");
    let bench = Bench {
        scratch: Scratch::new()?,
        ours: super::build("bench-train")?,
        python: peers::python(&folder.join("nn/requirements.txt"))?,
        peer: folder.join("train/peer.py").display().to_string(),
        rounds: if quick { 3 } else { 10 },
    };
    let mut cases = Vec::new();
    for workers in [2, 4] {
        if "sums".contains(only) {
            cases.extend(bench.sums(workers)?);
        }
    }
    if "survival".contains(only) {
        cases.extend(survival::cases(&bench)?);
    }
    if "fashion".contains(only) {
        cases.extend(fashion::cases(&bench, quick)?);
    }
    if "link".contains(only) {
        cases.extend(link::cases(&bench)?);
    }
    for (name, label, rows, steps) in MODELS.iter().filter(|model| model.1.contains(only)) {
        let mut alone = None;
        for workers in [1, 2] {
            eprintln!("{label}, {workers} workers");
            let (ours, mut found) = bench.steps(name, label, workers, (*rows, *steps))?;
            cases.append(&mut found);
            let gain = alone.map(|alone: f64| ours / alone);
            cases.extend(
                gain.map(|gain| case(format!("{label}, 2 workers over 1"), "x", gain, None, true)),
            );
            alone = Some(ours);
        }
    }
    Ok(cases)
}

impl Bench {
    fn start(&self, is_peer: bool, model: &str, workers: usize, way: &str) -> Result<Worker> {
        let mut command = self.command(is_peer, model, workers, way)?;
        // What it shows of its progress would hide ours.
        command.stderr(std::process::Stdio::null());
        Worker::start(command)
    }

    /// What starts a side.
    pub(super) fn command(
        &self,
        is_peer: bool,
        model: &str,
        workers: usize,
        way: &str,
    ) -> Result<Command> {
        let fixture = self.scratch.path().join(format!("{model}.safetensors"));
        if !fixture.exists() {
            let mut write = Command::new(&self.ours);
            write.args(["fixture", model]).arg(&fixture);
            command::run(write)?;
        }
        let mut command = match is_peer {
            false => {
                let mut ours = Command::new(&self.ours);
                ours.arg("train");
                ours
            }
            true => {
                let mut python = Command::new(&self.python);
                python.args([&self.peer, "eager"]);
                python
            }
        };
        command.arg(model).arg(&fixture).args([&workers.to_string(), way]);
        Ok(command)
    }

    /// The sum over the workers, through shared memory and over sockets.
    fn sums(&self, workers: usize) -> Result<Vec<Case>> {
        let mut peer = self.start(true, "mlp", workers, "cpu")?;
        let mut ours = [("shared memory", "cpu"), ("sockets", "tcp")]
            .map(|(label, way)| Ok((label, self.start(false, "mlp", workers, way)?)))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let mut cases = Vec::new();
        for (len, size, times) in SUMS {
            let mut seconds = vec![Vec::new(); ours.len()];
            let mut theirs = Vec::new();
            for _ in 0..self.rounds {
                for ((_, side), seconds) in ours.iter_mut().zip(&mut seconds) {
                    seconds.extend(&side.reduce(*len, WARM_UP + times)?.seconds[WARM_UP..]);
                }
                theirs.extend(&peer.reduce(*len, WARM_UP + times)?.seconds[WARM_UP..]);
            }
            for ((label, _), seconds) in ours.iter().zip(&seconds) {
                let name = format!("sum of {size}, {label}, {workers} workers");
                let peer = (median(&theirs) * 1e3, peer.name.clone());
                cases.push(case(name, "ms", median(seconds) * 1e3, Some(peer), false));
            }
        }
        Ok(cases)
    }

    /// Samples a second; ours apart, too.
    fn steps(
        &self,
        model: &str,
        label: &str,
        workers: usize,
        (rows, steps): (usize, usize),
    ) -> Result<(f64, Vec<Case>)> {
        let mut ours = self.start(false, model, workers, "cpu")?;
        let mut peer = self.start(true, model, workers, "cpu")?;
        let (mut seconds, mut theirs, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            let round = ours.run(WARM_UP + steps)?;
            let other = peer.run(WARM_UP + steps)?;
            let losses = [&round, &other].map(|round| round.loss.context("a loss"));
            let [a, b] = losses;
            same_loss(a?, b?, ROUND_LOSS)?;
            seconds.extend(&round.seconds[WARM_UP..]);
            theirs.extend(&other.seconds[WARM_UP..]);
            starts.extend(round.startup);
        }
        let rate = |seconds: &[f64]| rows as f64 / median(seconds);
        let named = |what: &str| format!("{label}, {what}, {workers} workers");
        let theirs = (rate(&theirs), peer.name.clone());
        let start = median(&starts) * 1e3;
        Ok((
            rate(&seconds),
            vec![
                case(named("training"), "samples/s", rate(&seconds), Some(theirs), true),
                case(named("fit to first step"), "ms", start, None, false),
            ],
        ))
    }
}
