//! Layer `train`: a training step, ours against PyTorch on the CPU.

use super::agreement::{LOSS_STEPS, STRICT_STEPS, distance, same_loss};
use super::worker::Worker;
use super::{Case, median, peers};
use crate::command;
use anyhow::{Context, Result};
use cargo_metadata::MetadataCommand;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Steps at the start of a round that are not counted: they allocate the optimizer's state.
const WARM_UP: usize = 5;

/// By the end of a round, rounding has grown (see `agreement`); this says that all still train.
const ROUND_LOSS: f64 = 0.05;

/// Ours first, then the peers, on the same initial weights and batches.
struct Contest {
    ours: Side,
    peers: Vec<Side>,
    /// The matrix products alone.
    limit: Side,
}

struct Side {
    worker: Worker,
    seconds: Vec<f64>,
}

pub(super) fn run(quick: bool) -> Result<Vec<Case>> {
    let scratch = Scratch::new()?;
    let ours = build()?;
    let folder = command::root().join("bench/train");
    let python = peers::python(&folder.join("requirements.txt"))?;
    let fixture = scratch.0.join("fixture.safetensors");
    let mut write = Command::new(&ours);
    write.arg("fixture").arg(&fixture);
    command::run(write)?;
    let (rounds, steps) = if quick { (5, 30) } else { (20, 100) };
    let mut cases = Vec::new();
    for threads in [1, 2] {
        let start =
            |program: &Path, arguments: &[&str]| Side::start(program, arguments, &fixture, threads);
        let peer = folder.join("peer.py").display().to_string();
        let mut contest = Contest {
            ours: start(&ours, &["mlp"])?,
            peers: vec![start(&python, &[&peer, "eager"])?],
            limit: start(&python, &[&peer, "matmul"])?,
        };
        match start(&python, &[&peer, "compile"]) {
            Ok(compiled) => contest.peers.push(compiled),
            Err(error) => eprintln!("torch.compile does not work here, left out: {error:#}"),
        }
        contest.check_agreement(&scratch.0)?;
        contest.measure(rounds, steps)?;
        cases.push(contest.case(threads));
    }
    Ok(cases)
}

/// Builds ours in release, and says where it is.
fn build() -> Result<PathBuf> {
    command::cargo("build --release --package mobula-bench --bin bench-train")?;
    let metadata = MetadataCommand::new().current_dir(command::root()).no_deps().exec()?;
    Ok(metadata.target_directory.join("release/bench-train").into())
}

impl Side {
    fn start(program: &Path, arguments: &[&str], fixture: &Path, threads: usize) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments).arg(fixture).arg(threads.to_string());
        for variable in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"] {
            command.env(variable, threads.to_string());
        }
        Ok(Self { worker: Worker::start(command)?, seconds: Vec::new() })
    }

    /// The weights after the first steps, as a safetensors file.
    fn weights(&mut self, scratch: &Path) -> Result<Vec<u8>> {
        let path = scratch.join("weights.safetensors");
        self.worker.run(STRICT_STEPS)?;
        self.worker.save(&path)?;
        std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// The loss after `steps`, unmeasured.
    fn loss(&mut self, steps: usize) -> Result<f64> {
        self.worker.run(steps)?.loss.context("a side that trains has a loss")
    }

    /// One measured round; returns the last loss.
    fn round(&mut self, steps: usize) -> Result<Option<f64>> {
        // The side before may still be spinning in its thread pool.
        std::thread::sleep(Duration::from_millis(50));
        let round = self.worker.run(WARM_UP + steps)?;
        self.seconds.extend(&round.seconds[WARM_UP..]);
        Ok(round.loss)
    }

    fn milliseconds(&self) -> f64 {
        median(&self.seconds) * 1e3
    }

    fn report(&self) {
        let least = self.seconds.iter().copied().fold(f64::INFINITY, f64::min) * 1e3;
        eprintln!(
            "  {:<40} median {:>7.2} ms, minimum {least:>7.2} ms",
            self.worker.name,
            self.milliseconds()
        );
    }
}

impl Contest {
    /// The same steps must lead every side to the same weights, then to the same loss.
    fn check_agreement(&mut self, scratch: &Path) -> Result<()> {
        let ours = self.ours.weights(scratch)?;
        let our_loss = self.ours.loss(LOSS_STEPS)?;
        for peer in &mut self.peers {
            let distance = distance(&ours, &peer.weights(scratch)?)?;
            let (name, their_loss) = (peer.worker.name.clone(), peer.loss(LOSS_STEPS)?);
            eprintln!(
                "{name}: weights after {STRICT_STEPS} steps differ by {distance}; \
                 loss after {LOSS_STEPS} is {their_loss:.6}, ours {our_loss:.6}"
            );
            let agree = distance.check().and_then(|()| same_loss(our_loss, their_loss, 1e-3));
            agree.with_context(|| format!("ours and {name}"))?;
        }
        Ok(())
    }

    /// Alternates between the sides, so that a change of the machine's mood meets all of them.
    fn measure(&mut self, rounds: usize, steps: usize) -> Result<()> {
        for _ in 0..rounds {
            let ours = self.ours.round(steps)?.context("ours trains, so it has a loss")?;
            for peer in &mut self.peers {
                let theirs = peer.round(steps)?.context("a peer trains, so it has a loss")?;
                same_loss(ours, theirs, ROUND_LOSS)
                    .with_context(|| format!("ours and {}", peer.worker.name))?;
            }
            self.limit.round(steps)?;
        }
        Ok(())
    }

    fn case(&self, threads: usize) -> Case {
        let sides = [&self.ours].into_iter().chain(&self.peers).chain([&self.limit]);
        sides.for_each(Side::report);
        let best = self.peers.iter().min_by(|a, b| a.milliseconds().total_cmp(&b.milliseconds()));
        let ours = self.ours.milliseconds();
        let peer = best.map(Side::milliseconds);
        Case {
            case: format!("mlp 784-512-512-10, batch 256, {threads}t"),
            unit: "ms/step",
            ours,
            peer,
            peer_name: best.map(|peer| peer.worker.name.clone()),
            ratio: peer.map(|peer| peer / ours),
            limit: Some(self.limit.milliseconds()),
        }
    }
}

/// A temporary folder, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("mobula-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
