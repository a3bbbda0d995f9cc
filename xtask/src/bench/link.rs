//! Steps of two workers over a slow link: in a network namespace whose loopback lets through so much
//! and no more. What is sent while the backward pass computes is hidden there, and half as many bytes take
//! half as long.

use super::train::Bench;
use super::worker::Worker;
use super::{Case, case, median};
use anyhow::Result;
use std::process::{Command, Stdio};

/// Bits a second.
const RATE: &str = "2gbit";
const WARM_UP: usize = 3;
/// A model with its label, and the measured steps of a round.
const MODELS: &[(&str, &str, usize)] =
    &[("mlp", "mlp, batch 256", 30), ("transformer-32", "transformer, batch 32", 4)];
/// Ways of ours.
const WAYS: [(&str, &str); 3] =
    [("tcp-whole", "after the pass"), ("tcp", "in buckets"), ("tcp-bf16", "in buckets, bf16")];

/// Nothing, and a word on why, where there can be no such link.
pub(super) fn cases(bench: &Bench) -> Result<Vec<Case>> {
    let mut probe = limited(&Command::new("true"));
    if !probe.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        eprintln!("link: not measured, for it needs network namespaces, `ip` and `tc`");
        return Ok(Vec::new());
    }
    let mut cases = Vec::new();
    for (model, label, steps) in MODELS {
        let start = |is_peer, way| Worker::start(limited(&bench.command(is_peer, model, 2, way)?));
        let mut peer = start(true, "cpu")?;
        let mut ours = WAYS.into_iter().map(|way| Ok((way.1, start(false, way.0)?)));
        let mut ours = ours.by_ref().collect::<Result<Vec<_>>>()?;
        let (mut theirs, mut seconds) = (Vec::new(), vec![Vec::new(); ours.len()]);
        for _ in 0..bench.rounds {
            theirs.extend(&peer.run(WARM_UP + steps)?.seconds[WARM_UP..]);
            for ((_, side), seconds) in ours.iter_mut().zip(&mut seconds) {
                seconds.extend(&side.run(WARM_UP + steps)?.seconds[WARM_UP..]);
            }
        }
        for ((way, _), seconds) in ours.iter().zip(&seconds) {
            let peer = (median(&theirs) * 1e3, peer.name.clone());
            let name = format!("{label}, link of {RATE}, {way}");
            cases.push(case(name, "ms", median(seconds) * 1e3, Some(peer), false));
        }
    }
    Ok(cases)
}

/// The same command behind such a link.
fn limited(command: &Command) -> Command {
    let script = format!(
        "ip link set lo up && tc qdisc add dev lo root tbf rate {RATE} burst 1mb latency 200ms && exec \"$@\""
    );
    let mut limited = Command::new("unshare");
    limited.args(["-rn", "sh", "-c", &script, "sh"]);
    limited.arg(command.get_program()).args(command.get_args());
    limited.stderr(Stdio::null());
    limited
}
