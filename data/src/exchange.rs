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
use crate::memory::{self, Taken};
use crate::plan::Compiled;
use crate::runtime::{joined, threads};
use crate::spill::Unnamed;
use crate::store::{Kept, bytes_of, compact};
use arrow::array::{ArrayRef, RecordBatchOptions, UInt32Array, UInt64Array, new_empty_array};
use arrow::compute::{cast, concat_batches, interleave_record_batch, take_record_batch};
use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use arrow::row::{OwnedRow, Row, RowConverter, Rows, SortField};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// About how many rows and bytes a part has.
const PART_ROWS: u64 = 32_768;
const PART_BYTES: u64 = 8 << 20;

/// About how much of a part is kept at a time, and of all parts at least.
const PIECE_BYTES: usize = 128 << 10;
const LEAST_PENDING: usize = 1 << 20;

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
                    routed.push(Routed::new(&batch, at, keys.as_ref(), &cuts)?);
                }
                Ok(routed)
            })
            .map(joined)
        };
        let mut routed = stream::iter(0..input.blocks()).map(route).buffered(input.at_once());
        let mut writer = PartsWriter::new(cuts.len() + 1)?;
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

/// At most `most` of `0..all`, evenly spread.
fn spread(all: usize, most: usize) -> impl Iterator<Item = usize> {
    let count = all.min(most);
    (0..count).map(move |at| at * all / count.max(1))
}

/// With the values of dictionaries instead: a piece would have all of a dictionary for a few rows.
fn plain(rows: &RecordBatch) -> Result<RecordBatch> {
    let data_type = |of: &DataType| match of {
        DataType::Dictionary(_, values) => values.as_ref().clone(),
        other => other.clone(),
    };
    let schema = rows.schema();
    let fields = schema.fields().iter();
    let fields: Vec<_> = fields
        .map(|field| field.as_ref().clone().with_data_type(data_type(field.data_type())))
        .collect();
    retyped(rows, &Arc::new(Schema::new(fields)))
}

/// The same columns in the types of `schema`.
fn retyped(rows: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let columns = rows.columns().iter().zip(schema.fields());
    let columns = columns.map(|(column, field)| match column.data_type() == field.data_type() {
        true => Ok(column.clone()),
        false => cast(column, field.data_type()),
    });
    let columns = columns.collect::<Result<_, _>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &options)?)
}

/// Rows, one part after another.
struct Routed {
    rows: RecordBatch,
    /// The parts that have any, and which rows these are.
    parts: Vec<(usize, Range<usize>)>,
}

impl Routed {
    fn new(rows: &RecordBatch, first: u64, keys: &dyn Keys, cuts: &[OwnedRow]) -> Result<Self> {
        let placed = Placed::new(keys)?.of(keys, rows, first)?;
        let part = |row| cuts.partition_point(|cut| cut.row() <= placed.row(row)) as u32;
        let of: Vec<u32> = (0..rows.num_rows()).map(part).collect();
        let mut starts = vec![0_u32; cuts.len() + 2];
        of.iter().for_each(|part| starts[*part as usize + 1] += 1);
        (1..starts.len()).for_each(|at| starts[at] += starts[at - 1]);
        let mut next = starts.clone();
        let mut order = vec![0_u32; of.len()];
        for (row, part) in of.iter().enumerate() {
            let place = &mut next[*part as usize];
            order[*place as usize] = row as u32;
            *place += 1;
        }
        let range = |part: usize| starts[part] as usize..starts[part + 1] as usize;
        let parts = (0..=cuts.len()).map(|part| (part, range(part)));
        let parts = parts.filter(|(_, rows)| !rows.is_empty()).collect();
        // Nothing else is to be held by these while they wait for others.
        let rows = take_record_batch(&plain(rows)?, &UInt32Array::from(order))?;
        Ok(Self { rows: compact(&rows)?, parts })
    }
}

/// Collects the rows of parts, and keeps them a generation at a time.
struct PartsWriter {
    /// What is not kept yet.
    pending: Vec<RecordBatch>,
    /// Which rows of which of these are those of a part.
    places: Vec<Vec<(usize, Range<usize>)>>,
    pending_bytes: usize,
    /// Bytes of a generation.
    most: usize,
    _memory: Taken,
    parts: Vec<Vec<Kept>>,
    rows: Vec<u64>,
    file: Arc<OnceLock<Unnamed>>,
}

impl PartsWriter {
    fn new(parts: usize) -> Result<Self> {
        let quarter = (memory::budget()? / 4).max(LEAST_PENDING);
        let most = (parts * PIECE_BYTES).clamp(LEAST_PENDING, quarter);
        Ok(Self {
            pending: Vec::new(),
            places: vec![Vec::new(); parts],
            pending_bytes: 0,
            most,
            _memory: memory::take(most)?,
            parts: (0..parts).map(|_| Vec::new()).collect(),
            rows: vec![0; parts],
            file: Arc::default(),
        })
    }

    async fn push(&mut self, routed: Routed) -> Result<()> {
        for (part, rows) in routed.parts {
            self.rows[part] += rows.len() as u64;
            self.places[part].push((self.pending.len(), rows));
            self.pending_bytes += size_of::<(usize, Range<usize>)>();
        }
        self.pending_bytes += bytes_of(&routed.rows)?;
        self.pending.push(routed.rows);
        if self.pending_bytes >= self.most { self.keep().await } else { Ok(()) }
    }

    /// Keeps all that is pending, a piece for each part.
    async fn keep(&mut self) -> Result<()> {
        let pending = Arc::new(std::mem::take(&mut self.pending));
        let places = std::mem::replace(&mut self.places, vec![Vec::new(); self.parts.len()]);
        let filled = places.into_iter().enumerate().filter(|(_, places)| !places.is_empty());
        let keep = |(part, places): (usize, Vec<(usize, Range<usize>)>)| {
            let (pending, file) = (pending.clone(), self.file.clone());
            let keep = async move {
                let slice = |(at, rows): (usize, Range<usize>)| {
                    let batch: &RecordBatch = &pending[at];
                    batch.slice(rows.start, rows.len())
                };
                let slices: Vec<_> = places.into_iter().map(slice).collect();
                let piece = concat_batches(&slices[0].schema(), &slices)?;
                Ok((part, Kept::keep(piece, &file)?))
            };
            tokio::spawn(keep).map(joined)
        };
        let kept = stream::iter(filled).map(keep).buffered(threads());
        for (part, piece) in kept.try_collect::<Vec<_>>().await? {
            self.parts[part].push(piece);
        }
        self.pending_bytes = 0;
        Ok(())
    }

    async fn finish(mut self) -> Result<(Vec<Vec<Kept>>, Vec<u64>)> {
        self.keep().await?;
        Ok((self.parts, self.rows))
    }
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
