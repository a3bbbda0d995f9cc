//! What is being done in this process, how far it is, and what it waits for.
//!
//! A stage is a source with the operations on it that run as one, block by block. Who computes blocks
//! does it through [`Watched`]; a thread looks at the stages that are at work, shows those that take
//! long, and warns of those in which nothing happens.

mod report;
mod watch;

pub(crate) use report::since;
pub use report::{StageReport, Stall, stages};

use crate::source::OpenSource;
use crate::store::bytes_of;
use arrow::record_batch::RecordBatch;
use futures::Stream;
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// Stages that are remembered.
const REMEMBERED: usize = 256;

/// Those that have begun, in that order.
static STAGES: Mutex<VecDeque<Arc<Stage>>> = Mutex::new(VecDeque::new());

fn all() -> MutexGuard<'static, VecDeque<Arc<Stage>>> {
    STAGES.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
pub(crate) struct Stage {
    name: String,
    /// Of one pass; none where they are not known.
    blocks: Option<usize>,
    /// What a block is called in messages.
    block_name: Box<dyn Names>,
    begun: AtomicBool,
    /// Whether it goes on for as long as somebody wants more.
    is_endless: AtomicBool,
    counts: Mutex<Counts>,
}

/// Stages are remembered, sources are not.
impl Names for Weak<OpenSource> {
    fn name(&self, block: usize) -> String {
        let source = self.upgrade();
        source.map_or_else(|| format!("block {block}"), |source| source.name(block))
    }
}

/// What blocks are called.
pub(crate) trait Names: std::fmt::Debug + Send + Sync {
    fn name(&self, block: usize) -> String;
}

#[derive(Clone, Debug, Default)]
struct Counts {
    blocks: u64,
    rows: u64,
    bytes: u64,
    /// Time in which rows were made, of all threads.
    busy: Duration,
    /// Time in which rows that were there were not taken.
    untaken: Duration,
    /// The blocks at work, and since when somebody waits for rows of each.
    at_work: BTreeMap<usize, Option<Instant>>,
    first: Option<Instant>,
}

impl Stage {
    pub(crate) fn new(
        name: String,
        blocks: Option<usize>,
        block_name: Box<dyn Names>,
    ) -> Arc<Self> {
        Arc::new(Self {
            name,
            blocks,
            block_name,
            begun: AtomicBool::new(false),
            is_endless: AtomicBool::new(false),
            counts: Mutex::default(),
        })
    }

    /// It has no end of its own.
    pub(crate) fn has_no_end(&self) {
        self.is_endless.store(true, Ordering::Relaxed);
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>) {
        if !self.begun.swap(true, Ordering::Relaxed) {
            let mut all = all();
            // One that is at work is still looked at.
            let idle = |stage: &Arc<Self>| stage.counts().at_work.is_empty();
            if let Some(oldest) = all.iter().position(idle).filter(|_| all.len() >= REMEMBERED) {
                all.remove(oldest);
            }
            all.push_back(self.clone());
        }
        watch::wake();
    }

    /// Blocks for whose rows somebody has waited for `limit` or longer.
    fn stalls(&self, now: Instant, limit: Duration) -> Vec<(usize, Duration)> {
        let waited = |(block, since): (&usize, &Option<Instant>)| {
            let waited = now.saturating_duration_since((*since)?);
            (waited >= limit).then_some((*block, waited))
        };
        self.counts().at_work.iter().filter_map(waited).collect()
    }
}

/// The rows of a block on their way.
pub(crate) struct Watched<S> {
    rows: S,
    stage: Arc<Stage>,
    block: usize,
    /// When the last rows were given.
    given: Option<Instant>,
}

impl<S> Watched<S> {
    pub(crate) fn new(rows: S, stage: &Arc<Stage>, block: usize) -> Self {
        let now = Instant::now();
        let mut counts = stage.counts();
        counts.first.get_or_insert(now);
        counts.at_work.insert(block, None);
        drop(counts);
        stage.begin();
        Self { rows, stage: stage.clone(), block, given: None }
    }

    fn ask(&mut self, now: Instant) {
        let mut counts = self.stage.counts();
        if let Some(given) = self.given.take() {
            counts.untaken += now.saturating_duration_since(given);
        }
        let since = counts.at_work.entry(self.block).or_default();
        since.get_or_insert(now);
    }
}

impl<S, E> Stream for Watched<S>
where
    S: Stream<Item = Result<RecordBatch, E>> + Unpin,
{
    type Item = Result<RecordBatch, E>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let asked = Instant::now();
        self.ask(asked);
        let polled = Pin::new(&mut self.rows).poll_next(context);
        let now = Instant::now();
        let mut counts = self.stage.counts();
        counts.busy += now.saturating_duration_since(asked);
        drop(counts);
        let next = ready!(polled);
        let mut counts = self.stage.counts();
        counts.at_work.insert(self.block, None);
        match &next {
            Some(Ok(batch)) => {
                counts.rows += batch.num_rows() as u64;
                counts.bytes += bytes_of(batch).unwrap_or(0) as u64;
            }
            Some(Err(_)) => {}
            None => counts.blocks += 1,
        }
        drop(counts);
        self.given = Some(now);
        Poll::Ready(next)
    }
}

impl<S> Drop for Watched<S> {
    fn drop(&mut self) {
        self.stage.counts().at_work.remove(&self.block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Numbers;

    impl Names for Numbers {
        fn name(&self, block: usize) -> String {
            format!("block {block}")
        }
    }

    #[test]
    fn only_who_is_waited_for_stalls() {
        let (stage, start) = (Stage::new("s".to_owned(), None, Box::new(Numbers)), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let limit = Duration::from_secs(10);
        // Block 1 is waited for since the start, nobody asks for more of block 2.
        stage.counts().at_work.extend([(1, Some(start)), (2, None)]);
        assert_eq!(stage.stalls(at(9), limit), []);
        assert_eq!(stage.stalls(at(12), limit), [(1, Duration::from_secs(12))]);
    }
}
