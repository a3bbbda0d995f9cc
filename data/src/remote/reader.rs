//! An object as something to read from any place on.

use super::RemoteFile;
use bytes::Bytes;
use std::io::{Error, Read, Result, Seek, SeekFrom};
use std::sync::Arc;

/// How much is read at first, and at most.
const FIRST: u64 = 64 << 10;
const MOST: u64 = 8 << 20;

/// Reads ahead, the more the longer it is read in one go.
#[derive(Debug)]
pub(crate) struct RemoteReader {
    file: Arc<RemoteFile>,
    at: u64,
    /// Where the bytes at hand begin.
    start: u64,
    bytes: Bytes,
    ahead: u64,
}

impl RemoteReader {
    pub(crate) fn new(file: Arc<RemoteFile>) -> Self {
        Self { file, at: 0, start: 0, bytes: Bytes::new(), ahead: FIRST }
    }

    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Has the bytes from where it is on.
    fn fill(&mut self) -> Result<()> {
        let goes_on = self.at == self.end() && self.at > 0;
        self.ahead = if goes_on { MOST.min(self.ahead * 2) } else { FIRST };
        let end = self.file.length().min(self.at + self.ahead);
        // Near its end what comes before is read too: footers are gone through from the back.
        let start = if goes_on { self.at } else { self.at.min(end.saturating_sub(FIRST)) };
        let ranges = std::iter::once(start..end).collect();
        let read = self.file.read(ranges).map_err(|error| self.file.remember(error))?;
        (self.start, self.bytes) = (start, read.into_iter().next().unwrap_or_default());
        Ok(())
    }
}

impl Read for RemoteReader {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        if self.at >= self.file.length() || into.is_empty() {
            return Ok(0);
        }
        if !(self.start..self.end()).contains(&self.at) {
            self.fill()?;
        }
        let from = &self.bytes[(self.at - self.start) as usize..];
        let length = from.len().min(into.len());
        into[..length].copy_from_slice(&from[..length]);
        self.at += length as u64;
        Ok(length)
    }
}

impl Seek for RemoteReader {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let (base, by) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::End(by) => (self.file.length(), by),
            SeekFrom::Current(by) => (self.at, by),
        };
        let before = || Error::other("a place before the start of the file");
        self.at = base.checked_add_signed(by).ok_or_else(before)?;
        Ok(self.at)
    }
}
