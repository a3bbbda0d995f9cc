//! Exchanges through memory that ranks share, a piece at a time: who writes and reads what when.
//!
//! Each rank has its part of the values. In each turn it gives the piece after the next of every
//! other part to the rank whose part it is, reduces what it was given for the next piece of its own,
//! and takes the results of two turns before. So ranks need not keep in step, and what they have in
//! hand stays in the caches: of the values themselves each number is read once and written once.
//! A ring over sockets would move each through the kernel 2·(P−1)/P times more.
//!
//! Invariant, for cells that are used again after [`SETS`] turns (SHM-2). In turn t a rank gives for
//! t+1, waits until all have given for t, reduces, and takes t−2.
//! * It gives where it gave for t−3, which all have reduced: it has waited for their results of t−3
//!   in turn t−1.
//! * Its result goes where that of t−4 was, which all have taken: they did in their turn t−2, and
//!   gave for t, which it has waited for, in their turn t−1.
//! * At the end of an exchange it has waited for all results of all turns, and the others give for
//!   the next one when they have taken all of this one.
//!
//! `model` runs this very code on all schedules of two and three ranks.

use super::element::reduce;
use super::region::Cell;
use super::{Element, Exchange};
use crate::{Error, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Turns between a result and the taking of it.
const BEHIND: usize = 2;
/// Counter of the turns for which a rank has given.
pub(super) const GIVEN: usize = 0;
/// Counter of the turns whose result a rank has ready.
pub(super) const READY: usize = 1;
/// How many values a rank brought, and what it wants of them.
const LENGTH: usize = 2;
const WANTED: usize = 3;

/// What the ranks of a host share, in the hands of one of them.
pub(super) trait Memory {
    type Counter: Counter;
    /// Bytes that fit into a cell of so many ranks.
    fn cell_bytes(&self, world: usize) -> usize;
    fn counter(&self, rank: usize, index: usize) -> &Self::Counter;
    /// Copies values into a cell of this rank, from element `first` of it on.
    fn write<T: Element>(&self, cell: Cell, first: usize, values: &[T]);
    /// What a rank wrote into a cell.
    fn read<T: Element>(&self, cell: Cell, len: usize) -> &[T];
    /// Until none of the ranks, by their places, is late.
    fn wait(
        &self,
        exchange: &Exchange,
        ranks: &[usize],
        is_late: impl Fn(usize) -> bool,
    ) -> Result<()>;
}

/// A number that one rank stores and all load.
pub(super) trait Counter {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
}

impl Counter for AtomicU64 {
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
}

/// The turns of one rank.
#[derive(Debug)]
pub(super) struct Turns<M> {
    memory: M,
    /// The ranks that share it, the lowest first.
    ranks: Vec<usize>,
    /// This one's place among them.
    me: usize,
    /// Turns done.
    turn: u64,
}

/// One exchange under way.
struct Job<'a, T> {
    exchange: &'a Exchange,
    code: u64,
    values: &'a mut [T],
    parts: Vec<Range<usize>>,
    /// Elements of a piece.
    piece: usize,
}

impl<T> Job<'_, T> {
    /// The next piece of a rank's part.
    fn piece(&self, rank: usize, at: usize) -> Range<usize> {
        let part = &self.parts[rank];
        let start = (part.start + at * self.piece).min(part.end);
        start..(start + self.piece).min(part.end)
    }

    /// Turns, one at least: in that the ranks compare what they want.
    fn turns(&self) -> usize {
        let longest = self.parts.iter().map(Range::len).max().unwrap_or(0);
        longest.div_ceil(self.piece).max(1)
    }
}

impl<M: Memory> Turns<M> {
    pub(super) fn new(memory: M, ranks: Vec<usize>, me: usize) -> Self {
        Self { memory, ranks, me, turn: 0 }
    }

    /// `code` is the same for operations that fit each other.
    pub(super) fn exchange<T: Element>(
        &mut self,
        values: &mut [T],
        exchange: &Exchange,
        code: u64,
    ) -> Result<()> {
        let world = self.ranks.len();
        let parts = (0..world).map(|rank| exchange.parts.of(rank, world, values.len())).collect();
        let piece = self.memory.cell_bytes(world) / size_of::<T>();
        let mut job = Job { exchange, code, values, parts, piece };
        self.store(LENGTH, job.values.len() as u64);
        self.store(WANTED, code);
        let turns = job.turns();
        self.give(&job, 0);
        for at in 0..turns + BEHIND {
            if at + 1 < turns {
                self.give(&job, at + 1);
            }
            if at < turns {
                self.reduce(&mut job, at)?;
            }
            if at >= BEHIND {
                self.take(&mut job, at - BEHIND)?;
            }
        }
        self.turn += turns as u64;
        Ok(())
    }

    fn give<T: Element>(&self, job: &Job<'_, T>, at: usize) {
        let turn = self.turn + at as u64;
        for index in (0..self.ranks.len()).filter(|rank| *rank != self.me) {
            if job.exchange.reduce.is_some() {
                let cell = Cell { owner: self.me, turn, index };
                self.memory.write(cell, 0, &job.values[job.piece(index, at)]);
            }
        }
        self.count(GIVEN, turn);
    }

    /// The next piece of this rank's part, reduced or as it is, for itself and the others.
    fn reduce<T: Element>(&self, job: &mut Job<'_, T>, at: usize) -> Result<()> {
        let turn = self.turn + at as u64;
        self.wait(job.exchange, GIVEN, turn)?;
        if at == 0 {
            // Nobody says what it wants next before this rank is ready.
            self.check(job)?;
        }
        self.reduce_given(job, at, turn);
        self.count(READY, turn);
        Ok(())
    }

    fn reduce_given<T: Element>(&self, job: &mut Job<'_, T>, at: usize, turn: u64) {
        let (world, own) = (self.ranks.len(), job.piece(self.me, at));
        let result = Cell { owner: self.me, turn, index: world };
        let Some(op) = job.exchange.reduce else {
            return self.memory.write(result, 0, &job.values[own]);
        };
        let others = |rank| {
            let given = Cell { owner: rank, turn, index: self.me };
            self.memory.read(given, own.len())
        };
        reduce(op, &mut job.values[own.clone()], (self.me, world), others, |first, block| {
            if job.exchange.gather {
                self.memory.write(result, first, block);
            }
        });
    }

    /// The other ranks' results of a turn.
    fn take<T: Element>(&self, job: &mut Job<'_, T>, at: usize) -> Result<()> {
        let turn = self.turn + at as u64;
        self.wait(job.exchange, READY, turn)?;
        if !job.exchange.gather {
            return Ok(());
        }
        let world = self.ranks.len();
        for owner in (0..world).filter(|rank| *rank != self.me) {
            let piece = job.piece(owner, at);
            let result = self.memory.read(Cell { owner, turn, index: world }, piece.len());
            job.values[piece].copy_from_slice(result);
        }
        Ok(())
    }

    fn check<T: Element>(&self, job: &Job<'_, T>) -> Result<()> {
        let counter = |rank, index| self.memory.counter(rank, index).load(Ordering::Relaxed);
        let (len, wanted) = (job.values.len() as u64, job.code);
        for (at, other) in self.ranks.iter().copied().enumerate() {
            let (rank, other_len) = (self.ranks[self.me], counter(at, LENGTH));
            if other_len != len {
                let (len, other_len) = (len as usize, other_len as usize);
                return Err(Error::CollectiveLength { rank, len, other, other_len });
            }
            if counter(at, WANTED) != wanted {
                let operation = job.exchange.operation;
                return Err(Error::CollectiveMismatch { rank, operation, other });
            }
        }
        Ok(())
    }

    fn store(&self, index: usize, value: u64) {
        self.memory.counter(self.me, index).store(value, Ordering::Relaxed);
    }

    /// This turn is done.
    fn count(&self, index: usize, turn: u64) {
        self.memory.counter(self.me, index).store(turn + 1, Ordering::Release);
    }

    fn wait(&self, exchange: &Exchange, counter: usize, turn: u64) -> Result<()> {
        let is_late = |at: usize| self.memory.counter(at, counter).load(Ordering::Acquire) <= turn;
        self.memory.wait(exchange, &self.ranks, is_late)
    }
}
