//! An encoded value as one piece of memory, for shared memory and files.
//!
//! Layout, numbers in the machine's byte order, which driver and workers share as they run one
//! binary: `magic`, `version`, bytes of the head, number of payloads, bytes of each payload; then
//! the head and each payload, every one at the next multiple of 64.

use super::blob::Payload;
use super::{Draft, Encoded};
use crate::Error;
use bytes::Bytes;
use std::io::{self, Write};
use std::ops::Range;

const MAGIC: [u8; 4] = *b"mobv";
const VERSION: u32 = 1;
/// Bytes before the sizes of the payloads.
const FIXED: usize = 24;
/// A cache line, and what Arrow asks of its buffers.
const ALIGN: usize = 64;

/// Where the parts of a flat value lie.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    head: Range<usize>,
    payloads: Vec<Range<usize>>,
}

impl Layout {
    /// `None` when the sizes add up to more than there can be.
    fn new(head: usize, payloads: &[usize]) -> Option<Self> {
        let mut end = payloads.len().checked_mul(8)?.checked_add(FIXED)?;
        let mut place = |bytes: usize| {
            let start = end.checked_next_multiple_of(ALIGN)?;
            end = start.checked_add(bytes)?;
            Some(start..end)
        };
        let head = place(head)?;
        let payloads = payloads.iter().map(|bytes| place(*bytes)).collect::<Option<_>>()?;
        Some(Self { head, payloads })
    }

    /// Bytes of the whole.
    pub(crate) fn bytes(&self) -> usize {
        self.payloads.last().unwrap_or(&self.head).end
    }

    fn header(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(self.head.start);
        header.extend(MAGIC);
        header.extend(VERSION.to_ne_bytes());
        header.extend((self.head.len() as u64).to_ne_bytes());
        header.extend((self.payloads.len() as u64).to_ne_bytes());
        for payload in &self.payloads {
            header.extend((payload.len() as u64).to_ne_bytes());
        }
        header
    }

    fn read(bytes: &[u8]) -> Result<Self, String> {
        let number = |at: usize| {
            let field = bytes.get(at..at.checked_add(8)?)?;
            usize::try_from(u64::from_ne_bytes(field.try_into().ok()?)).ok()
        };
        if bytes.get(..4) != Some(&MAGIC) || bytes.get(4..8) != Some(&VERSION.to_ne_bytes()) {
            return Err(format!("it does not start as an encoded value of version {VERSION} does"));
        }
        let short = || format!("its {} bytes are fewer than it says", bytes.len());
        let (head, count) = number(8).zip(number(16)).ok_or_else(short)?;
        if count > bytes.len() / 8 {
            return Err(short());
        }
        let sizes = (0..count).map(|i| number(FIXED + 8 * i)).collect::<Option<Vec<_>>>();
        let layout = sizes.and_then(|sizes| Self::new(head, &sizes)).ok_or_else(short)?;
        if layout.bytes() > bytes.len() { Err(short()) } else { Ok(layout) }
    }
}

impl Draft {
    /// Where the parts lie in the flat form.
    pub(crate) fn layout(&self) -> Result<Layout, Error> {
        let sizes = self.payloads.iter().map(Payload::len).collect::<Result<Vec<_>, _>>()?;
        let layout = Layout::new(self.head.len(), &sizes);
        layout.ok_or_else(|| Error::Internal("an encoded value has too many bytes".to_owned()))
    }

    /// Writes the flat form, [`Layout::bytes`] of it.
    pub(crate) fn write_to(&self, layout: &Layout, out: &mut dyn Write) -> io::Result<()> {
        // What is small goes out in one piece: into shared memory, each write is a system call.
        let mut start = layout.header();
        start.resize(layout.head.start, 0);
        start.extend_from_slice(&self.head);
        out.write_all(&start)?;
        let mut at = layout.head.end;
        for (payload, place) in self.payloads.iter().zip(&layout.payloads) {
            out.write_all(&[0; ALIGN][..place.start - at])?;
            payload.with_bytes(|bytes| out.write_all(bytes)).map_err(io::Error::other)??;
            at = place.end;
        }
        Ok(())
    }
}

impl Encoded {
    /// A value in its flat form; head and payloads share the memory of `flat`.
    pub(crate) fn from_flat(what: &str, flat: &Bytes) -> Result<Self, Error> {
        let layout = Layout::read(flat).map_err(|reason| Error::codec("decode", what, reason))?;
        let payloads = layout.payloads.iter().map(|place| flat.slice(place.clone()));
        Ok(Self { head: flat.slice(layout.head.clone()), buffers: payloads.collect() })
    }
}
