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
use crate::memory;
use crate::plan::Compiled;
use crate::runtime::{joined, threads};
use crate::spill::Unnamed;
use crate::store::{Kept, bytes_of, compact};
use arrow::array::{ArrayRef, RecordBatchOptions, UInt32Array, UInt64Array, new_empty_array};
use arrow::compute::{concat_batches, interleave_record_batch, take_record_batch};
use arrow::datatypes::{DataType, SchemaRef};
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

/// Blocks, and keys of each, that are looked at to see where to cut.
const SAMPLED_BLOCKS: usize = 256;
const SAMPLED_KEYS: usize = 256;

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
    /// Routes all rows of a plan. `sample` has the same rows, and of the columns those that are needed
    /// for the keys; without it these are whole numbers of 64 bits, drawn evenly. Runs on the crate's
    /// threads.
    pub(crate) async fn new(
        input: Compiled,
        sample: Option<Compiled>,
        keys: Arc<dyn Keys>,
    ) -> Result<Self> {
        let schema = input.schema();
        let count = count(&input).await?;
        let cuts = match sample {
            Some(sample) => cuts(sample, keys.clone(), count).await?,
            None => even_cuts(keys.as_ref(), count)?,
        };
        let cuts = Arc::new(cuts);
        let route = |block| {
            let (input, keys, cuts) = (input.clone(), keys.clone(), cuts.clone());
            tokio::spawn(async move {
                let (mut batches, mut routed, mut first) = (input.batches(block)?, Vec::new(), 0);
                while let Some(batch) = batches.try_next().await? {
                    let place = (block as u64) << 32 | first;
                    first += batch.num_rows() as u64;
                    routed.push(Routed::new(&batch, place, keys.as_ref(), &cuts)?);
                }
                Ok(routed)
            })
            .map(joined)
        };
        let mut routed = stream::iter(0..input.blocks()).map(route).buffered(threads());
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
        Ok(interleave_record_batch(&pieces, &places)?)
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

/// How many parts to make, by some blocks.
async fn count(input: &Compiled) -> Result<u64> {
    let (mut looked, mut rows, mut bytes) = (0_u64, 0_u64, 0_u64);
    for block in spread(input.blocks(), WEIGHED_BLOCKS) {
        let mut batches = input.batches(block)?;
        while let Some(batch) = batches.try_next().await? {
            rows += batch.num_rows() as u64;
            bytes += bytes_of(&batch)? as u64;
        }
        looked += 1;
    }
    // As if all blocks were like those.
    let blocks = input.blocks() as u128;
    let whole = |of: u64| (u128::from(of) * blocks / u128::from(looked.max(1))) as u64;
    Ok(whole(rows).div_ceil(PART_ROWS).max(whole(bytes).div_ceil(PART_BYTES)).max(1))
}

/// Where to cut: the first key of each part but the first.
async fn cuts(sample: Compiled, keys: Arc<dyn Keys>, parts: u64) -> Result<Vec<OwnedRow>> {
    if parts == 1 {
        return Ok(Vec::new());
    }
    let look = |block| {
        let (sample, keys) = (sample.clone(), keys.clone());
        tokio::spawn(async move {
            let rows = concat_batches(&sample.schema(), &sample.execute(block).await?)?;
            let all = Placed::new(keys.as_ref())?.of(keys.as_ref(), &rows, (block as u64) << 32)?;
            let some = spread(rows.num_rows(), SAMPLED_KEYS).map(|row| all.row(row).owned());
            Ok(some.collect::<Vec<_>>())
        })
        .map(joined)
    };
    let blocks = stream::iter(spread(sample.blocks(), SAMPLED_BLOCKS)).map(look);
    let mut found = blocks.buffered(threads()).try_concat().await?;
    found.sort_unstable();
    let count = found.len() as u128;
    let at = (1..u128::from(parts)).map(|part| (part * count / u128::from(parts)) as usize);
    let mut cuts: Vec<OwnedRow> = at.filter_map(|at| found.get(at).cloned()).collect();
    cuts.dedup();
    Ok(cuts)
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
        let rows = compact(&take_record_batch(rows, &UInt32Array::from(order))?)?;
        Ok(Self { rows, parts })
    }
}

/// Collects the rows of parts, and keeps them a generation at a time.
struct PartsWriter {
    pending: Vec<Vec<RecordBatch>>,
    pending_bytes: usize,
    /// Bytes of a generation.
    most: usize,
    parts: Vec<Vec<Kept>>,
    rows: Vec<u64>,
    file: Arc<OnceLock<Unnamed>>,
}

impl PartsWriter {
    fn new(parts: usize) -> Result<Self> {
        Ok(Self {
            pending: vec![Vec::new(); parts],
            pending_bytes: 0,
            most: (parts * PIECE_BYTES)
                .clamp(LEAST_PENDING, (memory::budget()? / 4).max(LEAST_PENDING)),
            parts: (0..parts).map(|_| Vec::new()).collect(),
            rows: vec![0; parts],
            file: Arc::default(),
        })
    }

    async fn push(&mut self, routed: Routed) -> Result<()> {
        for (part, rows) in routed.parts {
            self.rows[part] += rows.len() as u64;
            self.pending[part].push(routed.rows.slice(rows.start, rows.len()));
        }
        self.pending_bytes += bytes_of(&routed.rows)?;
        if self.pending_bytes >= self.most { self.keep().await } else { Ok(()) }
    }

    /// Keeps all that is pending: a slice holds the whole block that it is one of.
    async fn keep(&mut self) -> Result<()> {
        let pending = std::mem::replace(&mut self.pending, vec![Vec::new(); self.parts.len()]);
        let pending = pending.into_iter().enumerate().filter(|(_, slices)| !slices.is_empty());
        let keep = |(part, slices): (usize, Vec<RecordBatch>)| {
            let file = self.file.clone();
            let keep = async move {
                let piece = concat_batches(&slices[0].schema(), &slices)?;
                Ok((part, Kept::keep(piece, &file)?))
            };
            tokio::spawn(keep).map(joined)
        };
        let kept = stream::iter(pending).map(keep).buffered(threads());
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
