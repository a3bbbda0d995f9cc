//! The peers' virtual environments: each made once per list of pinned packages, then reused.

use crate::command;
use anyhow::{Context, Result};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Python of an environment with exactly the packages of `requirements`.
pub(crate) fn python(requirements: &Path) -> Result<PathBuf> {
    let list = std::fs::read_to_string(requirements)
        .with_context(|| format!("reading {}", requirements.display()))?;
    let mut version = Command::new("python3");
    version.arg("--version");
    let version = command::output(version).context("peers need python3 with its venv module")?;
    let mut hash = DefaultHasher::new();
    (list, version).hash(&mut hash);
    let environment = cache()?.join(format!("bench-venv-{:016x}", hash.finish()));
    let python = environment.join("bin/python");
    let complete = environment.join("complete");
    if !complete.exists() {
        install(&environment, &python, requirements)?;
        std::fs::write(&complete, "")?;
    }
    Ok(python)
}

fn install(environment: &Path, python: &Path, requirements: &Path) -> Result<()> {
    eprintln!("installing the peers into {}", environment.display());
    let mut venv = Command::new("python3");
    // `--clear`: what an interrupted installation left is no start.
    venv.args(["-m", "venv", "--clear"]).arg(environment);
    command::run(venv)
        .context("making a virtual environment (Debian: apt install python3-venv)")?;
    let mut pip = Command::new(python);
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--requirement",
    ])
    .arg(requirements);
    command::run(pip)
}

/// Where things that can be made again are kept: `$XDG_CACHE_HOME/mobula` or `~/.cache/mobula`.
pub(super) fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(
            std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?,
        )
        .join(".cache"),
    };
    Ok(base.join("mobula"))
}
