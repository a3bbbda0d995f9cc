//! Checkpoints: folders that are either whole or not there.
//!
//! A save writes into a temporary sibling, fsyncs every file, writes a manifest with a checksum
//! per file, renames the folder and fsyncs its parent. A reader trusts a folder only if every
//! file matches the manifest; an invalid newest one falls back to the one before it.

use crate::error::AtPath;
use crate::{Error, console};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MANIFEST: &str = "manifest.json";
const PREFIX: &str = "step-";
const TEMPORARY: &str = ".tmp-";

/// A committed checkpoint: a folder whose files match its manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    path: PathBuf,
    step: u64,
}

impl Checkpoint {
    /// Opens and verifies the checkpoint in `path`.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let manifest = Manifest::read(&path)?;
        manifest.verify(&path)?;
        Ok(Self { step: manifest.step, path })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of one of its files, such as `model.safetensors`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The global step it was taken at.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Reads one of its files as JSON.
    pub fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        let path = self.file(name);
        let bytes = fs::read(&path).at("read", &path)?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::codec("decode", path.display().to_string(), error))
    }
}

/// Of its folder. In the order of the steps.
fn name_of(step: u64) -> String {
    format!("{PREFIX}{step:010}")
}

/// The checkpoints of one run, a folder each, `step-0000000042`.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    dir: PathBuf,
    keep: usize,
    best: Option<Best>,
}

/// Which ones are kept beside the newest.
#[derive(Clone)]
struct Best {
    keep: usize,
    score: Score,
}

/// Of the folder of a checkpoint.
type Score = Arc<dyn Fn(&Path) -> Option<f64> + Send + Sync>;

impl std::fmt::Debug for Best {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Best").field("keep", &self.keep).finish_non_exhaustive()
    }
}

impl CheckpointStore {
    /// The store in `dir`, which keeps the newest `keep` (at least 1) checkpoints.
    pub fn new(dir: impl Into<PathBuf>, keep: usize) -> Self {
        Self { dir: dir.into(), keep: keep.max(1), best: None }
    }

    /// Keeps the best `keep` ones too. `score` is given the folder of a checkpoint; more is better,
    /// of equals the later one, and those without a score are never among the best.
    pub fn with_best(
        self,
        keep: usize,
        score: impl Fn(&Path) -> Option<f64> + Send + Sync + 'static,
    ) -> Self {
        Self { best: Some(Best { keep, score: Arc::new(score) }), ..self }
    }

    /// The folder that holds the checkpoints.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Commits what `write` puts into the folder that it is given, then drops the oldest ones. What an
    /// earlier save has left unfinished goes, too: one process at a time may save.
    pub fn save(
        &self,
        step: u64,
        write: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<Checkpoint, Error> {
        fs::create_dir_all(&self.dir).at("create", &self.dir)?;
        self.remove_unfinished()?;
        let name = name_of(step);
        let (temporary, path) = (self.dir.join(format!("{TEMPORARY}{name}")), self.dir.join(&name));
        fs::create_dir(&temporary).at("create", &temporary)?;
        let saved = self.commit(step, write, &temporary, &path);
        if saved.is_err() {
            // The error is what counts. A full disk gets back what was written.
            let _ = remove_if_there(&temporary);
        }
        saved
    }

    fn commit(
        &self,
        step: u64,
        write: impl FnOnce(&Path) -> Result<(), Error>,
        temporary: &Path,
        path: &Path,
    ) -> Result<Checkpoint, Error> {
        write(temporary)?;
        Manifest::commit(temporary, step)?;
        if path.exists() {
            // At no time is there none of this step.
            exchange(temporary, path)?;
            remove_if_there(temporary)?;
        } else {
            fs::rename(temporary, path).at("rename", temporary)?;
        }
        sync(&self.dir)?;
        self.prune()?;
        Ok(Checkpoint { path: path.to_owned(), step })
    }

    /// What a process that was killed while it wrote has left. If it stays, it only takes room.
    fn remove_unfinished(&self) -> Result<(), Error> {
        for path in self.with_prefix(TEMPORARY)? {
            let _ = remove_if_there(&path);
        }
        Ok(())
    }

    /// The newest valid checkpoint. Notes each invalid one that it passes over on stderr; errors
    /// when there are some and none is valid.
    pub fn latest(&self) -> Result<Option<Checkpoint>, Error> {
        self.newest(&self.paths()?)
    }

    /// The newest valid one of those that were taken before this step, in the same way.
    pub fn latest_before(&self, step: u64) -> Result<Option<Checkpoint>, Error> {
        let mut paths = self.paths()?;
        let end = self.dir.join(name_of(step));
        paths.retain(|path| *path < end);
        self.newest(&paths)
    }

    fn newest(&self, paths: &[PathBuf]) -> Result<Option<Checkpoint>, Error> {
        for path in paths.iter().rev() {
            match Checkpoint::open(path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => console::note(format!("{error}; trying the one before it")),
            }
        }
        match paths.len() {
            0 => Ok(None),
            found => Err(Error::NoCheckpoint { path: self.dir.clone(), found }),
        }
    }

    /// The folders of all checkpoints, oldest first, valid or not.
    pub fn paths(&self) -> Result<Vec<PathBuf>, Error> {
        self.with_prefix(PREFIX)
    }

    fn with_prefix(&self, prefix: &str) -> Result<Vec<PathBuf>, Error> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.dir).at("list", &self.dir)? {
            let path = entry.at("list", &self.dir)?.path();
            if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)) {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    fn prune(&self) -> Result<(), Error> {
        let paths = self.paths()?;
        let old = &paths[..paths.len().saturating_sub(self.keep)];
        if old.is_empty() {
            return Ok(());
        }
        let best = self.ranked(&paths);
        let kept = best.iter().take(self.best.as_ref().map_or(0, |best| best.keep));
        let kept: Vec<_> = kept.collect();
        old.iter().filter(|path| !kept.contains(path)).try_for_each(|path| remove_if_there(path))
    }

    /// The best one first, of those with a score.
    fn ranked(&self, paths: &[PathBuf]) -> Vec<PathBuf> {
        let Some(best) = &self.best else {
            return Vec::new();
        };
        let scored = paths.iter().rev().filter_map(|path| Some(((best.score)(path)?, path)));
        let mut scored: Vec<_> = scored.collect();
        scored.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        scored.into_iter().map(|(_, path)| path.clone()).collect()
    }

    /// The valid checkpoint with the best score, if any has one. Notes each invalid one that it
    /// passes over on stderr.
    pub fn best(&self) -> Result<Option<Checkpoint>, Error> {
        for path in self.ranked(&self.paths()?) {
            match Checkpoint::open(&path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => console::note(format!("{error}; trying the one after it")),
            }
        }
        Ok(None)
    }
}

/// Gives each of two folders the other's name, at once where the system can.
fn exchange(one: &Path, other: &Path) -> Result<(), Error> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        // Not every file system can.
        if renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
    }
    let aside = one.with_extension("aside");
    remove_if_there(&aside)?;
    fs::rename(other, &aside).at("rename", other)?;
    fs::rename(one, other).at("rename", one)?;
    fs::rename(&aside, one).at("rename", &aside)
}

/// The commit point: which files belong to the checkpoint, with sizes and checksums.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    step: u64,
    files: BTreeMap<String, FileEntry>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct FileEntry {
    bytes: u64,
    crc32: u32,
}

impl Manifest {
    fn commit(dir: &Path, step: u64) -> Result<(), Error> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(dir).at("list", dir)? {
            let path = entry.at("list", dir)?.path();
            sync(&path)?;
            files.insert(file_name(&path), FileEntry::of(&path)?);
        }
        let manifest = Self { format: 1, step, files };
        let text = serde_json::to_vec_pretty(&manifest).map_err(Error::layer)?;
        write_synced(&dir.join(MANIFEST), &text)?;
        sync(dir)
    }

    fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(MANIFEST);
        let bytes =
            fs::read(&path).map_err(|error| invalid(dir, format!("{MANIFEST}: {error}")))?;
        serde_json::from_slice(&bytes).map_err(|error| invalid(dir, format!("{MANIFEST}: {error}")))
    }

    fn verify(&self, dir: &Path) -> Result<(), Error> {
        for (name, expected) in &self.files {
            let got = FileEntry::of(&dir.join(name))
                .map_err(|error| invalid(dir, format!("{name}: {error}")))?;
            if got != *expected {
                let reason = format!(
                    "{name} has {} bytes and checksum {:08x}, expected {} bytes and {:08x}",
                    got.bytes, got.crc32, expected.bytes, expected.crc32
                );
                return Err(invalid(dir, reason));
            }
        }
        Ok(())
    }
}

impl FileEntry {
    fn of(path: &Path) -> Result<Self, Error> {
        let mut file = File::open(path).at("open", path)?;
        let (mut hasher, mut bytes) = (crc32fast::Hasher::new(), 0);
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = file.read(&mut buffer).at("read", path)?;
            if n == 0 {
                return Ok(Self { bytes, crc32: hasher.finalize() });
            }
            hasher.update(&buffer[..n]);
            bytes += n as u64;
        }
    }
}

/// Replaces a small file in one step: a reader sees the old text or the new, never a half.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let temporary = path.with_file_name(format!("{TEMPORARY}{}", file_name(path)));
    write_synced(&temporary, bytes)?;
    fs::rename(&temporary, path).at("rename", &temporary)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    sync(parent.unwrap_or(Path::new(".")))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = File::create(path).at("create", path)?;
    file.write_all(bytes).at("write", path)?;
    file.sync_all().at("sync", path)
}

fn sync(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|file| file.sync_all()).at("sync", path)
}

fn remove_if_there(dir: &Path) -> Result<(), Error> {
    if !dir.exists() {
        return Ok(());
    }
    fs::remove_dir_all(dir).at("remove", dir)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn invalid(dir: &Path, reason: String) -> Error {
    Error::CheckpointInvalid { path: dir.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store_with(steps: &[u64], keep: usize) -> (tempfile::TempDir, CheckpointStore) {
        let dir = tempfile::tempdir().expect("temporary folder");
        let store = CheckpointStore::new(dir.path().join("checkpoints"), keep);
        for step in steps {
            store
                .save(*step, |d| fs::write(d.join("model.bin"), [*step as u8; 100]).at("write", d))
                .expect("save");
        }
        (dir, store)
    }

    #[test]
    fn keeps_the_newest_and_finds_the_latest() {
        let (_dir, store) = store_with(&[1, 2, 30], 2);
        assert_eq!(store.paths().expect("paths").len(), 2);
        let latest = store.latest().expect("latest").expect("some");
        assert_eq!(latest.step(), 30);
        assert_eq!(fs::read(latest.file("model.bin")).expect("read"), [30; 100]);
    }

    #[test]
    fn the_best_stay_beside_the_newest() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let score = |path: &Path| fs::read(path.join("score")).ok().map(|bytes| bytes[0].into());
        let store = CheckpointStore::new(dir.path(), 1).with_best(2, score);
        for (step, score) in [(1, Some(5)), (2, Some(9)), (3, None), (4, Some(9)), (5, Some(1))] {
            let file = |d: &Path| match score {
                Some(score) => fs::write(d.join("score"), [score]).at("write", d),
                None => Ok(()),
            };
            store.save(step, file).expect("save");
        }
        let steps = |paths: Vec<PathBuf>| {
            paths
                .iter()
                .map(|path| Checkpoint::open(path).expect("valid").step())
                .collect::<Vec<_>>()
        };
        assert_eq!(steps(store.paths().expect("paths")), [2, 4, 5]);
        assert_eq!(store.best().expect("best").map(|best| best.step()), Some(4));
        fs::remove_file(store.paths().expect("paths")[1].join("score")).expect("remove");
        assert_eq!(store.best().expect("best").map(|best| best.step()), Some(2), "4 is damaged");
        // A step that is saved again takes the place of what it was.
        store.save(5, |d| fs::write(d.join("score"), [10]).at("write", d)).expect("save");
        assert_eq!(store.best().expect("best").map(|best| best.step()), Some(5));
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 2, "nothing temporary");
    }

    /// INV-CKPT: whatever byte is lost or changed, the one before it is used.
    #[test]
    fn a_damaged_newest_falls_back() {
        type Harm = fn(&Path);
        let damage: [(&str, Harm); 4] = [
            ("cut in half", |d| fs::write(d.join("model.bin"), [2; 50]).expect("write")),
            ("changed", |d| fs::write(d.join("model.bin"), [3; 100]).expect("write")),
            ("missing file", |d| fs::remove_file(d.join("model.bin")).expect("remove")),
            ("manifest cut", |d| fs::write(d.join(MANIFEST), b"{").expect("write")),
        ];
        for (what, harm) in damage {
            let (_dir, store) = store_with(&[1, 2], 5);
            harm(&store.paths().expect("paths")[1]);
            let latest = store.latest().expect("latest").expect("some");
            assert_eq!(latest.step(), 1, "{what}");
        }
    }

    #[test]
    fn checkpoints_that_are_all_damaged_are_an_error_not_a_fresh_start() {
        let (_dir, store) = store_with(&[1, 2], 5);
        for path in store.paths().expect("paths") {
            fs::write(path.join("model.bin"), b"").expect("write");
        }
        assert!(matches!(store.latest(), Err(Error::NoCheckpoint { found: 2, .. })));
    }

    #[test]
    fn a_failed_write_leaves_nothing_behind_that_counts() {
        let (_dir, store) = store_with(&[1], 5);
        let write = |d: &Path| fs::write(d.join("half"), b"of it").at("write", d);
        let full = |d: &Path| write(d).and(Err(Error::Internal("disk full".into())));
        assert!(store.save(2, full).is_err());
        let entries = || fs::read_dir(store.dir()).expect("list").count();
        assert_eq!(store.latest().expect("latest").expect("some").step(), 1);
        assert_eq!(entries(), 1, "the disk gets back what was written");
        // A process that is killed cannot tidy up: the next one that saves does.
        let left = store.dir().join(".tmp-step-0000000003");
        fs::create_dir(&left).expect("folder");
        write(&left).expect("write");
        store.save(4, |_| Ok(())).expect("the next save is not disturbed");
        assert_eq!(entries(), 2);
    }
}
