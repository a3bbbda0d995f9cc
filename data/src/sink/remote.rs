//! A folder in an object store, written so that what is not whole is no data.

use super::part::WrittenPart;
use super::{LIST, Written, WrittenFile};
use crate::error::{Error, Result};
use crate::remote::{PART, Place, WRITING, sign};
use mobula_core::error::AtPath;
use mobula_core::scratch::ScratchFolder;
use std::fs::{self, File};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// A folder that is being written. What was written goes, unless it is committed.
#[derive(Debug)]
pub(super) struct RemoteFolder {
    folder: Place,
    /// Where files are until they are sent.
    here: ScratchFolder,
    /// In the names of all files of this write.
    id: String,
    /// What goes when it is committed.
    before: Vec<Place>,
    sent: Mutex<Vec<Place>>,
}

impl RemoteFolder {
    pub(super) fn begin(url: &Path, overwrite: bool) -> Result<Self> {
        let folder = Place::new(url)?;
        let before = replaced(&folder, url, overwrite)?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = format!("{:x}-{:x}", time.as_nanos(), std::process::id());
        let here = ScratchFolder::create(&std::env::temp_dir())?;
        let new = Self { folder, here, id, before, sent: Mutex::default() };
        new.sign()?.put(b"Mobula".to_vec())?;
        Ok(new)
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
        self.sent().push(to.clone());
        to.upload(File::open(&path).at("open", &path)?, &path)?;
        fs::remove_file(&path).at("remove", &path)?;
        Ok(WrittenPart { path: name, folder, rows, bytes })
    }

    /// From here on the folder has these files, and of what was written before no others.
    pub(super) fn commit(&self, parts: &[WrittenPart]) -> Result<Written> {
        let file = |part: &WrittenPart| WrittenFile {
            name: part.path.clone(),
            rows: part.rows,
            bytes: part.bytes,
        };
        let written = Written { files: parts.iter().map(file).collect() };
        let list = serde_json::to_vec_pretty(&written).map_err(mobula_core::Error::layer)?;
        if !self.sign()?.exists()? {
            return Err(Error::TargetExists {
                path: self.folder.url(),
                hint: "another program has written to it meanwhile; write again, one at a time",
            });
        }
        self.put_list(list)?;
        self.sent().clear();
        for old in &self.before {
            if let Err(error) = old.delete() {
                tracing::warn!(%error, "what was replaced stays");
            }
        }
        Ok(written)
    }

    /// If the answer is lost, the list says whether it is there.
    fn put_list(&self, list: Vec<u8>) -> Result<()> {
        let place = self.folder.below(Path::new(LIST))?;
        let Err(error) = place.put(list.clone()) else { return Ok(()) };
        match place.get() {
            Ok(found) if found == list => Ok(()),
            Ok(_) | Err(Error::FileChanged { .. }) => Err(error),
            Err(_) => {
                // The files may be those of the list, so they stay.
                self.sent().clear();
                Err(error)
            }
        }
    }

    fn sign(&self) -> Result<Place> {
        self.folder.below(Path::new(&format!("{WRITING}{}", self.id)))
    }

    fn sent(&self) -> MutexGuard<'_, Vec<Place>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RemoteFolder {
    fn drop(&mut self) {
        let sent = std::mem::take(&mut *self.sent());
        // The sign last: it hides what is still there.
        for object in sent.into_iter().chain(self.sign()) {
            if let Err(error) = object.delete() {
                tracing::warn!(%error, "a file that is no data stays");
            }
        }
    }
}

/// What of a folder goes when another dataset is in it: the files of the last write, and what writes have
/// left that did not end. An error if something is there and may not be replaced.
fn replaced(folder: &Place, url: &Path, overwrite: bool) -> Result<Vec<Place>> {
    let exists = |hint| Err(Error::TargetExists { path: url.to_owned(), hint });
    let all = folder.objects()?;
    if all.is_empty() {
        return Ok(all);
    }
    if !overwrite {
        return exists("write elsewhere, or overwrite it");
    }
    let written = folder.written()?;
    let root = folder.below(Path::new(WRITING))?;
    let root = root.key().as_ref().trim_end_matches(WRITING);
    let signs = all.iter().filter_map(|object| sign(object.key()));
    let ids: Vec<_> = signs.filter(|(folder, _)| *folder == root).map(|(_, id)| id).collect();
    if written.is_none() && ids.is_empty() {
        return exists(
            "it has no _written.json, so it is no folder that a dataset was written to; \
             if nothing in it is needed, remove it",
        );
    }
    let is_left = |object: &&Place| {
        let name = object.key().filename().unwrap_or_default();
        ids.iter().any(|id| name.ends_with(id) || (name.starts_with(PART) && name.contains(id)))
    };
    let left = all.iter().filter(is_left).cloned();
    Ok(left.chain(written.into_iter().flatten()).collect())
}
