//! Ranks on several hosts: the first one of each host speaks for the others, which share its
//! memory.

use super::element::divide;
use super::links::Wanted;
use super::shared::SharedMemory;
use super::tcp::Tcp;
use super::{Collective, Element, Exchange, Parts, ReduceOp, Values};
use crate::Result;
use mobula_core::Shard;
use std::sync::{Mutex, PoisonError};

/// Locked by nobody but the one thread of this rank that takes part.
#[derive(Debug)]
pub(super) struct Hosts {
    pub(super) shard: Shard,
    pub(super) ways: Mutex<Ways>,
}

/// How this rank reaches the others.
#[derive(Debug)]
pub(super) struct Ways {
    /// The host of each rank, in the order of their first ranks.
    pub(super) hosts: Vec<usize>,
    /// The other ranks of this host, if there are any.
    pub(super) local: Option<SharedMemory>,
    /// The other hosts, if this is the one that speaks for its own.
    pub(super) far: Option<Tcp>,
}

impl Collective for Hosts {
    fn shard(&self) -> Shard {
        self.shard
    }

    fn exchange(&self, values: Values<'_>, exchange: &Exchange) -> Result<()> {
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        match values {
            Values::F32(values) => ways.exchange(self.shard, values, exchange),
            Values::F64(values) => ways.exchange(self.shard, values, exchange),
            Values::Bf16(values) => ways.exchange(self.shard, values, exchange),
            Values::F16(values) => ways.exchange(self.shard, values, exchange),
        }
    }
}

impl Ways {
    fn exchange<T: Element>(
        &mut self,
        shard: Shard,
        values: &mut [T],
        exchange: &Exchange,
    ) -> Result<()> {
        let wanted =
            Wanted { operation: exchange.operation, code: exchange.code::<T>(), len: values.len() };
        match exchange.reduce {
            Some(op) => self.reduce(shard, values, exchange, op, &wanted),
            None => self.gather(shard, values, exchange, &wanted),
        }
    }

    /// All ranks get the whole result: that of each host goes to all others in any case.
    fn reduce<T: Element>(
        &mut self,
        Shard { world, .. }: Shard,
        values: &mut [T],
        exchange: &Exchange,
        op: ReduceOp,
        wanted: &Wanted,
    ) -> Result<()> {
        let sum = if op == ReduceOp::Mean { ReduceOp::Sum } else { op };
        self.locally(values, exchange, Some(sum), 0)?;
        if let Some(far) = &mut self.far {
            far.all_reduce(wanted, values, sum)?;
            if op == ReduceOp::Mean {
                divide(values, world);
            }
        }
        self.locally(values, exchange, None, 0)
    }

    /// One rank's part after the other.
    fn gather<T: Element>(
        &mut self,
        Shard { rank: me, world }: Shard,
        values: &mut [T],
        exchange: &Exchange,
        wanted: &Wanted,
    ) -> Result<()> {
        let len = values.len();
        for rank in 0..world {
            let part = &mut values[exchange.parts.of(rank, world, len)];
            if part.is_empty() {
                continue;
            }
            let host = self.hosts[rank];
            if host == self.hosts[me] {
                let place = self.hosts[..rank].iter().filter(|other| **other == host).count();
                self.locally(part, exchange, None, place)?;
            }
            if let Some(far) = &mut self.far {
                far.broadcast(wanted, part, host)?;
            }
            if host != self.hosts[me] {
                self.locally(part, exchange, None, 0)?;
            }
        }
        Ok(())
    }

    /// To or from one rank of this host.
    fn locally<T: Element>(
        &mut self,
        values: &mut [T],
        whole: &Exchange,
        reduce: Option<ReduceOp>,
        root: usize,
    ) -> Result<()> {
        let Some(local) = &mut self.local else {
            return Ok(());
        };
        let (parts, gather) = (Parts::Root(root), reduce.is_none());
        local.exchange(values, &Exchange { parts, reduce, gather, ..whole.clone() })
    }
}
