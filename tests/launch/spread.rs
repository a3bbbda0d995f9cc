//! A program whose runtime spreads over the copies that a launcher has started.

use crate::engines;
use crate::program::{self, Finished};
use crate::rank::{ROLE, program};
use crate::slurm::{Slurm, poll};
use crate::{SlurmTest, Test};
use mobula::{Error, Node, Placement, Resources, Runtime, TaskOptions, collect, remote};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// The argument that makes a launched program one of this module.
pub(crate) const SPREAD: &str = "spread";

const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    ("spread::workers_here_are_one_node", workers_here),
    ("spread::a_machine_joins_by_hand", joins_by_hand),
];
pub(crate) const MPI_TESTS: &[Test] = &[("spread::mpirun_here_is_one_node", mpirun_here)];
pub(crate) const SLURM_TESTS: &[SlurmTest] = &[
    ("spread::six_copies_are_three_nodes", six_copies),
    ("spread::each_task_has_a_gpu_of_its_own", gpus),
    ("spread::a_node_is_killed_and_its_work_goes_on", node_killed),
];

/// What the driver tells, as a line of JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    cpus: f64,
    nodes: usize,
    places: BTreeSet<Place>,
}

/// Where a task has run, and what it had.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Place {
    node: String,
    gpus: String,
}

/// The launched program: `spread count`, `spread two`, `spread gpus FOLDER` or `spread stay FOLDER`.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    let ran = mobula::init().map_err(Into::into).and_then(|runtime| drive(&runtime, arguments));
    match ran {
        Ok(told) => {
            println!("{}", serde_json::to_string(&told).expect("JSON"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn drive(
    runtime: &Runtime,
    arguments: &[String],
) -> Result<Told, Box<dyn std::error::Error + Send + Sync>> {
    if arguments[1] == "two" {
        wait_for(|| runtime.nodes().len() == 2);
    }
    let nodes: Vec<Node> = runtime.nodes().iter().map(|info| info.node).collect();
    let cpus = runtime.resources().cpus;
    let anywhere = || TaskOptions { placement: Placement::Process, ..TaskOptions::default() };
    let tasks: Vec<_> = match arguments[1].as_str() {
        "count" | "two" => {
            let there = |node: &Node| TaskOptions { node: Some(*node), ..anywhere() };
            nodes.iter().map(|node| place::remote().with_options(there(node))).collect()
        }
        "gpus" => {
            // All at once: each GPU is given once.
            let one = Resources::cpus(0.5).with_gpus(1.0);
            let gpus = 0..runtime.resources().gpus as usize;
            let task = |_| meet::remote(arguments[2].clone(), gpus.len());
            gpus.clone()
                .map(|i| task(i).with_options(anywhere()).with_resources(one.clone()))
                .collect()
        }
        _ => {
            let retried = TaskOptions { max_retries: 1, ..anywhere() };
            let task = || stay::remote(arguments[2].clone()).with_options(retried.clone());
            (0..cpus as usize).map(|_| task()).collect()
        }
    };
    let places: Vec<_> = tasks.into_iter().map(|task| runtime.submit(task)).collect();
    let places = collect(&places)?.iter().map(|place| (**place).clone()).collect();
    Ok(Told { cpus, nodes: runtime.nodes().len(), places })
}

#[remote]
fn place() -> Result<Place, Error> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    Ok(Place { node: variable("SLURMD_NODENAME"), gpus: variable("CUDA_VISIBLE_DEVICES") })
}

/// Returns when so many have come.
#[remote]
fn meet(folder: String, count: usize) -> Result<Place, Error> {
    let place = place()?;
    leave_a_mark(Path::new(&folder), &format!("{}-{}", place.node, place.gpus));
    wait_for(|| marks(Path::new(&folder)).len() == count);
    Ok(place)
}

/// Returns when the folder has a file `go`.
#[remote]
fn stay(folder: String) -> Result<Place, Error> {
    let (folder, place) = (PathBuf::from(folder), place()?);
    // A warm process may run it a second time.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("now");
    leave_a_mark(&folder, &format!("{}-{}", place.node, now.as_nanos()));
    wait_for(|| folder.join("go").exists());
    Ok(place)
}

fn leave_a_mark(folder: &Path, name: &str) {
    std::fs::write(folder.join(name), "").expect("writes");
}

fn marks(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn wait_for(done: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() && Instant::now() < deadline {
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn told(ran: &Finished) -> Told {
    assert_eq!(ran.code, Some(0), "{ran:?}");
    told_in(&ran.stdout).unwrap_or_else(|| panic!("nothing was told: {ran:?}"))
}

fn told_in(text: &str) -> Option<Told> {
    text.lines().find_map(|line| serde_json::from_str(&line[line.find('{')?..]).ok())
}

fn nodes_of(told: &Told) -> Vec<&str> {
    told.places.iter().map(|place| place.node.as_str()).collect()
}

fn workers_here() {
    let program = program();
    let words = ["launch", "--workers", "4", "--", &program, ROLE, SPREAD, "count"];
    let told = told(&program::finish(program::command(&words)));
    let here = Resources::of_this_machine().cpus;
    assert_eq!((told.nodes, told.cpus), (1, here), "{told:?}");
}

fn mpirun_here() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut mpirun = engines::mpirun();
    mpirun.args(["-np", "4", &program(), ROLE, SPREAD, "count"]).current_dir(folder.path());
    let told = told(&program::finish(mpirun));
    let here = Resources::of_this_machine().cpus;
    assert_eq!((told.nodes, told.cpus), (1, here), "{told:?}");
}

/// A driver that listens, and `mobula launch --join`.
fn joins_by_hand() {
    let port = mobula::world::free_port().expect("a port");
    let (address, program) = (format!("127.0.0.1:{port}"), program());
    let secret = ("MOBULA_SECRET", "the secret of this test");
    let mut driver = Command::new(&program);
    driver.args([ROLE, SPREAD, "two"]).env("MOBULA_LISTEN", &address).env(secret.0, secret.1);
    let driver = std::thread::spawn(move || program::finish(driver));
    let words = ["launch", "--join", &address, "--", &program, ROLE, SPREAD, "two"];
    let mut agent = program::command(&words);
    agent.env(secret.0, secret.1);
    let agent = program::finish(agent);
    assert_eq!(agent.code, Some(0), "{agent:?}");
    assert_eq!(told(&driver.join().expect("the driver")).nodes, 2);
}

/// In a folder that all nodes see: the secret is in a file.
fn srun(slurm: &Slurm, folder: &Path, words: &[&str]) -> Finished {
    let mut srun = slurm.command("srun");
    srun.args(words).current_dir(folder);
    program::finish(srun)
}

fn six_copies(slurm: &mut Slurm) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let ran = srun(slurm, folder.path(), &["-N3", "-n6", &program(), ROLE, SPREAD, "count"]);
    let told = told(&ran);
    assert_eq!(nodes_of(&told), ["node1", "node2", "node3"], "{ran:?}");
    // A task has 1 CPU, and a node's tasks share what the node gives the job.
    assert_eq!(told.nodes, 3, "{ran:?}");
    assert!(told.cpus <= 6.0, "no CPU counts twice: {ran:?}");
}

fn gpus(slurm: &mut Slurm) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let marks = tempfile::tempdir().expect("temporary folder");
    let marks = marks.path().to_str().expect("UTF-8");
    let words = ["-N2", "--gpus-per-node=2", &program(), ROLE, SPREAD, "gpus", marks];
    let ran = srun(slurm, folder.path(), &words);
    let told = told(&ran);
    // Which two nodes is Slurm's to say.
    let nodes: BTreeSet<&str> = nodes_of(&told).into_iter().collect();
    assert_eq!(nodes.len(), 2, "{ran:?}");
    let both = |node: &str| ["0", "1"].map(|gpus| Place { node: node.into(), gpus: gpus.into() });
    let all: BTreeSet<Place> = nodes.into_iter().flat_map(both).collect();
    assert_eq!(told.places, all, "{ran:?}");
}

fn node_killed(slurm: &mut Slurm) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let marks_in = tempfile::tempdir().expect("temporary folder");
    let out = folder.path().join("out");
    let step = format!(
        "--wrap=srun --no-kill --kill-on-bad-exit=0 --wait=0 {} {ROLE} {SPREAD} stay {}",
        program(),
        marks_in.path().display()
    );
    let mut sbatch = slurm.command("sbatch");
    sbatch.args(["--parsable", "--no-kill", "-N3", "--cpus-per-task=1"]);
    sbatch.arg(format!("--output={}", out.display())).arg(step).current_dir(folder.path());
    let job = program::finish(sbatch).stdout.trim().to_owned();
    let text = || std::fs::read_to_string(&out).unwrap_or_default();
    let on = |node: &str| marks(marks_in.path()).iter().filter(|m| m.starts_with(node)).count();
    let all_run = || (on("node1") > 0 && on("node2") > 0 && on("node3") > 0).then_some(());
    poll(DEADLINE, all_run).unwrap_or_else(|| panic!("not all nodes work: {}", text()));
    let before = marks(marks_in.path()).len();
    slurm.kill_node("node2");
    // What was lost is seen, and waits for its turn elsewhere.
    let lost = || text().contains("was lost").then_some(());
    poll(DEADLINE, lost).unwrap_or_else(|| panic!("nobody noticed: {}", text()));
    leave_a_mark(marks_in.path(), "go");
    let told = poll(DEADLINE, || told_in(&text()));
    let told = told.unwrap_or_else(|| panic!("it did not go on: {}", text()));
    assert_eq!(nodes_of(&told), ["node1", "node3"], "{}", text());
    assert_eq!(told.nodes, 2, "{}", text());
    let after = marks(marks_in.path()).len();
    assert!(after > before + 1, "what node2 did was done again: {before} marks, then {after}");
    program::finish({
        let mut scancel = slurm.command("scancel");
        scancel.arg(job);
        scancel
    });
    slurm.start_node("node2").expect("a node");
    slurm.wait_idle(DEADLINE).expect("three nodes");
}
