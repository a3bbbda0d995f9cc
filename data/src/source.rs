//! Where rows come from: descriptions that travel, and what they become once opened.
//!
//! An opened source is a list of blocks with known row counts; a row's position in the source is
//! what splits and shuffles are functions of.

pub(crate) mod avro;
pub(crate) mod csv;
pub(crate) mod file;
pub(crate) mod idx;
pub(crate) mod ipc;
pub(crate) mod json;
pub(crate) mod memory;
pub(crate) mod npy;
mod opened;
pub(crate) mod parquet;
pub(crate) mod partitioned;
pub(crate) mod paths;
pub(crate) mod query;
pub(crate) mod range;
mod records;
pub(crate) mod slice;
pub(crate) mod sorted;
pub(crate) mod text;
pub(crate) mod tfrecord;
pub(crate) mod union;
pub(crate) mod webdataset;
pub(crate) mod whole;

pub(crate) use opened::{Block, OpenSource};

use crate::Dataset;
use crate::error::Result;
use crate::persist::BlockRef;
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

/// The description of where rows come from, which goes to the worker processes: what a
/// [`Dataset`](crate::Dataset) is made of.
///
/// Implement it, and [`Blocks`], for data that Mobula does not read itself. The attribute
/// registers the type by its name, so that a worker process, which is the same program, finds it.
/// Paths should be absolute: a worker may run in another folder.
///
/// ```
/// use arrow::array::{ArrayRef, UInt32Array};
/// use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
/// use arrow::record_batch::RecordBatch;
/// use mobula_data::{BatchIter, Blocks, Dataset, Result, Source, typetag};
/// use serde::{Deserialize, Serialize};
/// use std::sync::Arc;
///
/// /// The squares of 0, 1, 2, …
/// #[derive(Debug, Serialize, Deserialize)]
/// struct Squares {
///     blocks: u32,
/// }
///
/// #[typetag::serde]
/// impl Source for Squares {
///     fn open(&self) -> Result<Arc<dyn Blocks>> {
///         let schema = Schema::new(vec![Field::new("square", DataType::UInt32, false)]);
///         Ok(Arc::new(OpenSquares { schema: Arc::new(schema), blocks: self.blocks }))
///     }
/// }
///
/// #[derive(Debug)]
/// struct OpenSquares {
///     schema: SchemaRef,
///     blocks: u32,
/// }
///
/// impl Blocks for OpenSquares {
///     fn schema(&self) -> SchemaRef {
///         self.schema.clone()
///     }
///
///     fn rows(&self) -> Vec<u64> {
///         vec![100; self.blocks as usize]
///     }
///
///     fn fingerprint(&self) -> Result<String> {
///         Ok(format!("squares-{}", self.blocks))
///     }
///
///     fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
///         let start = block as u32 * 100;
///         let squares: ArrayRef = Arc::new((start..start + 100).map(|i| Some(i * i)).collect::<UInt32Array>());
///         let batch = RecordBatch::try_new(self.schema.clone(), vec![squares])?.project(projection)?;
///         Ok(Box::new(std::iter::once(Ok(batch))))
///     }
/// }
///
/// let squares = Dataset::from_source(Squares { blocks: 3 })?;
/// assert_eq!(squares.filter("square % 2 = 1")?.count()?, 150);
/// # Ok::<(), mobula_data::Error>(())
/// ```
#[typetag::serde]
pub trait Source: Debug + Send + Sync {
    /// Finds out the columns and the blocks. Called once in every process that reads rows.
    fn open(&self) -> Result<Arc<dyn Blocks>>;

    /// What [`Dataset::explain`](crate::Dataset::explain) says of it beside its name. Default:
    /// nothing.
    fn summary(&self) -> String {
        String::new()
    }

    /// The datasets that it is made of, with names for them. Default: none.
    fn inputs(&self) -> Vec<(String, &Dataset)> {
        Vec::new()
    }

    /// The engine's plans, if it runs a query.
    #[doc(hidden)]
    fn plans(&self) -> Result<Option<String>> {
        Ok(None)
    }

    /// The blocks of a dataset that was persisted.
    #[doc(hidden)]
    fn block_refs(&self) -> Option<&[BlockRef]> {
        None
    }
}

/// An opened [`Source`]: rows of known columns, in blocks of known length that can be read alone,
/// in any order, by several threads, and again.
pub trait Blocks: Debug + Send + Sync {
    /// Names and types of the columns.
    fn schema(&self) -> SchemaRef;

    /// How many rows each block has. A shuffle mixes whole blocks and keeps some in memory, so
    /// some thousand rows are a good length.
    fn rows(&self) -> Vec<u64>;

    /// Changes when the rows do, and is the same in every process: a stream that is resumed on
    /// other data is refused.
    fn fingerprint(&self) -> Result<String>;

    /// The files, if they are Parquet, of which the engine can read what a query needs.
    #[doc(hidden)]
    fn parquet_files(&self) -> Option<Vec<PathBuf>> {
        None
    }

    /// An error if one of these is another than that which was opened.
    #[doc(hidden)]
    fn check_files(&self) -> Result<()> {
        Ok(())
    }

    /// How messages call a block.
    fn name(&self, block: usize) -> String {
        format!("block {block}")
    }

    /// Whether most of the time that a block takes is spent waiting, such as for a network: more are
    /// then read at the same time than there are processors. Default: no.
    fn waits(&self) -> bool {
        false
    }

    /// The rows of a block, always in the same order, with the columns at `projection`, in that
    /// order. An empty projection gives batches that have rows and no columns.
    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter>;

    /// The same for who takes numbers of any width: decimals may come in the narrowest type that
    /// holds their digits. Default: what [`read`](Self::read) gives.
    fn read_narrow(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        self.read(block, projection)
    }

    /// Columns that have one value in all rows of a block, a row a block: filters on these leave out
    /// whole blocks.
    #[doc(hidden)]
    fn constants(&self) -> Option<&RecordBatch> {
        None
    }

    /// Which of the source's files has the block.
    #[doc(hidden)]
    fn file(&self, _block: usize) -> Option<usize> {
        None
    }
}

/// The rows of a block.
pub type BatchIter = Box<dyn Iterator<Item = Result<RecordBatch>> + Send>;

/// "name: type, name: type" for messages.
pub(crate) fn columns(schema: &SchemaRef) -> String {
    let text: Vec<_> =
        schema.fields().iter().map(|f| format!("{}: {}", f.name(), f.data_type())).collect();
    text.join(", ")
}

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
