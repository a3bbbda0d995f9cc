//! `mobula runs`: what ran, how far it got, what is left of it.

mod chart;
mod curves;
mod plot;

use super::output::{bytes, print, print_json, table};
use anyhow::bail;
use mobula::run::{RunInfo, RunStatus};
use mobula::{Checkpoint, Error, RunDir};
use mobula_core::run::utc;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List the runs in a folder, oldest first
    Ls(Place),
    /// Show a run: what it is, how it stands, its metrics, checkpoints and logs
    Show {
        /// The name of a run, or its folder
        run: String,
        #[command(flatten)]
        place: Place,
    },
    /// Draw the curves of runs as an SVG: a panel for each metric, a line for each run
    Plot(plot::Options),
}

#[derive(clap::Args)]
pub(crate) struct Place {
    /// The folder of the runs
    #[arg(long, default_value = "runs")]
    root: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Ls(place) => list(place),
        Command::Show { run, place } => show(run, place),
        Command::Plot(options) => plot::run(options),
    }
}

fn list(place: &Place) -> anyhow::Result<()> {
    let runs = RunDir::list(&place.root)?;
    let summaries: Vec<Summary> = runs.iter().map(Summary::of).collect();
    if place.json {
        return print_json(&summaries);
    }
    if summaries.is_empty() {
        return print(format!(
            "there are no runs in {}; programs make them there, or name another folder: --root DIR",
            place.root.display()
        ));
    }
    let header = ["name", "state", "created (UTC)", "step", "metrics", "checkpoint"];
    print(table(header, summaries.iter().map(Summary::row)))
}

/// A line of `runs ls`. A run whose files are damaged is listed with what can be read.
#[derive(Serialize)]
struct Summary {
    name: String,
    path: PathBuf,
    state: String,
    /// Seconds since 1970.
    created: Option<f64>,
    step: Option<u64>,
    metrics: BTreeMap<String, f64>,
    /// The step of the newest valid checkpoint.
    checkpoint: Option<u64>,
}

impl Summary {
    fn of(run: &RunDir) -> Self {
        let latest = Latest::of(run);
        Self {
            name: run.name(),
            path: run.path().to_owned(),
            state: run.status().map_or_else(|_| "unknown".to_owned(), |status| state(&status)),
            created: run.info().ok().map(|info| info.created),
            step: latest.step,
            metrics: latest.metrics,
            checkpoint: newest_valid(run),
        }
    }

    fn row(&self) -> [String; 6] {
        let step = |step: Option<u64>| step.map_or("-".to_owned(), |step| step.to_string());
        [
            self.name.clone(),
            self.state.clone(),
            self.created.map_or("-".to_owned(), utc),
            step(self.step),
            brief(&self.metrics),
            step(self.checkpoint),
        ]
    }
}

fn state(status: &RunStatus) -> String {
    format!("{:?}", status.state).to_lowercase()
}

fn newest_valid(run: &RunDir) -> Option<u64> {
    let paths = run.checkpoints(1).paths().unwrap_or_default();
    paths.iter().rev().find_map(|path| Checkpoint::open(path).ok()).map(|found| found.step())
}

/// The last value of every metric, and the last step.
#[derive(Default)]
struct Latest {
    step: Option<u64>,
    metrics: BTreeMap<String, f64>,
}

impl Latest {
    fn of(run: &RunDir) -> Self {
        let mut latest = Self::default();
        for line in run.metrics().unwrap_or_default() {
            latest.step = Some(line.step);
            latest.metrics.extend(line.values);
        }
        latest
    }
}

/// `accuracy 0.9712  loss 0.1034`: the three metrics that say most.
fn brief(metrics: &BTreeMap<String, f64>) -> String {
    const FIRST: [&str; 2] = ["accuracy", "loss"];
    // Names with a slash are of single steps, or of parts.
    const DULL: [&str; 2] = ["epoch", "samples_per_second"];
    let others = metrics.keys().map(String::as_str);
    let others =
        others.filter(|name| ![FIRST, DULL].concat().contains(name) && !name.contains('/'));
    let names = FIRST.into_iter().chain(others).filter(|name| metrics.contains_key(*name));
    let shown: Vec<String> =
        names.take(3).map(|name| format!("{name} {}", number(metrics[name]))).collect();
    if shown.is_empty() { "-".to_owned() } else { shown.join("  ") }
}

/// Four decimals where they tell something.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        1e-3..1e5 => format!("{value:.4}"),
        _ => format!("{value:.3e}"),
    }
}

fn show(name: &str, place: &Place) -> anyhow::Result<()> {
    let details = Details::of(&find(name, &place.root)?)?;
    if place.json { print_json(&details) } else { print(details.text()?) }
}

/// The run of this name in `root`, or in this folder.
fn find(name: &str, root: &Path) -> anyhow::Result<RunDir> {
    if let Ok(run) = RunDir::open(root.join(name)).or_else(|_| RunDir::open(name)) {
        return Ok(run);
    }
    let names: Vec<String> = RunDir::list(root)?.iter().map(RunDir::name).collect();
    let root = root.display();
    match names.is_empty() {
        true => bail!(
            "there is no run {name:?}, and none at all in {root}; --root DIR names another folder"
        ),
        false => bail!("there is no run {name:?} in {root}; there are: {}", names.join(", ")),
    }
}

/// All that `runs show` tells.
#[derive(Serialize)]
struct Details {
    path: PathBuf,
    info: RunInfo,
    status: RunStatus,
    step: Option<u64>,
    metrics: BTreeMap<String, f64>,
    checkpoints: Vec<CheckpointLine>,
    logs: Vec<Log>,
}

#[derive(Serialize)]
struct CheckpointLine {
    path: PathBuf,
    step: Option<u64>,
    valid: bool,
    /// Why it is not valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Serialize)]
struct Log {
    path: PathBuf,
    bytes: u64,
}

impl Details {
    fn of(run: &RunDir) -> anyhow::Result<Self> {
        let latest = Latest::of(run);
        let checkpoints = run.checkpoints(1).paths()?;
        Ok(Self {
            path: run.path().to_owned(),
            info: run.info()?,
            status: run.status()?,
            step: latest.step,
            metrics: latest.metrics,
            checkpoints: checkpoints.into_iter().map(CheckpointLine::of).collect(),
            logs: logs(&run.path().join("logs")),
        })
    }

    fn text(&self) -> anyhow::Result<String> {
        let info = &self.info;
        let mut lines = vec![
            format!("{:<12} {}", "run", info.name),
            format!("{:<12} {}", "folder", self.path.display()),
            format!(
                "{:<12} {} since {} UTC",
                "state",
                state(&self.status),
                utc(self.status.changed)
            ),
            format!("{:<12} {} UTC, by mobula {}", "created", utc(info.created), info.version),
            format!("{:<12} {}", "command", info.argv.join(" ")),
            format!("{:<12} {}", "in", info.cwd.display()),
            format!("{:<12} {}", "git", info.git.as_deref().unwrap_or("-")),
            format!("{:<12} {}", "seed", info.seed),
            format!("{:<12} {}", "config", serde_json::to_string(&info.config)?),
        ];
        let step = self.step.map_or("no step yet".to_owned(), |step| format!("at step {step}"));
        section(&mut lines, &format!("metrics, {step}"), self.metrics.iter(), |(name, value)| {
            format!("{name:<24} {}", number(*value))
        });
        section(&mut lines, "checkpoints", &self.checkpoints, CheckpointLine::text);
        section(&mut lines, "logs", &self.logs, |log| {
            format!("{:<24} {}", file_name(&log.path), bytes(log.bytes))
        });
        Ok(lines.join("\n"))
    }
}

fn section<T>(
    lines: &mut Vec<String>,
    title: &str,
    items: impl IntoIterator<Item = T>,
    text: impl Fn(T) -> String,
) {
    lines.push(format!("\n{title}"));
    let before = lines.len();
    lines.extend(items.into_iter().map(|item| format!("  {}", text(item))));
    if lines.len() == before {
        lines.push("  none".to_owned());
    }
}

impl CheckpointLine {
    fn of(path: PathBuf) -> Self {
        let opened = Checkpoint::open(&path);
        let reason = opened.as_ref().err().map(|error| match error {
            Error::CheckpointInvalid { reason, .. } => reason.clone(),
            other => other.to_string(),
        });
        let step = opened.ok().map(|checkpoint| checkpoint.step());
        Self { valid: reason.is_none(), path, step, reason }
    }

    fn text(&self) -> String {
        let name = file_name(&self.path);
        match &self.reason {
            None => format!("{name:<24} valid"),
            Some(reason) => format!("{name:<24} invalid: {reason}"),
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The files in the folder of the logs, by name; a run without one has none.
fn logs(folder: &Path) -> Vec<Log> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let log = |entry: std::fs::DirEntry| {
        Some(Log { bytes: entry.metadata().ok()?.len(), path: entry.path() })
    };
    let mut logs: Vec<Log> = entries.filter_map(log).collect();
    logs.sort_by(|a, b| a.path.cmp(&b.path));
    logs
}
