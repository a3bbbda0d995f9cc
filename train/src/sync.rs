//! Sums over the ranks within a pass, for layers with statistics of all rows.
//!
//! A rank without rows has no pass, and does not know which sums the others ask for. So the ranks
//! first tell each other their rows. Where one has none, the others announce each sum by its
//! length, 0 when their pass is over, and that rank follows them with zeros.

use crate::collective::{Collective, ReduceOp};
use crate::{Error, Result};
use mobula_core::BoxError;
use mobula_nn::SyncSum;
use std::sync::{Arc, Mutex, PoisonError};

/// Sums over the ranks in the passes of one batch.
#[derive(Debug)]
pub(crate) struct BatchSum {
    collective: Arc<dyn Collective>,
    /// The ranks that have rows.
    leaders: Vec<usize>,
    /// Whether there are others.
    has_followers: bool,
    first_error: Mutex<Option<Error>>,
}

impl BatchSum {
    /// All ranks begin a batch, with so many rows on this one.
    pub(crate) fn begin(collective: &Arc<dyn Collective>, rows: usize) -> Result<Self> {
        let rows = collective.gather_one(rows as f64)?;
        let leaders: Vec<usize> = (0..rows.len()).filter(|rank| rows[*rank] > 0.0).collect();
        Ok(Self {
            collective: Arc::clone(collective),
            has_followers: leaders.len() < rows.len(),
            leaders,
            first_error: Mutex::default(),
        })
    }

    /// For a rank without rows: takes part in each sum of the others.
    pub(crate) fn follow(&self) -> Result<()> {
        loop {
            match self.announce(0)? {
                0 => return Ok(()),
                len => self.collective.all_reduce(&mut vec![0.0f64; len], ReduceOp::Sum)?,
            }
        }
    }

    /// For a rank with rows: its pass is over.
    pub(crate) fn end(&self) -> Result<()> {
        if self.has_followers { self.announce(0).map(drop) } else { Ok(()) }
    }

    /// What went wrong in a sum. On its way through layers and candle an error becomes a text.
    pub(crate) fn first_error(&self) -> Option<Error> {
        self.first_error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn add(&self, values: &mut [f64]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        if self.has_followers {
            self.announce(values.len())?;
        }
        self.collective.all_reduce(values, ReduceOp::Sum)
    }

    /// How many values the ranks with rows sum next. Errors when they do not agree.
    fn announce(&self, len: usize) -> Result<usize> {
        let all = self.collective.gather_one(len as f64)?;
        let mut said = self.leaders.iter().map(|rank| (*rank, all[*rank] as usize));
        let (rank, len) = said.next().unwrap_or_default();
        match said.find(|(_, other_len)| *other_len != len) {
            None => Ok(len),
            Some((other, other_len)) => {
                Err(Error::CollectiveLength { rank, len, other, other_len })
            }
        }
    }
}

impl SyncSum for BatchSum {
    fn sum(&self, values: &mut [f64]) -> Result<(), BoxError> {
        self.add(values).map_err(|error| {
            let text = error.to_string();
            let mut first = self.first_error.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(error);
            text.into()
        })
    }
}
