//! Files that must not change while they are read.

use crate::error::{Error, Result};
use crate::remote::{self, RemoteFile, RemoteReader};
use crate::runtime::meanwhile;
use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use mobula_core::error::AtPath;
use std::fs::File;
use std::io::{Cursor, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

/// What a fingerprint looks at: so many pieces of so many bytes.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4096;

/// Remote files that are read at the same time.
const AT_ONCE: usize = 32;

/// With the only method there is: a TFRecord may begin with the first two, once in 65,536 times.
const GZIP: [u8; 3] = [0x1f, 0x8b, 8];

/// A file as it was when the dataset was opened.
#[derive(Clone, Debug)]
pub(crate) struct Stamped {
    pub(crate) path: PathBuf,
    pub(crate) length: u64,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    /// With the time of its last change. Not every file system knows it.
    Here(Option<SystemTime>),
    Remote(Arc<RemoteFile>),
}

/// A file that is open.
#[derive(Debug)]
pub(crate) enum Opened {
    Here(File),
    Remote(RemoteReader),
}

impl Read for Opened {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Here(file) => file.read(into),
            Self::Remote(file) => file.read(into),
        }
    }
}

impl Seek for Opened {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        match self {
            Self::Here(file) => file.seek(to),
            Self::Remote(file) => file.seek(to),
        }
    }
}

impl Stamped {
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let path = path.to_owned();
        if remote::is_url(&path) {
            let file = RemoteFile::open(&path)?;
            return Ok(Self { path, length: file.length(), place: Place::Remote(Arc::new(file)) });
        }
        let file = File::open(&path).at("open", &path)?;
        let (length, modified) = stamp(&file, &path)?;
        Ok(Self { path, length, place: Place::Here(modified) })
    }

    /// Opens the file again; an error if it is another now.
    pub(super) fn open(&self) -> Result<Opened> {
        let modified = match &self.place {
            Place::Here(modified) => modified,
            // It is found out when it is read.
            Place::Remote(file) => return Ok(Opened::Remote(RemoteReader::new(file.clone()))),
        };
        let file = File::open(&self.path).at("open", &self.path)?;
        let same = stamp(&file, &self.path)? == (self.length, *modified);
        if same { Ok(Opened::Here(file)) } else { Err(self.changed()) }
    }

    /// Some parts of it. Of a remote file neighbours come together.
    pub(super) fn read(&self, ranges: Vec<Range<u64>>) -> Result<Vec<Bytes>> {
        if let Place::Remote(file) = &self.place {
            return file.read(ranges);
        }
        let mut file = self.open()?;
        let mut read = |range: Range<u64>| {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.seek(SeekFrom::Start(range.start)).at("read", &self.path)?;
            file.read_exact(&mut bytes).at("read", &self.path)?;
            Ok(bytes.into())
        };
        ranges.into_iter().map(&mut read).collect()
    }

    pub(super) fn read_one(&self, range: Range<u64>) -> Result<Bytes> {
        Ok(self.read(std::iter::once(range).collect())?.pop().unwrap_or_default())
    }

    /// All of it.
    pub(super) fn read_all(&self) -> Result<Bytes> {
        self.read_one(0..self.length)
    }

    pub(super) fn is_remote(&self) -> bool {
        matches!(self.place, Place::Remote(_))
    }

    /// What was made of its content, unless that could not be read: then it is no fault of the content.
    pub(super) fn blame<T>(&self, made: Result<T>) -> Result<T> {
        made.map_err(|error| match &self.place {
            Place::Remote(file) => file.failure().unwrap_or(error),
            Place::Here(_) => error,
        })
    }

    /// Length and a sample of the content: constant in time, for formats that have no checksum. Of a
    /// remote file, what its store calls this version.
    pub(super) fn fingerprint(&self) -> Result<String> {
        if let Place::Remote(file) = &self.place {
            return Ok(format!("{}-{}", self.length, file.version()));
        }
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

/// The same for each of some files: of remote ones many at a time, since most of it is waiting.
pub(super) fn each<T: Sync, R: Send>(
    files: &[T],
    is_remote: impl Fn(&T) -> bool,
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    if files.len() < 2 || !files.iter().any(is_remote) {
        return files.iter().map(work).collect();
    }
    let (next, work) = (AtomicUsize::new(0), &work);
    let some = || {
        let mut done = Vec::new();
        while let Some((at, file)) = {
            let at = next.fetch_add(1, Ordering::Relaxed);
            files.get(at).map(|file| (at, file))
        } {
            done.push((at, work(file)));
        }
        done
    };
    let threads = files.len().min(AT_ONCE);
    let all = || {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(some)).collect();
            let ended = threads.into_iter().map(|thread| thread.join());
            let done = ended.map(|done| done.unwrap_or_else(|panic| resume_unwind(panic)));
            done.flatten().collect::<Vec<_>>()
        })
    };
    // They wait for the crate's threads, of which this may be one.
    let mut all = meanwhile(all);
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, result)| result).collect()
}

/// What can be read from any place on.
pub(super) trait ReadSeek: Read + Seek {}

impl<R: Read + Seek> ReadSeek for R {}

/// A file that is read in pieces, or, where it is gzipped, kept in memory.
#[derive(Debug)]
pub(super) struct Pieces {
    file: Stamped,
    unzipped: Option<Bytes>,
}

impl Pieces {
    pub(super) fn open(path: &Path, format: &'static str) -> Result<Self> {
        let file = Stamped::new(path)?;
        let mut magic = [0; GZIP.len()];
        let zipped = match file.open()?.read_exact(&mut magic) {
            Ok(()) => magic == GZIP,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => false,
            Err(error) => return file.blame(Err(error).at("read", path).map_err(Error::from)),
        };
        let unzipped = if zipped { Some(unzipped(&file, format)?) } else { None };
        Ok(Self { file, unzipped })
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
    pub(super) fn read(&self, start: u64, length: usize, crc: Option<u32>) -> Result<Bytes> {
        let end = start + length as u64;
        if let Some(bytes) = &self.unzipped {
            return Ok(bytes.slice(start as usize..end as usize));
        }
        let bytes = self.file.read_one(start..end)?;
        let same = crc.is_none_or(|crc| crc32fast::hash(&bytes) == crc);
        if same { Ok(bytes) } else { Err(self.file.changed()) }
    }

    pub(super) fn is_remote(&self) -> bool {
        self.file.is_remote() && self.unzipped.is_none()
    }

    /// See [`Stamped::blame`].
    pub(super) fn blame<T>(&self, made: Result<T>) -> Result<T> {
        self.file.blame(made)
    }
}

/// The content of a file that may be gzipped.
pub(super) fn read_unzipped(path: &Path, format: &'static str) -> Result<Bytes> {
    unzipped(&Stamped::new(path)?, format)
}

fn unzipped(file: &Stamped, format: &'static str) -> Result<Bytes> {
    let bytes = file.read_all()?;
    if !bytes.starts_with(&GZIP) {
        return Ok(bytes);
    }
    let mut plain = Vec::new();
    let read = MultiGzDecoder::new(&bytes[..]).read_to_end(&mut plain);
    read.map_err(|error| {
        let reason = format!("it cannot be unzipped: {error}");
        Error::Corrupt { path: file.path.clone(), format, reason }
    })?;
    Ok(plain.into())
}
