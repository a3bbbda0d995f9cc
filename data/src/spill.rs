//! Files for what has no room in memory. They have no name, so that nothing is left of them when the
//! process ends, however it ends.

use crate::error::{Error, Result};
use bytes::Bytes;
use datafusion::common::Result as EngineResult;
use datafusion::error::DataFusionError;
use datafusion::execution::{SpillFile, SpillWriter, TempFileFactory};
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that the engine reads back at a time.
const PIECE: u64 = 512 << 10;

/// Bytes appended to a file without a name.
#[derive(Clone, Debug)]
pub(crate) struct Unnamed {
    file: Arc<File>,
    length: Arc<AtomicU64>,
}

impl Unnamed {
    /// A new file in the folder for temporary files.
    pub(crate) fn create() -> Result<Self> {
        let file = tempfile::tempfile().map_err(spill_error)?;
        Ok(Self { file: Arc::new(file), length: Arc::default() })
    }

    /// Appends bytes; says where they are.
    pub(crate) fn append(&self, bytes: &[u8]) -> Result<Range<u64>> {
        let length = bytes.len() as u64;
        let start = self.length.fetch_add(length, Ordering::Relaxed);
        self.file.write_all_at(bytes, start).map_err(spill_error)?;
        Ok(start..start + length)
    }

    /// The bytes at a place that [`append`](Self::append) gave.
    pub(crate) fn read(&self, place: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (place.end - place.start) as usize];
        self.file.read_exact_at(&mut bytes, place.start).map_err(spill_error)?;
        Ok(bytes)
    }
}

fn spill_error(source: io::Error) -> Error {
    Error::Spill { folder: std::env::temp_dir(), source }
}

/// Makes the files that the query engine spills to.
#[derive(Debug)]
pub(crate) struct SpillFiles;

impl TempFileFactory for SpillFiles {
    fn create_temp_file(&self, _description: &str) -> EngineResult<Arc<dyn SpillFile>> {
        Ok(Arc::new(Unnamed::create()?))
    }
}

impl SpillFile for Unnamed {
    fn size(&self) -> Option<u64> {
        Some(self.length.load(Ordering::Relaxed))
    }

    fn read_stream(&self) -> EngineResult<BoxStream<'static, EngineResult<Bytes>>> {
        let (file, end) = (self.clone(), self.length.load(Ordering::Relaxed));
        let places = (0..end).step_by(PIECE as usize).map(move |at| at..end.min(at + PIECE));
        let pieces = stream::iter(places).map(move |place| file.read(place).map(Bytes::from));
        Ok(pieces.map_err(DataFusionError::from).boxed())
    }

    fn open_writer(&self) -> EngineResult<Box<dyn SpillWriter>> {
        Ok(Box::new(Writer(self.clone())))
    }
}

struct Writer(Unnamed);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SpillWriter for Writer {
    fn finish(&mut self) -> EngineResult<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_back_in_pieces() {
        let file = Unnamed::create().expect("a file");
        let bytes: Vec<u8> = (0..PIECE + 10).map(|i| (i % 251) as u8).collect();
        let mut writer = file.open_writer().expect("a writer");
        writer.write_all(&bytes[..7]).and_then(|()| writer.write_all(&bytes[7..])).expect("writes");
        assert_eq!(file.size(), Some(PIECE + 10));
        let pieces: Vec<Bytes> =
            futures::executor::block_on(file.read_stream().expect("opens").try_collect())
                .expect("reads");
        assert_eq!(pieces.len(), 2);
        assert_eq!(pieces.concat(), bytes);
        let place = file.append(b"more").expect("appends");
        assert_eq!(file.read(place).expect("reads"), b"more");
    }
}
