//! The decoded blocks of a stream: those used last, and those that will be needed next.

use super::TensorSource;
use super::tensors::Layout;
use super::values::Values;
use crate::error::{Error, Result};
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
    /// With the step of the last use.
    held: HashMap<usize, (Block, u64)>,
    capacity: usize,
    /// Steps so far.
    clock: u64,
}

enum Block {
    Coming(Pending<Decoded>),
    There(Arc<Decoded>),
}

impl Blocks {
    pub(super) fn new(source: &TensorSource, capacity: usize) -> Result<Self> {
        let loader = Loader {
            compiled: source.dataset.compile()?,
            layout: source.layout.clone(),
            rows: source.rows.clone(),
        };
        Ok(Self { loader: Arc::new(loader), held: HashMap::new(), capacity, clock: 0 })
    }

    /// How many are there or on their way.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// How many are being read.
    pub(super) fn coming(&self) -> usize {
        self.held.values().filter(|(block, _)| matches!(block, Block::Coming(_))).count()
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.clock += 1;
    }

    /// Begins to read a block, if that is not done, in the place of the one that was not used for the
    /// longest time. Says whether there is room for it, which is made if it is needed now.
    pub(super) fn fetch(&mut self, block: usize, is_now: bool) -> Result<bool> {
        if let Some((_, used)) = self.held.get_mut(&block) {
            *used = self.clock;
            return Ok(true);
        }
        if self.held.len() >= self.capacity {
            let is_idle =
                |block: &Block, used| matches!(block, Block::There(_)) && used < self.clock;
            let idle = self.held.iter().filter(|(_, (block, used))| is_idle(block, *used));
            match idle.min_by_key(|(_, (_, used))| *used).map(|(block, _)| *block) {
                Some(oldest) => drop(self.held.remove(&oldest)),
                None if !is_now => return Ok(false),
                None => {}
            }
        }
        let loader = Arc::clone(&self.loader);
        let coming = Block::Coming(spawn(async move { loader.load(block).await })?);
        self.held.insert(block, (coming, self.clock));
        Ok(true)
    }

    /// A block, once it is there.
    pub(super) fn get(&mut self, block: usize) -> Result<Arc<Decoded>> {
        self.fetch(block, true)?;
        let decoded = match self.held.remove(&block) {
            Some((Block::There(decoded), _)) => decoded,
            Some((Block::Coming(coming), _)) => Arc::new(coming.wait()?),
            None => return Err(Error::Internal(format!("block {block} is not held"))),
        };
        self.held.insert(block, (Block::There(Arc::clone(&decoded)), self.clock));
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
    async fn load(&self, block: usize) -> Result<Decoded> {
        let place = self.compiled.source().name(block);
        let expected = self.rows[block];
        let mut decoded = self.layout.room(expected as usize)?;
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
