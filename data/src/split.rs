//! Train and test: the side of a row is a function of the seed and its position in the source.

use arrow::array::BooleanArray;
use mobula_core::random::Stream;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// One side of a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Split {
    pub(crate) test_fraction: f64,
    pub(crate) seed: u64,
    /// How many splits came before it: the same seed twice draws different numbers.
    pub(crate) depth: u64,
    pub(crate) side: Side,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Side {
    Train,
    Test,
}

impl Split {
    fn has(&self, stream: &Stream, position: u64) -> bool {
        let test = stream.at(position, 0).uniform() < self.test_fraction;
        test == (self.side == Side::Test)
    }
}

/// Which of the rows at `positions` are on the given side of every split.
pub(crate) fn mask(splits: &[Split], positions: Range<u64>) -> BooleanArray {
    let splits: Vec<_> = splits
        .iter()
        .map(|split| (split, Stream::new(split.seed, "split").child(split.depth)))
        .collect();
    let inside = |p: u64| splits.iter().all(|(split, stream)| split.has(stream, p));
    positions.map(|p| Some(inside(p))).collect()
}
