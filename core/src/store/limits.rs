//! What the system allows: open files, memory.

use crate::{Error, Resources};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::path::Path;
use std::sync::Once;

/// How many bytes of memory objects may take, for a program that is to use more or less.
pub(crate) const BUDGET_VARIABLE: &str = "MOBULA_OBJECT_BYTES";

/// Bytes of memory for objects, as the environment says. The objects are the machine's, not this
/// process's.
pub(crate) fn budget() -> Result<u64, Error> {
    match std::env::var(BUDGET_VARIABLE) {
        Ok(_) => crate::scratch::memory_budget(BUDGET_VARIABLE, 30),
        Err(_) => Ok(default_budget()),
    }
}

/// Bytes of memory for objects unless told otherwise: 30 % of what this process may use.
pub(crate) fn default_budget() -> u64 {
    allowed() / 10 * 3
}

/// Bytes of memory that this process may use.
pub(crate) fn allowed() -> u64 {
    let machine = Resources::of_this_machine().memory;
    let allowed = cgroup_limit(Path::new("/sys/fs/cgroup"), "/proc/self/cgroup");
    allowed.map_or(machine, |allowed| allowed.min(machine))
}

/// The least memory limit of this process's control group and those around it (version 2).
fn cgroup_limit(root: &Path, of: impl AsRef<Path>) -> Option<u64> {
    let groups = std::fs::read_to_string(of).ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let limit = |folder: &Path| {
        let text = std::fs::read_to_string(root.join(folder).join("memory.max")).ok()?;
        text.trim().parse().ok()
    };
    Path::new(own).ancestors().filter_map(limit).min()
}

/// Lets this process open as many files as it may: a large object costs one.
pub(super) fn raise_open_files() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit { current: limit.maximum, ..limit };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::debug!(%error, ?limit, "the limit of open files stays as it is");
        }
    });
}

/// Whether there are too many open files to open another.
pub(super) fn out_of_files(error: &Error) -> bool {
    let Error::System { source, .. } = error else { return false };
    let code = source.raw_os_error();
    code == Some(Errno::MFILE.raw_os_error()) || code == Some(Errno::NFILE.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_around_the_process_counts() {
        let root = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(root.path().join("job/step")).expect("creates");
        let group = root.path().join("cgroup");
        std::fs::write(&group, "1:cpu:/other\n0::/job/step\n").expect("writes");
        assert_eq!(cgroup_limit(root.path(), &group), None);
        std::fs::write(root.path().join("job/step/memory.max"), "max\n").expect("writes");
        std::fs::write(root.path().join("job/memory.max"), "4096\n").expect("writes");
        assert_eq!(cgroup_limit(root.path(), &group), Some(4096));
        std::fs::write(root.path().join("memory.max"), "100\n").expect("writes");
        assert_eq!(cgroup_limit(root.path(), &group), Some(100));
    }

    #[test]
    fn the_budget_is_part_of_the_memory_and_files_are_as_many_as_may_be() {
        let machine = Resources::of_this_machine().memory;
        assert!(default_budget() > 0 && default_budget() <= machine / 10 * 3);
        raise_open_files();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
