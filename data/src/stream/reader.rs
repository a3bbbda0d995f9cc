//! The stream of one rank: the order's rows, out of a few decoded blocks, as tensors.

use super::TensorSource;
use super::columns::{Column, ColumnSpec};
use super::order::{EpochOrder, GROUP_BLOCKS, RowAt, VERSION};
use crate::error::{Error, Result};
use crate::plan::Compiled;
use crate::runtime::block_on;
use arrow::compute::concat_batches;
use mobula_core::{Batch, BatchStream, Shard, StreamState};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

/// A rank's place in a [`TensorSource`].
pub(super) struct Reader {
    source: TensorSource,
    shard: Shard,
    blocks: Blocks,
    order: EpochOrder,
    epoch: u64,
    /// Steps consumed in the epoch.
    step: u64,
}

impl Reader {
    pub(super) fn new(source: &TensorSource, shard: Shard) -> Result<Self> {
        let lanes = (shard.rank..source.shape.lanes).step_by(shard.world).len();
        let blocks = Blocks {
            compiled: source.dataset.compile()?,
            columns: source.columns.clone(),
            rows: source.rows.clone(),
            decoded: HashMap::new(),
            capacity: lanes * (GROUP_BLOCKS + 1),
            clock: 0,
        };
        let order = order(source, 0);
        Ok(Self { source: source.clone(), shard, blocks, order, epoch: 0, step: 0 })
    }

    fn batch(&mut self) -> Result<Batch> {
        let lanes = (self.shard.rank..self.source.shape.lanes).step_by(self.shard.world);
        let rows = self.order.step(self.step, lanes);
        let blocks = self.blocks.of(&rows)?;
        let tensors = self
            .source
            .columns
            .iter()
            .enumerate()
            .map(|(i, spec)| {
                let sources = rows.iter().map(|at| (&blocks[&at.block].0[i], at.row));
                Ok((spec.name().to_owned(), spec.gather(rows.len(), sources)?))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Batch::new(tensors)?.with_global_rows(self.order.step_rows(self.step)))
    }
}

impl BatchStream for Reader {
    fn next_batch(&mut self) -> Result<Option<Batch>, mobula_core::Error> {
        if self.step == self.steps_per_epoch() {
            (self.epoch, self.step) = (self.epoch + 1, 0);
            self.order = order(&self.source, self.epoch);
            return Ok(None);
        }
        let batch = self.batch()?;
        self.step += 1;
        Ok(Some(batch))
    }

    fn state(&self) -> StreamState {
        StreamState {
            manifest: self.source.manifest.clone(),
            version: VERSION,
            seed: self.source.shuffle.unwrap_or(0),
            epoch: self.epoch,
            step: self.step,
        }
    }

    fn restore(&mut self, state: &StreamState) -> Result<(), mobula_core::Error> {
        let own = self.state();
        same("order's version", &own.version, &state.version)?;
        same("seed", &own.seed, &state.seed)?;
        same("manifest (data, operations, columns, batch size)", &own.manifest, &state.manifest)?;
        if state.step > self.steps_per_epoch() {
            let steps = format!("at most {}", self.steps_per_epoch());
            return Err(mismatch("step", steps, state.step.to_string()));
        }
        (self.epoch, self.step) = (state.epoch, state.step);
        self.order = order(&self.source, self.epoch);
        Ok(())
    }

    fn steps_per_epoch(&self) -> u64 {
        self.source.steps_per_epoch()
    }
}

fn order(source: &TensorSource, epoch: u64) -> EpochOrder {
    EpochOrder::new(&source.rows, source.shape, source.shuffle, epoch)
}

fn same<T>(what: &'static str, own: &T, state: &T) -> Result<(), mobula_core::Error>
where
    T: PartialEq + ToString,
{
    if own == state { Ok(()) } else { Err(mismatch(what, own.to_string(), state.to_string())) }
}

fn mismatch(what: &'static str, expected: String, got: String) -> mobula_core::Error {
    mobula_core::Error::StreamMismatch { what, expected, got }
}

/// The columns of a block, ready to gather from.
struct Decoded(Vec<Column>);

/// The blocks used last.
struct Blocks {
    compiled: Compiled,
    columns: Vec<ColumnSpec>,
    /// Rows that every block must have.
    rows: Vec<u64>,
    /// With the time of the last use.
    decoded: HashMap<usize, (Arc<Decoded>, u64)>,
    capacity: usize,
    clock: u64,
}

impl Blocks {
    /// The blocks that have the given rows.
    fn of(&mut self, rows: &[RowAt]) -> Result<HashMap<usize, Arc<Decoded>>> {
        let mut needed = HashMap::new();
        for at in rows {
            if let Entry::Vacant(entry) = needed.entry(at.block) {
                entry.insert(self.get(at.block)?);
            }
        }
        Ok(needed)
    }

    fn get(&mut self, block: usize) -> Result<Arc<Decoded>> {
        self.clock += 1;
        if let Some((decoded, used)) = self.decoded.get_mut(&block) {
            *used = self.clock;
            return Ok(decoded.clone());
        }
        let decoded = Arc::new(self.load(block)?);
        if self.decoded.len() >= self.capacity {
            let oldest = self.decoded.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(block, _)| *block) {
                self.decoded.remove(&oldest);
            }
        }
        self.decoded.insert(block, (decoded.clone(), self.clock));
        Ok(decoded)
    }

    fn load(&self, block: usize) -> Result<Decoded> {
        let compiled = self.compiled.clone();
        let batches = block_on(async move { compiled.execute(block).await })?;
        let whole = concat_batches(&self.compiled.schema(), &batches)?;
        let place = self.compiled.source().name(block);
        let (expected, got) = (self.rows[block], whole.num_rows() as u64);
        if got != expected {
            return Err(Error::Changed { place, expected, got });
        }
        let columns = self.columns.iter().zip(whole.columns());
        let decode = |(spec, array): (&ColumnSpec, _)| spec.decode(array, &place);
        Ok(Decoded(columns.map(decode).collect::<Result<_>>()?))
    }
}
