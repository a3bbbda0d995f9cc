//! One run of the program: looks at it, does what the plan says, and sees how it ends.

use super::plan::{Command, Fault, Line, Plan, Rules, Sighting, Worker};
use super::program::{Home, Program};
use super::workers::of_program;
use super::{Kind, runs};
use anyhow::{Context, bail};
use mobula::RunDir;
use mobula::console::note;
use mobula::run::unix_time;
use rustix::process::Signal;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// How often to look.
const POLL: Duration = Duration::from_millis(50);

/// How a run went.
#[derive(Debug)]
pub(super) struct Course {
    pub(super) ending: Ending,
    /// Seconds since 1970.
    pub(super) begun: f64,
    pub(super) seconds: f64,
    pub(super) step: Option<u64>,
    pub(super) faults: Vec<Fault>,
    pub(super) restarts: u64,
    folder: PathBuf,
    run: Option<RunDir>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ending {
    Exited(ExitStatus),
    /// It was ended, for it had not come further for so many seconds.
    Stalled(f64),
}

impl Ending {
    pub(super) fn is_good(self) -> bool {
        matches!(self, Self::Exited(status) if status.success())
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => status.fmt(f),
            Self::Stalled(seconds) => write!(f, "stalled for {seconds} s"),
        }
    }
}

/// A signal that has ended this command.
#[derive(Debug)]
pub(super) struct Interrupted(pub(super) Signal);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted by {:?}", self.0)
    }
}

impl std::error::Error for Interrupted {}

impl Course {
    /// The run that the program has made. Errors if it made none where it was to.
    pub(super) fn run(&self) -> anyhow::Result<&RunDir> {
        self.run.as_ref().with_context(|| {
            format!(
                "the program ({}) made no run in {}: have it take its run from \
                 `RunDir::of_program`, or add --chdir if it makes one in runs/ of its own",
                self.ending,
                self.folder.display()
            )
        })
    }

    /// Errors if the program cannot do without faults what it is to do with them.
    pub(super) fn must_be_good(&self) -> anyhow::Result<()> {
        match self.ending {
            Ending::Exited(status) if !status.success() => {
                bail!("the program failed before any signal was sent: {status}")
            }
            Ending::Exited(_) => self.run().map(drop),
            Ending::Stalled(seconds) => bail!(
                "no signal was sent, and for {seconds} s the program has come no further than \
                 step {}: --patience allows for more",
                self.step.unwrap_or(0)
            ),
        }
    }
}

/// Runs the program to its end.
pub(super) fn watch(
    command: &[OsString],
    home: Home,
    folder: &Path,
    rules: Rules,
    interrupts: &Receiver<Signal>,
) -> anyhow::Result<Course> {
    let patience = rules.patience;
    let begun = unix_time();
    let mut plan = Plan::new(rules, begun);
    let mut program = Program::start(command, home, folder)?;
    let ending = loop {
        if let Some(status) = program.ended()? {
            break Ending::Exited(status);
        }
        program.insist();
        let seen = look(program.id(), home, folder);
        match plan.step(&seen) {
            Command::Wait => {}
            Command::Strike(worker, kind) => strike(&mut program, &mut plan, worker, kind, &seen),
            Command::GiveUp => break Ending::Stalled(patience),
        }
        if let Ok(signal) = interrupts.recv_timeout(POLL) {
            return Err(Interrupted(signal).into());
        }
    };
    let seconds = unix_time() - begun;
    drop(program);
    let run = runs::find(home, folder);
    plan.step(&Sighting { now: unix_time(), workers: Vec::new(), lines: lines(run.as_ref()) });
    let step = plan.step_reached();
    let (faults, restarts, folder) = (plan.faults, plan.restarts, folder.to_owned());
    Ok(Course { ending, begun, seconds, step, faults, restarts, folder, run })
}

fn look(program: u32, home: Home, folder: &Path) -> Sighting {
    let workers = of_program(program);
    // After the workers: a line that is there by now cannot be missing from what is seen of them.
    let lines = lines(runs::find(home, folder).as_ref());
    Sighting { now: unix_time(), workers, lines }
}

fn lines(run: Option<&RunDir>) -> Vec<Line> {
    run.map(runs::newest_lines).unwrap_or_default()
}

/// A worker that has just ended is left out.
fn strike(program: &mut Program, plan: &mut Plan, target: Worker, kind: Kind, seen: &Sighting) {
    let now = unix_time();
    if program.strike(&target, kind) {
        note(format!("chaos: {kind} to {}, process {}", target.name, target.pid));
        plan.struck(target, kind, seen, now);
    }
}
