//! Objects in memory, and how other processes are told of them.

use super::limits;
use super::reader::Shared;
use super::segment::{Location, Mapping, Segment};
use crate::Error;
use crate::value::{Draft, Encoded, Layout};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufReader, Write};
use std::sync::{Arc, Weak};
use tokio::sync::mpsc;

/// Smaller objects are plain memory.
const SHARED_FROM: usize = 64 << 10;
/// What is read of a file at a time.
const READ_BYTES: usize = 1 << 20;

/// An object as it is told to another process: small ones as they are, others by where they are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Place {
    /// In its flat form.
    Inline(Bytes),
    Shared(Location),
}

/// An object that this process has made and another's store is to adopt: a worker's result. To be
/// kept until that has happened, since a shared one lives here until then.
#[derive(Debug)]
pub(crate) struct Offer(Memory);

impl Offer {
    /// Writes a value.
    pub(crate) fn new(value: impl Into<Draft>) -> Result<Self, Error> {
        let value = value.into();
        Ok(Self(Memory::write(&value, &value.layout()?)?))
    }

    /// What to tell the process that owns the store.
    pub(crate) fn place(&self) -> Place {
        self.0.place()
    }

    /// The value itself, which stays in memory as long as this does, whoever else has it.
    pub(crate) fn open(&self) -> Result<Encoded, Error> {
        let flat = match &self.0 {
            Memory::Inline(flat) => flat.clone(),
            Memory::Shared(segment, _) => Bytes::from_owner(Shared(Arc::new(segment.map()?))),
        };
        Encoded::from_flat("an object", &flat)
    }
}

/// An object in memory, in its flat form.
#[derive(Clone, Debug)]
pub(super) enum Memory {
    Inline(Bytes),
    Shared(Arc<Segment>, Weak<Mapping>),
}

impl Memory {
    /// Takes over an object that another process has made.
    pub(super) fn of(place: &Place) -> Result<Self, Error> {
        match place {
            Place::Shared(location) => Segment::open(location).map(Self::shared),
            Place::Inline(flat) if flat.len() < SHARED_FROM => Ok(Self::Inline(flat.clone())),
            // From another host.
            Place::Inline(flat) => Self::make(flat.len(), |out| out.write_all(flat)),
        }
    }

    pub(super) fn place(&self) -> Place {
        match self {
            Self::Inline(flat) => Place::Inline(flat.clone()),
            Self::Shared(segment, _) => Place::Shared(segment.location()),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Inline(flat) => flat.len() as u64,
            Self::Shared(segment, _) => segment.location().bytes,
        }
    }

    fn shared(segment: Segment) -> Self {
        Self::Shared(Arc::new(segment), Weak::new())
    }

    pub(super) fn write(value: &Draft, layout: &Layout) -> Result<Self, Error> {
        Self::make(layout.bytes(), |out| value.write_to(layout, out))
    }

    pub(super) fn read_back(file: &File, bytes: u64) -> Result<Self, Error> {
        let too_large = |error| Error::system("reading a spilled object", io::Error::other(error));
        let bytes = usize::try_from(bytes).map_err(too_large)?;
        Self::make(bytes, |out| {
            let mut file = BufReader::with_capacity(bytes.min(READ_BYTES), file);
            io::copy(&mut file, out).map(drop)
        })
    }

    /// Takes in what comes in pieces, and waits for each.
    pub(super) fn receive(bytes: u64, pieces: mpsc::Receiver<Bytes>) -> Result<Self, Error> {
        let too_large = |error| Error::system("receiving an object", io::Error::other(error));
        let bytes = usize::try_from(bytes).map_err(too_large)?;
        let pieces = RefCell::new(pieces);
        Self::make(bytes, |out| {
            while let Some(piece) = pieces.borrow_mut().blocking_recv() {
                out.write_all(&piece)?;
            }
            Ok(())
        })
    }

    /// Memory for so many bytes, which `write` must write.
    fn make(bytes: usize, write: impl Fn(&mut dyn Write) -> io::Result<()>) -> Result<Self, Error> {
        if bytes >= SHARED_FROM {
            match Segment::create(bytes as u64, &write) {
                // Then it is sent along like a small one.
                Err(error) if limits::out_of_files(&error) => {}
                made => return made.map(Self::shared),
            }
        }
        let mut flat = Vec::with_capacity(bytes);
        write(&mut flat).map_err(|error| Error::system("copying an object", error))?;
        if flat.len() != bytes {
            let short = format!("expected {bytes} bytes, got {}", flat.len());
            return Err(Error::system("copying an object", io::Error::other(short)));
        }
        Ok(Self::Inline(flat.into()))
    }

    pub(super) fn read<R>(&self, run: impl FnOnce(&[u8]) -> Result<R, Error>) -> Result<R, Error> {
        match self {
            Self::Inline(flat) => run(flat),
            Self::Shared(segment, _) => run(segment.map()?.as_ref()),
        }
    }
}
