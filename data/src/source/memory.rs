//! Record batches in memory: given by the program, or read whole from IDX or npz.

use super::{BatchIter, Block, Blocks, Source, columns};
use crate::error::{Error, Result};
use crate::store::BLOCK_ROWS;
use arrow::datatypes::SchemaRef;
use arrow::ipc::{reader::StreamReader, writer::StreamWriter};
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::sync::{Arc, OnceLock};

/// Batches as part of a description: Arrow's IPC stream format once serialised.
#[derive(Clone, Debug)]
pub(crate) struct MemoryTable {
    schema: SchemaRef,
    batches: Arc<Vec<RecordBatch>>,
}

impl MemoryTable {
    pub(crate) fn new(batches: Vec<RecordBatch>) -> Result<Self> {
        let first = batches.first().ok_or(Error::Empty { after: "" })?;
        let schema = first.schema();
        for batch in &batches {
            if batch.schema() != schema {
                return Err(Error::SchemaDiffers {
                    path: "a record batch".into(),
                    expected: columns(&schema),
                    got: columns(&batch.schema()),
                });
            }
        }
        Ok(Self { schema, batches: Arc::new(batches) })
    }

    pub(crate) fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    pub(crate) fn batches(&self) -> &[RecordBatch] {
        &self.batches
    }
}

#[typetag::serde(name = "batches")]
impl Source for MemoryTable {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::new(MemoryBlocks::new(self.schema.clone(), self.batches.to_vec())))
    }
}

impl Serialize for MemoryTable {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes = encode(&self.schema, &self.batches).map_err(serde::ser::Error::custom)?;
        serializer.serialize_bytes(&bytes)
    }
}

impl<'de> Deserialize<'de> for MemoryTable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_byte_buf(IpcVisitor)
    }
}

struct IpcVisitor;

impl<'de> de::Visitor<'de> for IpcVisitor {
    type Value = MemoryTable;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an Arrow IPC stream")
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<MemoryTable, E> {
        let reader = StreamReader::try_new(bytes, None).map_err(E::custom)?;
        let schema = reader.schema();
        let batches = reader.collect::<Result<_, _>>().map_err(E::custom)?;
        Ok(MemoryTable { schema, batches: Arc::new(batches) })
    }

    /// JSON has no bytes: they come as a list of numbers.
    fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<MemoryTable, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = seq.next_element::<u8>()? {
            bytes.push(byte);
        }
        self.visit_bytes(&bytes)
    }
}

fn encode(schema: &SchemaRef, batches: &[RecordBatch]) -> Result<Vec<u8>> {
    let mut writer = StreamWriter::try_new(Vec::new(), schema)?;
    for batch in batches {
        writer.write(batch)?;
    }
    Ok(writer.into_inner()?)
}

/// Batches cut into blocks.
#[derive(Debug)]
pub(crate) struct MemoryBlocks {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
    blocks: Vec<Block>,
    fingerprint: OnceLock<String>,
}

impl MemoryBlocks {
    /// Keeps the batches' bounds, except that none is longer than a block may be.
    pub(crate) fn new(schema: SchemaRef, batches: Vec<RecordBatch>) -> Self {
        let batches: Vec<_> = batches.iter().flat_map(slices).collect();
        let blocks = Block::sequence(batches.iter().map(|b| b.num_rows() as u64));
        Self { schema, batches, blocks, fingerprint: OnceLock::new() }
    }
}

impl Blocks for MemoryBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.blocks.iter().map(|block| block.rows).collect()
    }

    fn name(&self, block: usize) -> String {
        let Block { start, rows } = self.blocks[block];
        format!("rows {start} to {}", start + rows.saturating_sub(1))
    }

    fn fingerprint(&self) -> Result<String> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known.clone());
        }
        let bytes = encode(&self.schema, &self.batches)?;
        let text = format!("{}-{:08x}", bytes.len(), crc32fast::hash(&bytes));
        Ok(self.fingerprint.get_or_init(|| text).clone())
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let batch = self.batches[block].project(projection)?;
        Ok(Box::new(std::iter::once(Ok(batch))))
    }
}

fn slices(batch: &RecordBatch) -> Vec<RecordBatch> {
    let rows = batch.num_rows();
    let cut = |start| batch.slice(start, BLOCK_ROWS.min(rows - start));
    (0..rows).step_by(BLOCK_ROWS).map(cut).collect()
}
