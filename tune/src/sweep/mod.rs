//! Sweep files: a study of any program, described in YAML as Weights & Biases users know it.
//!
//! ```yaml
//! name: digits
//! command: [cargo, run, --release, --, "${args}"]   # → --lr=0.01 --width=64
//! method: tpe                                       # grid | random | tpe
//! metric: {name: accuracy, goal: maximize}
//! parameters:
//!   lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-1}
//!   layers: {min: 1, max: 4}
//!   width: {values: [32, 64, 128]}
//!   epochs: {value: 9}
//! scheduler: {type: asha, max_t: 9, reduction_factor: 3}
//! run_cap: 16
//! ```

mod command;
mod file;
mod process;
mod tail;

use crate::{Error, Params, ResultGrid, SearchSpace, StopHandle, Trial};
use file::SweepFile;
use mobula_core::Runtime;
use mobula_core::error::AtPath;
use std::path::{Path, PathBuf};

/// A study whose trials are runs of a command.
///
/// Each trial is a process group of its own with `MOBULA_RUN_DIR` set to
/// `<root>/<sweep>/trial-<n>`. Its metric is read from `metrics.jsonl` in that folder, which
/// programs using Mobula write, and from lines of JSON that it prints, such as
/// `{"step": 1, "accuracy": 0.9}`; of two sources the one that is ahead counts. What it prints is
/// kept in `logs/rank-0.log`.
///
/// ```
/// use mobula_tune::Sweep;
///
/// let sweep = Sweep::parse(r#"
/// name: digits
/// command: [./train, "${args}"]
/// metric: {name: accuracy, goal: maximize}
/// parameters:
///   lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-1}
///   width: {values: [32, 64]}
/// "#)?;
/// assert_eq!(sweep.name(), "digits");
/// assert_eq!(sweep.space().parameters().len(), 2);
/// # Ok::<(), mobula_tune::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sweep {
    file: SweepFile,
    space: SearchSpace,
}

impl Sweep {
    /// Reads a sweep file; errors name the line, and for an unknown field those that are known.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).at("read", path)?;
        let wrap = |error: Error| Error::SweepFile { path: path.to_owned(), source: error.into() };
        Self::parse(&text).map_err(wrap)
    }

    /// The same from text.
    pub fn parse(yaml: &str) -> Result<Self, Error> {
        let file: SweepFile = serde_norway::from_str(yaml)
            .map_err(|error| Error::SweepFile { path: "sweep".into(), source: error.into() })?;
        let space = file.space()?;
        let sweep = Self { file, space };
        sweep.check()?;
        Ok(sweep)
    }

    fn check(&self) -> Result<(), Error> {
        let wrong = |field: &str, problem: &str| {
            Err(Error::SweepField { field: field.into(), problem: problem.into() })
        };
        let name = &self.file.name;
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
            return wrong("name", "is a folder's name: not empty, no slash, no dot in front");
        }
        if self.file.command.first().is_none_or(String::is_empty) {
            return wrong(
                "command",
                "is empty; expected a program and its arguments, such as [./train, \"${args}\"]",
            );
        }
        self.space.validate()?;
        // Every variable in the command is known before the first trial runs.
        let any = self.space.decode(&vec![0.0; self.space.parameters().len()]);
        self.command(&any).map(|_| ())
    }

    /// The sweep's name, also its folder's.
    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// Its search space.
    pub fn space(&self) -> &SearchSpace {
        &self.space
    }

    /// The command line of a trial with these parameters.
    pub fn command(&self, params: &Params) -> Result<Vec<String>, Error> {
        command::expand(&self.file.command, params)
    }

    /// The sweep's folder, with its journal `study.journal` and a folder a trial.
    pub fn folder(&self, root: impl AsRef<Path>) -> PathBuf {
        root.as_ref().join(&self.file.name)
    }

    /// Runs the sweep in `root/<name>`, or goes on with the one that is recorded there.
    pub fn run(&self, runtime: &Runtime, root: impl AsRef<Path>) -> Result<ResultGrid, Error> {
        self.run_until(runtime, root, StopHandle::default())
    }

    /// The same, until `stop` is used from another thread.
    pub fn run_until(
        &self,
        runtime: &Runtime,
        root: impl AsRef<Path>,
        stop: StopHandle,
    ) -> Result<ResultGrid, Error> {
        let root = std::path::absolute(root.as_ref()).at("find", root.as_ref())?;
        let (sweep, folder) = (self.clone(), self.folder(root));
        let tuner = self.file.tuner(self.space.clone())?;
        let tuner = tuner.with_journal(folder.join("study.journal")).with_stop(stop);
        tuner.run(runtime, move |trial| sweep.run_trial(trial, &folder))
    }

    fn run_trial(&self, trial: &mut Trial, folder: &Path) -> Result<(), Error> {
        let command = self.command(&trial.params)?;
        let run_dir = folder.join(format!("trial-{}", trial.number));
        make_way(&run_dir, trial.attempt)?;
        process::run(trial, &command, &run_dir, self.file.resources.threads())
    }
}

/// A trial that runs again keeps its folder if it holds checkpoints to go on from; otherwise what
/// the earlier attempt left is set aside, since a program may refuse to write over it.
fn make_way(run_dir: &Path, attempt: u32) -> Result<(), Error> {
    let checkpoints = run_dir.join("checkpoints");
    let has_checkpoint = checkpoints.read_dir().is_ok_and(|mut entries| entries.next().is_some());
    if run_dir.exists() && !has_checkpoint {
        let aside = run_dir.with_extension(format!("attempt-{}", attempt.saturating_sub(1)));
        if aside.exists() {
            std::fs::remove_dir_all(&aside).at("remove", &aside)?;
        }
        std::fs::rename(run_dir, &aside).at("set aside", run_dir)?;
    }
    let logs = run_dir.join("logs");
    std::fs::create_dir_all(&logs).at("create", &logs).map_err(Error::from)
}
