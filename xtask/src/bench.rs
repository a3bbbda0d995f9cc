//! `cargo xtask bench`: ours against pinned peers, alternately, on the same work, in one run.

mod agreement;
mod core;
mod data;
mod fashion;
mod link;
mod nn;
pub(crate) mod peers;
mod survival;
mod train;
mod worker;

use crate::command;
use anyhow::{Context, Result};
use cargo_metadata::MetadataCommand;
use serde::Serialize;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to measure
    layer: Layer,
    /// Only cases whose names contain this
    #[arg(long, default_value = "")]
    only: String,
    /// Fewer rounds: good for a look, not for a claim
    #[arg(long)]
    quick: bool,
    /// Print one JSON object per case instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Layer {
    Core,
    Data,
    Nn,
    Train,
}

/// One measured case. Ours and the peer's figure are medians in `unit`.
#[derive(Debug, Serialize)]
struct Case {
    case: String,
    unit: &'static str,
    ours: f64,
    /// Missing in a row that only shows a limit or a figure.
    peer: Option<f64>,
    peer_name: Option<String>,
    /// Above 1 when ours is better, whichever way the unit counts.
    ratio: Option<f64>,
    /// What the machine or the library allows, in `unit`, where it is known.
    limit: Option<f64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    warn_if_busy();
    let cases = match options.layer {
        Layer::Core => core::run(options.quick)?,
        Layer::Data => data::run(options.quick, &options.only)?,
        Layer::Nn => nn::run(options.quick, &options.only)?,
        Layer::Train => train::run(options.quick, &options.only)?,
    };
    if options.json {
        return print_json(&cases);
    }
    print_table(&cases);
    Ok(())
}

/// Figures from a machine that does other work are noise, and two sides suffer differently.
fn warn_if_busy() {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0);
    if load > 0.5 {
        eprintln!(
            "warning: this machine is busy (load {load}): repeat this on a quiet one before you quote it"
        );
    }
}

fn print_json(cases: &[Case]) -> Result<()> {
    for case in cases {
        println!("{}", serde_json::to_string(case)?);
    }
    Ok(())
}

fn print_table(cases: &[Case]) {
    let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
    println!(
        "{:<34} {:>8} {:>8} {:>6} {:>8}  unit, peer",
        "case", "ours", "peer", "ratio", "limit"
    );
    for case in cases {
        let (ours, peer) = (number(Some(case.ours)), number(case.peer));
        let (ratio, limit) = (number(case.ratio), number(case.limit));
        let name = case.peer_name.as_deref().unwrap_or("-");
        println!(
            "{:<34} {ours:>8} {peer:>8} {ratio:>6} {limit:>8}  {}, {name}",
            case.case, case.unit
        );
    }
    println!("ratio > 1: ours is better");
}

fn case(
    case: String,
    unit: &'static str,
    ours: f64,
    peer: Option<(f64, String)>,
    more_is_better: bool,
) -> Case {
    let (peer, peer_name) = peer.unzip();
    let ratio = peer.map(|peer| if more_is_better { ours / peer } else { peer / ours });
    Case { case, unit, ours, peer, peer_name, ratio, limit: None }
}

/// Builds one of our sides in release, and says where it is.
fn build(binary: &str) -> Result<PathBuf> {
    build_of("mobula-bench", binary)
}

/// The same of another package.
fn build_of(package: &str, binary: &str) -> Result<PathBuf> {
    command::cargo(&format!("build --release --package {package} --bin {binary}"))?;
    let metadata = MetadataCommand::new().current_dir(command::root()).no_deps().exec()?;
    Ok(metadata.target_directory.join("release").join(binary).into())
}

/// A temporary folder, removed at the end.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("mobula-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The middle of the sorted values, or the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn json_has_the_seven_fields_of_the_contract() {
        let case = Case {
            case: "a".into(),
            unit: "ms/step",
            ours: 2.0,
            peer: None,
            peer_name: None,
            ratio: None,
            limit: Some(1.0),
        };
        assert_eq!(
            serde_json::to_string(&case).expect("plain data"),
            r#"{"case":"a","unit":"ms/step","ours":2.0,"peer":null,"peer_name":null,"ratio":null,"limit":1.0}"#
        );
    }
}
