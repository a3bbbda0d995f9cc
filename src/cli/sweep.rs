//! `mobula sweep`: hyperparameter search over any program that a sweep file names.

use super::output::{print, print_json};
use mobula::Runtime;
use mobula::tune::{Params, ResultGrid, Sweep, TrialResult};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Run the trials of a sweep file, or go on with them
    ///
    /// The journal and a folder for each trial go to ROOT/<the sweep's name>. Run the same command
    /// again to go on with a sweep that was interrupted.
    Run {
        /// The sweep file, YAML
        file: PathBuf,
        /// The folder of the runs
        #[arg(long, default_value = "runs")]
        root: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

pub(crate) fn run(command: &Command, runtime: &Runtime) -> anyhow::Result<()> {
    let Command::Run { file, root, json } = command;
    let sweep = Sweep::load(file)?;
    if *json {
        let results = stdout_to_stderr(|| sweep.run(runtime, root))?;
        return print_json(&Report::of(&results?)?);
    }
    // It prints the best trial itself.
    let results = sweep.run(runtime, root)?;
    print(format!("{results}\neverything is in {}", sweep.folder(root).display()))
}

/// Runs `work` with all that it prints on stderr: stdout is for the JSON alone.
fn stdout_to_stderr<T>(work: impl FnOnce() -> T) -> std::io::Result<T> {
    let stdout = rustix::io::dup(std::io::stdout())?;
    rustix::stdio::dup2_stdout(std::io::stderr())?;
    let result = work();
    std::io::stdout().flush()?;
    rustix::stdio::dup2_stdout(stdout)?;
    Ok(result)
}

#[derive(Serialize)]
struct Report<'a> {
    metric: &'a str,
    best: Line<'a>,
    trials: Vec<Line<'a>>,
}

#[derive(Serialize)]
struct Line<'a> {
    trial: usize,
    state: String,
    step: u64,
    /// None for a trial that reported nothing.
    value: Option<f64>,
    params: &'a Params,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

impl<'a> Report<'a> {
    fn of(results: &'a ResultGrid) -> anyhow::Result<Self> {
        Ok(Self {
            metric: &results.metric().name,
            best: Line::of(results.best()?),
            trials: results.trials().iter().map(Line::of).collect(),
        })
    }
}

impl<'a> Line<'a> {
    fn of(trial: &'a TrialResult) -> Self {
        Self {
            trial: trial.number,
            state: trial.state.to_string(),
            step: trial.step,
            value: trial.value.is_finite().then_some(trial.value),
            params: &trial.params,
            error: trial.error.as_deref(),
        }
    }
}
