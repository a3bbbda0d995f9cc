//! The program that is launched, and what its copies have told.

use crate::spread;
use mobula::World;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

/// The first argument of this binary as a launched program.
pub(crate) const ROLE: &str = "be-a-rank";

/// Its name as a launched program.
pub(crate) const PROGRAM: &str = "program";

/// The arguments for [`run`], if this process is a launched program.
pub(crate) fn arguments() -> Option<Vec<String>> {
    let mut words = std::env::args();
    if Path::new(&words.next()?).file_name()? == PROGRAM {
        return Some(words.collect());
    }
    (words.next()? == ROLE).then(|| words.collect())
}

/// What one copy tells, as a line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) world: World,
    /// `CUDA_VISIBLE_DEVICES`, `MOBULA_RUN_DIR` and so on.
    pub(crate) variables: BTreeMap<String, String>,
    pub(crate) arguments: Vec<String>,
    /// The address of rank 0, if it was asked for.
    pub(crate) master: Option<String>,
    pub(crate) pid: u32,
}

const VARIABLES: [&str; 5] =
    ["CUDA_VISIBLE_DEVICES", "MOBULA_RUN_DIR", "MOBULA_SECRET", "SLURMD_NODENAME", "SLURM_JOB_ID"];

/// Tells what it is; then does what it was asked to: `resolve`, `fail-at-first`, `wait`.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    if arguments.first().is_some_and(|first| first == spread::SPREAD) {
        return spread::run(arguments);
    }
    let world = match World::from_env() {
        Ok(world) => world,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let asked = |what: &str| arguments.iter().any(|argument| argument == what);
    let master = asked("resolve").then(|| match world.master() {
        Ok(address) => address.to_string(),
        Err(error) => error.to_string(),
    });
    let variables = VARIABLES.iter().filter_map(|name| Some((*name, std::env::var(name).ok()?)));
    let variables = variables.map(|(name, value)| (name.to_owned(), value)).collect();
    let first = world.restart_count == 0;
    let pid = std::process::id();
    let told = Told { world, variables, arguments: arguments.to_vec(), master, pid };
    println!("{}", serde_json::to_string(&told).expect("JSON"));
    if asked("wait") || (first && asked("wait-at-first")) {
        // Until somebody ends it.
        loop {
            std::thread::park();
        }
    }
    ExitCode::from(if first && asked("fail-at-first") { 3 } else { 0 })
}

/// This binary as the program to launch.
pub(crate) fn program() -> String {
    std::env::current_exe().expect("this binary").to_str().expect("UTF-8").to_owned()
}

/// What was told, by rank; lines of others and the prefixes of lines do not matter.
pub(crate) fn told(text: &str) -> Vec<Told> {
    let json = |line: &str| serde_json::from_str(&line[line.find('{')?..]).ok();
    let mut told: Vec<Told> = text.lines().filter_map(json).collect();
    told.sort_by_key(|told| (told.world.restart_count, told.world.rank));
    told
}

pub(crate) fn told_in(file: &Path) -> Vec<Told> {
    told(&std::fs::read_to_string(file).unwrap_or_default())
}

/// The copies of one launch agree: every rank once, one master, local ranks from 0 on every node.
/// Gives the number of copies on each node.
pub(crate) fn check_agreement(told: &[Told]) -> Vec<usize> {
    let mut nodes: BTreeMap<usize, Vec<&World>> = BTreeMap::new();
    let first = &told.first().expect("nobody told anything").world;
    for (rank, told) in told.iter().enumerate() {
        let world = &told.world;
        assert_eq!(world.rank, rank, "{told:?}");
        assert_eq!(world.world_size, told_size(world, first), "{told:?}");
        nodes.entry(world.node_rank).or_default().push(world);
    }
    assert_eq!(told.len(), first.world_size, "{told:?}");
    assert!(nodes.keys().copied().eq(0..nodes.len()), "{told:?}");
    for worlds in nodes.values() {
        let mut local: Vec<usize> = worlds.iter().map(|world| world.local_rank).collect();
        local.sort_unstable();
        assert!(local.into_iter().eq(0..worlds.len()), "{worlds:?}");
        assert!(worlds.iter().all(|world| world.local_world_size == worlds.len()), "{worlds:?}");
    }
    nodes.values().map(Vec::len).collect()
}

/// The size, if all else that must be the same is.
fn told_size(world: &World, first: &World) -> usize {
    let common = |w: &World| (w.master_addr.clone(), w.master_port, w.restart_count, w.launcher);
    assert_eq!(common(world), common(first));
    first.world_size
}
