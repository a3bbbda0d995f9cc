//! The `mobula` command: a look at the machine and at runs, sweeps of any program, copies of
//! one on many machines, a server for model repositories, and a start for a program of your own.

mod cli;

use clap::Parser;
use cli::{Cli, Command, Driver};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Driver(driver) => drive(driver),
        Command::Launcher(launcher) => launcher.run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {}", cli::output::one_line(&error));
        ExitCode::FAILURE
    })
}

fn drive(driver: Driver) -> anyhow::Result<ExitCode> {
    // First of all: `doctor` and `sweep` start processes, which are this same program.
    let runtime = mobula::init()?;
    log_to_stderr();
    driver.run(&runtime)
}

/// Warnings and errors, or what `RUST_LOG` says.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "warn".into()))
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
}
