//! The decoded blocks of a stream: those used last, and those that will be needed next.

use super::TensorSource;
use super::tensors::Layout;
use super::values::Values;
use crate::error::{Error, Result};
use crate::memory::{self, Taken};
use crate::plan::Compiled;
use crate::runtime::{Pending, spawn};
use futures::TryStreamExt;
use std::collections::HashMap;
use std::sync::Arc;

/// The rows of a block as those of tensors, ready to gather from.
pub(super) struct Decoded(pub(super) Vec<Values>);

/// The blocks used last.
pub(super) struct Blocks {
    loader: Arc<Loader>,
    held: HashMap<usize, Held>,
    capacity: usize,
    /// Steps so far.
    clock: u64,
    /// What made room for the next, which takes its memory: that of the system must be zeroed first.
    spare: Option<Decoded>,
}

struct Held {
    block: Block,
    /// The step of the last use.
    used: u64,
    _memory: Taken,
}

enum Block {
    Coming(Pending<Decoded>),
    There(Arc<Decoded>),
}

impl Block {
    fn is_coming(&self) -> bool {
        matches!(self, Self::Coming(_))
    }
}

impl Blocks {
    /// With room for so many, and for those that are read ahead.
    pub(super) fn new(source: &TensorSource, needed: usize) -> Result<Self> {
        let loader = Loader {
            compiled: source.dataset.compile()?.endless(),
            layout: source.layout.clone(),
            rows: source.rows.clone(),
        };
        let capacity = needed + 2 * loader.compiled.at_once();
        Ok(Self { loader: Arc::new(loader), held: HashMap::new(), capacity, clock: 0, spare: None })
    }

    /// How many are there or on their way.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether as many are being read as can be at once.
    pub(super) fn enough_coming(&self) -> bool {
        let coming = self.held.values().filter(|held| held.block.is_coming()).count();
        coming >= self.loader.compiled.at_once()
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.clock += 1;
    }

    /// Begins to read a block, if that is not done, in the place of the one that was not used for the
    /// longest time. Says whether there is room for it, which is made if it is needed now.
    pub(super) fn fetch(&mut self, block: usize, is_now: bool) -> Result<bool> {
        if let Some(held) = self.held.get_mut(&block) {
            held.used = self.clock;
            return Ok(true);
        }
        if self.held.len() >= self.capacity && !self.drop_oldest() && !is_now {
            return Ok(false);
        }
        let memory = self.memory(self.loader.bytes(block), is_now)?;
        let spare = self.spare.take();
        let Some(memory) = memory else { return Ok(false) };
        let loader = Arc::clone(&self.loader);
        let coming = Block::Coming(spawn(async move { loader.load(block, spare).await })?);
        self.held.insert(block, Held { block: coming, used: self.clock, _memory: memory });
        Ok(true)
    }

    /// Memory for a block, for which those make room that this step does not need.
    fn memory(&mut self, bytes: usize, is_now: bool) -> Result<Option<Taken>> {
        loop {
            if let Some(memory) = memory::try_read_ahead(bytes)? {
                return Ok(Some(memory));
            }
            if !is_now {
                return Ok(None);
            }
            if !self.drop_oldest() {
                return Ok(Some(memory::take(bytes)?));
            }
        }
    }

    /// Forgets the block that was not used for the longest time, if there is one that this step does
    /// not need.
    fn drop_oldest(&mut self) -> bool {
        let is_idle = |held: &Held| !held.block.is_coming() && held.used < self.clock;
        let idle = self.held.iter().filter(|(_, held)| is_idle(held));
        let oldest = idle.min_by_key(|(_, held)| held.used).map(|(block, _)| *block);
        let Some(held) = oldest.and_then(|oldest| self.held.remove(&oldest)) else { return false };
        if let Block::There(decoded) = held.block {
            self.spare = Arc::into_inner(decoded);
        }
        true
    }

    /// A block, once it is there.
    pub(super) fn get(&mut self, block: usize) -> Result<Arc<Decoded>> {
        self.fetch(block, true)?;
        let lost = || Error::Internal(format!("block {block} is not held"));
        let mut held = self.held.remove(&block).ok_or_else(lost)?;
        let decoded = match held.block {
            Block::There(decoded) => decoded,
            Block::Coming(coming) => Arc::new(coming.wait()?),
        };
        (held.block, held.used) = (Block::There(Arc::clone(&decoded)), self.clock);
        self.held.insert(block, held);
        Ok(decoded)
    }
}

/// Reads blocks.
struct Loader {
    compiled: Compiled,
    layout: Layout,
    /// Rows that every block must have.
    rows: Vec<u64>,
}

impl Loader {
    /// Memory that a decoded block takes.
    fn bytes(&self, block: usize) -> usize {
        self.rows[block] as usize * self.layout.row_bytes()
    }

    fn room(&self, rows: usize, used: Option<Decoded>) -> Result<Vec<Values>> {
        match used {
            Some(Decoded(used)) => Ok(self.layout.room_in(used, rows)),
            None => self.layout.room(rows),
        }
    }

    /// A block, in the place of one that nobody needs any more.
    async fn load(&self, block: usize, used: Option<Decoded>) -> Result<Decoded> {
        let place = self.compiled.source().name(block);
        let expected = self.rows[block];
        let mut decoded = self.room(expected as usize, used)?;
        let (mut batches, mut got) = (self.compiled.stream_narrow(block)?, 0);
        while let Some(batch) = batches.try_next().await? {
            let row = got as usize;
            got += batch.num_rows() as u64;
            if got <= expected {
                self.layout.put(&batch, row, &mut decoded, &place)?;
            }
        }
        match got == expected {
            true => Ok(Decoded(decoded)),
            false => Err(Error::Changed { place, expected, got }),
        }
    }
}
