//! Whole numbers, counted up.

use super::{BatchIter, Blocks, Source};
use crate::error::{Error, Result};
use arrow::array::Int64Array;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const BLOCK_ROWS: u64 = 4096;

/// 2^32: a list of its blocks still has its place in memory.
const MOST_ROWS: u64 = 1 << 32;

/// The numbers from 0 up to `rows` in the column `id`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Range {
    pub(crate) rows: u64,
}

#[typetag::serde(name = "range")]
impl Source for Range {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        if self.rows > MOST_ROWS {
            return Err(Error::InvalidOption {
                option: "the number of rows of a range",
                expected: format!("at most {MOST_ROWS}"),
                got: self.rows.to_string(),
            });
        }
        let schema = Arc::new(Schema::new(vec![Field::new("id", DataType::Int64, false)]));
        Ok(Arc::new(RangeBlocks { schema, rows: self.rows }))
    }
}

#[derive(Debug)]
struct RangeBlocks {
    schema: SchemaRef,
    rows: u64,
}

impl Blocks for RangeBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        let starts = (0..self.rows).step_by(BLOCK_ROWS as usize);
        starts.map(|start| BLOCK_ROWS.min(self.rows - start)).collect()
    }

    fn fingerprint(&self) -> Result<String> {
        Ok(format!("range-{}", self.rows))
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let start = block as u64 * BLOCK_ROWS;
        let ids = start as i64..(start + BLOCK_ROWS).min(self.rows) as i64;
        let ids = Arc::new(Int64Array::from_iter_values(ids));
        let batch = RecordBatch::try_new(self.schema.clone(), vec![ids])?.project(projection)?;
        Ok(Box::new(std::iter::once(Ok(batch))))
    }
}
