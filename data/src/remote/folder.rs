//! What of a folder in an object store is data.
//!
//! There is no renaming in an object store, so a folder that is being written cannot be hidden. It
//! says itself what is in it instead: `_written.json` lists the files of the last write that has ended,
//! `_writing-ID` says that the files with this ID in their names are of one that has not.

use super::{Place, failed};
use crate::error::{Error, Result};
use crate::runtime::block_on;
use crate::sink::{LIST, Written};
use bytes::Bytes;
use object_store::buffered::BufWriter;
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStoreExt, PutPayload};
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use tokio::io::AsyncWriteExt;

/// What names of files that are written begin with.
pub(crate) const PART: &str = "part-";

/// What the name of the sign of a write that has not ended begins with.
pub(crate) const WRITING: &str = "_writing-";

/// Bytes of a file that are sent at a time.
const PIECE: u64 = 8 << 20;

/// Leaves out what belongs to no write that has ended. An error if nothing else is there.
pub(super) fn without_unfinished(place: &Place, found: Vec<Key>) -> Result<Vec<Key>> {
    let in_folder = |key: &Key, name: &str| {
        let folder = key.as_ref().strip_suffix(name)?;
        Some(folder.to_owned())
    };
    let lists: Vec<_> = found.iter().filter_map(|key| in_folder(key, LIST)).collect();
    let mut written = HashSet::new();
    for folder in &lists {
        let list = place.with(Key::parse(format!("{folder}{LIST}")).map_err(place.invalid())?);
        let list: Written = serde_json::from_slice(&list.get()?).map_err(|error| {
            let path = list.url();
            Error::Corrupt { path, format: "list of what was written", reason: error.to_string() }
        })?;
        let names = list.files.iter().map(|file| format!("{folder}{}", file.name.display()));
        written.extend(names);
    }
    let unfinished: Vec<(&str, &str)> = found.iter().filter_map(writing).collect();
    let is_data = |key: &&Key| {
        let (key, name) = (key.as_ref(), key.filename().unwrap_or_default());
        let listed = lists.iter().any(|folder| key.starts_with(folder.as_str()));
        let is_written = !listed || written.contains(key);
        let is_ended = written.contains(key)
            || !unfinished.iter().any(|(folder, id)| key.starts_with(folder) && name.contains(id));
        !name.starts_with(PART) || (is_written && is_ended)
    };
    let data: Vec<_> = found.iter().filter(is_data).cloned().collect();
    let is_empty = data.iter().all(|key| writing(key).is_some());
    match unfinished.first() {
        Some((folder, _)) if is_empty => {
            Err(Error::Unfinished { folder: format!("{}/{folder}", place.root) })
        }
        _ => Ok(data),
    }
}

/// The folder and the ID of a write that has not ended.
fn writing(key: &Key) -> Option<(&str, &str)> {
    let (folder, id) = key.as_ref().rsplit_once(WRITING).filter(|(_, id)| !id.contains('/'))?;
    Some((folder, id))
}

/// What is done to an object.
impl Place {
    /// Another object of the same store.
    pub(super) fn with(&self, key: Key) -> Self {
        Self { key, ..self.clone() }
    }

    /// An object of this folder, by a path below it.
    pub(crate) fn below(&self, path: &Path) -> Result<Self> {
        let below = path.to_str().unwrap_or_default();
        let key = format!("{}/{below}", self.key);
        let key = Key::parse(key.trim_start_matches('/')).map_err(self.invalid())?;
        Ok(self.with(key))
    }

    pub(super) fn invalid(&self) -> impl Fn(object_store::path::Error) -> Error + use<> {
        let failed = failed("use", &self.url());
        move |error| failed(error.into())
    }

    /// All that is below.
    pub(crate) fn objects(&self) -> Result<Vec<Self>> {
        let found = self.list(&self.key)?;
        Ok(found.into_iter().map(|ObjectMeta { location, .. }| self.with(location)).collect())
    }

    pub(crate) fn url(&self) -> PathBuf {
        self.url_of(&self.key)
    }

    pub(crate) fn filename(&self) -> &str {
        self.key.filename().unwrap_or_default()
    }

    fn get(&self) -> Result<Bytes> {
        let (store, key, failed) =
            (self.store.clone(), self.key.clone(), failed("read", &self.url()));
        block_on(async move {
            let got = store.get(&key).await.map_err(&failed)?;
            got.bytes().await.map_err(&failed)
        })
    }

    pub(crate) fn put(&self, bytes: Vec<u8>) -> Result<()> {
        let (store, key, failed) =
            (self.store.clone(), self.key.clone(), failed("write", &self.url()));
        block_on(
            async move { store.put(&key, PutPayload::from(bytes)).await.map(drop).map_err(failed) },
        )
    }

    /// Sends a file, which is there once all of it is.
    pub(crate) fn upload(&self, file: File, path: &Path) -> Result<()> {
        let (url, path) = (self.url(), path.to_owned());
        let mut to = BufWriter::new(self.store.clone(), self.key.clone());
        block_on(async move {
            let sent = send(file, &path, &mut to, &url).await;
            if sent.is_err() {
                // The error is the one before.
                let _ = to.abort().await;
            }
            sent
        })
    }

    pub(crate) fn delete(&self) -> Result<()> {
        let (store, key, failed) =
            (self.store.clone(), self.key.clone(), failed("delete", &self.url()));
        block_on(async move { store.delete(&key).await.map_err(failed) })
    }
}

async fn send(mut file: File, path: &Path, to: &mut BufWriter, url: &Path) -> Result<()> {
    use mobula_core::error::AtPath;
    loop {
        let mut piece = Vec::new();
        (&mut file).take(PIECE).read_to_end(&mut piece).at("read", path)?;
        if piece.is_empty() {
            break;
        }
        to.put(piece.into()).await.map_err(failed("write", url))?;
    }
    to.shutdown().await.map_err(|error| {
        let store = error.downcast::<object_store::Error>();
        let store = store.unwrap_or_else(|error| object_store::Error::Generic {
            store: "object store",
            source: error.into(),
        });
        failed("write", url)(store)
    })
}
