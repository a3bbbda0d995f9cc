//! A folder in an object store, written so that what is not whole is no data.

use super::part::WrittenPart;
use super::{LIST, Written, WrittenFile};
use crate::error::{Error, Result};
use crate::remote::{PART, Place, WRITING};
use mobula_core::error::AtPath;
use mobula_core::scratch::ScratchFolder;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// A folder that is being written. What was written goes, unless it is committed.
#[derive(Debug)]
pub(super) struct RemoteFolder {
    folder: Place,
    /// Where files are until they are sent.
    here: ScratchFolder,
    /// In the names of all files of this write.
    id: String,
    /// What was there before.
    before: Vec<Place>,
    sent: Mutex<Vec<Place>>,
}

impl RemoteFolder {
    pub(super) fn begin(url: &Path, overwrite: bool) -> Result<Self> {
        let folder = Place::new(url)?;
        let before = folder.objects()?;
        may_be_written(url, &before, overwrite)?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = format!("{:x}-{:x}", time.as_nanos(), std::process::id());
        let here = ScratchFolder::create(&std::env::temp_dir())?;
        folder.below(Path::new(&format!("{WRITING}{id}")))?.put(b"Mobula".to_vec())?;
        Ok(Self { folder, here, id, before, sent: Mutex::default() })
    }

    pub(super) fn here(&self) -> &Path {
        self.here.path()
    }

    /// Sends a file; the name says where it is in the folder.
    pub(super) fn send(
        &self,
        part: WrittenPart,
        name: &str,
        extension: &str,
    ) -> Result<WrittenPart> {
        let WrittenPart { path, folder, rows, .. } = part;
        let bytes = fs::metadata(&path).at("read", &path)?.len();
        let name = folder.join(format!("{PART}{name}-{}.{extension}", self.id));
        let to = self.folder.below(&name)?;
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).push(to.clone());
        to.upload(File::open(&path).at("open", &path)?, &path)?;
        fs::remove_file(&path).at("remove", &path)?;
        Ok(WrittenPart { path: name, folder, rows, bytes })
    }

    /// From here on the folder has these files, and no others.
    pub(super) fn commit(&self, parts: &[WrittenPart]) -> Result<Written> {
        let file = |part: &WrittenPart| WrittenFile {
            name: part.path.clone(),
            rows: part.rows,
            bytes: part.bytes,
        };
        let written = Written { files: parts.iter().map(file).collect() };
        let list = serde_json::to_vec_pretty(&written).map_err(mobula_core::Error::layer)?;
        self.folder.below(Path::new(LIST))?.put(list)?;
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).clear();
        for old in self.before.iter().filter(|old| old.url() != self.folder_list()) {
            if let Err(error) = old.delete() {
                tracing::warn!(%error, "what was replaced stays");
            }
        }
        Ok(written)
    }

    fn folder_list(&self) -> PathBuf {
        self.folder.url().join(LIST)
    }
}

impl Drop for RemoteFolder {
    fn drop(&mut self) {
        let sent = std::mem::take(&mut *self.sent.lock().unwrap_or_else(PoisonError::into_inner));
        let sign = self.folder.below(Path::new(&format!("{WRITING}{}", self.id)));
        // The sign last: it hides what is still there.
        for object in sent.into_iter().chain(sign) {
            match object.delete() {
                // One that was not whole was never there.
                Ok(()) | Err(Error::NoFiles { .. }) => {}
                Err(error) => tracing::warn!(%error, "a file that is no data stays"),
            }
        }
    }
}

/// An error if something is there that may not be replaced.
fn may_be_written(url: &Path, before: &[Place], overwrite: bool) -> Result<()> {
    let exists = |hint| Err(Error::TargetExists { path: url.to_owned(), hint });
    if before.is_empty() {
        return Ok(());
    }
    if !overwrite {
        return exists("write elsewhere, or overwrite it");
    }
    let is_ours = |object: &Place| {
        let name = object.filename();
        name == LIST || name.starts_with(WRITING)
    };
    match before.iter().any(is_ours) {
        true => Ok(()),
        false => exists(
            "it has no _written.json, so it is no folder that a dataset was written to; \
             if nothing in it is needed, remove it",
        ),
    }
}
