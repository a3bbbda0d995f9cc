//! `cargo xtask ballista`: formats, lints and tests of the crate that is not in the workspace.

use crate::command;
use anyhow::Result;
use cargo_metadata::MetadataCommand;

pub(crate) fn run() -> Result<()> {
    let checks = ["fmt --check", "clippy --locked --all-targets -- -D warnings", "test --locked"];
    checks.into_iter().try_for_each(in_crate)
}

/// Beside what the workspace builds: it has the crates with other features.
fn in_crate(task: &str) -> Result<()> {
    let root = command::root();
    let metadata = MetadataCommand::new().current_dir(&root).no_deps().exec()?;
    let mut cargo = command::cargo_command(task);
    cargo.current_dir(root.join("ballista"));
    cargo.env("CARGO_TARGET_DIR", metadata.target_directory.join("ballista"));
    command::run(cargo)
}
