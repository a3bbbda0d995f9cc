//! A folder that is whole or not there.

use super::part::WrittenPart;
use super::{LIST, Written, WrittenFile};
use crate::error::{Error, Result};
use mobula_core::error::AtPath;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A folder that is being written under a hidden name. It goes, unless it is committed.
#[derive(Debug)]
pub(super) struct NewFolder {
    target: PathBuf,
    hidden: PathBuf,
    overwrite: bool,
}

impl NewFolder {
    pub(super) fn begin(target: &Path, overwrite: bool) -> Result<Self> {
        let target = std::path::absolute(target).at("resolve", target)?;
        may_be_written(&target, overwrite)?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(exists(&target, "it is the root of the file system"));
        };
        fs::create_dir_all(parent).at("create", parent)?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (name, pid) = (name.to_string_lossy(), std::process::id());
        let hidden = parent.join(format!(".{name}.{pid}-{}", time.as_nanos()));
        fs::create_dir(&hidden).at("create", &hidden)?;
        Ok(Self { target, hidden, overwrite })
    }

    pub(super) fn path(&self) -> &Path {
        &self.hidden
    }

    /// Gives the files, and then the folder, the names that they are to have.
    pub(super) fn commit(self, extension: &str, parts: &[WrittenPart]) -> Result<Written> {
        let files = self.name_files(extension, parts)?;
        let written = Written { files };
        let list = serde_json::to_vec_pretty(&written).map_err(mobula_core::Error::layer)?;
        let path = self.hidden.join(LIST);
        fs::write(&path, list).at("write", &path)?;
        sync(&path)?;
        sync(&self.hidden)?;
        self.swap()?;
        Ok(written)
    }

    /// Moves the files into the folders that they belong into, with numbers in each.
    fn name_files(&self, extension: &str, parts: &[WrittenPart]) -> Result<Vec<WrittenFile>> {
        let (mut counts, mut files) = (HashMap::<&Path, usize>::new(), Vec::new());
        parts.iter().for_each(|part| *counts.entry(&part.folder).or_default() += 1);
        let mut numbers = HashMap::<&Path, usize>::new();
        for WrittenPart { path, folder, rows, .. } in parts {
            fs::create_dir_all(self.hidden.join(folder)).at("create", self.hidden.join(folder))?;
            let number = numbers.entry(folder).or_default();
            let name = folder.join(part_name(*number, counts[&**folder], extension));
            *number += 1;
            let bytes = sync(path)?;
            // Folders that differ in case may be one.
            rename(path, &self.hidden.join(&name)).at("rename", path)?;
            files.push(WrittenFile { name, rows: *rows, bytes });
        }
        for folder in parents(counts.keys().copied()) {
            sync(&self.hidden.join(folder))?;
        }
        Ok(files)
    }

    fn swap(&self) -> Result<()> {
        may_be_written(&self.target, self.overwrite)?;
        if self.target.exists() {
            exchange(&self.hidden, &self.target).at("replace", &self.target)?;
        } else {
            rename(&self.hidden, &self.target).at("create", &self.target)?;
        }
        self.target.parent().map_or(Ok(()), |parent| sync(parent).map(drop))
    }
}

impl Drop for NewFolder {
    /// What is left under the hidden name is unfinished, or was replaced.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.hidden);
    }
}

/// The folders, and those that they lie in.
fn parents<'a>(folders: impl Iterator<Item = &'a Path>) -> BTreeSet<&'a Path> {
    folders.flat_map(Path::ancestors).collect()
}

/// An error if something is there that may not be replaced.
fn may_be_written(target: &Path, overwrite: bool) -> Result<()> {
    if fs::symlink_metadata(target).is_err() {
        return Ok(());
    }
    if !overwrite {
        return Err(exists(target, "write elsewhere, or overwrite it"));
    }
    let is_ours = target.join(LIST).is_file();
    let is_empty = || target.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    match is_ours || is_empty() {
        true => Ok(()),
        false => Err(exists(
            target,
            "it has no _written.json, so it is no folder that a dataset was written to; \
             if nothing in it is needed, remove it",
        )),
    }
}

fn exists(target: &Path, hint: &'static str) -> Error {
    Error::TargetExists { path: target.to_owned(), hint }
}

/// With as many digits as keep the names in order: readers go by it.
fn part_name(at: usize, files: usize, extension: &str) -> PathBuf {
    let digits = files.to_string().len().max(5);
    format!("part-{at:0digits$}.{extension}").into()
}

/// Onto nothing: who came first stays.
fn rename(from: &Path, to: &Path) -> std::io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(error) if error != rustix::io::Errno::EXIST => fs::rename(from, to),
        result => Ok(result?),
    }
}

/// Gives each of two folders the other's name, at once where the file system can.
fn exchange(one: &Path, other: &Path) -> std::io::Result<()> {
    if renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok() {
        return Ok(());
    }
    exchange_in_steps(one, other)
}

fn exchange_in_steps(one: &Path, other: &Path) -> std::io::Result<()> {
    let mut aside = one.as_os_str().to_owned();
    aside.push(".replaced");
    fs::rename(other, &aside)?;
    if let Err(error) = fs::rename(one, other) {
        // Nothing was replaced.
        let _ = fs::rename(&aside, other);
        return Err(error);
    }
    fs::rename(&aside, one)
}

/// Length of a file that is on the disk then.
fn sync(path: &Path) -> Result<u64> {
    let file = File::open(path).at("open", path)?;
    file.sync_all().at("sync", path)?;
    Ok(file.metadata().at("read", path)?.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_order_of_the_files() {
        assert_eq!(part_name(9, 10, "csv"), Path::new("part-00009.csv"));
        let names: Vec<_> = [0, 9, 99_999, 100_000].map(|at| part_name(at, 100_001, "csv")).into();
        assert!(names.is_sorted(), "{names:?}");
    }

    /// Where a file system cannot do it at once. If the new one does not come, the old one stays.
    #[test]
    fn exchanged_folders_have_each_other_s_content() {
        let dir = tempfile::tempdir().expect("folder");
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        for folder in [&one, &other] {
            fs::create_dir(folder).expect("folder");
            fs::write(folder.join("name"), folder.as_os_str().as_encoded_bytes()).expect("write");
        }
        exchange_in_steps(&one, &other).expect("exchange");
        let name = |folder: &Path| fs::read_to_string(folder.join("name")).expect("read");
        assert_eq!(
            (name(&one), name(&other)),
            (other.display().to_string(), one.display().to_string(),)
        );
        exchange_in_steps(&dir.path().join("absent"), &other).expect_err("nothing to give");
        assert_eq!(name(&other), one.display().to_string());
    }
}
