//! `cargo xtask`: the checks and chores of this workspace.
//!
//! ```text
//! cargo xtask verify                  everything that must hold before a change goes in; writes nothing
//! cargo xtask fix                     format, and apply what clippy can repair by itself
//! cargo xtask smoke                   `mobula new`: what it writes must build, run and pass its test
//! cargo xtask slurm srun -N3 hostname a Slurm of three nodes on this machine, while a command runs
//! cargo xtask bench nn --quick        ours against pinned peers on the same work
//! cargo xtask peers                   what we write, read back by pyarrow, polars and DuckDB
//! cargo xtask ballista                the crate beside the workspace: its checks, and its tests on a real cluster
//! cargo xtask soak                    kill workers and drivers at random, and check everything
//! ```
#![forbid(unsafe_code)]

mod ballista;
mod bench;
mod command;
mod dependencies;
mod features;
mod imports;
mod licence;
mod read_back;
mod slurm;
mod smoke;
mod soak;
mod tidy;
mod verify;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The checks and chores of this workspace")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run every check; change nothing
    Verify(verify::Options),
    /// Format the code and apply what clippy can repair by itself
    Fix,
    /// Write a crate with `mobula new`, build it, run it, test it
    Smoke,
    /// Start a Slurm of three nodes on this machine, and a command or a shell that sees it
    Slurm(slurm::Options),
    /// Measure ours against pinned peers on the same work
    Bench(bench::Options),
    /// Have pyarrow, polars and DuckDB read what `mobula data convert` writes, and compare all values
    Peers,
    /// Check and test the crate that runs queries on Apache Ballista, on a cluster of this machine's
    Ballista,
    /// Kill workers and drivers at random for some minutes, and check every answer and every trace
    Soak(soak::Options),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().task {
        Task::Verify(options) => verify::run(&options),
        Task::Fix => fix(),
        Task::Smoke => smoke::run(),
        Task::Slurm(options) => slurm::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Peers => read_back::run(),
        Task::Ballista => ballista::run(),
        Task::Soak(options) => soak::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn fix() -> anyhow::Result<()> {
    let clippy = "clippy --fix --allow-dirty --allow-staged --workspace --all-targets";
    command::cargo(clippy)?;
    command::cargo("fmt --all")
}
