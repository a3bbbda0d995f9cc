//! Running cargo and other programs from the root of the workspace.

use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The root of the workspace: the folder above this package.
pub(crate) fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// `cargo <arguments>`, split at spaces, with its output shown.
pub(crate) fn cargo(arguments: &str) -> Result<()> {
    run(cargo_command(arguments))
}

/// The same, not started yet.
pub(crate) fn cargo_command(arguments: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.args(arguments.split_whitespace()).current_dir(root());
    for (name, _) in std::env::vars_os() {
        if is_of_xtask(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    command
}

/// What cargo tells this program of itself. Another cargo would take it for the user's wish: `ring` is compiled anew,
/// and all of DataFusion behind it, when these are others than they were.
fn is_of_xtask(variable: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|start| variable.starts_with(start))
        || ["CARGO_CRATE_NAME", "CARGO_BIN_NAME", "CARGO_PRIMARY_PACKAGE", "OUT_DIR"]
            .contains(&variable)
}

/// Runs `command` with its output shown.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let shown = show(&command);
    eprintln!("$ {shown}");
    let status = command.stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot start `{shown}`"))?;
    ensure!(status.success(), "`{shown}` failed ({status})");
    Ok(())
}

/// Runs `command`, shows its standard output line by line, and gives each line to `see`.
/// Returns whether it succeeded.
pub(crate) fn run_seeing(mut command: Command, mut see: impl FnMut(&str)) -> Result<bool> {
    let shown = show(&command);
    eprintln!("$ {shown}");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = child.with_context(|| format!("cannot start `{shown}`"))?;
    let output = child.stdout.take().context("the output is piped")?;
    for line in BufReader::new(output).split(b'\n') {
        // Not `lines()`: a test may print bytes that are no UTF-8.
        let line = line.with_context(|| format!("reading what `{shown}` prints"))?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        see(&line);
    }
    Ok(child.wait()?.success())
}

/// Runs `command` quietly and returns its standard output.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let shown = show(&command);
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start `{shown}`"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{shown}` failed ({}):\n{}", output.status, errors.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// As one would type it.
pub(crate) fn show(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cargo has started this test too.
    #[test]
    fn another_cargo_hears_nothing_of_this_program() {
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        let command = cargo_command("tree");
        let removed = command.get_envs().filter(|(_, value)| value.is_none());
        let removed: Vec<_> = removed.map(|(name, _)| name.to_string_lossy()).collect();
        assert!(removed.contains(&"CARGO_MANIFEST_DIR".into()), "{removed:?}");
        assert!(removed.contains(&"CARGO_PKG_VERSION_MAJOR".into()), "{removed:?}");
        assert!(!removed.contains(&"CARGO_TARGET_DIR".into()), "the user's");
    }
}
