//! `mobula launch`: many copies of a program, here, under Slurm or under Kubernetes.
//!
//! It never calls `mobula::init()`: it is no driver, and what it hears (Ctrl-C, the end of a copy)
//! it passes on.

mod child;
mod gang;
mod guard;
mod kubernetes;
mod local;
mod output;
mod shell;
mod slurm;

pub(crate) use child::Options as ChildOptions;

use anyhow::{anyhow, ensure};
use mobula::World;
use mobula::world::JOIN_VARIABLE;
use std::ffi::OsString;
use std::num::NonZeroU32;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("engine").args(["slurm", "kubernetes"]))]
pub(crate) struct Options {
    /// How many copies to start on this machine
    #[arg(long, default_value = "1", conflicts_with = "engine")]
    workers: NonZeroU32,
    /// How often all copies are started again after one has failed
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_restarts: u32,
    /// How long copies may take to end, once asked to, before they are killed
    #[arg(long, value_name = "SECONDS", default_value_t = 10, conflicts_with = "engine")]
    grace: u64,
    /// Join a driver that listens there (MOBULA_LISTEN) as one more machine of its runtime
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["engine", "workers"])]
    join: Option<String>,
    /// Write a batch script for Slurm and submit it
    #[arg(long)]
    slurm: bool,
    /// Write a manifest for Kubernetes; only with --print
    #[arg(long, requires = "print")]
    kubernetes: bool,
    /// Show the script or the manifest; write and submit nothing
    #[arg(long, requires = "engine")]
    print: bool,
    #[command(flatten)]
    job: Job,
    /// The program and its arguments, after --
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// What both engines are asked for.
#[derive(clap::Args)]
#[command(next_help_heading = "Options for --slurm and --kubernetes")]
struct Job {
    /// The job's name, and that of its run [default: launch-<time>]
    #[arg(long, requires = "engine")]
    name: Option<String>,
    /// How many nodes, or pods
    #[arg(long, value_name = "N", default_value = "1", requires = "engine")]
    nodes: NonZeroU32,
    /// CPUs for each copy
    #[arg(long, value_name = "N", requires = "engine")]
    cpus_per_task: Option<NonZeroU32>,
    /// GPUs on each node
    #[arg(long, value_name = "N", requires = "engine")]
    gpus_per_node: Option<NonZeroU32>,
    /// Memory on each node, such as 64G (for Kubernetes 64Gi)
    #[arg(long, value_name = "SIZE", requires = "engine")]
    mem: Option<String>,
    #[command(flatten)]
    slurm: SlurmOptions,
    #[command(flatten)]
    kubernetes: KubernetesOptions,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Options for --slurm")]
struct SlurmOptions {
    /// Copies on each node: one is right for a Mobula program, which starts its own workers
    #[arg(long, value_name = "N", default_value = "1", requires = "slurm")]
    ntasks_per_node: NonZeroU32,
    /// The time limit, such as 30 (minutes), 4:00:00 or 2-00:00:00
    #[arg(long, requires = "slurm")]
    time: Option<String>,
    /// The partition
    #[arg(long, requires = "slurm")]
    partition: Option<String>,
    /// The account
    #[arg(long, requires = "slurm")]
    account: Option<String>,
    /// Any other option of sbatch, such as --sbatch=--exclusive; may be repeated
    #[arg(long, value_name = "OPTION", requires = "slurm", allow_hyphen_values = true)]
    sbatch: Vec<String>,
    /// The folder of the runs; every node must see it
    #[arg(long, default_value = "runs", requires = "slurm")]
    root: PathBuf,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Options for --kubernetes")]
struct KubernetesOptions {
    /// The container image that has the program
    #[arg(long, requires = "kubernetes", required_if_eq("kubernetes", "true"))]
    image: Option<String>,
    /// A persistent volume claim that every pod can write to, for the run directory
    #[arg(long, requires = "kubernetes")]
    volume_claim: Option<String>,
}

impl Job {
    /// The name that was given, or one with the time in it.
    fn name(&self) -> anyhow::Result<String> {
        let Some(name) = &self.name else {
            return Ok(mobula::run::timestamped("launch").to_lowercase());
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        ensure!(
            name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain),
            "{name:?} is no name for a job: expected a letter or digit, then letters, digits, ., _ \
             and -"
        );
        Ok(name.clone())
    }
}

/// Runs the launch; gives the exit code of the first copy that failed.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if let Some(address) = &options.join {
        return Err(join(address, &options.command));
    } else if options.slurm {
        slurm::run(options)?;
    } else if options.kubernetes {
        super::output::print(kubernetes::manifest(options)?.trim_end())?;
    } else {
        return local::run(options);
    }
    Ok(ExitCode::SUCCESS)
}

/// Becomes the program as an agent; returns only if that fails.
fn join(address: &str, command: &[OsString]) -> anyhow::Error {
    let [program, arguments @ ..] = command else { return anyhow!("there is no program") };
    let mut agent = Command::new(program);
    World::remove_from(&mut agent);
    let failed = agent.args(arguments).env(JOIN_VARIABLE, address).exec();
    anyhow!(failed).context(format!("starting {}", program.display()))
}

pub(crate) fn run_child(options: &ChildOptions) -> anyhow::Result<ExitCode> {
    child::run(options)
}

/// Ends what a launcher that was killed has left behind.
pub(crate) fn run_guard() -> anyhow::Result<ExitCode> {
    guard::run()
}
