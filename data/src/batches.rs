//! The rows of a plan, one batch after another.

use crate::error::Result;
use crate::plan::Compiled;
use crate::runtime::{Pending, spawn};
use arrow::record_batch::RecordBatch;
use std::collections::VecDeque;

/// Reads blocks ahead of who takes their rows.
pub(crate) struct Batches {
    compiled: Compiled,
    /// The block that is read next.
    next: usize,
    coming: VecDeque<Pending<Vec<RecordBatch>>>,
    here: std::vec::IntoIter<RecordBatch>,
}

impl Batches {
    pub(crate) fn new(compiled: Compiled) -> Self {
        Self { compiled, next: 0, coming: VecDeque::new(), here: Vec::new().into_iter() }
    }

    /// The next block, if there is one.
    fn block(&mut self) -> Result<Option<Vec<RecordBatch>>> {
        while self.coming.len() < self.compiled.at_once() && self.next < self.compiled.blocks() {
            let (compiled, block) = (self.compiled.clone(), self.next);
            self.coming.push_back(spawn(async move { compiled.execute(block).await })?);
            self.next += 1;
        }
        self.coming.pop_front().map(Pending::wait).transpose()
    }
}

impl Iterator for Batches {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(batch) = self.here.next() {
                return Some(Ok(batch));
            }
            match self.block() {
                Ok(Some(block)) => self.here = block.into_iter(),
                Ok(None) => return None,
                Err(error) => {
                    // Nothing comes behind an error.
                    (self.next, self.coming) = (self.compiled.blocks(), VecDeque::new());
                    return Some(Err(error));
                }
            }
        }
    }
}
