//! What data gives and training takes: named tensors, streamed by rank, resumable in O(1).
//!
//! The `data` crate implements [`BatchSource`]; `train` consumes it. Neither knows the other.

use crate::Error;
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

/// Named tensors that share their first dimension, the rows.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    tensors: Vec<(String, Tensor)>,
    rows: usize,
    global_rows: usize,
    /// Rows of each part, if it is cut into parts.
    parts: Vec<usize>,
    position: Option<StreamState>,
}

impl Batch {
    /// A batch of the given tensors. Errors when their first dimensions differ.
    pub fn new(tensors: Vec<(String, Tensor)>) -> Result<Self, Error> {
        let rows = match tensors.first() {
            Some((name, tensor)) => rows_of(name, tensor)?,
            None => 0,
        };
        for (name, tensor) in &tensors {
            let got = rows_of(name, tensor)?;
            if got != rows {
                return Err(Error::BatchRows { name: name.clone(), expected: rows, got });
            }
        }
        Ok(Self { tensors, rows, global_rows: rows, parts: Vec::new(), position: None })
    }

    /// The rows of several batches, one after the other, each a [part](Self::parts). The batches must
    /// have the same tensors.
    pub fn concat(batches: &[Self]) -> Result<Self, Error> {
        // Not every device knows empty tensors.
        let mut full: Vec<&Self> = batches.iter().filter(|batch| batch.rows > 0).collect();
        full.extend(batches.first().filter(|_| full.is_empty()));
        let tensors = match full.as_slice() {
            [] => Vec::new(),
            [one] => one.tensors.clone(),
            [first, ..] => {
                first.names().map(|name| concat(&full, name)).collect::<Result<_, _>>()?
            }
        };
        let parts = batches.iter().map(|batch| batch.rows).collect();
        Ok(Self { parts, ..Self::new(tensors)? })
    }

    /// Its parts, in order: itself, if it is not a [concatenation](Self::concat). A part may have no
    /// rows.
    pub fn parts(&self) -> Result<Vec<Self>, Error> {
        let mut start = 0;
        let part = |rows: &usize| {
            let part = self.slice(start, *rows)?;
            start += rows;
            Ok(part.with_global_rows(self.global_rows))
        };
        match self.parts.as_slice() {
            [] => Ok(vec![self.clone()]),
            parts => parts.iter().map(part).collect(),
        }
    }

    /// Whether it is a [concatenation](Self::concat).
    pub fn is_in_parts(&self) -> bool {
        !self.parts.is_empty()
    }

    /// Says where the stream that it is from stands behind it.
    pub fn with_position(self, position: StreamState) -> Self {
        Self { position: Some(position), ..self }
    }

    /// Where the stream that it is from stands behind it, if that is known: batches of a training
    /// worker's stream know it.
    pub fn position(&self) -> Option<&StreamState> {
        self.position.as_ref()
    }

    /// Says how many rows this step has over all ranks (the default is this batch's own).
    pub fn with_global_rows(self, global_rows: usize) -> Self {
        Self { global_rows, ..self }
    }

    /// The tensor of this name, or an error that lists the names there are.
    pub fn get(&self, name: &str) -> Result<&Tensor, Error> {
        let found = self.tensors.iter().find(|(n, _)| n == name);
        found.map(|(_, tensor)| tensor).ok_or_else(|| Error::NoSuchColumn {
            name: name.to_owned(),
            available: self.tensors.iter().map(|(n, _)| n.clone()).collect(),
        })
    }

    /// The same rows with only these tensors.
    pub fn select(&self, names: &[&str]) -> Result<Self, Error> {
        let pick = |name: &&str| Ok(((*name).to_owned(), self.get(name)?.clone()));
        Ok(self.with_tensors(names.iter().map(pick).collect::<Result<_, Error>>()?))
    }

    /// So many rows from `start` on. Errors when there are not as many.
    pub fn slice(&self, start: usize, rows: usize) -> Result<Self, Error> {
        let narrow =
            |(name, tensor): &(String, Tensor)| Ok((name.clone(), tensor.narrow(0, start, rows)?));
        Self::new(self.tensors.iter().map(narrow).collect::<Result<_, Error>>()?)
    }

    /// The same rows on a device. Costs nothing when they are there.
    pub fn to_device(&self, device: &Device) -> Result<Self, Error> {
        let there =
            |(name, tensor): &(String, Tensor)| Ok((name.clone(), tensor.to_device(device)?));
        Ok(self.with_tensors(self.tensors.iter().map(there).collect::<Result<_, Error>>()?))
    }

    /// The same rows, of which these tensors are.
    fn with_tensors(&self, tensors: Vec<(String, Tensor)>) -> Self {
        let Self { rows, global_rows, parts, position, .. } = self;
        let (parts, position) = (parts.clone(), position.clone());
        Self { tensors, rows: *rows, global_rows: *global_rows, parts, position }
    }

    /// Gives the rows other tensors. Errors when these are not as many rows.
    pub fn replace(&self, tensors: Vec<(String, Tensor)>) -> Result<Self, Error> {
        for (name, tensor) in &tensors {
            let (expected, got) = (self.rows, rows_of(name, tensor)?);
            if got != expected {
                return Err(Error::BatchRows { name: name.clone(), expected, got });
            }
        }
        Ok(self.with_tensors(tensors))
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }

    /// Rows in this rank's part of the step. May be 0 in the last step of an epoch.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows in this step over all ranks: what a mean loss is weighted by.
    pub fn global_rows(&self) -> usize {
        self.global_rows
    }

    /// The tensors with their names, in the order they were given.
    pub fn tensors(&self) -> &[(String, Tensor)] {
        &self.tensors
    }
}

fn concat(batches: &[&Batch], name: &str) -> Result<(String, Tensor), Error> {
    let tensors = batches.iter().map(|batch| batch.get(name)).collect::<Result<Vec<_>, _>>()?;
    Ok((name.to_owned(), Tensor::cat(&tensors, 0)?))
}

fn rows_of(name: &str, tensor: &Tensor) -> Result<usize, Error> {
    tensor.dims().first().copied().ok_or_else(|| Error::BatchScalar { name: name.to_owned() })
}

/// Which part of a stream belongs to a worker: rank `rank` of `world`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// This worker, in `0..world`.
    pub rank: usize,
    /// All workers.
    pub world: usize,
}

impl Shard {
    /// Everything: the one worker of a world of one.
    pub const ALL: Self = Self { rank: 0, world: 1 };
}

/// Where a stream stands, O(1) in size and valid for any world size up to its number of lanes.
///
/// The state names the position that was *consumed*, never what was prefetched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamState {
    /// Hash of the list of blocks with their row counts; a resumed stream must have the same.
    pub manifest: String,
    /// Version of the order's algorithm.
    pub version: u32,
    /// Seed of the shuffle.
    pub seed: u64,
    /// Epochs finished.
    pub epoch: u64,
    /// Steps consumed in the epoch under way.
    pub step: u64,
}

/// A rank's share of an endless sequence of epochs.
pub trait BatchStream: Send {
    /// The next batch, or `None` once at the end of each epoch; the call after that starts the
    /// next epoch. Every rank gets the same number of batches in an epoch.
    fn next_batch(&mut self) -> Result<Option<Batch>, Error>;

    /// The position after the last batch that was returned.
    fn state(&self) -> StreamState;

    /// Continues from `state`. Errors when it was taken from other data or another order.
    fn restore(&mut self, state: &StreamState) -> Result<(), Error>;

    /// Steps in one epoch.
    fn steps_per_epoch(&self) -> u64;
}

/// The description of a stream: cheap to send, opened where it is read.
pub trait BatchSource: Send + Sync {
    /// Opens the part of `shard`, at the start of epoch 0.
    fn open(&self, shard: Shard) -> Result<Box<dyn BatchStream>, Error>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tensor(rows: u32) -> Tensor {
        Tensor::arange(0, rows, &Device::Cpu).expect("tensor")
    }

    #[test]
    fn tensors_of_a_batch_share_their_rows() {
        let error = Batch::new(vec![("x".into(), tensor(3)), ("y".into(), tensor(2))]);
        let error = error.expect_err("3 rows and 2").to_string();
        assert_eq!(error, "tensor \"y\" of a batch has 2 rows, expected 3 as the first tensor has");
    }

    #[test]
    fn columns_and_rows_are_taken_out_by_name_and_place() {
        let batch =
            Batch::new(vec![("x".into(), tensor(3)), ("y".into(), tensor(3))]).expect("batch");
        let part = batch.select(&["y"]).and_then(|b| b.slice(1, 2)).expect("part");
        assert_eq!(part.rows(), 2);
        assert_eq!(part.get("y").expect("y").to_vec1::<u32>().expect("values"), [1, 2]);
        let error = part.get("x").expect_err("not selected").to_string();
        assert_eq!(error, "there is no column \"x\"; available: y");
        assert!(batch.slice(2, 2).is_err(), "there are only 3 rows");
    }

    #[test]
    fn what_was_put_together_comes_apart() {
        let part = |rows| Batch::new(vec![("x".into(), tensor(rows))]).expect("batch");
        let position = StreamState { step: 7, ..StreamState::default() };
        let whole = Batch::concat(&[part(3), part(0), part(2)]).expect("batch");
        let whole = whole.with_global_rows(9).with_position(position.clone());
        let whole = whole.select(&["x"]).and_then(|b| b.to_device(&Device::Cpu)).expect("batch");
        assert_eq!((whole.rows(), whole.position()), (5, Some(&position)));
        let parts = whole.parts().expect("parts");
        let values = parts.iter().map(|part| part.get("x")?.to_vec1::<u32>().map_err(Error::from));
        let values: Vec<_> = values.collect::<Result<_, _>>().expect("values");
        assert_eq!(values, [vec![0, 1, 2], vec![], vec![0, 1]]);
        assert!(parts.iter().all(|part| part.global_rows() == 9 && !part.is_in_parts()));
        assert!(part(3).parts().expect("itself").len() == 1 && !part(3).is_in_parts());
        assert_eq!(Batch::concat(&[part(0), part(0)]).expect("batch").parts().expect("2").len(), 2);
        let other = Batch::new(vec![("y".into(), tensor(1))]).expect("batch");
        assert!(Batch::concat(&[part(1), other]).is_err(), "of other tensors");
    }
}
