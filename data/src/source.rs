//! Where rows come from: descriptions that travel, and what they become once opened.
//!
//! An opened source is a list of blocks with known row counts; a row's position in the source is
//! what splits and shuffles are functions of.

pub(crate) mod csv;
pub(crate) mod idx;
pub(crate) mod memory;
pub(crate) mod parquet;
pub(crate) mod paths;

use crate::Dataset;
use crate::error::Result;
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use memory::{MemorySource, MemoryTable};
use parquet::ParquetSource;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

/// The description of a source. Paths are absolute, so that every worker means the same files.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Source {
    Parquet {
        files: Vec<PathBuf>,
    },
    Csv {
        files: Vec<PathBuf>,
        options: csv::CsvOptions,
    },
    Idx {
        images: PathBuf,
        labels: PathBuf,
    },
    Memory(MemoryTable),
    /// The result of a query over another dataset, computed where it is opened.
    Query {
        input: Box<Dataset>,
        query: String,
    },
}

impl Source {
    pub(crate) fn open(&self) -> Result<OpenSource> {
        let memory = match self {
            Self::Parquet { files } => return ParquetSource::open(files).map(OpenSource::Parquet),
            Self::Csv { files, options } => csv::read(files, options)?,
            Self::Idx { images, labels } => idx::read(images, labels)?,
            Self::Memory(table) => table.open()?,
            Self::Query { input, query } => crate::plan::run_query(input, query)?,
        };
        Ok(OpenSource::Memory(memory))
    }
}

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
        let mut start = 0;
        let next = |rows| {
            start += rows;
            Self { start: start - rows, rows }
        };
        rows.into_iter().map(next).collect()
    }
}

/// A source whose schema and blocks are known.
#[derive(Debug)]
pub(crate) enum OpenSource {
    Parquet(ParquetSource),
    Memory(MemorySource),
}

impl OpenSource {
    pub(crate) fn empty(schema: SchemaRef) -> Self {
        Self::Memory(MemorySource::new(schema, Vec::new()))
    }

    pub(crate) fn schema(&self) -> &SchemaRef {
        match self {
            Self::Parquet(source) => source.schema(),
            Self::Memory(source) => source.schema(),
        }
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        match self {
            Self::Parquet(source) => source.blocks(),
            Self::Memory(source) => source.blocks(),
        }
    }

    /// Changes when the content does; the same wherever the files lie.
    pub(crate) fn fingerprint(&self) -> Result<String> {
        match self {
            Self::Parquet(source) => Ok(source.fingerprint().to_owned()),
            Self::Memory(source) => source.fingerprint(),
        }
    }

    /// How messages call a block.
    pub(crate) fn name(&self, block: usize) -> String {
        match self {
            Self::Parquet(source) => source.name(block),
            Self::Memory(source) => source.name(block),
        }
    }

    /// The rows of a block, in order, with the columns at `projection`.
    pub(crate) fn read(self: &Arc<Self>, block: usize, projection: &[usize]) -> Result<BatchIter> {
        match &**self {
            Self::Parquet(source) => source.read(block, projection),
            Self::Memory(source) => source.read(block, projection),
        }
    }
}

pub(crate) type BatchIter = Box<dyn Iterator<Item = Result<RecordBatch>> + Send>;

/// FNV-1a over the parts, as 16 hex digits: tells data apart, guards against no adversary.
pub(crate) fn hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for byte in part.iter().chain(&(part.len() as u64).to_le_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}
