//! Rows that are routed to parts, and kept a piece at a time.

use crate::error::Result;
use crate::memory::{self, Taken};
use crate::runtime::{joined, threads};
use crate::spill::Unnamed;
use crate::store::{Kept, bytes_of, compact};
use arrow::array::{Array, AsArray, RecordBatchOptions, UInt32Array};
use arrow::buffer::Buffer;
use arrow::compute::{cast, concat_batches, take_record_batch};
use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// About how much of a part is kept at a time, and of all parts at least.
const PIECE_BYTES: usize = 128 << 10;
const LEAST_PENDING: usize = 1 << 20;

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
pub(crate) fn retyped(rows: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
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
pub(crate) struct Routed {
    rows: RecordBatch,
    /// The parts that have any, and which rows these are.
    parts: Vec<(usize, Range<usize>)>,
}

impl Routed {
    /// Row `i` of `rows` goes to part `of[i]` of so many.
    pub(crate) fn new(rows: &RecordBatch, of: &[u32], parts: usize) -> Result<Self> {
        let mut starts = vec![0_u32; parts + 1];
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
        let parts = (0..parts).map(|part| (part, range(part)));
        let parts = parts.filter(|(_, rows)| !rows.is_empty()).collect();
        let rows = take_record_batch(&plain(rows)?, &UInt32Array::from(order))?;
        // Not much else is to be held by these while they wait for others.
        let rows = if holds_more(&rows) { compact(&rows)? } else { rows };
        Ok(Self { rows, parts })
    }
}

/// Whether text that is views holds twice what it views, or more.
fn holds_more(rows: &RecordBatch) -> bool {
    let is_sparse = |used: usize, buffers: &[Buffer]| {
        buffers.iter().map(Buffer::len).sum::<usize>() >= 2 * used.max(1)
    };
    rows.columns().iter().any(|column| match column.data_type() {
        DataType::Utf8View => {
            let text = column.as_string_view();
            is_sparse(text.total_buffer_bytes_used(), text.data_buffers())
        }
        DataType::BinaryView => {
            let bytes = column.as_binary_view();
            is_sparse(bytes.total_buffer_bytes_used(), bytes.data_buffers())
        }
        _ => false,
    })
}

/// Collects the rows of parts, and keeps them a generation at a time.
pub(crate) struct PartsWriter {
    /// What is not kept yet.
    pending: Vec<RecordBatch>,
    /// Which rows of which of these are those of a part.
    places: Vec<Vec<(usize, Range<usize>)>>,
    pending_bytes: usize,
    /// Bytes of a generation.
    most: usize,
    /// Parts that are kept at the same time.
    at_once: usize,
    _memory: Taken,
    parts: Vec<Vec<Kept>>,
    rows: Vec<u64>,
    file: Arc<OnceLock<Unnamed>>,
}

impl PartsWriter {
    /// The only one of all rows: it works on all processors, and has a quarter of the budget at most.
    pub(crate) fn alone(parts: usize) -> Result<Self> {
        let quarter = (memory::budget()? / 4).max(LEAST_PENDING);
        Self::new(parts, (parts * PIECE_BYTES).clamp(LEAST_PENDING, quarter), threads())
    }

    /// One of several at the same time. Where its pieces end is a function of the rows alone.
    pub(crate) fn beside_others(parts: usize) -> Result<Self> {
        Self::new(parts, (parts * PIECE_BYTES).max(LEAST_PENDING), 1)
    }

    fn new(parts: usize, most: usize, at_once: usize) -> Result<Self> {
        Ok(Self {
            pending: Vec::new(),
            places: vec![Vec::new(); parts],
            pending_bytes: 0,
            most,
            at_once,
            _memory: memory::take(most)?,
            parts: (0..parts).map(|_| Vec::new()).collect(),
            rows: vec![0; parts],
            file: Arc::default(),
        })
    }

    pub(crate) async fn push(&mut self, routed: Routed) -> Result<()> {
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
        let keep = |places: Vec<(usize, Range<usize>)>| {
            let (pending, file) = (pending.clone(), self.file.clone());
            move || keep_piece(&pending, places, &file)
        };
        if self.at_once == 1 {
            for (part, places) in filled {
                self.parts[part].push(keep(places)()?);
            }
        } else {
            let keep = |(part, places)| {
                let keep = keep(places);
                tokio::spawn(async move { Ok((part, keep()?)) }).map(joined)
            };
            let kept = stream::iter(filled).map(keep).buffered(self.at_once);
            for (part, piece) in kept.try_collect::<Vec<_>>().await? {
                self.parts[part].push(piece);
            }
        }
        self.pending_bytes = 0;
        Ok(())
    }

    /// The pieces of each part and how many rows they have.
    pub(crate) async fn finish(mut self) -> Result<(Vec<Vec<Kept>>, Vec<u64>)> {
        self.keep().await?;
        Ok((self.parts, self.rows))
    }
}

/// Rows of batches, as one piece.
fn keep_piece(
    batches: &[RecordBatch],
    places: Vec<(usize, Range<usize>)>,
    file: &OnceLock<Unnamed>,
) -> Result<Kept> {
    let slice = |(at, rows): (usize, Range<usize>)| batches[at].slice(rows.start, rows.len());
    let slices: Vec<_> = places.into_iter().map(slice).collect();
    Kept::keep(concat_batches(&slices[0].schema(), &slices)?, file)
}
