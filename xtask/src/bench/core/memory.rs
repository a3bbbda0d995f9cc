//! How much memory a tree of processes uses: the sum of their PSS, in which a page that n of them
//! share counts one n-th in each.

use crate::bench::median;
use crate::bench::worker::Worker;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// MiB of the tree below a worker that has started so many processes, and waits.
///
/// Such a worker answers `run WORKERS` with its process id.
pub(super) fn of_idle(worker: &mut Worker, workers: usize) -> Result<f64> {
    let answer = worker.run(workers)?.loss;
    let root = answer.with_context(|| format!("{} gave no process id", worker.name))? as u32;
    let mut samples = Vec::new();
    for _ in 0..3 {
        // What starts lazily has started by then, and start-up's garbage is gone.
        std::thread::sleep(Duration::from_secs(2));
        let tree = pss_of_tree(root)?;
        let enough = tree.len() > workers;
        ensure!(enough, "{}: {workers} workers, but {} processes", worker.name, tree.len());
        samples.push(tree.iter().sum::<u64>() as f64 / 1024.0);
    }
    Ok(median(&samples))
}

/// KiB of each process of the tree below `root`, itself included.
fn pss_of_tree(root: u32) -> Result<Vec<u64>> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc").context("listing /proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end while we look.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        parents.extend(parent(&stat).map(|parent| (pid, parent)));
    }
    // One that has ended, or is a zombie, has no memory.
    Ok(tree(root, &parents).into_iter().filter_map(pss).collect())
}

fn pss(pid: u32) -> Option<u64> {
    pss_in(&std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?)
}

/// The `Pss:` line of smaps_rollup.
fn pss_in(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// The parent in `/proc/PID/stat`. The program's name before it may hold spaces and parentheses.
fn parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// `root` and all below it, given each process and its parent.
fn tree(root: u32, parents: &[(u32, u32)]) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let children = parents.iter().filter(|(_, parent)| *parent == found[next]);
        found.extend(children.map(|(pid, _)| *pid).collect::<Vec<_>>());
        next += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pss_is_found() {
        let rollup = "55d6c0a0-7ffd [rollup]\nRss:  6240 kB\nPss:  3120 kB\nPss_Dirty:  8 kB\n";
        assert_eq!(pss_in(rollup), Some(3120));
        assert_eq!(pss_in(""), None);
    }

    #[test]
    fn a_name_does_not_hide_the_parent() {
        assert_eq!(parent("12 (a b) S) S 7 12 12 0"), Some(7));
        assert_eq!(parent("12 (a"), None);
    }

    #[test]
    fn a_tree_holds_grandchildren_and_no_strangers() {
        let parents = [(5, 4), (3, 2), (2, 1), (4, 2), (9, 8), (1, 0)];
        assert_eq!(tree(2, &parents), [2, 3, 4, 5]);
    }

    #[test]
    fn our_own_tree_has_memory() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("starts");
        let tree = pss_of_tree(std::process::id()).expect("has /proc");
        child.kill().expect("was alive");
        child.wait().expect("ended");
        assert!(tree.len() >= 2 && tree.iter().all(|kib| *kib > 0), "{tree:?}");
    }
}
