//! Blocks that are kept: in memory while the budget has room, and else in a file.

use crate::error::{Error, Result};
use crate::memory::{self, Taken};
use crate::source::{BatchIter, Blocks};
use crate::spill::Unnamed;
use arrow::array::{Array, ArrayRef, AsArray, OffsetSizeTrait, RecordBatchOptions};
use arrow::buffer::Buffer;
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, SchemaRef};
use arrow::error::ArrowError;
use arrow::ipc::reader::StreamDecoder;
use arrow::ipc::writer::StreamWriter;
use arrow::record_batch::RecordBatch;
use futures::{Stream, StreamExt};
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use xxhash_rust::xxh3::xxh3_128;

/// Most rows of a block: small enough that a shuffle has blocks to mix.
pub(crate) const BLOCK_ROWS: usize = 4096;

/// A block of wide rows has fewer of them, as soon as it has so many bytes.
const BLOCK_BYTES: usize = 32 << 20;

/// A record batch in Arrow's IPC stream format. The same rows, made in the same way, give the same
/// bytes, whatever buffers they are a slice of.
pub(crate) fn encode(batch: &RecordBatch) -> Result<Vec<u8>> {
    let batch = compact(batch)?;
    let room = bytes_of(&batch)? + 4096;
    let mut writer = StreamWriter::try_new(Vec::with_capacity(room), &batch.schema())?;
    writer.write(&batch)?;
    Ok(writer.into_inner()?)
}

/// The same columns as those of `schema`, which may say otherwise what can be missing.
pub(crate) fn relabel(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    let columns = batch.columns().to_vec();
    Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &options)?)
}

/// Text that is views holds all that it views, and a dictionary has values that no row has: here they
/// are with nothing else.
pub(crate) fn compact(batch: &RecordBatch) -> Result<RecordBatch> {
    let column = |column: &ArrayRef| match column.data_type() {
        DataType::Utf8View => Ok(Arc::new(column.as_string_view().gc()) as ArrayRef),
        DataType::BinaryView => Ok(Arc::new(column.as_binary_view().gc()) as ArrayRef),
        DataType::Dictionary(_, values) => cast(&cast(column, values)?, column.data_type()),
        _ => Ok(column.clone()),
    };
    let columns = batch.columns().iter().map(column).collect::<Result<_, _>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(batch.schema(), columns, &options)?)
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

/// Bytes of a batch's values, about: not those around them in its buffers, nor what says which are
/// missing. The sum over pieces of a batch is that of the batch.
pub(crate) fn bytes_of(batch: &RecordBatch) -> Result<usize> {
    batch.columns().iter().map(|column| bytes_of_column(column)).sum()
}

fn bytes_of_column(column: &dyn Array) -> Result<usize> {
    let rows = column.len();
    let values = |first: usize, last: usize, values: &dyn Array| {
        bytes_of_column(&values.slice(first, last - first))
    };
    Ok(match column.data_type() {
        DataType::Null => 0,
        DataType::Boolean => rows,
        of if of.primitive_width().is_some() => of.primitive_width().unwrap_or(0) * rows,
        DataType::Utf8View => 16 * rows + column.as_string_view().total_buffer_bytes_used(),
        DataType::BinaryView => 16 * rows + column.as_binary_view().total_buffer_bytes_used(),
        DataType::Utf8 => 4 * rows + span(column.as_string::<i32>().value_offsets()),
        DataType::LargeUtf8 => 8 * rows + span(column.as_string::<i64>().value_offsets()),
        DataType::Binary => 4 * rows + span(column.as_binary::<i32>().value_offsets()),
        DataType::LargeBinary => 8 * rows + span(column.as_binary::<i64>().value_offsets()),
        DataType::FixedSizeBinary(width) => *width as usize * rows,
        // As if each row had a short value of its own.
        DataType::Dictionary(keys, _) => (keys.primitive_width().unwrap_or(0) + 8) * rows,
        DataType::List(_) => {
            let (list, ends) = (column.as_list::<i32>(), column.as_list::<i32>().value_offsets());
            4 * rows + values(ends[0] as usize, ends[rows] as usize, list.values())?
        }
        DataType::LargeList(_) => {
            let (list, ends) = (column.as_list::<i64>(), column.as_list::<i64>().value_offsets());
            8 * rows + values(ends[0] as usize, ends[rows] as usize, list.values())?
        }
        DataType::Map(..) => {
            let (map, ends) = (column.as_map(), column.as_map().value_offsets());
            4 * rows + values(ends[0] as usize, ends[rows] as usize, map.entries())?
        }
        DataType::FixedSizeList(_, width) => {
            let (list, width) = (column.as_fixed_size_list(), *width as usize);
            let first = list.value_offset(0) as usize;
            values(first, first + rows * width, list.values())?
        }
        DataType::Struct(_) => {
            let fields = column.as_struct().columns().iter();
            fields.map(|field| bytes_of_column(field)).sum::<Result<usize>>()?
        }
        _ => column.to_data().get_slice_memory_size()?,
    })
}

fn span<O: OffsetSizeTrait>(ends: &[O]) -> usize {
    match (ends.first(), ends.last()) {
        (Some(first), Some(last)) => last.as_usize() - first.as_usize(),
        _ => 0,
    }
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
            return Ok(Self::Here { batch: compact(&batch)?, _memory: memory });
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
    pub(crate) async fn collect<E: From<Error>>(
        schema: SchemaRef,
        mut batches: impl Stream<Item = Result<RecordBatch, E>> + Unpin,
    ) -> Result<Self, E> {
        let mut writer = BlockWriter::new(schema);
        while let Some(batch) = batches.next().await {
            writer.push(batch?)?;
        }
        Ok(writer.finish()?)
    }

    /// The blocks of several, one store after another.
    pub(crate) fn join(schema: SchemaRef, stores: impl IntoIterator<Item = Self>) -> Self {
        let mut all =
            Self { schema, blocks: Vec::new(), rows: Vec::new(), fingerprint: OnceLock::new() };
        for store in stores {
            all.blocks.extend(store.blocks);
            all.rows.extend(store.rows);
        }
        all
    }
}

impl IntoIterator for BlockStore {
    type Item = Kept;
    type IntoIter = std::vec::IntoIter<Kept>;

    fn into_iter(self) -> Self::IntoIter {
        self.blocks.into_iter()
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

/// A block ends behind a multiple of so many rows. Which one depends on the rows, not on the batches
/// that they come in.
const UNIT_ROWS: usize = 16;

/// Cuts rows into blocks and keeps them.
pub(crate) struct BlockWriter {
    schema: SchemaRef,
    /// Rows that are no block yet.
    pending: Vec<RecordBatch>,
    pending_rows: usize,
    pending_bytes: usize,
    blocks: Vec<Kept>,
    rows: Vec<u64>,
    file: OnceLock<Unnamed>,
}

impl BlockWriter {
    pub(crate) fn new(schema: SchemaRef) -> Self {
        Self {
            schema,
            pending: Vec::new(),
            pending_rows: 0,
            pending_bytes: 0,
            blocks: Vec::new(),
            rows: Vec::new(),
            file: OnceLock::new(),
        }
    }

    /// Adds rows with the columns of the writer, of which the engine says less.
    pub(crate) fn push(&mut self, batch: RecordBatch) -> Result<()> {
        let mut batch = relabel(&batch, &self.schema)?;
        while batch.num_rows() > 0 {
            let take = self.room(&batch)?;
            let piece = batch.slice(0, take);
            batch = batch.slice(take, batch.num_rows() - take);
            self.pending_rows += take;
            self.pending_bytes += bytes_of(&piece)?;
            self.pending.push(piece);
            let is_unit = self.pending_rows.is_multiple_of(UNIT_ROWS);
            if self.pending_rows >= BLOCK_ROWS || (is_unit && self.pending_bytes >= BLOCK_BYTES) {
                self.end_block()?;
            }
        }
        Ok(())
    }

    /// How many rows to take: all that the block lacks, or where these may be too many bytes, a unit.
    fn room(&self, batch: &RecordBatch) -> Result<usize> {
        let all = (BLOCK_ROWS - self.pending_rows).min(batch.num_rows());
        if self.pending_bytes + bytes_of(&batch.slice(0, all))? < BLOCK_BYTES {
            return Ok(all);
        }
        let unit = UNIT_ROWS - self.pending_rows % UNIT_ROWS;
        Ok(unit.min(all))
    }

    fn end_block(&mut self) -> Result<()> {
        if self.pending_rows > 0 {
            let block = concat_batches(&self.schema, &self.pending)?;
            self.rows.push(block.num_rows() as u64);
            self.blocks.push(Kept::keep(block, &self.file)?);
        }
        self.pending.clear();
        (self.pending_rows, self.pending_bytes) = (0, 0);
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<BlockStore> {
        self.end_block()?;
        let Self { schema, blocks, rows, .. } = self;
        Ok(BlockStore { schema, blocks, rows, fingerprint: OnceLock::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Int32Array, ListArray, StringViewArray};
    use arrow::datatypes::Int32Type;

    fn batch(column: ArrayRef) -> RecordBatch {
        RecordBatch::try_from_iter([("x", column)]).expect("a batch")
    }

    /// What is counted, and what is written, is that of the slice.
    #[test]
    fn slices_weigh_what_they_have() {
        let lists = (0..1000).map(|i| Some(vec![Some(i); 100]));
        let lists = batch(Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(lists)));
        let text = "a text that is longer than twelve bytes";
        let views = batch(Arc::new(StringViewArray::from_iter_values(vec![text; 1000])));
        let numbers = batch(Arc::new(Int32Array::from_iter_values(0..1000)));
        for (all, row) in [(lists, 404), (views, 16 + text.len()), (numbers, 4)] {
            let some = all.slice(500, 10);
            let bytes = bytes_of(&some).expect("bytes");
            assert!((row * 10..row * 10 + 80).contains(&bytes), "{bytes} for {row} a row");
            let encoded = encode(&some).expect("encodes");
            assert!(encoded.len() < row * 10 + 1200, "{} for {row} a row", encoded.len());
            assert_eq!(decode(encoded).expect("decodes"), some);
        }
    }

    #[test]
    fn blocks_end_where_the_rows_say() {
        let rows = |sizes: &[i32]| {
            let wide = |i: i32| "x".repeat(if i % 1000 < 500 { 100_000 } else { 10 });
            let mut writer =
                BlockWriter::new(batch(Arc::new(StringViewArray::from_iter_values([""]))).schema());
            let (mut start, mut size) = (0, sizes.iter().cycle());
            while start < 6000 {
                let end = (start + size.next().expect("a size")).min(6000);
                let text = StringViewArray::from_iter_values((start..end).map(wide));
                writer.push(batch(Arc::new(text))).expect("pushes");
                start = end;
            }
            writer.finish().expect("finishes").rows
        };
        let expected = rows(&[6000]);
        assert!(expected.len() > 3 && expected.iter().sum::<u64>() == 6000, "{expected:?}");
        assert_eq!(rows(&[7, 1300, 1]), expected);
    }
}
