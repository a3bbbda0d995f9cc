//! The subcommands, a file each.

mod chaos;
#[cfg(feature = "data")]
mod data;
mod doctor;
mod duration;
mod launch;
mod new;
pub(crate) mod output;
mod runs;
#[cfg(all(feature = "serve", feature = "train"))]
mod serve;
mod signals;
mod status;
#[cfg(feature = "tune")]
mod sweep;

use clap::{Parser, Subcommand};
use mobula::Runtime;
use std::process::ExitCode;

/// ML pipelines in Rust: data, training, search and serving from one binary
#[derive(Parser)]
#[command(name = "mobula", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Driver(Driver),
    #[command(flatten)]
    Launcher(Launcher),
}

/// The commands that work with a runtime.
#[derive(Subcommand)]
pub(crate) enum Driver {
    /// Check this machine: CPUs, threads, memory, GPUs, worker processes
    Doctor(doctor::Options),
    /// List runs, show one with its metrics, checkpoints and logs, or draw their curves
    #[command(subcommand)]
    Runs(runs::Command),
    /// Look into files of data: what they have, and queries over them
    #[cfg(feature = "data")]
    #[command(subcommand)]
    Data(data::Command),
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

/// The commands that start or ask other programs, and have no runtime of their own.
#[derive(Subcommand)]
pub(crate) enum Launcher {
    /// Start copies of a program: here, under Slurm or under Kubernetes
    Launch(Box<launch::Options>),
    /// Kill worker processes of a training program, and see whether it ends with the same weights
    ///
    /// The program runs once undisturbed and once disturbed, each with a run directory of its own,
    /// that `RunDir::of_program` finds in MOBULA_RUN_DIR. It must allow for as many losses of workers
    /// as there will be: `FailureConfig::max_failures` (3 unless it says otherwise), or --faults here.
    /// The exit code is 0 only if signals were sent, the program ended well all the same, and the
    /// weights of the newest checkpoints are the same to the bit.
    Chaos(chaos::Options),
    /// Show what running programs are doing: resources, tasks, actors, worker processes, objects
    Status(status::Options),
    #[command(hide = true)]
    LaunchChild(launch::ChildOptions),
    #[command(hide = true)]
    LaunchGuard,
}

impl Driver {
    pub(crate) fn run(self, runtime: &Runtime) -> anyhow::Result<ExitCode> {
        match self {
            Self::Doctor(options) => doctor::run(&options, runtime),
            Self::Runs(command) => runs::run(&command),
            #[cfg(feature = "data")]
            Self::Data(command) => data::run(&command),
            #[cfg(feature = "tune")]
            Self::Sweep(command) => sweep::run(&command, runtime),
            #[cfg(all(feature = "serve", feature = "train"))]
            Self::Serve(options) => serve::run(&options, runtime),
            Self::New(options) => new::run(&options),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Launcher {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Launch(options) => launch::run(&options),
            Self::Chaos(options) => chaos::run(&options),
            Self::Status(options) => status::run(&options),
            Self::LaunchChild(options) => launch::run_child(&options),
            Self::LaunchGuard => launch::run_guard(),
        }
    }
}
