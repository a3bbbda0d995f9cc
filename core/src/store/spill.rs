//! The folder for what does not fit into memory.

use super::ObjectId;
use crate::Error;
use crate::error::AtPath;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const PREFIX: &str = "mobula-spill";

/// Where a store's folder is to be, once something is spilled.
#[derive(Debug)]
pub(super) struct Spill {
    parent: PathBuf,
    folder: Option<SpillFolder>,
}

impl Spill {
    /// Removes what processes of this host that were killed have left in `parent`.
    pub(super) fn into(parent: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(parent).at("create", parent)?;
        sweep(parent, &own_prefix())?;
        Ok(Self { parent: parent.to_owned(), folder: None })
    }

    /// The folder, made when it is first needed.
    pub(super) fn folder(&mut self) -> Result<&SpillFolder, Error> {
        match &mut self.folder {
            Some(folder) => Ok(folder),
            none => Ok(none.insert(SpillFolder::create(&self.parent)?)),
        }
    }

    /// Removes an object's file, if it has one.
    pub(super) fn remove(&self, id: ObjectId) {
        self.folder.iter().for_each(|folder| folder.remove(id));
    }
}

/// A private folder of this process, one file an object, removed when dropped. It is locked for
/// as long as the process lives; the next store on this host removes those that are not.
#[derive(Debug)]
pub(crate) struct SpillFolder {
    path: PathBuf,
    /// None where the file system has no locks; then nobody removes the folder of a killed process.
    _lock: Option<File>,
}

impl SpillFolder {
    /// A new folder in `parent`, which is created if need be.
    pub(crate) fn create(parent: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(parent).at("create", parent)?;
        let own = own_prefix();
        for attempt in 0..u32::MAX {
            let path = parent.join(format!("{own}{}-{attempt}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.at("create", &path)?,
            }
            match lock(&path) {
                Ok(Some(lock)) => return Ok(Self { path, _lock: Some(lock) }),
                // Another store's sweep was faster, and there is no folder any more.
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "a spill folder has no lock");
                    return Ok(Self { path, _lock: None });
                }
            }
        }
        Err(Error::Internal(format!("no name is free in {}", parent.display())))
    }

    fn path(&self, id: ObjectId) -> PathBuf {
        self.path.join(id.0.to_string())
    }

    /// Writes an object; what a failed attempt has written is removed.
    pub(crate) fn write(&self, id: ObjectId, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path(id);
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| file.write_all(bytes));
        if written.is_err() {
            let _ = std::fs::remove_file(&path);
        }
        written.at("write", &path)
    }

    /// Opens an object's file.
    pub(crate) fn open(&self, id: ObjectId) -> Result<File, Error> {
        let path = self.path(id);
        File::open(&path).at("read", &path)
    }

    /// Removes an object's file, if it has one.
    pub(crate) fn remove(&self, id: ObjectId) {
        // What stays behind goes with the folder.
        let _ = std::fs::remove_file(self.path(id));
    }
}

impl Drop for SpillFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a spill folder stays behind");
        }
    }
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
        if !entry.file_name().to_string_lossy().starts_with(own) {
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
    fn a_folder_is_private_and_goes_with_its_store() {
        let parent = tempfile::tempdir().expect("a folder");
        let spill = SpillFolder::create(&parent.path().join("new")).expect("creates");
        let path = spill.path.clone();
        spill.write(ObjectId(3), b"content").expect("writes");
        let mode = |path: &Path| std::fs::metadata(path).expect("exists").permissions().mode();
        assert_eq!(mode(&path) & 0o777, 0o700);
        assert_eq!(mode(&spill.path(ObjectId(3))) & 0o777, 0o600);
        assert_eq!(
            io::read_to_string(spill.open(ObjectId(3)).expect("opens")).expect("reads"),
            "content"
        );
        spill.remove(ObjectId(3));
        assert!(spill.open(ObjectId(3)).expect_err("removed").to_string().contains("cannot read"));
        drop(spill);
        assert!(!path.exists());
    }

    #[test]
    fn what_the_dead_left_is_removed_and_what_the_living_use_is_not() {
        let parent = tempfile::tempdir().expect("a folder");
        let living = SpillFolder::create(parent.path()).expect("creates");
        let dead = parent.path().join(format!("{PREFIX}-{}-1-0", host()));
        let elsewhere = parent.path().join(format!("{PREFIX}-another-host-1-0"));
        let foreign = parent.path().join("results");
        for folder in [&dead, &elsewhere, &foreign] {
            std::fs::create_dir(folder).expect("creates");
            std::fs::write(folder.join("1"), "content").expect("writes");
        }
        drop(Spill::into(parent.path()).expect("sweeps"));
        let second = SpillFolder::create(parent.path()).expect("creates");
        assert_ne!(living.path, second.path);
        assert!(living.path.exists() && elsewhere.exists() && foreign.exists());
        assert!(!dead.exists());
    }
}
