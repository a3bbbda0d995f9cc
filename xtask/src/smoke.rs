//! `cargo xtask smoke`: what `mobula new` writes must build, run and pass its own test.

use crate::command;
use anyhow::{Context, Result};
use cargo_metadata::MetadataCommand;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub(crate) fn run() -> Result<()> {
    let start = Instant::now();
    let folder = Folder::create()?;
    let mut new = command::cargo_command("run --bin mobula -- new hello --dir");
    new.arg(&folder.0);
    command::run(new)?;
    let hello = folder.hello()?;
    // The versions that were just tested, and no second download.
    let lock = command::root().join("Cargo.lock");
    std::fs::copy(&lock, hello.join("Cargo.lock"))
        .with_context(|| format!("copying {}", lock.display()))?;
    in_crate(&hello, "run")?;
    in_crate(&hello, "test")?;
    println!(
        "smoke: what `mobula new` wrote builds, runs and passes its test ({:.0} s)",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Runs cargo in the new crate, against this checkout, in this checkout's target folder.
fn in_crate(hello: &Path, task: &str) -> Result<()> {
    let root = command::root();
    let metadata = MetadataCommand::new().current_dir(&root).no_deps().exec()?;
    let mut cargo = command::cargo_command(task);
    cargo
        .arg("--config")
        .arg(format!("patch.crates-io.mobula.path={:?}", root.display().to_string()));
    cargo.current_dir(hello).env("CARGO_TARGET_DIR", metadata.target_directory);
    command::run(cargo)
}

/// A folder outside of the workspace (cargo would take the new crate for a member), removed at
/// the end.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("mobula-smoke-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where `mobula new hello --dir <folder>` put the crate.
    fn hello(&self) -> Result<PathBuf> {
        let places = [self.0.join("hello"), self.0.clone()];
        let found = places.into_iter().find(|place| place.join("Cargo.toml").exists());
        found
            .with_context(|| format!("`mobula new` wrote no Cargo.toml under {}", self.0.display()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Leaving a temporary folder behind is no reason to fail.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
