//! `mobula chaos`: does a training program survive the loss of its workers, and with the same weights?

mod plan;
mod program;
mod report;
mod runs;
mod watch;
mod weights;
mod workers;

use super::output::{print, print_json};
use super::{duration, signals};
use mobula::console::note;
use plan::Rules;
use program::Home;
use report::Report;
use runs::Runs;
use rustix::process::Signal;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, TrySendError, sync_channel};
use std::time::Duration;
use watch::{Interrupted, watch};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The time from one signal to the next, and from the start of workers to the first, such as
    /// 500ms, 5s or 2m
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration::parse)]
    kill_every: Duration,
    /// The signals to draw from: KILL, TERM, ABRT, SEGV, and STOP for a worker that hangs
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "KILL",
        ignore_case = true,
        hide_possible_values = true
    )]
    signals: Vec<Kind>,
    /// The seed of what is drawn: which worker, which signal
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Send at most so many signals [default: until the program ends]
    #[arg(long, value_name = "N")]
    faults: Option<u64>,
    /// Give up when training has not come further for so long
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration::parse)]
    patience: Duration,
    /// Keep the two runs, as DIR/reference and DIR/disturbed [default: a temporary folder, which is
    /// kept if the program does not survive]
    #[arg(long, value_name = "DIR")]
    runs: Option<PathBuf>,
    /// Leave out the undisturbed run; no weights are compared
    #[arg(long)]
    no_reference: bool,
    /// Start each run in an empty working directory, and find its run in runs/ there: for programs that
    /// do not ask `RunDir::of_program` for it
    #[arg(long)]
    chdir: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The program and its arguments, after --; what it prints goes to stderr
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// A signal that a worker may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, serde::Serialize)]
#[value(rename_all = "UPPER")]
#[serde(rename_all = "UPPERCASE")]
enum Kind {
    Kill,
    Stop,
    Term,
    Abrt,
    Segv,
}

impl Kind {
    fn signal(self) -> Signal {
        match self {
            Self::Kill => Signal::KILL,
            Self::Stop => Signal::STOP,
            Self::Term => Signal::TERM,
            Self::Abrt => Signal::ABORT,
            Self::Segv => Signal::SEGV,
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Kill => "KILL",
            Self::Stop => "STOP",
            Self::Term => "TERM",
            Self::Abrt => "ABRT",
            Self::Segv => "SEGV",
        })
    }
}

impl Options {
    fn home(&self) -> Home {
        if self.chdir { Home::WorkingDirectory } else { Home::Run }
    }

    fn rules(&self) -> Rules {
        Rules {
            every: self.kill_every.as_secs_f64(),
            kinds: self.signals.clone(),
            seed: self.seed,
            most: self.faults.unwrap_or(u64::MAX),
            patience: self.patience.as_secs_f64(),
        }
    }
}

/// Runs the program twice. The exit code tells whether it survived; 128 + n that signal n has ended
/// this command, and the program with it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let (send, interrupts) = sync_channel(1);
    let heard = send.clone();
    signals::listen(move |signal| {
        heard.try_send(signal) != Err(TrySendError::Disconnected(signal))
    })?;
    let mut runs = Runs::create(options.runs.as_deref())?;
    let code = match run_both(options, &runs, &interrupts) {
        Ok(report) => {
            let survived = report.problems().is_empty();
            runs.is_wanted = !survived;
            if options.json {
                print_json(&report.json())?
            } else {
                print(report.text())?
            }
            if survived { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => match error.downcast::<Interrupted>() {
            Ok(Interrupted(signal)) => {
                runs.is_wanted = false;
                ExitCode::from(128 + signal.as_raw() as u8)
            }
            Err(error) => return Err(error),
        },
    };
    // For as long as we listen there is somebody who could be heard.
    drop(send);
    Ok(code)
}

fn run_both(
    options: &Options,
    runs: &Runs,
    interrupts: &Receiver<Signal>,
) -> anyhow::Result<Report> {
    let course = |name: &str, most: u64| {
        note(format!("chaos: the {name} run begins"));
        let rules = Rules { most, ..options.rules() };
        watch(&options.command, options.home(), &runs.folder(name), rules, interrupts)
    };
    let reference = if options.no_reference { None } else { Some(course("reference", 0)?) };
    if let Some(reference) = &reference {
        reference.must_be_good()?;
    }
    let disturbed = course("disturbed", options.faults.unwrap_or(u64::MAX))?;
    disturbed.run()?;
    Report::new(reference, disturbed)
}
