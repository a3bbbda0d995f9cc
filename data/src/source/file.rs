//! Files that must not change while they are read.

use crate::error::{Error, Result};
use flate2::read::MultiGzDecoder;
use mobula_core::error::AtPath;
use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// What a fingerprint looks at: so many pieces of so many bytes.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4096;

/// With the only method there is: a TFRecord may begin with the first two, once in 65,536 times.
const GZIP: [u8; 3] = [0x1f, 0x8b, 8];

/// A file as it was when the dataset was opened.
#[derive(Clone, Debug)]
pub(super) struct Stamped {
    pub(super) path: PathBuf,
    pub(super) length: u64,
    modified: Option<SystemTime>,
}

impl Stamped {
    pub(super) fn new(path: &Path) -> Result<(Self, File)> {
        let file = File::open(path).at("open", path)?;
        let (length, modified) = stamp(&file, path)?;
        Ok((Self { path: path.to_owned(), length, modified }, file))
    }

    /// Opens the file again; an error if it is another now.
    pub(super) fn open(&self) -> Result<File> {
        let file = File::open(&self.path).at("open", &self.path)?;
        let same = stamp(&file, &self.path)? == (self.length, self.modified);
        if same { Ok(file) } else { Err(self.changed()) }
    }

    /// Length and a sample of the content: constant in time, for formats that have no checksum.
    pub(super) fn fingerprint(&self) -> Result<String> {
        let (mut file, mut hasher) = (self.open()?, crc32fast::Hasher::new());
        let last = self.length.saturating_sub(SAMPLE_BYTES);
        let mut at = 0;
        loop {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(at)).at("read", &self.path)?;
            (&mut file).take(SAMPLE_BYTES).read_to_end(&mut bytes).at("read", &self.path)?;
            hasher.update(&bytes);
            if at == last {
                return Ok(format!("{}-{:08x}", self.length, hasher.finalize()));
            }
            at = last.min(at + (last / SAMPLES).max(SAMPLE_BYTES));
        }
    }

    pub(super) fn changed(&self) -> Error {
        Error::FileChanged { path: self.path.clone() }
    }
}

fn stamp(file: &File, path: &Path) -> Result<(u64, Option<SystemTime>)> {
    let metadata = file.metadata().at("read", path)?;
    // Not every file system knows the time.
    Ok((metadata.len(), metadata.modified().ok()))
}

/// What can be read from any place on.
pub(super) trait ReadSeek: Read + Seek {}

impl<R: Read + Seek> ReadSeek for R {}

/// A file that is read in pieces, or, where it is gzipped, kept in memory.
#[derive(Debug)]
pub(super) struct Pieces {
    file: Stamped,
    unzipped: Option<Vec<u8>>,
}

impl Pieces {
    pub(super) fn open(path: &Path, format: &'static str) -> Result<Self> {
        let (stamped, mut file) = Stamped::new(path)?;
        let mut magic = [0; GZIP.len()];
        let zipped = file.read_exact(&mut magic).is_ok() && magic == GZIP;
        let unzipped = if zipped { Some(read_unzipped(path, format)?) } else { None };
        Ok(Self { file: stamped, unzipped })
    }

    pub(super) fn path(&self) -> &Path {
        &self.file.path
    }

    pub(super) fn length(&self) -> u64 {
        self.unzipped.as_ref().map_or(self.file.length, |bytes| bytes.len() as u64)
    }

    pub(super) fn fingerprint(&self) -> Result<String> {
        self.file.fingerprint()
    }

    /// All bytes, from the first on.
    pub(super) fn reader(&self) -> Result<Box<dyn ReadSeek + '_>> {
        Ok(match &self.unzipped {
            Some(bytes) => Box::new(Cursor::new(bytes)),
            None => Box::new(self.file.open()?),
        })
    }

    /// `length` bytes from `start` on, which must have the checksum `crc`, if there is one.
    pub(super) fn read(
        &self,
        start: u64,
        length: usize,
        crc: Option<u32>,
    ) -> Result<Cow<'_, [u8]>> {
        if let Some(bytes) = &self.unzipped {
            let start = start as usize;
            return Ok(Cow::Borrowed(&bytes[start..start + length]));
        }
        let (mut file, mut bytes) = (self.file.open()?, vec![0; length]);
        let read = file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(&mut bytes));
        read.at("read", self.path())?;
        let same = crc.is_none_or(|crc| crc32fast::hash(&bytes) == crc);
        if same { Ok(Cow::Owned(bytes)) } else { Err(self.file.changed()) }
    }
}

/// The content of a file that may be gzipped.
pub(super) fn read_unzipped(path: &Path, format: &'static str) -> Result<Vec<u8>> {
    let bytes = fs::read(path).at("read", path)?;
    if !bytes.starts_with(&GZIP) {
        return Ok(bytes);
    }
    let mut plain = Vec::new();
    let read = MultiGzDecoder::new(&bytes[..]).read_to_end(&mut plain);
    read.map_err(|error| {
        let reason = format!("it cannot be unzipped: {error}");
        Error::Corrupt { path: path.to_owned(), format, reason }
    })?;
    Ok(plain)
}
