//! A range of the rows of a dataset, or datasets side by side: rows found by their position.

use super::union::{Input, relabelled};
use super::{BatchIter, Blocks, Source, hash};
use crate::Dataset;
use crate::error::{Error, Result};
use arrow::array::RecordBatchOptions;
use arrow::compute::concat_batches;
use arrow::datatypes::{Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// Some of the rows of a dataset, in blocks of other bounds if wanted.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Slice {
    pub(crate) input: Dataset,
    pub(crate) part: Part,
    /// Rows of a block; those of the input unless given.
    pub(crate) block_rows: Option<u64>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Part {
    /// From a row on, so many.
    Rows { start: u64, rows: u64 },
    /// One of so many pieces, whose lengths differ by one at most.
    Piece { piece: u64, of: u64 },
}

impl Part {
    /// Where the last of its rows is at most.
    fn last(self) -> u64 {
        match self {
            Self::Rows { start, rows } => start.saturating_add(rows),
            Self::Piece { .. } => u64::MAX,
        }
    }

    fn range(self, all: u64) -> Range<u64> {
        match self {
            Self::Rows { start, rows } => start.min(all)..start.saturating_add(rows).min(all),
            Self::Piece { piece, of } => {
                let bound =
                    |piece: u64| (u128::from(all) * u128::from(piece) / u128::from(of)) as u64;
                bound(piece)..bound(piece + 1)
            }
        }
    }
}

#[typetag::serde(name = "slice")]
impl Source for Slice {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let rows = Rows::open(&self.input, self.part.last())?;
        let range = self.part.range(rows.all());
        let ranges = match self.block_rows {
            Some(length) => cut(&range, length),
            None => rows.overlapping(&range).map(|(_, rows)| rows).collect(),
        };
        Ok(Arc::new(SliceBlocks { rows, ranges }))
    }

    fn summary(&self) -> String {
        let part = match self.part {
            Part::Rows { start, rows: u64::MAX } => format!("from row {start}"),
            Part::Rows { start, rows } => format!("{rows} rows from row {start}"),
            Part::Piece { piece, of } => format!("piece {} of {of}", piece + 1),
        };
        let blocks = self.block_rows.map(|rows| format!(", in blocks of {rows}"));
        part + &blocks.unwrap_or_default()
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        vec![("input".to_owned(), &self.input)]
    }
}

fn cut(range: &Range<u64>, length: u64) -> Vec<Range<u64>> {
    let step = usize::try_from(length).unwrap_or(usize::MAX);
    let starts = range.clone().step_by(step);
    starts.map(|start| start..start.saturating_add(length).min(range.end)).collect()
}

/// A dataset whose rows are found by their position.
#[derive(Debug)]
struct Rows {
    input: Input,
    /// Where each block starts, and where the last ends.
    bounds: Vec<u64>,
}

impl Rows {
    /// No row behind the first `most` will be read.
    fn open(dataset: &Dataset, most: u64) -> Result<Self> {
        let input = Input::open_until(dataset, most)?;
        let mut bounds = vec![0];
        for rows in &input.rows {
            bounds.push(bounds.last().unwrap_or(&0) + rows);
        }
        Ok(Self { input, bounds })
    }

    fn all(&self) -> u64 {
        self.bounds.last().copied().unwrap_or(0)
    }

    /// The blocks with rows in `range`, and which rows these are.
    fn overlapping(&self, range: &Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> {
        let first = self.bounds.partition_point(|bound| *bound <= range.start).saturating_sub(1);
        let Range { start, end } = *range;
        let blocks = (first..self.input.rows.len()).map(move |block| {
            (block, self.bounds[block].max(start)..self.bounds[block + 1].min(end))
        });
        blocks.take_while(move |(_, rows)| rows.start < end).filter(|(_, rows)| !rows.is_empty())
    }

    fn read(&self, range: &Range<u64>, projection: &[usize]) -> Result<Vec<RecordBatch>> {
        let mut all = Vec::new();
        for (block, rows) in self.overlapping(range) {
            let mut start = self.bounds[block];
            for batch in self.input.read(block, projection)? {
                let end = start + batch.num_rows() as u64;
                let (from, to) = (rows.start.max(start), rows.end.min(end));
                if from < to {
                    all.push(batch.slice((from - start) as usize, (to - from) as usize));
                }
                start = end;
            }
        }
        Ok(all)
    }
}

#[derive(Debug)]
struct SliceBlocks {
    rows: Rows,
    /// The rows of each block.
    ranges: Vec<Range<u64>>,
}

impl Blocks for SliceBlocks {
    fn schema(&self) -> SchemaRef {
        self.rows.input.schema().clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.ranges.iter().map(|range| range.end - range.start).collect()
    }

    fn fingerprint(&self) -> Result<String> {
        let bounds = self.ranges.iter().flat_map(|range| [range.start, range.end]);
        let bounds: Vec<u8> = bounds.flat_map(u64::to_le_bytes).collect();
        Ok(hash([self.rows.input.fingerprint().as_bytes(), &bounds]))
    }

    fn name(&self, block: usize) -> String {
        let Range { start, end } = &self.ranges[block];
        format!("rows {start} to {}", end.saturating_sub(1))
    }

    fn waits(&self) -> bool {
        self.rows.input.waits()
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let batches = self.rows.read(&self.ranges[block], projection)?;
        relabelled(batches, &self.schema(), projection)
    }
}

/// The columns of two datasets, row by row.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Zip {
    pub(crate) left: Dataset,
    pub(crate) right: Dataset,
}

#[typetag::serde(name = "zip")]
impl Source for Zip {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let (left, right) = (Rows::open(&self.left, u64::MAX)?, Rows::open(&self.right, u64::MAX)?);
        if left.all() != right.all() {
            return Err(Error::InvalidOption {
                option: "the number of rows of the right side of a zip",
                expected: format!("{}, as the left side has", left.all()),
                got: right.all().to_string(),
            });
        }
        let schema = zipped(left.input.schema(), right.input.schema())?;
        Ok(Arc::new(ZipBlocks { schema, left, right }))
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        [("left", &self.left), ("right", &self.right)].map(|(n, d)| (n.to_owned(), d)).into()
    }
}

/// The columns of both sides.
pub(crate) fn zipped(left: &SchemaRef, right: &SchemaRef) -> Result<SchemaRef> {
    if let Some(twice) = right.fields().iter().find(|f| left.field_with_name(f.name()).is_ok()) {
        return Err(Error::ColumnTwice { column: twice.name().clone() });
    }
    let fields: Vec<_> = left.fields().iter().chain(right.fields()).cloned().collect();
    Ok(Arc::new(Schema::new(fields)))
}

#[derive(Debug)]
struct ZipBlocks {
    schema: SchemaRef,
    left: Rows,
    right: Rows,
}

impl Blocks for ZipBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.left.input.rows.clone()
    }

    fn fingerprint(&self) -> Result<String> {
        Ok(hash([&self.left, &self.right].map(|side| side.input.fingerprint().as_bytes())))
    }

    fn name(&self, block: usize) -> String {
        self.left.input.name(block).unwrap_or_else(|_| format!("block {block}"))
    }

    fn waits(&self) -> bool {
        self.left.input.waits() || self.right.input.waits()
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let rows = self.left.bounds[block]..self.left.bounds[block + 1];
        let middle = self.left.input.schema().fields().len();
        let (left, right): (Vec<_>, Vec<_>) = projection.iter().partition(|at| **at < middle);
        let right: Vec<_> = right.into_iter().map(|at| at - middle).collect();
        let side = |side: &Rows, projection: &[usize]| {
            let schema = Arc::new(side.input.schema().project(projection)?);
            let rows = concat_batches(&schema, &side.read(&rows, projection)?)?;
            Ok::<_, Error>(rows.columns().to_vec())
        };
        let (left, right) = (side(&self.left, &left)?, side(&self.right, &right)?);
        // In the order asked for.
        let (mut left, mut right) = (left.into_iter(), right.into_iter());
        let columns = projection.iter().filter_map(|at| match *at < middle {
            true => left.next(),
            false => right.next(),
        });
        let schema = Arc::new(self.schema.project(projection)?);
        let count = Some((rows.end - rows.start) as usize);
        let options = RecordBatchOptions::new().with_row_count(count);
        let batch = RecordBatch::try_new_with_options(schema, columns.collect(), &options)?;
        Ok(Box::new(std::iter::once(Ok(batch))))
    }
}
