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
use object_store::{Error as StoreError, ObjectMeta, ObjectStoreExt, PutPayload};
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

/// Leaves out what belongs to no write that has ended. An error if nothing else is there, and if what was
/// written is not.
pub(super) fn without_unfinished(place: &Place, found: Vec<Key>) -> Result<Vec<Key>> {
    let lists: Vec<_> =
        found.iter().filter_map(|key| folder_of(key, |name| name == LIST)).collect();
    let written = lists.iter().map(|folder| files_of(place, folder)).collect::<Result<Vec<_>>>()?;
    let written: HashSet<Key> = written.into_iter().flatten().collect();
    let there: HashSet<&Key> = found.iter().collect();
    if let Some(missing) = written.iter().find(|key| !there.contains(key)) {
        return Err(Error::FileChanged { path: place.url_of(missing) });
    }
    let signs: Vec<_> = found.iter().filter_map(sign).collect();
    let is_data = |key: &Key| {
        let (key, name) = (key.as_ref(), key.filename().unwrap_or_default());
        let is_listed = lists.iter().any(|folder| key.starts_with(folder));
        let is_unfinished =
            signs.iter().any(|(folder, id)| key.starts_with(folder) && name.contains(id));
        !name.starts_with(PART) || !(is_listed || is_unfinished)
    };
    let is_data = |key: &&Key| written.contains(key) || is_data(key);
    let data: Vec<_> = found.iter().filter(is_data).cloned().collect();
    match signs.first() {
        Some((folder, _)) if data.iter().all(|key| sign(key).is_some()) => {
            Err(Error::Unfinished { folder: format!("{}/{folder}", place.root) })
        }
        _ => Ok(data),
    }
}

/// What comes before the name of an object, if it is such a name.
fn folder_of(key: &Key, is: impl Fn(&str) -> bool) -> Option<&str> {
    let name = key.filename().filter(|name| is(name))?;
    key.as_ref().strip_suffix(name)
}

/// The files that the list in a folder has.
fn files_of(place: &Place, folder: &str) -> Result<Vec<Key>> {
    let key = |name: &str| Key::parse(format!("{folder}{name}")).map_err(place.invalid());
    let list = place.with(key(LIST)?);
    let written = list.get()?;
    let written: Written = serde_json::from_slice(&written).map_err(|error| Error::Corrupt {
        path: list.url(),
        format: "list of what was written",
        reason: error.to_string(),
    })?;
    written.files.iter().map(|file| key(&file.name.to_string_lossy())).collect()
}

/// The folder and the ID of a write that has not ended.
pub(crate) fn sign(key: &Key) -> Option<(&str, &str)> {
    let id = key.filename()?.strip_prefix(WRITING)?;
    let is_id = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    let folder = key.as_ref().strip_suffix(key.filename()?)?;
    is_id.then_some((folder, id))
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
        let key = Key::parse(key.trim_matches('/')).map_err(self.invalid())?;
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

    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    pub(crate) fn exists(&self) -> Result<bool> {
        self.head().map(|found| found.is_some())
    }

    /// The files that this folder has by its list; none if it has no list.
    pub(crate) fn written(&self) -> Result<Option<Vec<Self>>> {
        let folder = self.below(Path::new(""))?;
        let folder = match folder.key.as_ref() {
            "" => String::new(),
            key => format!("{key}/"),
        };
        if !self.below(Path::new(LIST))?.exists()? {
            return Ok(None);
        }
        let files = files_of(self, &folder)?;
        Ok(Some(files.into_iter().map(|key| self.with(key)).collect()))
    }

    pub(crate) fn get(&self) -> Result<Bytes> {
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
        // Of several files at a time.
        to = to.with_max_concurrency(2);
        block_on(async move {
            if let Err(error) = send(file, &path, &mut to, &url).await {
                // Why that fails is why the other did.
                let _ = to.abort().await;
                return Err(error);
            }
            to.shutdown().await.map_err(|error| {
                let store = error.downcast::<StoreError>();
                let store = store.unwrap_or_else(|error| StoreError::Generic {
                    store: "object store",
                    source: error.into(),
                });
                failed("write", &url)(store)
            })
        })
    }

    /// Removes it, if it is there.
    pub(crate) fn delete(&self) -> Result<()> {
        let (store, key, failed) =
            (self.store.clone(), self.key.clone(), failed("delete", &self.url()));
        block_on(async move {
            match store.delete(&key).await {
                // Not every store says so.
                Err(StoreError::NotFound { .. }) => Ok(()),
                deleted => deleted.map_err(failed),
            }
        })
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
    Ok(())
}
