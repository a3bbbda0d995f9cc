//! How many tasks a runtime has, by where they stand.
//!
//! Three steps a task are counted, a million times a second: so nothing is shared but by chance.
//! Each thread adds to one of a few cells, and who looks adds them up. A look is not a snapshot: a
//! task that moves on meanwhile may be seen in neither place.

use super::TaskCounts;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Finished,
    Failed,
    Cancelled,
}

const ENDINGS: [Ending; 3] = [Ending::Finished, Ending::Failed, Ending::Cancelled];
const CELLS: usize = 16;

/// The steps of the tasks of one runtime.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    cells: [Cell; CELLS],
}

/// A cache line pair of its own: processors fetch lines by twos.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Cell {
    submitted: AtomicU64,
    started: AtomicU64,
    /// Attempts after which the task waits again.
    put_back: AtomicU64,
    /// By [`Ending`]: tasks that were running, and tasks that were not.
    ended_running: [AtomicU64; 3],
    ended_waiting: [AtomicU64; 3],
}

static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static CELL: usize = THREADS.fetch_add(1, Ordering::Relaxed) % CELLS;
}

impl Counts {
    /// There is a new task. It waits.
    pub(crate) fn submitted(&self) {
        add(&self.cell().submitted);
    }

    /// A task that waited runs.
    pub(crate) fn started(&self) {
        add(&self.cell().started);
    }

    /// A task that ran waits again.
    pub(crate) fn put_back(&self) {
        add(&self.cell().put_back);
    }

    /// A task has ended.
    pub(crate) fn ended(&self, ending: Ending, was_running: bool) {
        let cell = self.cell();
        let ended = if was_running { &cell.ended_running } else { &cell.ended_waiting };
        add(&ended[ending as usize]);
    }

    /// Where the tasks stand now.
    pub(crate) fn look(&self) -> TaskCounts {
        // Later steps first, so that a task which moves on meanwhile is not counted twice.
        let running = ENDINGS.map(|ending| self.sum(|cell| &cell.ended_running[ending as usize]));
        let waiting = ENDINGS.map(|ending| self.sum(|cell| &cell.ended_waiting[ending as usize]));
        let put_back = self.sum(|cell| &cell.put_back);
        let started = self.sum(|cell| &cell.started);
        let submitted = self.sum(|cell| &cell.submitted);
        let [finished, failed, cancelled] = [0, 1, 2].map(|i: usize| running[i] + waiting[i]);
        let now_running = started.saturating_sub(put_back + running.iter().sum::<u64>());
        let ended = finished + failed + cancelled;
        TaskCounts {
            waiting: submitted.saturating_sub(ended + now_running),
            running: now_running,
            finished,
            failed,
            cancelled,
            submitted,
            retried: put_back,
        }
    }

    fn sum<'a>(&'a self, of: impl Fn(&'a Cell) -> &'a AtomicU64) -> u64 {
        self.cells.iter().map(|cell| of(cell).load(Ordering::Relaxed)).sum()
    }

    /// A thread whose locals are gone already is as good as any.
    fn cell(&self) -> &Cell {
        &self.cells[CELL.try_with(|cell| *cell).unwrap_or(0)]
    }
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(counts: &Counts, expected: [u64; 5]) {
        let seen = counts.look();
        let seen = [seen.waiting, seen.running, seen.finished, seen.failed, seen.cancelled];
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_task_is_in_one_place_at_a_time() {
        let counts = Counts::default();
        (0..4).for_each(|_| counts.submitted());
        check(&counts, [4, 0, 0, 0, 0]);
        counts.started();
        counts.started();
        check(&counts, [2, 2, 0, 0, 0]);
        counts.put_back();
        check(&counts, [3, 1, 0, 0, 0]);
        counts.ended(Ending::Finished, true);
        counts.ended(Ending::Cancelled, false);
        counts.started();
        counts.ended(Ending::Failed, true);
        check(&counts, [1, 0, 1, 1, 1]);
    }

    #[test]
    fn threads_add_up() {
        let counts = Counts::default();
        std::thread::scope(|scope| {
            for _ in 0..2 * CELLS {
                scope.spawn(|| (0..100).for_each(|_| counts.submitted()));
            }
        });
        assert_eq!(counts.look().submitted, 200 * CELLS as u64);
    }
}
