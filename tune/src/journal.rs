//! The study journal: one append-only file that survives a crash at any byte.
//!
//! ```text
//! header   "MOBSTUDY" and a version, u32
//! record   length u32, CRC-32 of length and payload u32, payload: one event as a line of JSON
//! ```
//!
//! Numbers are little-endian. A tail without a whole record is dropped on open; a damaged record
//! with a good one behind it is an error, because dropping that would lose what was committed.
//! The writer holds an exclusive `flock`, which the kernel frees when its process dies. A commit
//! is one write and one `fdatasync`, however many events it carries.

use crate::Error;
use mobula_core::error::AtPath;
use rustix::fs::FlockOperation;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"MOBSTUDY";
const VERSION: u32 = 1;
const HEADER: usize = 12;
const FRAME: usize = 8;

/// The writing end of a journal.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    pending: Vec<u8>,
    /// Bytes that are known to be whole.
    length: u64,
}

impl Journal {
    /// Opens or creates the journal, takes its lock, drops a torn tail, and returns its events.
    pub(crate) fn open<E: DeserializeOwned>(path: &Path) -> Result<(Self, Vec<E>), Error> {
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(folder).at("create", folder)?;
        }
        let mut options = OpenOptions::new();
        let file = options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .at("open", path)?;
        lock(&file, path)?;
        let bytes = fs::read(path).at("read", path)?;
        let (payloads, whole) = split(&bytes, path)?;
        let events = decode(payloads, path)?;
        let path = path.to_owned();
        let mut journal = Self { path, file, pending: Vec::new(), length: whole };
        journal.cut(bytes.len() as u64)?;
        Ok((journal, events))
    }

    /// Adds an event to the next commit.
    pub(crate) fn append(&mut self, event: &impl Serialize) -> Result<(), Error> {
        let mut payload = serde_json::to_vec(event).map_err(mobula_core::Error::layer)?;
        payload.push(b'\n');
        let length = (payload.len() as u32).to_le_bytes();
        self.pending.extend_from_slice(&length);
        self.pending.extend_from_slice(&checksum(length, &payload).to_le_bytes());
        self.pending.extend_from_slice(&payload);
        Ok(())
    }

    /// Makes every appended event durable. After an error none of them is in the file.
    pub(crate) fn commit(&mut self) -> Result<(), Error> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        let written = self.file.write_all(&pending).and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            // A half-written record would make the next one unreadable.
            self.cut(u64::MAX)?;
            return Err(source).at("append to", &self.path).map_err(Error::from);
        }
        self.length += pending.len() as u64;
        Ok(())
    }

    /// Cuts the file behind its last whole record and goes there; a new file gets its header.
    fn cut(&mut self, size: u64) -> Result<(), Error> {
        let dropped = size.saturating_sub(self.length.max(HEADER as u64));
        if dropped > 0 && size != u64::MAX {
            tracing::warn!(journal = %self.path.display(), bytes = dropped, "dropped a torn record at the end");
        }
        self.file.set_len(self.length).at("truncate", &self.path)?;
        self.file.seek(SeekFrom::Start(self.length)).at("seek in", &self.path)?;
        if self.length == 0 {
            self.file.write_all(MAGIC).at("write", &self.path)?;
            self.file.write_all(&VERSION.to_le_bytes()).at("write", &self.path)?;
            self.length = HEADER as u64;
            sync_folder(&self.path)?;
        }
        self.file.sync_data().at("sync", &self.path).map_err(Error::from)
    }
}

impl Drop for Journal {
    /// Closing the file is not enough: a child that another thread has forked and that has not
    /// reached its `exec` yet holds the same open file, and with it the lock.
    fn drop(&mut self) {
        if let Err(error) = rustix::fs::flock(&self.file, FlockOperation::Unlock) {
            tracing::warn!(journal = %self.path.display(), %error, "the lock was not given back");
        }
    }
}

/// The events of a journal that another process may be writing: its whole records.
pub(crate) fn read<E: DeserializeOwned>(path: &Path) -> Result<Vec<E>, Error> {
    let bytes = fs::read(path).at("read", path)?;
    decode(split(&bytes, path)?.0, path)
}

fn decode<E: DeserializeOwned>(payloads: Vec<Record<'_>>, path: &Path) -> Result<Vec<E>, Error> {
    let decode = |(offset, payload): (usize, &[u8])| {
        serde_json::from_slice(payload).map_err(|error| corrupt(path, offset, &error.to_string()))
    };
    payloads.into_iter().map(decode).collect()
}

fn lock(file: &File, path: &Path) -> Result<(), Error> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::JournalLocked { path: path.to_owned() }),
        other => other.map_err(std::io::Error::from).at("lock", path).map_err(Error::from),
    }
}

fn sync_folder(path: &Path) -> Result<(), Error> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).at("sync", folder).map_err(Error::from)
}

fn checksum(length: [u8; 4], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length);
    hasher.update(payload);
    hasher.finalize()
}

fn corrupt(path: &Path, offset: usize, reason: &str) -> Error {
    let (path, reason) = (path.to_owned(), reason.to_owned());
    Error::JournalCorrupt { path, offset: offset as u64, reason }
}

/// A record's offset in the file, and its payload.
type Record<'a> = (usize, &'a [u8]);

/// The payloads with their offsets, and the length up to the end of the last one.
fn split<'a>(bytes: &'a [u8], path: &Path) -> Result<(Vec<Record<'a>>, u64), Error> {
    if !check_header(bytes, path)? {
        return Ok((Vec::new(), 0));
    }
    let (mut payloads, mut offset) = (Vec::new(), HEADER);
    while let Some(payload) = record_at(bytes, offset) {
        payloads.push((offset, payload));
        offset += FRAME + payload.len();
    }
    // A torn tail holds no whole record; if one follows, something else happened.
    if (offset + 1..bytes.len()).any(|at| record_at(bytes, at).is_some()) {
        return Err(corrupt(path, offset, "the record there does not match its checksum"));
    }
    Ok((payloads, offset as u64))
}

/// Whether there is a whole header; a part of one is a file whose creation was interrupted.
fn check_header(bytes: &[u8], path: &Path) -> Result<bool, Error> {
    let magic = &bytes[..bytes.len().min(MAGIC.len())];
    if *magic != MAGIC[..magic.len()] {
        return Err(Error::NotAJournal { path: path.to_owned() });
    }
    let Some(version) = bytes.get(MAGIC.len()..).and_then(|rest| rest.first_chunk()) else {
        return Ok(false);
    };
    let (expected, got) = (VERSION, u32::from_le_bytes(*version));
    if got != expected {
        return Err(Error::JournalVersion { path: path.to_owned(), expected, got });
    }
    Ok(true)
}

/// The payload of the record at `offset`, if a whole and undamaged one is there.
fn record_at(bytes: &[u8], offset: usize) -> Option<&[u8]> {
    let rest = bytes.get(offset..)?;
    let length = *rest.first_chunk::<4>()?;
    let expected = u32::from_le_bytes(*rest.get(4..)?.first_chunk()?);
    let payload = rest.get(FRAME..)?.get(..u32::from_le_bytes(length) as usize)?;
    // The cheap test first: a search for records behind a bad one tries every offset.
    let json = payload.first() == Some(&b'{') && payload.last() == Some(&b'\n');
    (json && checksum(length, payload) == expected).then_some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn event(i: usize) -> Value {
        json!({"report": i, "value": i as f64 / 3.0})
    }

    /// A journal of `n` events, and its bytes.
    fn written(n: usize) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("sub/study.journal");
        let (mut journal, events) = Journal::open::<Value>(&path).expect("open");
        assert!(events.is_empty());
        (0..n).for_each(|i| journal.append(&event(i)).expect("append"));
        journal.commit().expect("commit");
        let bytes = fs::read(&path).expect("read");
        (folder, path, bytes)
    }

    /// INV-PREFIX: cut anywhere, the journal opens with a prefix, and what is appended then is
    /// read back behind that prefix.
    #[test]
    fn a_journal_cut_at_any_byte_holds_a_prefix_and_goes_on() {
        let (_folder, path, bytes) = written(4);
        let mut last = 0;
        for cut in 0..=bytes.len() {
            fs::write(&path, &bytes[..cut]).expect("write");
            let (mut journal, events) = Journal::open::<Value>(&path).expect("open");
            let kept = events.len();
            assert_eq!(events, (0..kept).map(event).collect::<Vec<_>>(), "cut at {cut}");
            assert!(kept >= last, "a longer file holds no less");
            last = kept;
            journal.append(&event(99)).expect("append");
            journal.commit().expect("commit");
            drop(journal);
            let events: Vec<Value> = read(&path).expect("read");
            assert_eq!((events.len(), &events[kept]), (kept + 1, &event(99)), "cut at {cut}");
        }
        assert_eq!(last, 4);
    }

    /// A flipped bit never becomes an event: it is an error, or a torn last record.
    #[test]
    fn a_damaged_byte_is_never_read() {
        let (_folder, path, bytes) = written(4);
        let last_record = bytes.len() - (bytes.len() - HEADER) / 4;
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x41;
            fs::write(&path, &damaged).expect("write");
            match read::<Value>(&path) {
                Ok(events) => {
                    assert_eq!(events, (0..3).map(event).collect::<Vec<_>>(), "byte {at}");
                    assert!(at >= last_record - 8, "byte {at}: committed events were dropped");
                }
                Err(Error::JournalCorrupt { offset, .. }) => assert!(offset <= at as u64),
                Err(Error::NotAJournal { .. }) => assert!(at < 8),
                Err(Error::JournalVersion { .. }) => assert!((8..12).contains(&at)),
                Err(other) => panic!("byte {at}: {other}"),
            }
        }
    }

    #[test]
    fn a_tail_of_zeros_is_dropped_and_a_foreign_file_is_left_alone() {
        let (_folder, path, mut bytes) = written(2);
        bytes.extend([0; 100]);
        fs::write(&path, &bytes).expect("write");
        assert_eq!(Journal::open::<Value>(&path).expect("open").1.len(), 2);
        fs::write(&path, "name,age\n").expect("write");
        assert!(matches!(Journal::open::<Value>(&path), Err(Error::NotAJournal { .. })));
        assert_eq!(fs::read(&path).expect("read"), b"name,age\n");
    }

    /// What a child between `fork` and `exec` does: it holds the open file for a moment longer.
    #[test]
    fn a_duplicate_of_the_descriptor_does_not_keep_the_lock() {
        let (_folder, path, _) = written(1);
        let (journal, _) = Journal::open::<Value>(&path).expect("open");
        let _in_a_child = journal.file.try_clone().expect("duplicate");
        drop(journal);
        assert!(Journal::open::<Value>(&path).is_ok());
    }

    #[test]
    fn two_writers_are_refused() {
        let (_folder, path, _) = written(1);
        let (first, _) = Journal::open::<Value>(&path).expect("open");
        assert!(matches!(Journal::open::<Value>(&path), Err(Error::JournalLocked { .. })));
        drop(first);
        assert!(Journal::open::<Value>(&path).is_ok());
    }
}
