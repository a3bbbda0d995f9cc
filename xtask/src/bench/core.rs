//! Layer `core`: tasks, actors and objects, ours against Ray (processes against processes), Dask
//! (graphs on threads) and tokio's bare channels (the limit within a process).
//!
//! What a worker answers carries, where a training side has its loss, the answer of its work: both
//! sides must have the same. Only one side works at a time; the others wait, idle.

mod memory;

use super::worker::Worker;
use super::{Case, median, peers};
use crate::command;
use anyhow::{Context, Result, ensure};
use cargo_metadata::MetadataCommand;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// A step, which is one call, or a batch or graph of them, that both sides repeat.
struct Work {
    case: &'static str,
    unit: Unit,
    /// What our program is told to do.
    ours: &'static str,
    peer: Peer,
    /// Steps of a round. As many again, divided by ten, warm it up.
    steps: usize,
    /// With and without `--quick`.
    rounds: (usize, usize),
}

enum Peer {
    /// A case of `peer_ray.py`.
    Ray(&'static str),
    /// A graph of `peer_dask.py`.
    Dask(&'static str),
    /// Channels alone, in a program of ours.
    Tokio,
}

#[derive(Clone, Copy)]
enum Unit {
    /// Of a step.
    Milliseconds,
    /// A name, and how many of it a step is.
    PerSecond(&'static str, f64),
}

const CALLS: Unit = Unit::PerSecond("k calls/s", 1.0);
const GRAPH: Unit = Unit::PerSecond("k tasks/s", 100.0);

const WORK: &[Work] = &[
    Work {
        case: "process actor call, one at a time",
        unit: Unit::Milliseconds,
        ours: "actor_call",
        peer: Peer::Ray("actor_call"),
        steps: 500,
        rounds: (3, 20),
    },
    Work {
        case: "process actor calls, pipelined",
        unit: CALLS,
        ours: "actor_calls",
        peer: Peer::Ray("actor_calls"),
        steps: 10,
        rounds: (3, 15),
    },
    Work {
        case: "process tasks, batched",
        unit: Unit::PerSecond("k tasks/s", 1.0),
        ours: "tasks",
        peer: Peer::Ray("tasks"),
        steps: 5,
        rounds: (3, 15),
    },
    Work {
        case: "process tasks of a process task",
        unit: Unit::PerSecond("k tasks/s", 1.0),
        ours: "tasks_of_a_task",
        peer: Peer::Ray("tasks_of_a_task"),
        steps: 5,
        rounds: (3, 15),
    },
    Work {
        case: "values streamed from a process task",
        unit: Unit::PerSecond("k values/s", 1.0),
        ours: "stream",
        peer: Peer::Ray("stream"),
        steps: 5,
        rounds: (3, 15),
    },
    Work {
        case: "create a process actor",
        unit: Unit::Milliseconds,
        ours: "actor_create",
        peer: Peer::Ray("actor_create"),
        steps: 5,
        rounds: (2, 10),
    },
    Work {
        case: "1 MiB argument by reference",
        unit: CALLS,
        ours: "by_reference",
        peer: Peer::Ray("by_reference"),
        steps: 5,
        rounds: (3, 15),
    },
    Work {
        case: "100 k no-op tasks, 100 layers",
        unit: GRAPH,
        ours: "graph_layered",
        peer: Peer::Dask("layered"),
        steps: 1,
        rounds: (2, 7),
    },
    Work {
        case: "100 k no-op tasks, one sum",
        unit: GRAPH,
        ours: "graph_wide",
        peer: Peer::Dask("wide"),
        steps: 1,
        rounds: (2, 7),
    },
    Work {
        case: "in-process actor calls, pipelined",
        unit: Unit::PerSecond("M calls/s", 1e-3),
        ours: "thread_actor_calls",
        peer: Peer::Tokio,
        steps: 1000,
        rounds: (5, 20),
    },
];

/// Process workers whose memory is measured.
const WORKERS: usize = 4;

/// Where the sides' programs are.
struct Programs {
    ours: PathBuf,
    ours_for_memory: PathBuf,
    python: PathBuf,
    folder: PathBuf,
    scratch: Scratch,
}

pub(super) fn run(quick: bool) -> Result<Vec<Case>> {
    let programs = Programs::new()?;
    let mut cases = Vec::new();
    for work in WORK {
        let mut contest = Contest::start(work, &programs)?;
        let (few, many) = work.rounds;
        contest.measure(if quick { few } else { many })?;
        cases.push(contest.end()?);
    }
    // After Ray's first cases, so that its files are in the page cache.
    cases.extend(start_up(&programs, if quick { 2 } else { 7 })?);
    cases.push(memory(&programs, if quick { 1 } else { 3 })?);
    Ok(cases)
}

impl Programs {
    fn new() -> Result<Self> {
        command::cargo(
            "build --release --package mobula-bench --features memory --bin bench-core --bin bench-core-memory",
        )?;
        let metadata = MetadataCommand::new().current_dir(command::root()).no_deps().exec()?;
        let release = metadata.target_directory.join("release");
        let folder = command::root().join("bench/core");
        Ok(Self {
            ours: release.join("bench-core").into(),
            ours_for_memory: release.join("bench-core-memory").into(),
            python: peers::python(&folder.join("requirements.txt"))?,
            folder,
            scratch: Scratch::new()?,
        })
    }

    fn ours(&self, case: &str) -> Result<Worker> {
        let mut command = Command::new(&self.ours);
        command.arg(case);
        Worker::start(command)
    }

    fn ray(&self, case: &str) -> Result<Worker> {
        let mut command = Command::new(&self.python);
        command.arg(self.folder.join("peer_ray.py")).arg(case).arg(&self.scratch.0);
        Worker::start(command)
    }

    /// Chunks of 256 tasks, not of Dask's default of one: the fastest for tasks that do nothing.
    fn dask(&self, graph: &str) -> Result<Worker> {
        let mut command = Command::new(&self.python);
        command.arg(self.folder.join("peer_dask.py")).args([graph, "256"]);
        Worker::start(command)
    }

    fn peer(&self, peer: &Peer) -> Result<Worker> {
        match peer {
            Peer::Ray(case) => self.ray(case),
            Peer::Dask(graph) => self.dask(graph),
            Peer::Tokio => self.ours("tokio_calls"),
        }
    }
}

struct Contest<'a> {
    work: &'a Work,
    ours: Side,
    peer: Side,
}

struct Side {
    worker: Worker,
    seconds: Vec<f64>,
}

impl<'a> Contest<'a> {
    fn start(work: &'a Work, programs: &Programs) -> Result<Self> {
        let side = |worker| Side { worker, seconds: Vec::new() };
        let ours = programs.ours(work.ours).with_context(|| format!("ours, {}", work.case))?;
        let peer = programs.peer(&work.peer).with_context(|| format!("peer, {}", work.case))?;
        Ok(Self { work, ours: side(ours), peer: side(peer) })
    }

    /// Alternates between the sides, so that a change of the machine's mood meets both of them.
    fn measure(&mut self, rounds: usize) -> Result<()> {
        for _ in 0..rounds {
            let ours = self.ours.round(self.work.steps)?;
            let theirs = self.peer.round(self.work.steps)?;
            same_answer(self.work.case, ours, theirs)?;
        }
        Ok(())
    }

    fn end(mut self) -> Result<Case> {
        if matches!(self.work.peer, Peer::Ray(_)) {
            self.peer.worker.run(0)?;
        }
        let (case, unit) = (self.work.case, self.work.unit);
        let mut row =
            unit.case(case, &self.ours.seconds, &self.peer.seconds, &self.peer.worker.name);
        if matches!(self.work.peer, Peer::Tokio) {
            row.limit = row.peer;
        }
        Ok(row)
    }
}

impl Side {
    /// One measured round; returns its answer.
    fn round(&mut self, steps: usize) -> Result<f64> {
        // The side before may still be putting things away.
        std::thread::sleep(Duration::from_millis(50));
        let warm_up = steps / 10;
        let round = self.worker.run(warm_up + steps)?;
        self.seconds.extend(&round.seconds[warm_up..]);
        round.loss.with_context(|| format!("{} gave no answer", self.worker.name))
    }
}

/// Answers are whole numbers: they agree, or they do not.
fn same_answer(case: &str, ours: f64, theirs: f64) -> Result<()> {
    let agree = ours == theirs;
    ensure!(agree, "{case}: ours answers {ours}, the peer {theirs}; the comparison is void");
    Ok(())
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::PerSecond(name, _) => name,
        }
    }

    /// The figure for a step that took so many seconds.
    fn figure(self, seconds: f64) -> f64 {
        match self {
            Self::Milliseconds => seconds * 1e3,
            Self::PerSecond(_, amount) => amount / seconds,
        }
    }

    fn case(self, case: &str, ours: &[f64], theirs: &[f64], peer: &str) -> Case {
        self.report(case, "Mobula", ours);
        self.report(case, peer, theirs);
        let (our_median, their_median) = (median(ours), median(theirs));
        Case {
            case: case.to_owned(),
            unit: self.name(),
            ours: self.figure(our_median),
            peer: Some(self.figure(their_median)),
            peer_name: Some(peer.to_owned()),
            // Of times, whatever the unit: less is better.
            ratio: Some(their_median / our_median),
            limit: None,
        }
    }

    fn report(self, case: &str, side: &str, seconds: &[f64]) {
        let least = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let (median, best) = (self.figure(median(seconds)), self.figure(least));
        let unit = self.name();
        eprintln!("  {case:<34} {side:<38} median {median:>9.3}, best {best:>9.3} {unit}");
    }
}

/// From nothing to a runtime: ours from the start of the program, Ray only from `ray.init()`, with
/// Python and its imports behind it.
fn start_up(programs: &Programs, rounds: usize) -> Result<Vec<Case>> {
    let (mut ours, mut theirs) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    let mut name = String::new();
    for _ in 0..rounds {
        let begin = Instant::now();
        let mut worker = programs.ours("start")?;
        ours[0].push(begin.elapsed().as_secs_f64());
        let our_answer = worker.run(1)?.loss;
        ours[1].push(begin.elapsed().as_secs_f64());
        drop(worker);

        let mut worker = programs.ray("start")?;
        let round = worker.run(2)?;
        theirs[0].push(round.seconds[0]);
        theirs[1].push(round.seconds[1]);
        worker.run(0)?;
        name.clone_from(&worker.name);
        let (ours, theirs) = our_answer.zip(round.loss).context("a task has a result")?;
        same_answer("start", ours, theirs)?;
    }
    let cases = ["runtime start", "runtime start to first result"];
    let case = |i: usize| Unit::Milliseconds.case(cases[i], &ours[i], &theirs[i], &name);
    Ok(vec![case(0), case(1)])
}

/// Four workers that have worked, and now wait.
fn memory(programs: &Programs, rounds: usize) -> Result<Case> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut name = String::new();
    for _ in 0..rounds {
        let mut worker = Worker::start(Command::new(&programs.ours_for_memory))?;
        ours.push(memory::of_idle(&mut worker, WORKERS)?);
        // Pages that two trees share would count half in each.
        drop(worker);
        let mut worker = programs.ray("memory")?;
        theirs.push(memory::of_idle(&mut worker, WORKERS)?);
        worker.run(0)?;
        name.clone_from(&worker.name);
    }
    let (ours, peer) = (median(&ours), median(&theirs));
    Ok(Case {
        case: format!("memory of the tree, {WORKERS} idle workers"),
        unit: "MiB PSS",
        ours,
        peer: Some(peer),
        peer_name: Some(name),
        ratio: Some(peer / ours),
        limit: None,
    })
}

/// A temporary folder, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        // Short: Ray makes sockets in it, whose paths may have 107 bytes.
        let path = std::env::temp_dir().join(format!("mobula-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_their_units_and_more_than_one_is_better() {
        let case = Unit::Milliseconds.case("a", &[0.001, 0.001, 0.5], &[0.004], "peer");
        assert_eq!((case.ours, case.peer, case.ratio), (1.0, Some(4.0), Some(4.0)));
        let case = CALLS.case("a", &[0.01], &[0.04], "peer");
        assert_eq!((case.ours, case.peer, case.ratio), (100.0, Some(25.0), Some(4.0)));
        assert_eq!(GRAPH.case("a", &[0.5], &[5.0], "peer").ours, 200.0);
    }

    #[test]
    fn another_answer_voids_the_comparison() {
        assert!(same_answer("a", 3.0, 3.0).is_ok());
        assert!(same_answer("a", 3.0, 4.0).is_err());
        assert!(same_answer("a", f64::NAN, f64::NAN).is_err());
    }
}
