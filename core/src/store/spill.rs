//! The files of what does not fit into memory.

use super::ObjectId;
use crate::Error;
use crate::error::AtPath;
use crate::scratch::ScratchFolder;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Where a store's folder is to be, once something is spilled.
#[derive(Debug)]
pub(super) struct Spill {
    parent: PathBuf,
    folder: Option<SpillFolder>,
}

impl Spill {
    /// Removes what processes of this host that were killed have left in `parent`.
    pub(super) fn into(parent: &Path) -> Result<Self, Error> {
        ScratchFolder::sweep(parent)?;
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

/// One file an object.
#[derive(Debug)]
pub(crate) struct SpillFolder(ScratchFolder);

impl SpillFolder {
    /// A new folder in `parent`.
    pub(crate) fn create(parent: &Path) -> Result<Self, Error> {
        Ok(Self(ScratchFolder::create(parent)?))
    }

    fn path(&self, id: ObjectId) -> PathBuf {
        self.0.path().join(id.0.to_string())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_object_is_in_a_private_file() {
        let parent = tempfile::tempdir().expect("a folder");
        let spill = SpillFolder::create(parent.path()).expect("creates");
        spill.write(ObjectId(3), b"content").expect("writes");
        let mode = std::fs::metadata(spill.path(ObjectId(3))).expect("exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            io::read_to_string(spill.open(ObjectId(3)).expect("opens")).expect("reads"),
            "content"
        );
        spill.remove(ObjectId(3));
        assert!(spill.open(ObjectId(3)).expect_err("removed").to_string().contains("cannot read"));
    }
}
