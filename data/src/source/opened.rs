//! An opened source, with what the rest of the crate asks of it.

use super::memory::MemoryBlocks;
use super::{BatchIter, Blocks, Source, columns};
use crate::error::{Error, Result};
use arrow::datatypes::{DataType, Field, FieldRef, SchemaRef};
use arrow::record_batch::RecordBatch;
use std::path::PathBuf;
use std::sync::Arc;

/// Beyond this, positions of rows have no place in the numbers that they are computed with.
pub(crate) const MOST_ROWS: u64 = 1 << 48;

/// A part of a source that is read as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Position of its first row in the source.
    pub(crate) start: u64,
    /// Rows before any operation.
    pub(crate) rows: u64,
}

impl Block {
    /// Blocks of the given sizes, one after another.
    pub(crate) fn sequence(rows: impl IntoIterator<Item = u64>) -> Vec<Self> {
        let mut start = 0_u64;
        let next = |rows| {
            let first = start;
            start = first.saturating_add(rows);
            Self { start: first, rows }
        };
        rows.into_iter().map(next).collect()
    }
}

/// A source whose schema and blocks are known.
#[derive(Debug)]
pub(crate) struct OpenSource {
    inner: Arc<dyn Blocks>,
    schema: SchemaRef,
    blocks: Vec<Block>,
}

impl OpenSource {
    pub(crate) fn new(source: &dyn Source) -> Result<Self> {
        let opened = Self::opened(source.open()?);
        match opened.blocks.last() {
            Some(last) if last.start.checked_add(last.rows).is_none_or(|end| end > MOST_ROWS) => {
                Err(Error::InvalidOption {
                    option: "the number of rows",
                    expected: format!("at most {MOST_ROWS}"),
                    got: "more".to_owned(),
                })
            }
            _ => Ok(opened),
        }
    }

    pub(crate) fn parquet_files(&self) -> Option<Vec<PathBuf>> {
        self.inner.parquet_files()
    }

    pub(crate) fn check_files(&self) -> Result<()> {
        self.inner.check_files()
    }

    pub(crate) fn empty(schema: SchemaRef) -> Self {
        Self::opened(Arc::new(MemoryBlocks::new(schema, Vec::new())))
    }

    fn opened(inner: Arc<dyn Blocks>) -> Self {
        let (schema, blocks) = (inner.schema(), Block::sequence(inner.rows()));
        Self { inner, schema, blocks }
    }

    pub(crate) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    pub(crate) fn fingerprint(&self) -> Result<String> {
        self.inner.fingerprint()
    }

    pub(crate) fn waits(&self) -> bool {
        self.inner.waits()
    }

    pub(crate) fn constants(&self) -> Option<&RecordBatch> {
        self.inner.constants()
    }

    pub(crate) fn name(&self, block: usize) -> String {
        self.inner.name(block)
    }

    /// The rows of a block, checked to be as many as were announced, of the columns announced.
    pub(crate) fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let batches = self.inner.read(block, projection)?;
        self.check(block, projection, batches, |field| field.data_type().clone())
    }

    /// The same, but for decimals that may be narrower.
    pub(crate) fn read_narrow(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let batches = self.inner.read_narrow(block, projection)?;
        self.check(block, projection, batches, |field| widened(field.data_type()))
    }

    fn check(
        &self,
        block: usize,
        projection: &[usize],
        batches: BatchIter,
        data_type: fn(&Field) -> DataType,
    ) -> Result<BatchIter> {
        let schema = Arc::new(self.schema.project(projection)?);
        let (name, expected) = (self.name(block), self.blocks[block].rows);
        let mut checked =
            Checked { batches, schema, data_type, name, expected, got: 0, ended: false };
        Ok(Box::new(std::iter::from_fn(move || checked.next())))
    }
}

/// Decimals as the widest that a Parquet file's are.
fn widened(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Decimal32(digits, scale) | DataType::Decimal64(digits, scale) => {
            DataType::Decimal128(*digits, *scale)
        }
        other => other.clone(),
    }
}

/// A block that keeps to what its source said of it. A row's position depends on it.
struct Checked {
    batches: BatchIter,
    schema: SchemaRef,
    /// As what a column's type counts.
    data_type: fn(&Field) -> DataType,
    name: String,
    expected: u64,
    got: u64,
    ended: bool,
}

impl Checked {
    fn next(&mut self) -> Option<Result<RecordBatch>> {
        if self.ended {
            return None;
        }
        let next = match self.batches.next() {
            Some(batch) => Some(batch.and_then(|batch| self.check(batch))),
            None if self.got == self.expected => None,
            None => Some(Err(self.changed())),
        };
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }

    fn check(&mut self, batch: RecordBatch) -> Result<RecordBatch> {
        let schema = batch.schema();
        let same = |(expected, got): (&FieldRef, &FieldRef)| {
            expected.name() == got.name()
                && (self.data_type)(expected) == (self.data_type)(got)
                && expected.is_nullable() == got.is_nullable()
        };
        let fields = self.schema.fields().iter().zip(schema.fields());
        if schema.fields().len() != self.schema.fields().len() || !fields.into_iter().all(same) {
            return Err(Error::SchemaDiffers {
                path: (&self.name).into(),
                expected: columns(&self.schema),
                got: columns(&schema),
            });
        }
        self.got += batch.num_rows() as u64;
        if self.got > self.expected { Err(self.changed()) } else { Ok(batch) }
    }

    fn changed(&self) -> Error {
        Error::Changed { place: self.name.clone(), expected: self.expected, got: self.got }
    }
}
