//! The subcommands, a file each.

mod doctor;
mod new;
pub(crate) mod output;
mod runs;
#[cfg(all(feature = "serve", feature = "train"))]
mod serve;
#[cfg(feature = "tune")]
mod sweep;

use clap::{Parser, Subcommand};
use mobula::Runtime;

/// ML pipelines in Rust: data, training, search and serving from one binary
#[derive(Parser)]
#[command(name = "mobula", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check this machine: CPUs, threads, memory, GPUs, worker processes
    Doctor(doctor::Options),
    /// List runs, or show one with its metrics, checkpoints and logs
    #[command(subcommand)]
    Runs(runs::Command),
    /// Search hyperparameters of any program
    #[cfg(feature = "tune")]
    #[command(subcommand)]
    Sweep(sweep::Command),
    /// Serve the models of a repository, or of a run, over HTTP
    #[cfg(all(feature = "serve", feature = "train"))]
    Serve(serve::Options),
    /// Write a small program of your own: training, a sweep file and a test
    New(new::Options),
}

impl Cli {
    pub(crate) fn run(self, runtime: &Runtime) -> anyhow::Result<()> {
        match self.command {
            Command::Doctor(options) => doctor::run(&options, runtime),
            Command::Runs(command) => runs::run(&command),
            #[cfg(feature = "tune")]
            Command::Sweep(command) => sweep::run(&command, runtime),
            #[cfg(all(feature = "serve", feature = "train"))]
            Command::Serve(options) => serve::run(&options, runtime),
            Command::New(options) => new::run(&options),
        }
    }
}
