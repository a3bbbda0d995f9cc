//! `cargo xtask soak`: builds the soak of core in `bench/soak`, and runs it.

use crate::command;
use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Rounds to run
    #[arg(long, default_value_t = 200)]
    rounds: u64,
    /// What all random draws come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this round of the seed
    #[arg(long)]
    round: Option<u64>,
    /// At most 20 rounds
    #[arg(long)]
    quick: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let soak = "run --package mobula-bench --bin soak --";
    let (rounds, seed) = (options.rounds, options.seed);
    let mut command = command::cargo_command(&format!("{soak} --rounds {rounds} --seed {seed}"));
    command.args(options.round.map(|round| format!("--round={round}")));
    command.args(options.quick.then_some("--quick"));
    command::run(command)
}
