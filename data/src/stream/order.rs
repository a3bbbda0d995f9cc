//! Which row is where in an epoch: a pure function of the seed, the epoch and the blocks' sizes.

use mobula_core::random::Stream;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Changes whenever the same seed gives another order.
pub(super) const VERSION: u32 = 2;

/// Neighbouring blocks of a lane whose rows are mixed.
pub(super) const GROUP_BLOCKS: usize = 4;

const ROUNDS: usize = 6;

/// How a step is cut: `lanes` pieces of `per_lane` rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) lanes: usize,
    pub(super) per_lane: usize,
}

impl Shape {
    pub(super) fn steps(&self, rows: u64) -> u64 {
        rows.div_ceil((self.lanes * self.per_lane) as u64)
    }
}

/// Rows of a block that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Run {
    pub(super) block: usize,
    pub(super) row: usize,
    pub(super) rows: usize,
}

/// Blocks of a lane whose rows are mixed, and the places in the epoch that they have.
struct Group {
    /// Their place among the blocks of the epoch.
    blocks: Range<usize>,
    places: Range<u64>,
    keys: Keys,
}

/// The order of one epoch. Memory: two words a block, and the permutation of a group a lane.
#[derive(Debug)]
pub(super) struct EpochOrder {
    shape: Shape,
    /// The blocks, as this epoch goes through them.
    blocks: Vec<usize>,
    /// Where each of them starts in the epoch, and at the end how many rows there are.
    starts: Vec<u64>,
    shuffle: Option<Stream>,
    /// Of the group that each lane is in.
    permutations: Vec<Option<Permutation>>,
}

impl EpochOrder {
    pub(super) fn new(rows: &[u64], shape: Shape, seed: Option<u64>, epoch: u64) -> Self {
        let mut blocks: Vec<usize> = (0..rows.len()).filter(|block| rows[*block] > 0).collect();
        let shuffle = seed.map(|seed| Stream::new(seed, "shuffle").child(epoch));
        if let Some(seed) = seed {
            let mut rng = Stream::new(seed, "shuffle-blocks").at(epoch, 0);
            for i in (1..blocks.len()).rev() {
                blocks.swap(i, rng.below(i as u64 + 1) as usize);
            }
        }
        let mut starts = vec![0];
        let mut end = 0;
        starts.extend(blocks.iter().map(|block| {
            end += rows[*block];
            end
        }));
        let permutations = (0..shape.lanes).map(|_| None).collect();
        Self { shape, blocks, starts, shuffle, permutations }
    }

    /// Rows of `step`, lane by lane, for the lanes given.
    pub(super) fn step(&mut self, step: u64, lanes: impl Iterator<Item = usize>) -> Vec<Run> {
        let mut runs = Vec::new();
        for lane in lanes {
            let places = self.step_of_lane(step, lane);
            match self.shuffle {
                None => self.in_order(places, &mut runs),
                Some(stream) => self.mixed(&stream, lane, places, &mut runs),
            }
        }
        runs
    }

    /// The blocks that have rows of `step` of a lane, and perhaps some more.
    pub(super) fn blocks(&self, step: u64, lane: usize) -> &[usize] {
        let places = self.step_of_lane(step, lane);
        if places.is_empty() {
            return &[];
        }
        let (first, last) = match &self.shuffle {
            None => (self.block_at(places.start), self.block_at(places.end - 1)),
            Some(stream) => {
                let group = |place| self.group(stream, lane, place).blocks;
                (group(places.start).start, group(places.end - 1).end - 1)
            }
        };
        &self.blocks[first..=last]
    }

    /// Rows of `step` over all lanes.
    pub(super) fn step_rows(&self, step: u64) -> usize {
        let rows = |lane| self.step_of_lane(step, lane);
        (0..self.shape.lanes).map(rows).map(|r| (r.end - r.start) as usize).sum()
    }

    fn total(&self) -> u64 {
        self.starts[self.blocks.len()]
    }

    /// The places in the epoch from which a lane's rows come: without a shuffle the lane's piece
    /// of the step, with one the lane's piece of the epoch.
    fn step_of_lane(&self, step: u64, lane: usize) -> Range<u64> {
        let (lanes, per_lane) = (self.shape.lanes as u64, self.shape.per_lane as u64);
        let (first, end) = match self.shuffle {
            None => ((step * lanes + lane as u64) * per_lane, self.total()),
            Some(_) => {
                let lane = self.lane(lane);
                (lane.start + step * per_lane, lane.end)
            }
        };
        first.min(end)..(first + per_lane).min(end)
    }

    fn lane(&self, lane: usize) -> Range<u64> {
        let cut =
            |lane| (u128::from(self.total()) * lane as u128 / self.shape.lanes as u128) as u64;
        cut(lane)..cut(lane + 1)
    }

    fn in_order(&self, mut places: Range<u64>, runs: &mut Vec<Run>) {
        while !places.is_empty() {
            let at = self.block_at(places.start);
            let end = self.starts[at + 1].min(places.end);
            let (row, rows) = (places.start - self.starts[at], end - places.start);
            runs.push(Run { block: self.blocks[at], row: row as usize, rows: rows as usize });
            places.start = end;
        }
    }

    fn mixed(&mut self, stream: &Stream, lane: usize, mut places: Range<u64>, runs: &mut Vec<Run>) {
        runs.reserve((places.end - places.start) as usize);
        while !places.is_empty() {
            let Group { blocks, places: all, keys } = self.group(stream, lane, places.start);
            let own = Permutation::kept(&mut self.permutations[lane], all.end - all.start, keys);
            // Of the blocks behind the first; no place is behind those that there are not.
            let mut starts = [u64::MAX; GROUP_BLOCKS - 1];
            for (start, next) in starts.iter_mut().zip(&self.starts[blocks.start + 1..blocks.end]) {
                *start = *next;
            }
            let (blocks, firsts) = (&self.blocks[blocks.clone()], &self.starts[blocks]);
            let end = all.end.min(places.end);
            let mixed = own.of(places.start - all.start..end - all.start).into_iter();
            runs.extend(mixed.map(|place| {
                let place = all.start + place;
                // Without branches, which nothing could foretell.
                let at: usize = starts.iter().map(|start| usize::from(*start <= place)).sum();
                Run { block: blocks[at], row: (place - firsts[at]) as usize, rows: 1 }
            }));
            places.start = end;
        }
    }

    /// The group whose rows are mixed that has a place of a lane. Groups are counted from the lane's first
    /// block and end where the lane ends.
    fn group(&self, stream: &Stream, lane: usize, place: u64) -> Group {
        let bounds = self.lane(lane);
        let first = self.block_at(bounds.start);
        let group = (self.block_at(place) - first) / GROUP_BLOCKS;
        let begin = first + group * GROUP_BLOCKS;
        let end = (begin + GROUP_BLOCKS).min(self.blocks.len());
        let places = self.starts[begin].max(bounds.start)..self.starts[end].min(bounds.end);
        // Blocks behind the lane's last one have no row of it.
        let end = self.block_at(places.end - 1) + 1;
        let mut words = stream.at(group as u64, lane as u32);
        Group { blocks: begin..end, places, keys: std::array::from_fn(|_| words.word()) }
    }

    /// Index of the block that has `place`.
    fn block_at(&self, place: u64) -> usize {
        self.starts.partition_point(|start| *start <= place) - 1
    }
}

/// Of the rounds of a permutation.
type Keys = [u32; ROUNDS];

/// A keyed permutation of `0..length`: a Feistel network (Luby and Rackoff 1988) on as many bits as the
/// length needs, in halves that may differ by one, walked until it lands inside (Black and Rogaway
/// 2002): fewer than two steps of the walk on average.
#[derive(Debug)]
struct Permutation {
    length: u64,
    keys: Keys,
    /// Bits of the lower half.
    low: u32,
    /// Of the halves. They change places in each round, and have theirs again after an even number.
    masks: [u64; 2],
    /// What each round makes of each half, if they are short enough.
    tables: Option<Box<Tables>>,
}

/// Bits of halves for which there are tables, of 48 KB: those of sixteen million rows.
const TABLE_BITS: u32 = 12;
const HALVES: usize = 1 << TABLE_BITS;
const LEAST_FOR_TABLES: u64 = 4096;
type Tables = [[u16; HALVES]; ROUNDS];

impl Permutation {
    fn new(length: u64, keys: Keys) -> Self {
        let bits = (u64::BITS - (length - 1).leading_zeros()).max(2);
        let low = bits / 2;
        let masks = [(1u64 << (bits - low)) - 1, (1u64 << low) - 1];
        let own = Self { length, keys, low, masks, tables: None };
        // Making them for a few rows would take longer than doing without.
        if bits - low > TABLE_BITS || length < LEAST_FOR_TABLES {
            return own;
        }
        let mut tables = Box::new([[0; HALVES]; ROUNDS]);
        for (round, table) in tables.iter_mut().enumerate() {
            for half in 0..=masks[(round + 1) % 2] {
                table[half as usize] = own.round(round, half) as u16;
            }
        }
        Self { tables: Some(tables), ..own }
    }

    /// The one that is kept, if it is this one, or this one in its place.
    fn kept(kept: &mut Option<Self>, length: u64, keys: Keys) -> &Self {
        let is_same = |own: &Self| (own.length, own.keys) == (length, keys);
        if !kept.as_ref().is_some_and(is_same) {
            *kept = None;
        }
        kept.get_or_insert_with(|| Self::new(length, keys))
    }

    /// Where indices that follow each other go.
    fn of(&self, indices: Range<u64>) -> Vec<u64> {
        match &self.tables {
            // The remainder is the half, and tells the compiler that the table has it.
            Some(tables) => {
                self.walk(indices, |round, half| tables[round][half as usize % HALVES].into())
            }
            None => self.walk(indices, |round, half| self.round(round, half)),
        }
    }

    /// Each makes its first step, then those that landed outside their next ones: nothing could foretell
    /// which these are, so no branch depends on it.
    fn walk(&self, indices: Range<u64>, round: impl Fn(usize, u64) -> u64) -> Vec<u64> {
        let mut values: Vec<u64> = indices.map(|index| self.step(index, &round)).collect();
        let mut outside: Vec<usize> = (0..values.len()).collect();
        loop {
            let mut count = 0;
            for i in 0..outside.len() {
                let at = outside[i];
                outside[count] = at;
                count += usize::from(values[at] >= self.length);
            }
            outside.truncate(count);
            if outside.is_empty() {
                return values;
            }
            outside.iter().for_each(|at| values[*at] = self.step(values[*at], &round));
        }
    }

    #[inline]
    fn step(&self, value: u64, round: impl Fn(usize, u64) -> u64) -> u64 {
        let (mut left, mut right) = (value >> self.low, value & self.masks[1]);
        for at in 0..ROUNDS {
            (left, right) = (right, left ^ round(at, right));
        }
        left << self.low | right
    }

    fn round(&self, round: usize, half: u64) -> u64 {
        scramble(half, self.keys[round]) & self.masks[round % 2]
    }
}

/// MurmurHash3's 64-bit finaliser of a half and a round key.
fn scramble(half: u64, key: u32) -> u64 {
    let mut x = half ^ (u64::from(key) << 32 | u64::from(!key));
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// INV-ONCE: every row of an epoch is in exactly one step, for any sizes and any cut.
        #[test]
        fn every_row_once(
            rows in prop::collection::vec(0u64..40, 1..20),
            lanes in 1usize..9,
            per_lane in 1usize..6,
            seed in prop::option::of(any::<u64>()),
            epoch in 0u64..3,
        ) {
            let shape = Shape { lanes, per_lane };
            let mut order = EpochOrder::new(&rows, shape, seed, epoch);
            let steps = 0..shape.steps(rows.iter().sum());
            let of = |run: Run| (run.row..run.row + run.rows).map(move |row| (run.block, row));
            let mut seen = Vec::new();
            for step in steps {
                for lane in 0..lanes {
                    let runs = order.step(step, lane..lane + 1);
                    let blocks = order.blocks(step, lane);
                    prop_assert!(runs.iter().all(|run| blocks.contains(&run.block)));
                    seen.extend(runs.into_iter().flat_map(of));
                }
            }
            if seed.is_some() {
                seen.sort();
            }
            let all: Vec<_> = (0..rows.len())
                .flat_map(|block| (0..rows[block] as usize).map(move |row| (block, row)))
                .collect();
            prop_assert_eq!(seen, all, "and without a shuffle in the order of the data");
        }

        #[test]
        fn a_permutation_has_each_once(length in 1u64..3000, keys in any::<[u32; 6]>()) {
            let own = Permutation::new(length, keys);
            let mut image = own.of(0..length);
            image.sort_unstable();
            prop_assert!(image.into_iter().eq(0..length));
        }

        #[test]
        fn tables_change_nothing(length in LEAST_FOR_TABLES..1 << 24, keys in any::<[u32; 6]>(), at: u64) {
            let own = Permutation::new(length, keys);
            let plain = Permutation { tables: None, ..Permutation::new(length, keys) };
            prop_assert!(own.tables.is_some());
            let some = at % length..(at % length + 100).min(length);
            prop_assert_eq!(own.of(some.clone()), plain.of(some));
        }
    }

    /// Orders do not change from one release to the next without another version.
    #[test]
    fn the_order_of_version_two() {
        let rows = [1000, 40, 700_000, 1, 999];
        let step = |seed| {
            let shape = Shape { lanes: 2, per_lane: 4 };
            let runs = EpochOrder::new(&rows, shape, Some(seed), 3).step(5, 0..2);
            runs.iter().map(|run| (run.block, run.row)).collect::<Vec<_>>()
        };
        let rows = [178513, 184809, 342550, 219021, 672999, 491933, 374731, 451511];
        assert_eq!((VERSION, step(1)), (2, rows.map(|row| (2, row)).to_vec()));
        // More rows than there are tables for.
        let huge = Permutation::new(1 << 40, [1, 2, 3, 4, 5, 6]);
        assert_eq!(huge.of(12345..12346), [858_037_686_062]);
    }

    /// Each row is about equally often in each tenth of an epoch.
    #[test]
    fn a_shuffle_is_fair() {
        let (rows, shape) = ([100; 10], Shape { lanes: 4, per_lane: 25 });
        let mut hits = [[0u32; 10]; 10];
        for epoch in 0..400 {
            let mut order = EpochOrder::new(&rows, shape, Some(1), epoch);
            for step in 0..10 {
                order.step(step, 0..4).iter().for_each(|at| hits[at.block][step as usize] += 1);
            }
        }
        // Block by step: 4,000 expected, and the blocks of a lane come and go together.
        let (low, high) = (hits.iter().flatten().min(), hits.iter().flatten().max());
        assert!(low > Some(&3300) && high < Some(&4700), "{low:?} {high:?}");
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let order = |seed, epoch| {
            let shape = Shape { lanes: 4, per_lane: 25 };
            EpochOrder::new(&[100; 10], shape, Some(seed), epoch).step(0, 0..4)
        };
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
    }
}
