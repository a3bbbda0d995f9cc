//! Folders and memory for what a layer holds beyond the values that it computes with.

use crate::error::AtPath;
use crate::nested::nested;
use crate::store::limits;
use crate::{Error, Resources};
use bytesize::ByteSize;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

const PREFIX: &str = "mobula-spill";

/// Bytes of memory that a layer may use: what the environment `variable` says, such as `8GB` or
/// `7.5GiB`, or else `percent` of what this process may use. Of that a worker process gets the share
/// that it has of the CPUs.
pub fn memory_budget(variable: &'static str, percent: u64) -> Result<u64, Error> {
    if let Ok(text) = std::env::var(variable) {
        return bytes_of(&text).ok_or_else(|| Error::LaunchVariable {
            variable: variable.to_owned(),
            got: Some(text),
            expected: "bytes, such as 8000000000, 8GB or 7.5GiB".to_owned(),
        });
    }
    let cpus = Resources::of_this_machine().cpus.max(1.0);
    let own = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse::<f64>().ok());
    let share = own.filter(|_| nested().is_some()).map_or(1.0, |own| (own / cpus).min(1.0));
    Ok((limits::allowed() as f64 / 100.0 * percent as f64 * share) as u64)
}

/// A number of bytes, or of a unit; only of a unit may there be a fraction.
fn bytes_of(text: &str) -> Option<u64> {
    let of_unit = || text.parse::<ByteSize>().ok().filter(|_| text.parse::<f64>().is_err());
    text.parse().ok().or_else(|| of_unit().map(|size| size.as_u64()))
}

/// A private folder of this process, removed when dropped. It is locked for as long as the process
/// lives; the next that is made in the same place on this host removes those that are not.
#[derive(Debug)]
pub struct ScratchFolder {
    path: PathBuf,
    /// None where the file system has no locks; then nobody removes the folder of a killed process.
    _lock: Option<File>,
}

impl ScratchFolder {
    /// A new folder in `parent`, which is created if need be.
    pub fn create(parent: &Path) -> Result<Self, Error> {
        Self::sweep(parent)?;
        let own = own_prefix();
        for attempt in 0..u32::MAX {
            // Not the name of one that was there before: somebody may still know it.
            let random = rand_word();
            let path = parent.join(format!("{own}{}-{attempt}-{random:08x}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.at("create", &path)?,
            }
            match lock(&path) {
                Ok(Some(lock)) => return Ok(Self { path, _lock: Some(lock) }),
                // Another process's sweep was faster, and there is no folder any more.
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "a spill folder has no lock");
                    return Ok(Self { path, _lock: None });
                }
            }
        }
        Err(Error::Internal(format!("no name is free in {}", parent.display())))
    }

    /// Removes what processes of this host that were killed have left in `parent`, which is created
    /// if need be.
    pub fn sweep(parent: &Path) -> Result<(), Error> {
        std::fs::create_dir_all(parent).at("create", parent)?;
        sweep(parent, &own_prefix())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a spill folder stays behind");
        }
    }
}

fn is_number(text: &str) -> bool {
    text.parse::<u64>().is_ok()
}

/// A number that the system drew for this call.
fn rand_word() -> u32 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish() as u32
}

fn own_prefix() -> String {
    format!("{PREFIX}-{}-", host())
}

/// Hosts that share a file system do not always see each other's locks.
fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().replace('/', "_")
}

/// Locks a folder; `None` if another process has it, or it is no longer there.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let folder = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let same =
        std::fs::metadata(path).map(|there| there.ino()).ok() == Some(folder.metadata()?.ino());
    Ok(same.then_some(folder))
}

fn sweep(parent: &Path, own: &str) -> Result<(), Error> {
    for entry in std::fs::read_dir(parent).at("read", parent)? {
        let entry = entry.at("read", parent)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // Not that of a host whose name begins with this one's.
        let is_own = |rest: &str| match rest.split('-').collect::<Vec<_>>()[..] {
            [pid, attempt] => is_number(pid) && is_number(attempt),
            [pid, attempt, random] => is_number(pid) && is_number(attempt) && random.len() == 8,
            _ => false,
        };
        if !name.strip_prefix(own).is_some_and(is_own) {
            continue;
        }
        // Not ours to remove, or being removed by another: both are fine.
        if let Ok(Some(_lock)) = lock(&entry.path())
            && std::fs::remove_dir_all(entry.path()).is_ok()
        {
            tracing::info!(path = %entry.path().display(), "removed what a killed process left");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_is_private_and_goes_when_dropped() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = ScratchFolder::create(&parent.path().join("new")).expect("creates");
        let path = folder.path().to_owned();
        let mode = std::fs::metadata(&path).expect("exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn what_the_dead_left_is_removed_and_what_the_living_use_is_not() {
        let parent = tempfile::tempdir().expect("a folder");
        let living = ScratchFolder::create(parent.path()).expect("creates");
        let dead = parent.path().join(format!("{PREFIX}-{}-1-0", host()));
        let elsewhere = parent.path().join(format!("{PREFIX}-{}-1-4711-0-0a1b2c3d", host()));
        let foreign = parent.path().join("results");
        for folder in [&dead, &elsewhere, &foreign] {
            std::fs::create_dir(folder).expect("creates");
            std::fs::write(folder.join("1"), "content").expect("writes");
        }
        let second = ScratchFolder::create(parent.path()).expect("creates");
        assert_ne!(living.path, second.path);
        assert!(living.path.exists() && elsewhere.exists() && foreign.exists());
        assert!(!dead.exists());
    }

    #[test]
    fn budgets_have_units() {
        assert_eq!(bytes_of("8000000000"), Some(8_000_000_000));
        assert_eq!(bytes_of("8GB"), Some(8_000_000_000));
        assert_eq!(bytes_of("7.5 GiB"), Some(15 << 29));
        for text in ["8.5", "-1", "much", "8 GG", ""] {
            assert_eq!(bytes_of(text), None, "{text}");
        }
    }

    #[test]
    fn a_budget_is_a_share_of_the_memory() {
        let half = memory_budget("MOBULA_NOT_SET", 50).expect("a budget");
        assert!(half > 0 && half <= Resources::of_this_machine().memory / 2);
        assert!(memory_budget("MOBULA_NOT_SET", 25).expect("a budget") <= half / 2 + 1);
    }
}
