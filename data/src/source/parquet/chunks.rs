//! The columns of a row group, read at once: each page by itself would be a request.

use crate::error::Result;
use crate::source::file::Stamped;
use bytes::{Buf, Bytes, buf::Reader};
use datafusion::parquet::arrow::ProjectionMask;
use datafusion::parquet::errors::{ParquetError, Result as ParquetResult};
use datafusion::parquet::file::metadata::RowGroupMetaData;
use datafusion::parquet::file::reader::{ChunkReader, Length};

pub(super) struct Chunks {
    length: u64,
    /// With where they begin.
    chunks: Vec<(u64, Bytes)>,
}

impl Chunks {
    pub(super) fn read(
        file: &Stamped,
        group: &RowGroupMetaData,
        mask: &ProjectionMask,
    ) -> Result<Self> {
        let columns = group.columns().iter().enumerate();
        let columns = columns.filter(|(leaf, _)| mask.leaf_included(*leaf));
        let ranges = columns.map(|(_, column)| column.byte_range());
        // A damaged footer may lie.
        let ranges = ranges.map(|(start, length)| {
            let end = start.saturating_add(length).min(file.length);
            start.min(end)..end
        });
        let ranges: Vec<_> = ranges.filter(|range| !range.is_empty()).collect();
        let starts: Vec<_> = ranges.iter().map(|range| range.start).collect();
        let chunks = starts.into_iter().zip(file.read(ranges)?).collect();
        Ok(Self { length: file.length, chunks })
    }

    fn from(&self, start: u64) -> ParquetResult<Bytes> {
        let has =
            |(first, bytes): &&(u64, Bytes)| (*first..first + bytes.len() as u64).contains(&start);
        let chunk = self
            .chunks
            .iter()
            .find(has)
            .map(|(first, bytes)| bytes.slice((start - first) as usize..));
        chunk.ok_or_else(|| ParquetError::EOF(format!("no column at byte {start}")))
    }
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Chunks {
    type T = Reader<Bytes>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        self.from(start).map(Buf::reader)
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let bytes = self.from(start)?;
        let cut_off =
            || ParquetError::EOF(format!("a column ends within {length} bytes of {start}"));
        (length <= bytes.len()).then(|| bytes.slice(..length)).ok_or_else(cut_off)
    }
}
