//! A memory cgroup for each worker with a memory limit, where this process may make them.
//!
//! Looking at resident sizes decides first, twenty times a second. The cgroup is for what grows
//! faster: the kernel kills the worker alone, before the whole machine runs out. It counts more than
//! the resident size, as the pages of objects that a worker has made stay its own wherever they are
//! used. So its limit is higher, by what all objects together may take.

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use std::fs::File;
use std::io::{Result, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const NAME: &str = "mobula";
/// Whoever lives on for so long after something was killed here was not the victim.
const DYING: Duration = Duration::from_secs(5);

/// Those that could not be removed yet.
static LEFT: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// The cgroup of one worker; removed when dropped, as far as nothing is in it any more.
#[derive(Debug)]
pub(super) struct Cgroup {
    folder: PathBuf,
    version: Version,
    limit: u64,
    /// How often the kernel has killed something here, and when that was seen first.
    kills: (u64, Option<Instant>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Cgroup {
    /// Puts a process into a new one. `None` if that is not possible here: then only its resident
    /// size is watched.
    pub(super) fn of(process: Pid, limit: u64) -> Option<Self> {
        let (own, version) = own_folder_here()?;
        lock(&LEFT).retain(|folder| std::fs::remove_dir(folder).is_err() && folder.exists());
        remove_those(&own, |driver| test_kill_process(driver) == Err(Errno::SRCH));
        let objects = crate::store::memory_budget().ok()?;
        let made = Self::make(&own, version, limit, limit.saturating_add(objects));
        let joined = made.and_then(|cgroup| cgroup.join(process).map(|()| cgroup));
        joined.inspect_err(|error| tracing::debug!(%error, ?own, "no memory cgroup")).ok()
    }

    fn make(own: &Path, version: Version, limit: u64, bytes: u64) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if version == Version::V2 && !lists(&own.join("cgroup.subtree_control"), "memory") {
            // Refused where processes are in the group itself, unless it is the root.
            write(&own.join("cgroup.subtree_control"), "+memory")?;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = own.join(format!("{NAME}-{}-{number}", std::process::id()));
        std::fs::create_dir(&folder)?;
        let cgroup = Self { folder, version, limit, kills: (0, None) };
        let bytes = bytes.to_string();
        let (limit, swap) = match version {
            Version::V1 => ("memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", &*bytes)),
            Version::V2 => ("memory.max", ("memory.swap.max", "0")),
        };
        write(&cgroup.folder.join(limit), &bytes)?;
        // Not there where the kernel does not account for swap.
        let _ = write(&cgroup.folder.join(swap.0), swap.1);
        Ok(cgroup)
    }

    fn join(&self, process: Pid) -> Result<()> {
        write(&self.folder.join("cgroup.procs"), &process.to_string())
    }

    /// Sees whether the kernel has killed something here: the worker, or a program of its own.
    pub(super) fn look(&mut self, now: Instant) {
        let events = match self.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        let kills = field(&self.read(events), "oom_kill").unwrap_or(0);
        if kills > self.kills.0 {
            self.kills = (kills, Some(now));
        }
    }

    /// What was held, and what was allowed, if the kernel has just killed something here for that.
    pub(super) fn overrun(&mut self, now: Instant) -> Option<(u64, u64)> {
        self.look(now);
        let peak = match self.version {
            Version::V1 => "memory.max_usage_in_bytes",
            Version::V2 => "memory.peak",
        };
        // Linux before 5.19 does not tell.
        let peak = self.read(peak).trim().parse().unwrap_or(self.limit);
        let is_new = now.saturating_duration_since(self.kills.1?) < DYING;
        is_new.then_some((peak, self.limit))
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.join(name)).unwrap_or_default()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What its worker has left behind may take a moment to go.
        if std::fs::remove_dir(&self.folder).is_err() {
            lock(&LEFT).push(std::mem::take(&mut self.folder));
        }
    }
}

fn own_folder_here() -> Option<(PathBuf, Version)> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    own_folder(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"))
}

/// The folder of this process's own memory cgroup, from `/proc/self/cgroup` and
/// `/proc/self/mountinfo`.
fn own_folder(cgroups: &str, mounts: &str) -> Option<(PathBuf, Version)> {
    let own = cgroups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        Some((controllers, Path::new(path)))
    });
    let with = |is_it: fn(&str) -> bool| {
        own.clone().find(|(controllers, _)| is_it(controllers)).map(|(_, path)| path)
    };
    let v1 = || {
        let own = with(|controllers| controllers.split(',').any(|name| name == "memory"))?;
        Some((folder_of(own, mounts, "cgroup", "memory")?, Version::V1))
    };
    let v2 = || Some((folder_of(with(str::is_empty)?, mounts, "cgroup2", "")?, Version::V2));
    v1().or_else(v2)
}

/// Where a cgroup is mounted, by a mount of that kind with that option.
fn folder_of(own: &Path, mounts: &str, kind: &str, option: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (place, system) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, Path::new(place.next()?));
        let mut system = system.split(' ');
        let is_it = system.next() == Some(kind)
            && (option.is_empty() || system.nth(1)?.split(',').any(|name| name == option));
        // A mount of another part of the tree does not show it.
        is_it.then(|| own.strip_prefix(root).ok().map(|inside| point.join(inside)))?
    })
}

/// Removes those that a driver which has ended has made, and that nothing is in any more.
pub(super) fn remove_those_of(driver: Pid) {
    if let Some((own, _)) = own_folder_here() {
        remove_those(&own, |other| other == driver);
    }
}

fn remove_those(own: &Path, of: impl Fn(Pid) -> bool) {
    let entries = std::fs::read_dir(own).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let driver = name.to_str().and_then(driver_of).and_then(Pid::from_raw);
        if driver.is_some_and(&of) {
            // Refused where something is in it.
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

/// The process id of the driver that has made a cgroup of this name.
fn driver_of(name: &str) -> Option<i32> {
    name.strip_prefix(NAME)?.strip_prefix('-')?.split_once('-')?.0.parse().ok()
}

fn field(text: &str, name: &str) -> Option<u64> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.find(|(field, _)| *field == name)?.1.trim().parse().ok()
}

fn lists(file: &Path, name: &str) -> bool {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.split_whitespace().any(|word| word == name)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes to a file that is there.
fn write(file: &Path, text: &str) -> Result<()> {
    File::options().write(true).open(file)?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    const MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
";

    #[test]
    fn the_own_memory_cgroup_is_found_whatever_is_mounted_where() {
        let find = |cgroups, mounts: &str| {
            own_folder(cgroups, mounts).map(|(path, version)| (path.display().to_string(), version))
        };
        let v1 = find("5:cpu:/x\n4:memory:/job/7\n0::/z", MOUNTS).expect("version 1");
        assert_eq!(v1, ("/sys/fs/cgroup/memory/job/7".to_owned(), Version::V1));
        let v2 = find("0::/user/a:b", MOUNTS).expect("version 2");
        assert_eq!(v2, ("/sys/fs/cgroup/unified/user/a:b".to_owned(), Version::V2));
        // In a container the mount shows only what is below its own cgroup.
        let container = "1 2 0:3 /docker/7 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory";
        let inside = find("4:memory:/docker/7/job", container).expect("shown");
        assert_eq!(inside.0, "/sys/fs/cgroup/memory/job");
        assert_eq!(find("4:memory:/elsewhere", container), None);
        assert_eq!(find("", MOUNTS).or(find("0::/", "")), None);
    }

    #[test]
    fn the_files_of_version_2_are_written_and_read() {
        let root = tempfile::tempdir().expect("a folder");
        let make = || Cgroup::make(root.path(), Version::V2, 100, 300);
        assert!(make().is_err(), "no controller can be turned on");
        std::fs::write(root.path().join("cgroup.subtree_control"), "cpu memory\n").expect("write");
        let (folder, version, limit) = (root.path().to_owned(), Version::V2, 100);
        let mut cgroup = Cgroup { folder, version, limit, kills: (0, None) };
        let began = Instant::now();
        assert_eq!(cgroup.overrun(began), None);
        let text = |kills: u64| format!("max 9\noom 1\noom_kill {kills}\n");
        std::fs::write(root.path().join("memory.events"), text(0)).expect("write");
        assert_eq!(cgroup.overrun(began), None);
        std::fs::write(root.path().join("memory.events"), text(1)).expect("write");
        assert_eq!(cgroup.overrun(began), Some((100, 100)), "an old kernel tells no peak");
        std::fs::write(root.path().join("memory.peak"), "300\n").expect("write");
        assert_eq!(cgroup.overrun(began), Some((300, 100)));
        let later = began + 2 * DYING;
        assert_eq!(cgroup.overrun(later), None, "it was another process that was killed");
        std::fs::write(root.path().join("memory.events"), text(2)).expect("write");
        assert_eq!(cgroup.overrun(later), Some((300, 100)), "now it is");
    }

    #[test]
    fn a_name_tells_its_driver() {
        assert_eq!(driver_of("mobula-12-3"), Some(12));
        for other in ["mobula-12", "mobula-x-3", "other-12-3", ""] {
            assert_eq!(driver_of(other), None, "{other}");
        }
    }

    /// Where cgroups cannot be made there is nothing to see.
    #[test]
    fn the_kernel_kills_what_takes_too_much_and_it_is_known() {
        let Some((own, version)) = own_folder_here() else { return };
        let Ok(mut cgroup) = Cgroup::make(&own, version, 20 << 20, 40 << 20) else { return };
        let folder = cgroup.folder.clone();
        // It begins when it has been moved, and keeps much of what it reads.
        let mut child = Command::new("sh")
            .args(["-c", "read line; head -c 300000000 /dev/zero | tail -c 200000000"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("start");
        let joined = cgroup.join(Pid::from_child(&child));
        drop(child.stdin.take());
        if joined.is_err() {
            child.kill().expect("kill");
        }
        child.wait().expect("reap");
        if joined.is_ok() {
            let (peak, limit) = cgroup.overrun(Instant::now()).expect("it was killed for that");
            assert!(peak > 30 << 20 && limit == 20 << 20, "{peak} of {limit}");
        }
        drop(cgroup);
        assert!(!folder.exists());
    }
}
