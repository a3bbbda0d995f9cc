//! Layer `nn`: training steps and inference of several models, ours against PyTorch on the CPU.

use super::agreement::{Answer, LOSS_STEPS, STRICT_STEPS, same_loss};
use super::worker::Worker;
use super::{Case, Scratch, median, peers};
use crate::command;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Steps at the start of a round that are not counted: they allocate the optimizer's state.
const WARM_UP: usize = 3;

/// PyTorch's mode whose answers are the truth.
const IN_F64: &str = "double";

/// By the end of a round, rounding has grown (see `agreement`); this says that all still train.
const ROUND_LOSS: f64 = 0.05;
/// The same where products are of `bf16`.
const ROUNDED_LOSS: f64 = 0.2;
/// What losses may differ by from those in `f64`, after few steps with products of `bf16`.
const FEW_ROUNDED_LOSS: f64 = 0.02;

/// A model, as `bench-nn` and the peer know it.
struct Model {
    name: &'static str,
    label: &'static str,
    /// Ways of PyTorch's that may be its best.
    modes: &'static [&'static str],
    /// Measured steps of a round: about a second.
    steps: usize,
    /// Rows of an inference.
    rows: &'static [usize],
}

const MODELS: &[Model] = &[
    Model {
        name: "mlp",
        label: "mlp 784-512-512-10, batch 256",
        modes: &["eager", "compile"],
        steps: 100,
        rows: &[1, 8, 64],
    },
    Model {
        name: "mlp-32",
        label: "mlp 784-512-512-10, batch 32",
        modes: &["eager", "compile"],
        steps: 300,
        rows: &[],
    },
    Model {
        name: "cnn",
        label: "cnn 32-64 on 28x28, batch 256",
        modes: &["eager", "compile", "channels-last"],
        steps: 10,
        rows: &[1, 8, 64],
    },
    Model {
        name: "resnet",
        label: "resnet-18 on 32x32, batch 64",
        modes: &["eager", "channels-last"],
        steps: 2,
        rows: &[1, 8, 64],
    },
    Model {
        name: "transformer",
        label: "transformer d=256, 4 layers, length 128, batch 16",
        modes: &["eager", "compile"],
        steps: 3,
        rows: &[1, 8, 16],
    },
    Model {
        name: "lstm",
        label: "lstm 256, length 64, batch 32",
        modes: &["eager"],
        steps: 10,
        rows: &[1, 8, 32],
    },
];

/// Who takes steps.
#[derive(Clone, Copy)]
enum Who<'a> {
    /// In a mode of `bench-nn`.
    Ours(&'a str),
    /// In a mode of PyTorch's.
    Peer(&'a str),
}

/// 10 million parameters, whose optimizer alone is measured.
const WIDE: Model = Model {
    name: "wide",
    label: "AdamW alone, 10 M parameters",
    modes: &["eager"],
    steps: 50,
    rows: &[],
};
const WIDE_PARAMETERS: f64 = 1e7;
/// Bytes of a parameter that AdamW moves: it reads weight, gradient and two moments, and writes all
/// but the gradient.
const ADAMW_BYTES: f64 = 28.0;

/// Programs and files of the whole comparison.
struct Bench {
    scratch: Scratch,
    ours: PathBuf,
    python: PathBuf,
    peer: String,
    quick: bool,
}

pub(super) fn run(quick: bool, only: &str) -> Result<Vec<Case>> {
    let folder = command::root().join("bench/nn");
    let bench = Bench {
        scratch: Scratch::new()?,
        ours: super::build("bench-nn")?,
        python: peers::python(&folder.join("requirements.txt"))?,
        peer: folder.join("peer.py").display().to_string(),
        quick,
    };
    let mut cases = Vec::new();
    for threads in [1, 2] {
        let peak = bench.peak(threads)?;
        for model in MODELS.iter().filter(|model| model.label.contains(only)) {
            eprintln!("{}, {threads}t", model.label);
            cases.extend(bench.compare(model, threads, peak)?);
            cases.push(bench.compare_rounded(model, threads)?);
        }
        if WIDE.label.contains(only) {
            eprintln!("{}, {threads}t", WIDE.label);
            cases.extend(bench.compare_updates(threads)?);
        }
    }
    Ok(cases)
}

impl Bench {
    /// The best rate of a large product, in GFLOP/s.
    fn peak(&self, threads: usize) -> Result<f64> {
        self.limit("peak", threads)
    }

    fn limit(&self, what: &str, threads: usize) -> Result<f64> {
        let mut limit = Command::new(&self.ours);
        set_threads(limit.arg(what), threads);
        Ok(command::output(limit)?.trim().parse()?)
    }

    fn start(&self, who: Who<'_>, model: &Model, threads: usize) -> Result<Side> {
        let fixture = self.scratch.path().join(format!("{}.safetensors", model.name));
        if !fixture.exists() {
            let mut write = Command::new(&self.ours);
            command::run({
                write.args(["fixture", model.name]).arg(&fixture);
                write
            })?;
        }
        let mut command = match who {
            Who::Ours(mode) => {
                let mut ours = Command::new(&self.ours);
                ours.arg(mode);
                ours
            }
            Who::Peer(mode) => {
                let mut python = Command::new(&self.python);
                python.args([&self.peer, mode]);
                python
            }
        };
        command.arg(model.name).arg(&fixture).arg(threads.to_string());
        set_threads(&mut command, threads);
        Ok(Side { worker: Worker::start(command)?, seconds: Vec::new() })
    }

    /// Ours, and the peers that work here.
    fn contest<'a>(&self, model: &'a Model, threads: usize) -> Result<Contest<'a>> {
        let ours = self.start(Who::Ours("train"), model, threads)?;
        Ok(self.with_peers(model, ours, threads, |mode| mode.to_owned()))
    }

    /// The same with products of `bf16`.
    fn rounded<'a>(&self, model: &'a Model, threads: usize) -> Result<Contest<'a>> {
        let ours = self.start(Who::Ours("bf16"), model, threads)?;
        Ok(self.with_peers(model, ours, threads, |mode| format!("bf16-{mode}")))
    }

    fn with_peers<'a>(
        &self,
        model: &'a Model,
        ours: Side,
        threads: usize,
        mode: impl Fn(&str) -> String,
    ) -> Contest<'a> {
        let mut contest = Contest { model, ours, peers: Vec::new() };
        for mode in model.modes.iter().map(|name| mode(name)) {
            match self.start(Who::Peer(&mode), model, threads) {
                Ok(peer) => contest.peers.push(peer),
                Err(error) => eprintln!("{mode} does not work here, left out: {error:#}"),
            }
        }
        contest
    }

    fn compare(&self, model: &Model, threads: usize, peak: f64) -> Result<Vec<Case>> {
        let mut contest = self.contest(model, threads)?;
        let memory = contest.memory(threads);
        let reference = self.start(Who::Peer(IN_F64), model, threads)?;
        contest.check_agreement(self.scratch.path(), reference)?;
        let rounds = self.rounds();
        contest.measure(rounds, ROUND_LOSS)?;
        let mut cases = contest.steps(threads, peak);
        cases.extend(memory);
        for rows in model.rows {
            cases.push(contest.inference(*rows, threads, rounds)?);
        }
        Ok(cases)
    }

    /// Steps with products of `bf16`. Rounding makes the weights too different to compare: the losses
    /// of a few steps have to be those in `f64`, about.
    fn compare_rounded(&self, model: &Model, threads: usize) -> Result<Case> {
        let mut contest = self.rounded(model, threads)?;
        let mut reference = self.start(Who::Peer(IN_F64), model, threads)?;
        let truth = reference.early_loss()?;
        for side in contest.sides() {
            same_loss(side.early_loss()?, truth, FEW_ROUNDED_LOSS)
                .with_context(|| format!("{} and the same in f64", side.worker.name))?;
        }
        contest.measure(self.rounds(), ROUNDED_LOSS)?;
        contest.sides().for_each(|side| side.report("bf16 step"));
        let (ours, best) = (contest.ours.milliseconds(), contest.best());
        Ok(contest.case("step in bf16", "ms", threads, ours, best, None))
    }

    fn rounds(&self) -> usize {
        if self.quick { 3 } else { 10 }
    }

    fn compare_updates(&self, threads: usize) -> Result<Vec<Case>> {
        let bandwidth = self.limit("bandwidth", threads)?;
        let mut contest = self.contest(&WIDE, threads)?;
        let reference = self.start(Who::Peer(IN_F64), &WIDE, threads)?;
        contest.check_agreement(self.scratch.path(), reference)?;
        for _ in 0..self.rounds() {
            contest.sides().try_for_each(Side::update)?;
        }
        contest.sides().for_each(|side| side.report("update"));
        let (ours, best) = (contest.ours.milliseconds(), contest.best());
        let rate = |milliseconds: f64| WIDE_PARAMETERS * ADAMW_BYTES / milliseconds / 1e6;
        let peer = best.clone().map(|(peer, name)| (rate(peer), name));
        let mut gigabytes =
            contest.case("update", "GB/s", threads, rate(ours), peer, Some(bandwidth));
        gigabytes.ratio = gigabytes.ratio.map(|ratio| 1.0 / ratio);
        Ok(vec![contest.case("update", "ms", threads, ours, best, None), gigabytes])
    }
}

fn set_threads(command: &mut Command, threads: usize) {
    for variable in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"] {
        command.env(variable, threads.to_string());
    }
}

/// Ours and the peers, on the same initial weights and batches.
struct Contest<'a> {
    model: &'a Model,
    ours: Side,
    peers: Vec<Side>,
}

struct Side {
    worker: Worker,
    seconds: Vec<f64>,
}

impl Side {
    /// What some unmeasured steps come to.
    fn answer(&mut self, scratch: &Path) -> Result<Answer> {
        let path = scratch.join("weights.safetensors");
        self.worker.run(STRICT_STEPS)?;
        self.worker.save(&path)?;
        let weights =
            std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Answer { weights, loss: self.loss()? })
    }

    /// What some unmeasured steps come to.
    fn loss(&mut self) -> Result<f64> {
        self.worker.run(LOSS_STEPS)?.loss.context("a side that trains has a loss")
    }

    /// The same before small differences have grown, as they do in deep networks with batch norms.
    fn early_loss(&mut self) -> Result<f64> {
        self.worker.run(STRICT_STEPS)?.loss.context("a side that trains has a loss")
    }

    /// One measured round of the optimizer alone.
    fn update(&mut self) -> Result<()> {
        settle();
        let round = self.worker.update(WARM_UP + WIDE.steps)?;
        self.seconds.extend(&round.seconds[WARM_UP..]);
        Ok(())
    }

    /// One measured round; returns the last loss.
    fn round(&mut self, steps: usize) -> Result<f64> {
        settle();
        let round = self.worker.run(WARM_UP + steps)?;
        self.seconds.extend(&round.seconds[WARM_UP..]);
        round.loss.context("a side that trains has a loss")
    }

    fn infer(&mut self, rows: usize, steps: usize) -> Result<f64> {
        settle();
        let round = self.worker.infer(rows, steps)?;
        self.seconds.extend(&round.seconds);
        round.loss.context("an inference has a sum")
    }

    fn milliseconds(&self) -> f64 {
        median(&self.seconds) * 1e3
    }

    fn report(&self, what: &str) {
        let least = self.seconds.iter().copied().fold(f64::INFINITY, f64::min) * 1e3;
        eprintln!(
            "  {what:<10} {:<40} median {:>8.3} ms, minimum {least:>8.3} ms",
            self.worker.name,
            self.milliseconds()
        );
    }
}

/// The side before may still be spinning in its thread pool.
fn settle() {
    std::thread::sleep(Duration::from_millis(50));
}

impl Contest<'_> {
    fn sides(&mut self) -> impl Iterator<Item = &mut Side> {
        std::iter::once(&mut self.ours).chain(&mut self.peers)
    }

    /// The same steps must lead every side to what they lead to in `f64`.
    fn check_agreement(&mut self, scratch: &Path, mut reference: Side) -> Result<()> {
        let truth = reference.answer(scratch)?;
        let mut errors = Vec::new();
        for side in self.sides() {
            let error = side.answer(scratch)?.error(&truth)?;
            eprintln!("  {:<40} off by: {error}", side.worker.name);
            errors.push(error);
        }
        errors.remove(0).check(&errors)
    }

    /// Alternates between the sides, so that a change of the machine's mood meets all of them.
    fn measure(&mut self, rounds: usize, tolerance: f64) -> Result<()> {
        for _ in 0..rounds {
            let ours = self.ours.round(self.model.steps)?;
            for peer in &mut self.peers {
                let theirs = peer.round(self.model.steps)?;
                same_loss(ours, theirs, tolerance)
                    .with_context(|| format!("ours and {}", peer.worker.name))?;
            }
        }
        Ok(())
    }

    fn memory(&self, threads: usize) -> Option<Case> {
        // What is less is noise.
        let megabytes = |side: &Side| side.worker.bytes.map(|bytes| bytes.max(1e5) / 1e6);
        let peers =
            self.peers.iter().filter_map(|peer| Some((megabytes(peer)?, peer.worker.name.clone())));
        let least = peers.min_by(|a, b| a.0.total_cmp(&b.0));
        Some(self.case("peak memory", "MB", threads, megabytes(&self.ours)?, least, None))
    }

    /// The time of a step, and what that makes of the machine.
    fn steps(&mut self, threads: usize, peak: f64) -> Vec<Case> {
        self.sides().for_each(|side| side.report("step"));
        let (ours, best) = (self.ours.milliseconds(), self.best());
        let flops = self.peers.iter().find_map(|peer| peer.worker.flops);
        // PyTorch's counter does not see into its recurrent layers.
        let flops = flops.filter(|flops| *flops > 1e8);
        let step = self.case(
            "step",
            "ms",
            threads,
            ours,
            best.clone(),
            flops.map(|flops| flops / peak / 1e6),
        );
        let rate = flops.map(|flops| {
            let rate = |milliseconds: f64| flops / milliseconds / 1e6;
            let best = best.map(|(peer, name)| (rate(peer), name));
            let mut case = self.case("step", "GFLOP/s", threads, rate(ours), best, Some(peak));
            case.ratio = case.peer.map(|peer| case.ours / peer);
            case
        });
        [Some(step), rate].into_iter().flatten().collect()
    }

    fn inference(&mut self, rows: usize, threads: usize, rounds: usize) -> Result<Case> {
        self.sides().for_each(|side| side.seconds.clear());
        let steps = (self.model.steps * 3).clamp(5, 100);
        for _ in 0..rounds {
            let ours = self.ours.infer(rows, steps)?;
            for peer in &mut self.peers {
                let theirs = peer.infer(rows, steps)?;
                same_loss(ours, theirs, 1e-3)
                    .with_context(|| format!("ours and {}", peer.worker.name))?;
            }
        }
        let what = format!("{rows} rows");
        self.sides().for_each(|side| side.report(&what));
        let best = self.best();
        let what = format!("inference, {rows} rows");
        Ok(self.case(&what, "ms", threads, self.ours.milliseconds(), best, None))
    }

    /// The fastest peer.
    fn best(&self) -> Option<(f64, String)> {
        let peers = self.peers.iter().map(|peer| (peer.milliseconds(), peer.worker.name.clone()));
        peers.min_by(|a, b| a.0.total_cmp(&b.0))
    }

    fn case(
        &self,
        what: &str,
        unit: &'static str,
        threads: usize,
        ours: f64,
        peer: Option<(f64, String)>,
        limit: Option<f64>,
    ) -> Case {
        let (peer, peer_name) = peer.unzip();
        Case {
            case: format!("{}, {what}, {threads}t", self.model.label),
            unit,
            ours,
            peer,
            peer_name,
            ratio: peer.map(|peer| peer / ours),
            limit,
        }
    }
}
