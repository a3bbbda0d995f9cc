//! Blocks that are kept: in memory while the budget has room, and else in a file.

use crate::error::Result;
use crate::memory::{self, Taken};
use crate::source::{BatchIter, Blocks};
use crate::spill::Unnamed;
use arrow::array::Array;
use arrow::buffer::Buffer;
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use arrow::ipc::reader::StreamDecoder;
use arrow::ipc::writer::StreamWriter;
use arrow::record_batch::RecordBatch;
use futures::{Stream, StreamExt};
use std::ops::Range;
use std::sync::OnceLock;
use xxhash_rust::xxh3::xxh3_128;

/// Most rows of a block: small enough that a shuffle has blocks to mix.
pub(crate) const BLOCK_ROWS: usize = 4096;

/// A block of wide rows has fewer of them.
const BLOCK_BYTES: usize = 32 << 20;

/// A record batch in Arrow's IPC stream format. The same rows give the same bytes, whatever buffers
/// they are a slice of.
pub(crate) fn encode(batch: &RecordBatch) -> Result<Vec<u8>> {
    let room = bytes_of(batch)? + 4096;
    let mut writer = StreamWriter::try_new(Vec::with_capacity(room), &batch.schema())?;
    writer.write(batch)?;
    Ok(writer.into_inner()?)
}

/// The record batch of [`encode`], whose columns lie in `bytes`.
pub(crate) fn decode(bytes: Vec<u8>) -> Result<RecordBatch> {
    let (mut bytes, mut decoder) = (Buffer::from_vec(bytes), StreamDecoder::new());
    let batch = decoder.decode(&mut bytes)?;
    Ok(batch.ok_or_else(|| ArrowError::IpcError("a block ends too early".to_owned()))?)
}

/// What tells the content of blocks apart.
pub(crate) fn content_hash(encoded: &[u8]) -> String {
    format!("{:032x}", xxh3_128(encoded))
}

/// Bytes of a batch's values, but not of what its buffers have around them.
pub(crate) fn bytes_of(batch: &RecordBatch) -> Result<usize> {
    let sizes = batch.columns().iter().map(|column| column.to_data().get_slice_memory_size());
    Ok(sizes.sum::<Result<usize, ArrowError>>()?)
}

/// A block, wherever it is.
#[derive(Debug)]
pub(crate) enum Kept {
    Here { batch: RecordBatch, _memory: Taken },
    Spilled { file: Unnamed, place: Range<u64> },
}

impl Kept {
    /// Keeps a block in memory, or in a file that `file` makes if there is none yet.
    pub(crate) fn keep(batch: RecordBatch, file: &OnceLock<Unnamed>) -> Result<Self> {
        if let Some(memory) = memory::try_keep(bytes_of(&batch)?)? {
            return Ok(Self::Here { batch, _memory: memory });
        }
        let file = match file.get() {
            Some(file) => file.clone(),
            None => {
                let made = Unnamed::create()?;
                file.get_or_init(|| made).clone()
            }
        };
        let place = file.append(&encode(&batch)?)?;
        Ok(Self::Spilled { file, place })
    }

    pub(crate) fn read(&self) -> Result<RecordBatch> {
        match self {
            Self::Here { batch, .. } => Ok(batch.clone()),
            Self::Spilled { file, place } => decode(file.read(place.clone())?),
        }
    }
}

/// What is made of a stream of rows, as blocks.
#[derive(Debug)]
pub(crate) struct BlockStore {
    schema: SchemaRef,
    blocks: Vec<Kept>,
    rows: Vec<u64>,
    fingerprint: OnceLock<String>,
}

impl BlockStore {
    /// Keeps the rows of a stream. Where the batches end means nothing.
    pub(crate) async fn collect(
        schema: SchemaRef,
        mut batches: impl Stream<Item = Result<RecordBatch>> + Unpin,
    ) -> Result<Self> {
        let mut writer = BlockWriter::default();
        while let Some(batch) = batches.next().await {
            writer.push(batch?)?;
        }
        writer.finish(schema)
    }
}

impl Blocks for BlockStore {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.rows.clone()
    }

    fn name(&self, block: usize) -> String {
        let start: u64 = self.rows[..block].iter().sum();
        format!("rows {start} to {}", (start + self.rows[block]).saturating_sub(1))
    }

    fn fingerprint(&self) -> Result<String> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known.clone());
        }
        let hashes = self.blocks.iter().map(|block| match block {
            Kept::Here { batch, .. } => Ok(content_hash(&encode(batch)?)),
            Kept::Spilled { file, place } => Ok(content_hash(&file.read(place.clone())?)),
        });
        let hashes = hashes.collect::<Result<Vec<_>>>()?;
        let all = crate::source::hash(hashes.iter().map(String::as_bytes));
        Ok(self.fingerprint.get_or_init(|| all).clone())
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let batch = self.blocks[block].read()?.project(projection)?;
        Ok(Box::new(std::iter::once(Ok(batch))))
    }
}

/// Cuts rows into blocks and keeps them.
#[derive(Default)]
pub(crate) struct BlockWriter {
    /// Rows that are no block yet.
    pending: Vec<RecordBatch>,
    pending_rows: usize,
    pending_bytes: usize,
    blocks: Vec<Kept>,
    rows: Vec<u64>,
    file: OnceLock<Unnamed>,
}

impl BlockWriter {
    pub(crate) fn push(&mut self, mut batch: RecordBatch) -> Result<()> {
        while batch.num_rows() > 0 {
            let take = self.room(&batch)?.min(batch.num_rows());
            let piece = batch.slice(0, take);
            batch = batch.slice(take, batch.num_rows() - take);
            self.pending_rows += take;
            self.pending_bytes += bytes_of(&piece)?;
            self.pending.push(piece);
            if self.pending_rows >= BLOCK_ROWS || self.pending_bytes >= BLOCK_BYTES {
                self.end_block()?;
            }
        }
        Ok(())
    }

    /// Rows of `batch` that the block in hand has room for: one at least.
    fn room(&self, batch: &RecordBatch) -> Result<usize> {
        let row = bytes_of(batch)?.div_ceil(batch.num_rows()).max(1);
        let by_bytes = BLOCK_BYTES.saturating_sub(self.pending_bytes) / row;
        Ok((BLOCK_ROWS - self.pending_rows).min(by_bytes).max(1))
    }

    /// A group of rows that are not to be parted is at an end.
    pub(crate) fn end_block(&mut self) -> Result<()> {
        let Some(first) = self.pending.first() else { return Ok(()) };
        let block = concat_batches(&first.schema(), &self.pending)?;
        self.rows.push(block.num_rows() as u64);
        self.blocks.push(Kept::keep(block, &self.file)?);
        self.pending.clear();
        (self.pending_rows, self.pending_bytes) = (0, 0);
        Ok(())
    }

    /// The blocks; of the columns of `schema` if there are none.
    pub(crate) fn finish(mut self, schema: SchemaRef) -> Result<BlockStore> {
        self.end_block()?;
        let schema = match self.blocks.first() {
            Some(block) => block.read()?.schema(),
            None => schema,
        };
        let Self { blocks, rows, .. } = self;
        Ok(BlockStore { schema, blocks, rows, fingerprint: OnceLock::new() })
    }
}
