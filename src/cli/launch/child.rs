//! `mobula launch-child`: what a launcher starts in place of the program, to become it.
//!
//! To end with one's parent is a wish that only the process itself can utter. The usual place,
//! between fork and exec, takes unsafe code; a process that execs once more does not.

use anyhow::{Context, anyhow};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The launcher's process id
    parent: i32,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// What shells answer for a program that cannot be started.
const CANNOT_START: u8 = 127;

/// Does not return if the program could be started.
pub(super) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("asking to end with the launcher")?;
    if getppid() != Pid::from_raw(options.parent) {
        return Err(anyhow!("the launcher ended before its copy began"));
    }
    let (program, arguments) = options.command.split_first().context("no program was named")?;
    let error = Command::new(program).args(arguments).exec();
    eprintln!("cannot start {}: {error}", program.display());
    Ok(ExitCode::from(CANNOT_START))
}
