//! `mobula runs plot`: the curves of runs, as one SVG.

use super::curves::{self, Axis, Shape};
use super::{chart, find};
use crate::cli::output::print;
use anyhow::{Context, ensure};
use mobula_core::run::MetricsLine;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The names of runs, or their folders
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<String>,
    /// A metric to draw, in a panel of its own; may be repeated [default: loss, and what epochs report
    /// besides]
    #[arg(long, value_name = "NAME")]
    metric: Vec<String>,
    /// The file to write; one that is there is replaced
    #[arg(long, value_name = "FILE", default_value = "plot.svg")]
    out: PathBuf,
    /// What to draw against: steps, the time since the run began, or epochs
    #[arg(long, value_enum, default_value_t = Axis::Step)]
    x: Axis,
    /// Smooth curves by a moving average that forgets 1 - F at each point, as TensorBoard does
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    smooth: f64,
    /// Draw values on a logarithmic scale; those that are not above 0 are left out
    #[arg(long)]
    log: bool,
    /// The folder of the runs
    #[arg(long, default_value = "runs")]
    root: PathBuf,
}

/// A run and what it has measured.
pub(super) struct Measured {
    pub(super) name: String,
    pub(super) lines: Vec<MetricsLine>,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let smooth = options.smooth;
    ensure!((0.0..1.0).contains(&smooth), "--smooth is {smooth}: expected 0 or more, and below 1");
    let runs = options.runs.iter().map(|run| measured(run, options));
    let runs = told_apart(runs.collect::<anyhow::Result<Vec<_>>>()?);
    let metrics = chosen(&options.metric, &runs)?;
    let shape = Shape { x: options.x, smooth, log: options.log };
    let panels = metrics.iter().map(|metric| curves::panel(metric, &runs, shape));
    let panels = panels.collect::<anyhow::Result<Vec<_>>>()?;
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let svg = chart::svg(&panels, &names, options.log)?;
    write(&options.out, &svg)?;
    print(format!("{}: {} of {}", options.out.display(), metrics.join(", "), names.join(", ")))
}

fn measured(run: &str, options: &Options) -> anyhow::Result<Measured> {
    let run = find(run, &options.root)?;
    let lines = run.metrics()?;
    ensure!(!lines.is_empty(), "the run {} has no metrics yet", run.path().display());
    Ok(Measured { name: run.name(), lines })
}

/// Runs of one name in several folders are numbered.
fn told_apart(mut runs: Vec<Measured>) -> Vec<Measured> {
    let mut known = BTreeSet::new();
    for run in &mut runs {
        let mut names = std::iter::once(run.name.clone())
            .chain((2u32..).map(|number| format!("{} ({number})", run.name)));
        if let Some(name) = names.find(|name| !known.contains(name)) {
            run.name = name;
        }
        known.insert(run.name.clone());
    }
    runs
}

/// The metrics that were asked for, if there are such, or those that tell most.
fn chosen(asked: &[String], runs: &[Measured]) -> anyhow::Result<Vec<String>> {
    let lines = runs.iter().flat_map(|run| &run.lines);
    let known: BTreeSet<&str> =
        lines.flat_map(|line| line.values.keys()).map(String::as_str).collect();
    if asked.is_empty() {
        let telling = telling(&known);
        ensure!(
            !telling.is_empty(),
            "no metric tells how it went; name some with --metric: {}",
            list(&known)
        );
        return Ok(telling);
    }
    let mut metrics: Vec<String> = Vec::new();
    for metric in asked {
        ensure!(
            known.contains(metric.as_str()),
            "there is no metric {metric:?}; there are: {}",
            list(&known)
        );
        if !metrics.contains(metric) {
            metrics.push(metric.clone());
        }
    }
    Ok(metrics)
}

fn list(names: &BTreeSet<&str>) -> String {
    names.iter().copied().collect::<Vec<_>>().join(", ")
}

/// The loss and evaluations. A run whose first epoch has yet to end has the loss of single steps.
fn telling(known: &BTreeSet<&str>) -> Vec<String> {
    // What the trainer adds to each epoch.
    const DULL: [&str; 5] = ["epoch", "loss_scale", "lr", "samples_per_second", "skipped_steps"];
    let of_epochs = known.iter().filter(|name| !name.contains('/') && !DULL.contains(*name));
    let mut names: Vec<String> = of_epochs.map(|name| (*name).to_owned()).collect();
    names.sort_by_key(|name| name != "loss");
    if names.is_empty() && known.contains("step/loss") {
        names.push("step/loss".to_owned());
    }
    names
}

fn write(path: &Path, svg: &str) -> anyhow::Result<()> {
    std::fs::write(path, svg).with_context(|| format!("writing {}", path.display()))
}
