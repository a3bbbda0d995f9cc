//! What a training costs beside its steps: a lost worker, and checkpoints. Ours against torchrun's
//! workers, which go on from their checkpoint, and PyTorch's distributed checkpoints.

use super::train::Bench;
use super::{Case, Scratch, case, median};
use crate::command;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::process::{Command, Stdio};

/// Longer than any of these should take, in seconds: torchrun's workers do not always come back.
const DEADLINE: &str = "90";

/// Of the steps from the one that takes a checkpoint on.
const TOUCHED: usize = 3;

#[derive(Deserialize)]
struct Recovered {
    seconds: f64,
    lost_steps: f64,
}

#[derive(Deserialize)]
struct Steps {
    /// From the end of each step to that of the next one, beginning with the first.
    seconds: Vec<f64>,
    /// Steps between checkpoints.
    every: usize,
}

pub(super) fn cases(bench: &Bench) -> Result<Vec<Case>> {
    let mut cases = recovery(bench)?;
    for (label, mode, peer_mode) in
        [("in the background", None, "async"), ("waited for", Some("waited-for"), "sync")]
    {
        let mut ours = Command::new(&bench.ours);
        ours.arg("checkpoint").args(mode);
        let mut peer = Command::new(&bench.python);
        peer.args([&script("peer_checkpoint.py"), peer_mode]);
        let ours = stall(&answer(ours)?)?;
        let peer = (stall(&answer(peer)?)?, "PyTorch DCP".to_owned());
        let name = format!("stall of a checkpoint of 100 M parameters, {label}");
        cases.push(case(name, "ms", ours * 1e3, Some((peer.0 * 1e3, peer.1)), false));
    }
    Ok(cases)
}

fn recovery(bench: &Bench) -> Result<Vec<Case>> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds {
        let mut command = Command::new(&bench.ours);
        command.arg("recover");
        ours.push(answer::<Recovered>(command)?);
        let scratch = Scratch::new()?;
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", DEADLINE]).arg(&bench.python);
        command.args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]);
        command.args(["--max-restarts", "3", &script("peer_recover.py")]).arg(scratch.path());
        match answer::<Recovered>(command) {
            Ok(recovered) => theirs.push(recovered),
            Err(error) => eprintln!("not counted, torchrun has not recovered: {error:#}"),
        }
    }
    let middle = |all: &[Recovered], of: fn(&Recovered) -> f64| {
        median(&all.iter().map(of).collect::<Vec<_>>())
    };
    let both = |name: &str, unit, of: fn(&Recovered) -> f64| {
        let peer = (!theirs.is_empty()).then(|| (middle(&theirs, of), "torchrun".to_owned()));
        case(name.to_owned(), unit, middle(&ours, of), peer, false)
    };
    let mut lost = both("steps done again after it", "steps", |one| one.lost_steps);
    // Of none there is no ratio.
    lost.ratio = None;
    Ok(vec![both("SIGKILL to the next step, 2 workers", "s", |one| one.seconds), lost])
}

pub(super) fn script(name: &str) -> String {
    command::root().join("bench/train").join(name).display().to_string()
}

/// The last line of JSON that it prints.
pub(super) fn answer<T: serde::de::DeserializeOwned>(mut command: Command) -> Result<T> {
    let program = format!("{command:?}");
    let output = command.stderr(Stdio::null()).output().with_context(|| program.clone())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().rev().find(|line| line.starts_with('{'));
    let line =
        line.with_context(|| format!("{program} ended with {} and no answer", output.status));
    serde_json::from_str(line?).with_context(|| program)
}

/// By how much the longest of the steps around a checkpoint is longer than the others are.
fn stall(steps: &Steps) -> Result<f64> {
    let Steps { seconds, every } = steps;
    let taken: Vec<usize> =
        (1..).map(|n| n * every - 2).take_while(|at| at + TOUCHED < seconds.len()).collect();
    ensure!(!taken.is_empty(), "no checkpoint in {} steps", seconds.len());
    let usual = median(seconds);
    let excess = |at: &usize| seconds[*at..at + TOUCHED].iter().fold(0.0, |a, b| b.max(a)) - usual;
    Ok(taken.iter().map(excess).sum::<f64>() / taken.len() as f64)
}
