//! How many tasks a runtime has, by where they stand.
//!
//! Three steps a task are counted, millions of times a second, so nothing is shared: a thread has a
//! cell that it alone writes, with plain loads and stores, and who looks adds the cells up. Threads
//! beyond the number of cells share one. A look is not a snapshot: a task that moves on meanwhile
//! may be seen in neither place.

use super::TaskCounts;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// How a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Finished,
    Failed,
    Cancelled,
}

const ENDINGS: [Ending; 3] = [Ending::Finished, Ending::Failed, Ending::Cancelled];
const CELLS: usize = 64;
/// The cell of the threads that have none of their own.
const SHARED: usize = 0;

/// The steps of the tasks of one runtime.
#[derive(Debug)]
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

/// The cell of a thread, which another thread gets after its end.
struct Own(usize);

/// Cells that no thread has: those that were given back, and all from this number on.
static FREE: Mutex<(Vec<usize>, usize)> = Mutex::new((Vec::new(), SHARED + 1));

thread_local! {
    static CELL: Own = Own::new();
}

impl Own {
    fn new() -> Self {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cell) = free.0.pop() {
            return Self(cell);
        }
        let cell = free.1;
        free.1 += usize::from(cell < CELLS);
        Self(if cell < CELLS { cell } else { SHARED })
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if self.0 != SHARED {
            FREE.lock().unwrap_or_else(PoisonError::into_inner).0.push(self.0);
        }
    }
}

impl Default for Counts {
    fn default() -> Self {
        Self { cells: std::array::from_fn(|_| Cell::default()) }
    }
}

impl Counts {
    /// There is a new task. It waits.
    pub(crate) fn submitted(&self) {
        self.add(|cell| &cell.submitted);
    }

    /// A task that waited runs.
    pub(crate) fn started(&self) {
        self.add(|cell| &cell.started);
    }

    /// A task that ran waits again.
    pub(crate) fn put_back(&self) {
        self.add(|cell| &cell.put_back);
    }

    /// A task has ended.
    pub(crate) fn ended(&self, ending: Ending, was_running: bool) {
        self.add(|cell| {
            let ended = if was_running { &cell.ended_running } else { &cell.ended_waiting };
            &ended[ending as usize]
        });
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

    fn add(&self, which: impl Fn(&Cell) -> &AtomicU64) {
        // A thread that is about to end may have given its cell back.
        let own = CELL.try_with(|own| own.0).unwrap_or(SHARED);
        let count = which(&self.cells[own]);
        if own == SHARED {
            count.fetch_add(1, Ordering::Relaxed);
        } else {
            // Nobody else writes it: no need to lock the line.
            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }
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
