//! `cargo xtask slurm`: a Slurm of three nodes on this machine, for as long as a command runs.

#[path = "../../tests/support/slurm.rs"]
#[allow(dead_code)] // Most of it is for tests.
mod cluster;

use anyhow::{Context, Result, anyhow, bail, ensure};
use cluster::Slurm;
use std::ffi::OsString;
use std::process::Stdio;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to run; without it, a shell
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(missing) = Slurm::missing() {
        bail!("{missing}; on Debian, apt-get install them");
    }
    let slurm = Slurm::start().map_err(|reason| anyhow!("Slurm did not start:\n{reason}"))?;
    eprintln!("Slurm runs: SLURM_CONF={}", slurm.configuration().display());
    let shell = || vec![std::env::var_os("SHELL").unwrap_or("sh".into())];
    let words = if options.command.is_empty() { shell() } else { options.command.clone() };
    let (program, arguments) = words.split_first().context("no command was given")?;
    let mut command = slurm.command(&program.to_string_lossy());
    let status = command.args(arguments).stdin(Stdio::inherit()).status();
    let status = status.with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(status.success(), "{} failed ({status})", program.display());
    Ok(())
}
