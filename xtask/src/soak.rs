//! `cargo xtask soak`: builds the soak of core in `bench/soak`, and runs it.

use crate::command;
use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// What the soak is told: --rounds N, --seed S, --round R, --quick; its own --help says more
    #[arg(value_name = "OPTION", trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut command = command::cargo_command("run --package mobula-bench --bin soak --");
    command.args(&options.options);
    command::run(command)
}
