//! Files of records: gone through once when they are opened, to find out where every so many
//! records begin, and from then on read in pieces, as they are needed.

use super::file::Pieces;
use super::{BatchIter, Blocks, columns, hash};
use crate::error::{Error, Result};
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use mobula_core::error::AtPath;
use std::fmt::Debug;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::sync::Arc;

/// Records of a block.
pub(super) const BLOCK_ROWS: u64 = 4096;

/// Most bytes of a block of binary records, unless one has more.
const BLOCK_BYTES: usize = 16 << 20;

/// Bytes of a file that are whole records.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) length: usize,
    pub(super) rows: u64,
    /// Their checksum, if they were read.
    crc: Option<u32>,
}

/// Puts records whose bounds are known, one after another, into spans.
#[derive(Default)]
pub(super) struct Packer {
    spans: Vec<Span>,
}

impl Packer {
    pub(super) fn record(&mut self, bytes: Range<u64>) {
        self.records(bytes, 1);
    }

    /// So many that are not to be parted.
    pub(super) fn records(&mut self, bytes: Range<u64>, rows: u64) {
        let length = (bytes.end - bytes.start) as usize;
        let fits = |last: &Span| {
            last.rows.saturating_add(rows) <= BLOCK_ROWS && last.length + length <= BLOCK_BYTES
        };
        match self.spans.last_mut().filter(|last| fits(last)) {
            Some(last) => {
                last.length = (bytes.end - last.start) as usize;
                last.rows += rows;
            }
            None => self.spans.push(Span { start: bytes.start, length, rows, crc: None }),
        }
    }

    pub(super) fn finish(self) -> Vec<Span> {
        self.spans
    }
}

/// Cuts a file into spans while its bytes pass by.
pub(super) struct Cutter {
    block_rows: u64,
    spans: Vec<Span>,
    /// Records that are no rows, such as a header.
    skip: u64,
    current: Span,
    hasher: crc32fast::Hasher,
}

impl Cutter {
    pub(super) fn new(block_rows: u64, skip: u64) -> Self {
        let (current, hasher) = (Span::default(), crc32fast::Hasher::new());
        Self { block_rows, spans: Vec::new(), skip, current, hasher }
    }

    /// The next bytes.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.current.length += bytes.len();
    }

    /// A record ends with the last of the bytes.
    pub(super) fn record(&mut self) {
        if self.skip > 0 {
            self.skip -= 1;
            self.next();
            return;
        }
        self.current.rows += 1;
        if self.current.rows == self.block_rows || self.current.length >= BLOCK_BYTES {
            let span = self.next();
            self.spans.push(span);
        }
    }

    fn next(&mut self) -> Span {
        let crc = std::mem::take(&mut self.hasher).finalize();
        let start = self.current.start + self.current.length as u64;
        let next = Span { start, ..Span::default() };
        Span { crc: Some(crc), ..std::mem::replace(&mut self.current, next) }
    }

    pub(super) fn finish(mut self) -> Vec<Span> {
        let last = self.next();
        self.spans.extend((last.rows > 0).then_some(last));
        self.spans
    }
}

/// The spans of a file whose records are lines. `is_record(number, line)` says whether one is.
pub(super) fn cut_lines(
    file: &Pieces,
    mut is_record: impl FnMut(u64, &[u8]) -> Result<bool>,
) -> Result<Vec<Span>> {
    let (mut reader, mut line) = (BufReader::new(file.reader()?), Vec::new());
    let mut cutter = Cutter::new(BLOCK_ROWS, 0);
    for number in 1.. {
        line.clear();
        if reader.read_until(b'\n', &mut line).at("read", file.path())? == 0 {
            break;
        }
        cutter.bytes(&line);
        if is_record(number, without_end(&line))? {
            cutter.record();
        }
    }
    Ok(cutter.finish())
}

/// A line without its `\n` or `\r\n`.
pub(super) fn without_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// What makes rows of the bytes of a span.
pub(super) trait Decode: Debug + Send + Sync {
    /// What messages call the files.
    fn format(&self) -> &'static str;

    /// The records as rows with the columns of `schema` at `projection`.
    fn decode(
        &self,
        bytes: &[u8],
        rows: usize,
        schema: &SchemaRef,
        projection: &[usize],
    ) -> Result<Vec<RecordBatch>, ArrowError>;
}

/// Files that were cut into spans; a block is one of them.
#[derive(Debug)]
pub(super) struct RecordBlocks {
    schema: SchemaRef,
    files: Vec<Pieces>,
    /// With the file of each, and the number of its first row there.
    spans: Vec<(usize, u64, Span)>,
    /// Of each file.
    decode: Vec<Arc<dyn Decode>>,
}

impl RecordBlocks {
    pub(super) fn new(
        schema: SchemaRef,
        files: Vec<(Pieces, Vec<Span>)>,
        decode: Arc<dyn Decode>,
    ) -> Self {
        let files = files.into_iter().map(|(file, spans)| (file, spans, decode.clone()));
        Self::of_files(schema, files.collect())
    }

    /// The same where each file says itself how it is read.
    pub(super) fn of_files(
        schema: SchemaRef,
        of: Vec<(Pieces, Vec<Span>, Arc<dyn Decode>)>,
    ) -> Self {
        let (mut files, mut spans, mut decode) = (Vec::new(), Vec::new(), Vec::new());
        for (at, (file, cut, how)) in of.into_iter().enumerate() {
            let mut row = 0_u64;
            for span in cut {
                let first = row;
                row = row.saturating_add(span.rows);
                spans.push((at, first, span));
            }
            files.push(file);
            decode.push(how);
        }
        Self { schema, files, spans, decode }
    }
}

impl Blocks for RecordBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.spans.iter().map(|(.., span)| span.rows).collect()
    }

    fn fingerprint(&self) -> Result<String> {
        let mut parts = vec![columns(&self.schema)];
        for (file, _, Span { length, rows, crc, .. }) in &self.spans {
            parts.push(format!("{file}-{length}-{rows}-{crc:?}"));
        }
        if self.spans.iter().any(|(.., span)| span.crc.is_none()) {
            for file in &self.files {
                parts.push(file.fingerprint()?);
            }
        }
        Ok(hash(parts.iter().map(String::as_bytes)))
    }

    fn waits(&self) -> bool {
        self.files.iter().any(Pieces::is_remote)
    }

    fn name(&self, block: usize) -> String {
        let (file, row, span) = &self.spans[block];
        let (path, last) = (self.files[*file].path().display(), row.saturating_add(span.rows) - 1);
        format!("{path} (rows {row} to {last})")
    }

    fn file(&self, block: usize) -> Option<usize> {
        Some(self.spans[block].0)
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let (file, _, span) = &self.spans[block];
        let bytes = self.files[*file].read(span.start, span.length, span.crc)?;
        let rows = span.rows as usize;
        let decode = &self.decode[*file];
        let batches = decode.decode(&bytes, rows, &self.schema, projection);
        let batches = batches.map_err(|error| Error::Corrupt {
            path: self.name(block).into(),
            format: decode.format(),
            reason: error.to_string(),
        })?;
        Ok(Box::new(batches.into_iter().map(Ok)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_ends_by_rows_and_by_bytes() {
        let mut cutter = Cutter::new(100, 0);
        for length in [1, BLOCK_BYTES - 2, 1, 5, BLOCK_BYTES, 7] {
            cutter.bytes(&vec![b'x'; length]);
            cutter.record();
        }
        (0..100).for_each(|_| cutter.record());
        let spans = cutter.finish();
        assert_eq!(spans.iter().map(|span| span.rows).collect::<Vec<_>>(), [3, 2, 100, 1]);
        assert!(
            spans.windows(2).all(|pair| pair[1].start == pair[0].start + pair[0].length as u64)
        );
    }
}
