//! Rows of all blocks, parted by ranges of their keys: what sorts, shuffles and groups are made of.
//!
//! A sample of the keys says where to cut. One pass over the input routes each row to its part; a part is
//! then small enough to be put in order in memory, whenever it is read. So data of any size are written
//! once and read once. Which rows are in which part is a function of the data alone, not of how much
//! memory there is, so that every process has the same parts. Rows of the same key stay in the order
//! they had.
//!
//! As sample sort: Frazer and McKellar, *Samplesort*, JACM 1970.

use crate::error::Result;
use crate::parts::{PartsWriter, Routed, retyped};
use crate::plan::Compiled;
use crate::runtime::joined;
use crate::store::{Kept, bytes_of};
use arrow::array::{ArrayRef, RecordBatchOptions, UInt64Array, new_empty_array};
use arrow::compute::interleave_record_batch;
use arrow::datatypes::{DataType, SchemaRef};
use arrow::record_batch::RecordBatch;
use arrow::row::{OwnedRow, Row, RowConverter, Rows, SortField};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::sync::Arc;

/// About how many rows and bytes a part has.
const PART_ROWS: u64 = 32_768;
const PART_BYTES: u64 = 8 << 20;

/// Blocks of which all is read to see how much there is.
const WEIGHED_BLOCKS: usize = 4;

/// Blocks, and keys of all of them, that are looked at to see where to cut.
const SAMPLED_BLOCKS: usize = 4096;
const SAMPLED_KEYS: usize = 1 << 16;

/// What rows are ordered by.
pub(crate) trait Keys: Send + Sync {
    /// The types of the keys' columns, and which way they go.
    fn fields(&self) -> Vec<SortField>;

    /// The keys of rows.
    fn of(&self, batch: &RecordBatch) -> Result<Vec<ArrayRef>>;

    /// Whether rows of the same key must be in one part.
    fn is_kept_together(&self) -> bool {
        false
    }
}

/// What is known of the keys before all rows are read.
pub(crate) enum Sample {
    /// A plan of the same rows, with the columns that are needed for the keys.
    Keys(Compiled),
    /// They are whole numbers of 64 bits, drawn evenly; and so many rows has each block.
    Even(Vec<u64>),
}

/// Rows in parts, which are in the order of their keys; so are the rows of a part once it is read.
pub(crate) struct Parts {
    schema: SchemaRef,
    keys: Arc<dyn Keys>,
    parts: Vec<Vec<Kept>>,
    rows: Vec<u64>,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Parts({} rows each)", self.rows.len())
    }
}

impl Parts {
    /// Routes all rows of a plan. Runs on the crate's threads.
    pub(crate) async fn new(input: Compiled, sample: Sample, keys: Arc<dyn Keys>) -> Result<Self> {
        let schema = input.schema();
        let cuts = Arc::new(match sample {
            Sample::Keys(sample) => cuts(&input, sample, keys.clone()).await?,
            Sample::Even(rows) => {
                let all = rows.iter().sum();
                let rows = rows.into_iter().enumerate().collect::<Vec<_>>();
                even_cuts(keys.as_ref(), count(&input, &rows, all).await?)?
            }
        });
        let route = |block| {
            let (input, keys, cuts) = (input.clone(), keys.clone(), cuts.clone());
            tokio::spawn(async move {
                let (mut batches, mut routed, mut first) = (input.batches(block)?, Vec::new(), 0);
                while let Some(batch) = batches.try_next().await? {
                    let at = place(block) + first;
                    first += batch.num_rows() as u64;
                    let of = parts_of(&batch, at, keys.as_ref(), &cuts)?;
                    routed.push(Routed::new(&batch, &of, cuts.len() + 1)?);
                }
                Ok(routed)
            })
            .map(joined)
        };
        let mut routed = stream::iter(0..input.blocks()).map(route).buffered(input.at_once());
        let mut writer = PartsWriter::alone(cuts.len() + 1)?;
        while let Some(block) = routed.try_next().await? {
            for batch in block {
                writer.push(batch).await?;
            }
        }
        drop(routed);
        let (parts, rows) = writer.finish().await?;
        Ok(Self { schema, keys, parts, rows })
    }

    pub(crate) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Rows of each part.
    pub(crate) fn rows(&self) -> &[u64] {
        &self.rows
    }

    /// The columns at `projection` of a part, in order.
    pub(crate) fn read(&self, part: usize, projection: &[usize]) -> Result<RecordBatch> {
        let pieces = self.parts[part].iter().map(Kept::read).collect::<Result<Vec<_>>>()?;
        let converter = RowConverter::new(self.keys.fields())?;
        let mut keys = converter.empty_rows(self.rows[part] as usize, 0);
        let mut places = Vec::with_capacity(self.rows[part] as usize);
        for (at, piece) in pieces.iter().enumerate() {
            converter.append(&mut keys, &self.keys.of(piece)?)?;
            places.extend((0..piece.num_rows()).map(|row| (at, row)));
        }
        let places: Vec<_> = in_order(&keys).into_iter().map(|at| places[at as usize]).collect();
        let pieces = pieces.iter().map(|piece| piece.project(projection));
        let pieces = pieces.collect::<Result<Vec<_>, _>>()?;
        if projection.is_empty() || pieces.is_empty() {
            let schema = Arc::new(self.schema.project(projection)?);
            let rows = Some(places.len());
            let options = RecordBatchOptions::new().with_row_count(rows);
            let none = schema.fields().iter().map(|field| new_empty_array(field.data_type()));
            return Ok(RecordBatch::try_new_with_options(
                schema.clone(),
                none.collect(),
                &options,
            )?);
        }
        let pieces: Vec<_> = pieces.iter().collect();
        let rows = interleave_record_batch(&pieces, &places)?;
        retyped(&rows, &Arc::new(self.schema.project(projection)?))
    }
}

/// The rows by their keys, those of the same key as they are.
fn in_order(keys: &Rows) -> Vec<u32> {
    // Most comparisons end in the first eight bytes.
    let prefix = |row: Row<'_>| {
        let bytes = row.data();
        let mut first = [0; 8];
        let length = bytes.len().min(8);
        first[..length].copy_from_slice(&bytes[..length]);
        u64::from_be_bytes(first)
    };
    let mut all: Vec<(u64, u32)> =
        keys.iter().enumerate().map(|(at, row)| (prefix(row), at as u32)).collect();
    all.sort_unstable_by(|(one, a), (other, b)| {
        let whole = || keys.row(*a as usize).cmp(&keys.row(*b as usize));
        one.cmp(other).then_with(whole).then(a.cmp(b))
    });
    all.into_iter().map(|(_, at)| at).collect()
}

/// The keys of rows with where they are behind them, so that no two are the same: rows can be parted
/// anywhere, however often a key comes.
struct Placed {
    converter: RowConverter,
}

impl Placed {
    fn new(keys: &dyn Keys) -> Result<Self> {
        let mut fields = keys.fields();
        fields.push(SortField::new(DataType::UInt64));
        Ok(Self { converter: RowConverter::new(fields)? })
    }

    /// `first` is the place of the first of the rows.
    fn of(&self, keys: &dyn Keys, rows: &RecordBatch, first: u64) -> Result<Rows> {
        let place = |row| if keys.is_kept_together() { 0 } else { first + row };
        let places = (0..rows.num_rows() as u64).map(place).collect::<UInt64Array>();
        let mut columns = keys.of(rows)?;
        columns.push(Arc::new(places));
        Ok(self.converter.convert_columns(&columns)?)
    }
}

/// How many parts to make of `all` rows: by what some of the blocks weigh that have rows.
async fn count(input: &Compiled, rows_of: &[(usize, u64)], all: u64) -> Result<u64> {
    let filled: Vec<_> = rows_of.iter().filter(|(_, rows)| *rows > 0).collect();
    let (mut rows, mut bytes) = (0_u64, 0_u64);
    for at in spread(filled.len(), WEIGHED_BLOCKS) {
        let mut batches = input.batches(filled[at].0)?;
        while let Some(batch) = batches.try_next().await? {
            rows += batch.num_rows() as u64;
            bytes += bytes_of(&batch)? as u64;
        }
    }
    let weight = (u128::from(all) * u128::from(bytes) / u128::from(rows.max(1))) as u64;
    Ok(all.div_ceil(PART_ROWS).max(weight.div_ceil(PART_BYTES)).max(1))
}

/// What a block showed of itself.
struct Looked {
    block: usize,
    rows: u64,
    keys: Vec<OwnedRow>,
}

/// Where to cut: the first key of each part but the first.
async fn cuts(input: &Compiled, sample: Compiled, keys: Arc<dyn Keys>) -> Result<Vec<OwnedRow>> {
    let blocks = sample.blocks().min(SAMPLED_BLOCKS);
    let most = (SAMPLED_KEYS / blocks.max(1)).clamp(8, 1024);
    let look = |block| {
        let (sample, keys) = (sample.clone(), keys.clone());
        tokio::spawn(async move {
            let rows = sample.whole(block).await?;
            let all = Placed::new(keys.as_ref())?.of(keys.as_ref(), &rows, place(block))?;
            let some = spread(rows.num_rows(), most).map(|row| all.row(row).owned());
            Ok(Looked { block, rows: rows.num_rows() as u64, keys: some.collect() })
        })
        .map(joined)
    };
    let looked = stream::iter(spread(sample.blocks(), SAMPLED_BLOCKS)).map(look);
    let looked = looked.buffered(sample.at_once()).try_collect::<Vec<_>>().await?;
    let rows_of: Vec<_> = looked.iter().map(|of| (of.block, of.rows)).collect();
    let seen: u64 = looked.iter().map(|of| of.rows).sum();
    // As if all blocks were like those.
    let all = u128::from(seen) * sample.blocks() as u128 / blocks.max(1) as u128;
    let parts = count(input, &rows_of, all as u64).await?;
    Ok(quantiles(looked, parts))
}

/// Keys that part what was seen into so many parts of the same length, about.
fn quantiles(looked: Vec<Looked>, parts: u64) -> Vec<OwnedRow> {
    // A key stands for as many rows as its block has for each that was taken.
    let weighed = |of: Looked| {
        let weight = u128::from(of.rows) * 1024 / (of.keys.len() as u128).max(1);
        of.keys.into_iter().map(move |key| (key, weight))
    };
    let mut keys: Vec<(OwnedRow, u128)> = looked.into_iter().flat_map(weighed).collect();
    keys.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    let all: u128 = keys.iter().map(|(_, weight)| weight).sum();
    let (mut cuts, mut before) = (Vec::<OwnedRow>::new(), 0);
    for (key, weight) in keys {
        let wanted = (cuts.len() as u128 + 1) * all / u128::from(parts);
        let is_new = cuts.last().is_none_or(|last| *last < key);
        if cuts.len() as u64 + 1 < parts && before >= wanted && is_new {
            cuts.push(key);
        }
        before += weight;
    }
    cuts
}

/// The place of the first row of a block.
fn place(block: usize) -> u64 {
    (block as u64) << 40
}

/// The same for keys that are any whole number alike.
fn even_cuts(keys: &dyn Keys, parts: u64) -> Result<Vec<OwnedRow>> {
    let cut = |part: u64| ((u128::from(part) << 64) / u128::from(parts)) as u64;
    let firsts: ArrayRef = Arc::new((1..parts).map(cut).collect::<UInt64Array>());
    let places: ArrayRef = Arc::new((1..parts).map(|_| 0).collect::<UInt64Array>());
    let rows = Placed::new(keys)?.converter.convert_columns(&[firsts, places])?;
    Ok(rows.iter().map(|row| row.owned()).collect())
}

/// The part of each of the rows, the first of which has the place `first`.
fn parts_of(
    rows: &RecordBatch,
    first: u64,
    keys: &dyn Keys,
    cuts: &[OwnedRow],
) -> Result<Vec<u32>> {
    let placed = Placed::new(keys)?.of(keys, rows, first)?;
    let part = |row| cuts.partition_point(|cut| cut.row() <= placed.row(row)) as u32;
    Ok((0..rows.num_rows()).map(part).collect())
}

/// At most `most` of `0..all`, evenly spread.
fn spread(all: usize, most: usize) -> impl Iterator<Item = usize> {
    let count = all.min(most);
    (0..count).map(move |at| at * all / count.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::Int64Array;

    fn looked(block: usize, keys: impl Iterator<Item = i64>, rows: u64) -> Looked {
        let converter = RowConverter::new(vec![SortField::new(DataType::Int64)]).expect("rows");
        let keys: ArrayRef = Arc::new(keys.collect::<Int64Array>());
        let all = converter.convert_columns(&[keys]).expect("rows");
        Looked { block, rows, keys: all.iter().map(|row| row.owned()).collect() }
    }

    /// A long block has the cuts that its rows ask for, however few of its keys were seen.
    #[test]
    fn blocks_count_by_their_rows() {
        let small = (0..9).map(|block| looked(block, 0..10, 10));
        let blocks = small.chain([looked(9, (1..=100).map(|i| i * 1000), 10_000)]).collect();
        let cuts = quantiles(blocks, 10);
        let large = looked(0, [1000].into_iter(), 1).keys.remove(0);
        assert_eq!(cuts.len(), 9);
        assert!(cuts.iter().filter(|cut| **cut >= large).count() >= 8);
        assert!(quantiles(vec![looked(0, std::iter::repeat_n(7, 50), 50)], 10).len() <= 1);
        assert!(quantiles(Vec::new(), 10).is_empty());
    }
}
