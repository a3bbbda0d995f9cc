//! Ranks of one host, which exchange values through shared memory.

use super::region::{Cell, Region};
use super::turns::{Memory, Turns};
use super::{Element, Exchange, Way, barrier};
use crate::Result;
use mobula_core::Member;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// One rank's view of the shared region.
#[derive(Debug)]
pub(super) struct SharedMemory(Turns<Host>);

impl SharedMemory {
    pub(super) fn new(
        member: &Arc<Member>,
        ranks: Vec<usize>,
        region: Region,
        timeout: Duration,
    ) -> Self {
        let me = ranks.iter().position(|rank| *rank == member.rank());
        let me = me.expect("a rank is among those of its host");
        let host = Host { member: Arc::clone(member), region, timeout };
        Self(Turns::new(host, ranks, me))
    }

    /// `code` is the same for operations that fit each other.
    pub(super) fn exchange_as<T: Element>(
        &mut self,
        values: &mut [T],
        exchange: &Exchange,
        code: u64,
    ) -> Result<()> {
        self.0.exchange(values, exchange, code)
    }
}

impl Way for SharedMemory {
    fn exchange<T: Element>(&mut self, values: &mut [T], exchange: &Exchange) -> Result<()> {
        self.exchange_as(values, exchange, exchange.code::<T>())
    }
}

#[derive(Debug)]
struct Host {
    member: Arc<Member>,
    region: Region,
    timeout: Duration,
}

impl Memory for Host {
    type Counter = AtomicU64;

    fn cell_bytes(&self, world: usize) -> usize {
        Region::cell_bytes(world)
    }

    #[inline]
    fn counter(&self, rank: usize, index: usize) -> &AtomicU64 {
        self.region.counter(rank, index)
    }

    #[inline]
    fn write<T: Element>(&self, cell: Cell, first: usize, values: &[T]) {
        self.region.write(cell, first, values);
    }

    #[inline]
    fn read<T: Element>(&self, cell: Cell, len: usize) -> &[T] {
        self.region.read(cell, len)
    }

    fn wait(
        &self,
        exchange: &Exchange,
        ranks: &[usize],
        is_late: impl Fn(usize) -> bool,
    ) -> Result<()> {
        let timeout = self.timeout.max(exchange.patience);
        barrier::wait(&self.member, ranks, exchange.operation, timeout, is_late)
    }
}
