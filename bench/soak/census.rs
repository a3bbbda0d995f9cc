//! What the driver holds, counted when nothing runs: what grows there leaks.

use crate::processes;
use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::fs::read_dir;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Everything idle has ended by then: workers after a second, threads after ten.
const PATIENCE: Duration = Duration::from_secs(30);
/// Threads that wait a while for their next work.
const PARKED: [&str; 2] = ["thread mobula-task", "thread mobula-control"];
/// What a warm allocator may have kept since the warm-up.
const SLACK: u64 = 128 << 20;

/// How many there are of each thing, by kind and name.
#[derive(Clone, Debug)]
pub(crate) struct Census {
    things: BTreeMap<String, usize>,
    pub(crate) resident: u64,
}

impl Census {
    fn take(scratch: &Path) -> Self {
        let mut things = BTreeMap::new();
        let mut count = |name: String| *things.entry(name).or_insert(0) += 1;
        processes::workers().iter().for_each(|_| count("worker process".to_owned()));
        processes::fork_servers().iter().for_each(|_| count("fork server".to_owned()));
        memory_cgroups().iter().for_each(|_| count("memory cgroup".to_owned()));
        for thread in names("/proc/self/task", "comm") {
            count(format!("thread {}", thread.trim()));
        }
        for entry in read_dir("/proc/self/fd").into_iter().flatten().flatten() {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            count(format!("descriptor {}", kind(&target.to_string_lossy())));
        }
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        maps.lines().filter(|line| line.contains("memfd:mobula")).for_each(|_| {
            count("mapping of shared memory".to_owned());
        });
        for folder in [scratch, Path::new("/dev/shm")] {
            let entries = read_dir(folder).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            // Others use /dev/shm too.
            let ours = names.filter(|name| folder == scratch || name.contains("mobula"));
            // That of a killed driver stays until the next one.
            ours.filter(|name| !is_spill_of_another(name)).for_each(|_| {
                count(format!("entry of {}", folder.display()));
            });
        }
        Self { things, resident: resident() }
    }

    /// Waits until no more is there than `before`, apart from `except`.
    fn settled(scratch: &Path, before: &Self, except: &[&str]) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = Self::take(scratch);
            let excess = now.excess(before, except);
            if excess.is_empty() {
                return Ok(now);
            }
            if Instant::now() > deadline {
                let workers: Vec<_> =
                    processes::workers().into_iter().map(processes::describe).collect();
                bail!("leaked: {}; workers: {workers:?}", excess.join(", "));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn excess(&self, before: &Self, except: &[&str]) -> Vec<String> {
        let count = |name| before.things.get(name).copied().unwrap_or(0);
        let grown = self
            .things
            .iter()
            .filter(|(name, n)| **n > count(*name) && !except.contains(&name.as_str()));
        grown.map(|(name, n)| format!("{name}: {n}, had {}", count(name))).collect()
    }
}

/// Compares all later ones with the first one.
pub(crate) struct Watch<'a> {
    scratch: &'a Path,
    /// Before any work: no worker, no thread that works.
    idle: Census,
    /// At each look, in bytes.
    resident: Vec<u64>,
}

impl<'a> Watch<'a> {
    /// To be called once there is a runtime, and each kind of thread that stays.
    pub(crate) fn begin(scratch: &'a Path) -> Result<Self> {
        let nothing = Census { things: BTreeMap::new(), resident: 0 };
        let is_idle = |census: &Census| !census.things.contains_key("worker process");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let idle = Census::take(scratch);
            if is_idle(&idle) {
                return Ok(Self { scratch, idle, resident: Vec::new() });
            }
            if Instant::now() > deadline {
                bail!("idle workers do not end: {}", idle.excess(&nothing, &[]).join(", "));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn look(&mut self) -> Result<()> {
        let now = Census::settled(self.scratch, &self.idle, &PARKED)?;
        self.resident.push(now.resident);
        let warm = self.resident.first().copied().unwrap_or_default();
        if now.resident > warm + SLACK {
            bail!("{} MiB are resident, after the warm-up {} were", now.resident >> 20, warm >> 20);
        }
        Ok(())
    }

    /// After the last round even parked threads are to go.
    pub(crate) fn end(&self) -> Result<()> {
        Census::settled(self.scratch, &self.idle, &[]).map(drop)
    }

    /// What the driver held at each look, in bytes.
    pub(crate) fn resident(self) -> Vec<u64> {
        self.resident
    }
}

/// No other process has this in its environment.
pub(crate) fn nobody_has(name: &str, value: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut left = processes::with_variable(name, value);
        left.retain(|pid| *pid != std::process::id());
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let left: Vec<_> = left.into_iter().map(processes::describe).collect();
            bail!("left behind: {left:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kind(target: &str) -> &str {
    match target.split_once([':', ' ']) {
        Some((kind @ ("socket" | "pipe"), _)) => kind,
        _ => target,
    }
}

/// Those that this process has made for its workers, or that one which has ended has left.
fn memory_cgroups() -> Vec<PathBuf> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let folders = own.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
        // Where they are mounted on most systems.
        let root = Path::new("/sys/fs/cgroup");
        Some(if controllers.is_empty() {
            root.join(path)
        } else {
            root.join(controllers).join(path)
        })
    });
    let entries = folders.flat_map(read_dir).flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| is_ours_or_nobodys(path)).collect()
}

fn is_ours_or_nobodys(cgroup: &Path) -> bool {
    let name = cgroup.file_name().unwrap_or_default().to_string_lossy();
    let driver = name.strip_prefix("mobula-").and_then(|rest| rest.split('-').next()?.parse().ok());
    driver.is_some_and(|driver| driver == std::process::id() || !processes::is_alive(driver))
}

fn is_spill_of_another(name: &str) -> bool {
    name.starts_with("mobula-spill-") && !name.contains(&format!("-{}-", std::process::id()))
}

fn names(folder: &str, file: &str) -> Vec<String> {
    let entries = read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| std::fs::read_to_string(entry.path().join(file)).ok()).collect()
}

fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
