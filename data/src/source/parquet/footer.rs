//! The footer of a file: what it has, and where.

use super::corrupt;
use crate::error::Result;
use crate::source::file::Stamped;
use bytes::Bytes;
use datafusion::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use datafusion::parquet::file::metadata::ParquetMetaDataReader;
use std::sync::Arc;

/// What is read of the end: most footers are in it.
const TAIL: u64 = 64 << 10;

/// What a file ends with, after the length of its footer.
const MAGIC: &[u8; 4] = b"PAR1";
const END: u64 = 8;

/// With what tells the file from another: its length, and the checksum of its footer, which has the
/// statistics and offsets.
pub(crate) fn read(file: &Stamped) -> Result<(ArrowReaderMetadata, String)> {
    let corrupt = |reason: String| corrupt(&file.path, reason);
    let bytes = bytes(file)?;
    let metadata = ParquetMetaDataReader::decode_metadata(&bytes);
    let metadata = metadata.map_err(|error| corrupt(error.to_string()))?;
    let metadata = ArrowReaderMetadata::try_new(Arc::new(metadata), ArrowReaderOptions::new());
    let metadata = metadata.map_err(|error| corrupt(error.to_string()))?;
    Ok((metadata, format!("{}-{:08x}", file.length, crc32fast::hash(&bytes))))
}

fn bytes(file: &Stamped) -> Result<Bytes> {
    let corrupt = |reason: String| corrupt(&file.path, reason);
    let start = file.length.saturating_sub(TAIL);
    let tail = file.read_one(start..file.length)?;
    let too_short = || corrupt(format!("it has {} bytes, too few for one", tail.len()));
    let (rest, magic) = tail.split_last_chunk::<4>().ok_or_else(too_short)?;
    let (rest, length) = rest.split_last_chunk::<4>().ok_or_else(too_short)?;
    if magic != MAGIC {
        return Err(corrupt(format!("it ends with {magic:?}, expected {MAGIC:?} (PAR1)")));
    }
    let length = u64::from(u32::from_le_bytes(*length));
    if let Some(before) = rest.len().checked_sub(length as usize) {
        return Ok(tail.slice(before..rest.len()));
    }
    let end = file.length - END;
    let start =
        end.checked_sub(length).ok_or_else(|| corrupt("its footer is cut off".to_owned()))?;
    file.read_one(start..end)
}
