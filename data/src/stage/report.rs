//! Stages as a program sees them.

use super::{Stage, all};
use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a stage has done so far: a source with the operations on it that run as one, block by block.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct StageReport {
    /// The source, and the operations.
    pub name: String,
    /// Blocks that were computed; one that was computed twice counts twice.
    pub blocks: u64,
    /// Blocks that there are, if that is known.
    pub blocks_of_all: Option<usize>,
    /// Blocks that are being computed.
    pub at_work: usize,
    /// Rows that came out.
    pub rows: u64,
    /// Bytes of these in memory.
    pub bytes: u64,
    /// Time in which rows were made, of all threads together.
    pub busy: Duration,
    /// Time in which rows that were there were not taken (back-pressure), of all blocks together.
    pub untaken: Duration,
    /// The block whose rows were waited for the longest time, if one is waited for.
    pub waiting: Option<Stall>,
}

/// A block that rows are waited for of.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Stall {
    /// The block, such as a file and its row group.
    pub block: String,
    /// How long.
    pub waited: Duration,
}

/// The stages that have run in this process, the newest last; of more than 256 the oldest are
/// forgotten.
///
/// ```
/// use mobula_data::{Dataset, stages};
///
/// let even = Dataset::range(10_000)?.filter("id % 2 = 0")?;
/// assert_eq!(even.collect()?.num_rows(), 5000);
/// let stages = stages();
/// let stage = stages.iter().find(|stage| stage.name.contains("filter id % 2 = 0")).unwrap();
/// assert_eq!(stage.rows, 5000);
/// println!("{stage}");
/// # Ok::<(), mobula_data::Error>(())
/// ```
pub fn stages() -> Vec<StageReport> {
    let now = Instant::now();
    // Not under the lock: what a block is called a source of the program may say.
    let all: Vec<_> = all().iter().cloned().collect();
    all.iter().map(|stage| stage.report(now)).collect()
}

/// Those that have begun since then.
pub(crate) fn since(time: Instant) -> Vec<StageReport> {
    let now = Instant::now();
    let begun = |stage: &&Arc<Stage>| stage.counts().first.is_some_and(|first| first >= time);
    let all: Vec<_> = all().iter().filter(begun).cloned().collect();
    all.iter().map(|stage| stage.report(now)).collect()
}

impl Stage {
    pub(super) fn report(&self, now: Instant) -> StageReport {
        let longest =
            self.stalls(now, Duration::ZERO).into_iter().max_by_key(|(_, waited)| *waited);
        let counts = self.counts().clone();
        StageReport {
            name: self.name.clone(),
            blocks: counts.blocks,
            blocks_of_all: self.blocks,
            at_work: counts.at_work.len(),
            rows: counts.rows,
            bytes: counts.bytes,
            busy: counts.busy,
            untaken: counts.untaken,
            waiting: longest
                .map(|(block, waited)| Stall { block: self.block_name.name(block), waited }),
        }
    }
}

impl Display for StageReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, blocks, rows, busy, untaken, .. } = self;
        write!(f, "{name}: {blocks}")?;
        if let Some(all) = self.blocks_of_all {
            write!(f, " of {all}")?;
        }
        let megabytes = self.bytes as f64 / 1e6;
        write!(
            f,
            " blocks, {rows} rows, {megabytes:.1} MB, {busy:.1?} busy, {untaken:.1?} not taken"
        )?;
        match &self.waiting {
            Some(Stall { block, waited }) => write!(f, ", {waited:.1?} waiting for {block}"),
            None => Ok(()),
        }
    }
}
