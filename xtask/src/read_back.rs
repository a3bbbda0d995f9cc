//! `cargo xtask peers`: what `mobula data convert` writes, others must read as it was.
//!
//! The readers are pinned in `bench/peers`, and the work is done by the script there.

use crate::bench::{Scratch, peers};
use crate::command;
use anyhow::Result;
use cargo_metadata::MetadataCommand;
use std::process::Command;
use std::time::Instant;

pub(crate) fn run() -> Result<()> {
    let start = Instant::now();
    command::cargo("build --bin mobula")?;
    let metadata = MetadataCommand::new().current_dir(command::root()).no_deps().exec()?;
    let scripts = command::root().join("bench/peers");
    let folder = Scratch::new()?;
    let mut read = Command::new(peers::python(&scripts.join("requirements.txt"))?);
    read.arg(scripts.join("read_back.py"));
    read.arg(metadata.target_directory.join("debug/mobula")).arg(folder.path());
    command::run(read)?;
    println!("peers: all was read as it was ({:.0} s)", start.elapsed().as_secs_f64());
    Ok(())
}
