//! A soak of core: real workers do a mix of work and are killed meanwhile, round after round; every
//! answer is checked, and nothing may be left over. It ends by itself.
//!
//! ```text
//! cargo xtask soak                        200 rounds, a few minutes
//! cargo xtask soak --quick                20 rounds
//! cargo xtask soak --seed 7 --round 31    one round again
//! ```
//!
//! All random draws come from the seed and the number of the round. The order in which processes
//! get to run does not, so a round that failed may have to be repeated some times.
#![forbid(unsafe_code)]

mod census;
mod driver;
mod killer;
mod oracle;
mod processes;
mod round;
mod tally;
mod work;

use anyhow::{Context, Result};
use census::{Watch, nobody_has};
use clap::Parser;
use mobula_core::random::Stream;
use mobula_core::value::Blob;
use mobula_core::{Placement, Resources, Runtime, TaskOptions};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tally::Tally;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// In the environment of the soak and of all that it starts: its process id.
const VARIABLE: &str = "MOBULA_SOAK";
/// Between two looks for leaks.
const ROUNDS_A_LOOK: u64 = 20;
/// A round that takes so long hangs, whatever its own deadlines say.
const HANGS: Duration = Duration::from_secs(180);
/// In every so many rounds a driver is killed too.
const ROUNDS_A_DRIVER: u64 = 8;

#[derive(Parser)]
#[command(name = "cargo xtask soak", about = "Kill workers and drivers at random, and check all")]
struct Options {
    /// Rounds to run
    #[arg(long, default_value_t = 200)]
    rounds: u64,
    /// What all draws come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this round
    #[arg(long)]
    round: Option<u64>,
    /// 20 rounds
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    if std::env::var_os(VARIABLE).is_none() {
        return begin();
    }
    let outcome = mobula_core::init_with(Resources::cpus(4.0)).map_err(anyhow::Error::from);
    match outcome.and_then(|runtime| soak(&runtime)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Becomes the same program with an environment of its own: its mark, a folder for temporary
/// files, workers that do not idle for long.
fn begin() -> ExitCode {
    let own = std::process::id();
    let scratch = std::env::temp_dir().join(format!("mobula-soak-{own}"));
    let error = std::fs::create_dir_all(&scratch).err().unwrap_or_else(|| {
        let mut command = Command::new("/proc/self/exe");
        command.args(std::env::args_os().skip(1)).env(VARIABLE, own.to_string());
        command.env("TMPDIR", &scratch).env("MOBULA_IDLE_WORKER_SECONDS", "1");
        command.exec()
    });
    eprintln!("error: starting with {}: {error}", scratch.display());
    ExitCode::FAILURE
}

fn soak(runtime: &Runtime) -> Result<()> {
    let options = Options::parse();
    // A killed process is to leave no core file.
    let no_core = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(rustix::process::Resource::Core, no_core)?;
    let stream = Stream::new(options.seed, "soak");
    if let Some(number) = driver::requested() {
        return driver::work(runtime, stream, number);
    }
    let scratch = std::env::temp_dir();
    let outcome = all_rounds(runtime, &options, stream, &scratch);
    runtime.shutdown();
    let own = std::process::id().to_string();
    let outcome = outcome.and_then(|tally| nobody_has(VARIABLE, &own).map(|()| tally));
    std::fs::remove_dir_all(&scratch).context("removing the folder for temporary files")?;
    outcome?.print();
    Ok(())
}

fn all_rounds(
    runtime: &Runtime,
    options: &Options,
    stream: Stream,
    scratch: &Path,
) -> Result<Tally> {
    watch_for_hangs(options.seed);
    let rounds = if options.quick { options.rounds.min(20) } else { options.rounds };
    let numbers = options.round.map_or(0..rounds, |round| round..round + 1);
    warm_up(runtime)?;
    let mut watch = Watch::begin(scratch)?;
    let mut tally = Tally::default();
    for number in numbers {
        CURRENT.store(number, Ordering::SeqCst);
        let outcome = one(runtime, stream, number, scratch, &mut watch);
        let name = || {
            format!(
                "round {number} of seed {seed}; `cargo xtask soak --seed {seed} --round {number}` repeats it",
                seed = options.seed
            )
        };
        tally.add(outcome.with_context(name)?);
    }
    watch.look()?;
    watch.end().context("after the last round")?;
    tally.resident = watch.resident();
    Ok(tally)
}

fn one(
    runtime: &Runtime,
    stream: Stream,
    number: u64,
    scratch: &Path,
    watch: &mut Watch<'_>,
) -> Result<Tally> {
    let mut tally = round::run(runtime, scratch, stream, number)?;
    if number % ROUNDS_A_DRIVER == ROUNDS_A_DRIVER - 1 {
        driver::kill_one(stream, number)?;
        tally.drivers_killed = 1;
    }
    if number % ROUNDS_A_LOOK == ROUNDS_A_LOOK - 1 {
        watch.look()?;
    }
    Ok(tally)
}

/// Has what stays for good made, so that it is no leak: the store, the timer.
fn warm_up(runtime: &Runtime) -> Result<()> {
    let large = runtime.put(Blob::from(vec![0; 1 << 20]));
    let folder = tempfile::tempdir()?;
    let mark = work::Mark::new(&folder.path().join("warm-up"), 0);
    let task = work::transform::remote(mark, large, 1);
    let options = TaskOptions { timeout: Some(HANGS), ..Default::default() };
    let options = TaskOptions { placement: Placement::Process, ..options };
    runtime.submit(task.with_options(options)).get()?;
    Ok(())
}

static CURRENT: AtomicU64 = AtomicU64::new(0);

/// Ends the program when a round does not.
fn watch_for_hangs(seed: u64) {
    std::thread::spawn(move || {
        let mut last = u64::MAX;
        loop {
            let now = CURRENT.load(Ordering::SeqCst);
            if now == last {
                eprintln!("error: round {now} of seed {seed} hangs");
                std::process::exit(1);
            }
            last = now;
            std::thread::sleep(HANGS);
        }
    });
}
