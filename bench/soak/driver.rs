//! A driver that is killed: this program, started again, at a random moment of its work.

use crate::census::nobody_has;
use crate::round;
use anyhow::{Context, Result};
use mobula_core::Runtime;
use mobula_core::random::Stream;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

/// In the environment of such a driver and of all that it starts: the round that it belongs to.
const VARIABLE: &str = "MOBULA_SOAK_DRIVER";

/// Whether this is one.
pub(crate) fn requested() -> Option<u64> {
    std::env::var(VARIABLE).ok()?.split('-').next()?.parse().ok()
}

/// Works until it is killed.
pub(crate) fn work(runtime: &Runtime, stream: Stream, number: u64) -> Result<()> {
    println!("begins");
    let folder = std::env::current_dir()?;
    for i in 0.. {
        round::run(runtime, &folder, stream.child(number), i)?;
    }
    Ok(())
}

/// Starts one, kills it with `kill -9`, and finds nothing left of it.
pub(crate) fn kill_one(stream: Stream, number: u64) -> Result<()> {
    // For its marks: it will not remove them itself.
    let folder = tempfile::tempdir()?;
    let name = format!("{number}-{}", std::process::id());
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).env(VARIABLE, &name);
    command.current_dir(&folder).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut driver = command.spawn().context("starting a driver")?;
    let mut output = BufReader::new(driver.stdout.take().context("its output is piped")?);
    output.read_line(&mut String::new())?;
    std::thread::sleep(Duration::from_millis(stream.at(number, 2).below(700)));
    driver.kill()?;
    driver.wait()?;
    nobody_has(VARIABLE, &name).context("after a driver was killed")
}
