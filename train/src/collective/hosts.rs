//! Ranks on several hosts: the first one of each host speaks for the others, which share its
//! memory.

use super::element::divide;
use super::links::Wanted;
use super::shared::SharedMemory;
use super::tcp::{RING, Tcp};
use super::{Compression, Element, Exchange, LONG, Parts, ReduceOp, Values, Way};
use crate::Result;
use mobula_core::Shard;
use std::ops::Range;

/// How this rank reaches the others.
#[derive(Debug)]
pub(super) struct Ways {
    pub(super) shard: Shard,
    /// The host of each rank, in the order of their first ranks.
    pub(super) hosts: Vec<usize>,
    /// How gradients travel to other hosts.
    pub(super) compression: Compression,
    /// Whether ranks are added up in a tree.
    pub(super) in_tree: bool,
    /// The other ranks of this host, if there are any.
    pub(super) local: Option<SharedMemory>,
    /// The other hosts, if this is the one that speaks for its own.
    pub(super) far: Option<Tcp>,
}

impl Way for Ways {
    fn exchange<T: Element>(&mut self, values: &mut [T], exchange: &Exchange) -> Result<()> {
        let (operation, patience) = (exchange.operation, exchange.patience);
        let (code, len) = (exchange.code::<T>(), values.len());
        let wanted = Wanted { operation, code, len, patience };
        let Some(op) = exchange.reduce else {
            return self.gather(values, exchange, &wanted);
        };
        match T::values(values) {
            Values::F32(values) => self.reduce(values, exchange, op, &wanted),
            Values::F64(values) => self.reduce(values, exchange, op, &wanted),
            Values::Bf16(values) => self.reduce_widened(values, exchange, op, &wanted),
            Values::F16(values) => self.reduce_widened(values, exchange, op, &wanted),
        }
    }
}

impl Ways {
    fn reduce_widened<T: Element>(
        &mut self,
        values: &mut [T],
        exchange: &Exchange,
        op: ReduceOp,
        wanted: &Wanted,
    ) -> Result<()> {
        let mut sums: Vec<T::Sum> = values.iter().map(|value| value.widen()).collect();
        self.reduce(&mut sums, exchange, op, wanted)?;
        values.iter_mut().zip(sums).for_each(|(to, sum)| *to = T::narrow(sum));
        Ok(())
    }

    /// All ranks get the whole result, or those of a host the parts of all of them.
    fn reduce<T: Element<Sum = T>>(
        &mut self,
        values: &mut [T],
        exchange: &Exchange,
        op: ReduceOp,
        wanted: &Wanted,
    ) -> Result<()> {
        let sum = if op == ReduceOp::Mean { ReduceOp::Sum } else { op };
        self.locally(values, exchange, wanted, Some(sum), 0)?;
        if let Some(parts) = self.parts::<T>(values.len(), exchange) {
            return self.reduce_scatter(values, exchange, op, wanted, &parts);
        }
        if let Some(far) = &mut self.far {
            let (rounded, exact) = values.split_at_mut(match self.compression {
                Compression::None => 0,
                Compression::Bf16 => exchange.rounded,
            });
            far.all_reduce::<T::Wire>(wanted, rounded, sum)?;
            far.all_reduce::<T>(wanted, exact, sum)?;
            if op == ReduceOp::Mean {
                divide(values, self.shard.world);
            }
        }
        self.locally(values, exchange, wanted, None, 0)
    }

    /// The parts of all ranks of each host, if they are to have no more and it is worth it: long enough
    /// for a ring, in which the order is another one than in a tree.
    fn parts<T>(&self, len: usize, exchange: &Exchange) -> Option<Vec<Range<usize>>> {
        let (world, hosts) = (self.shard.world, self.hosts.last()? + 1);
        let is_divided = !exchange.gather && !matches!(exchange.parts, Parts::Root(_));
        let is_alike = exchange.rounded == 0 || exchange.rounded == len;
        let is_long = len * size_of::<T>() >= RING * hosts && !self.in_tree;
        if !(is_divided && is_alike && is_long && self.hosts.is_sorted()) {
            return None;
        }
        let of = |rank: usize| exchange.parts.of(rank, world, len);
        let ranks = self.hosts.chunk_by(|a, b| a == b).scan(0, |end, ranks| {
            let first = *end;
            *end += ranks.len();
            Some(first..*end)
        });
        Some(ranks.map(|ranks| of(ranks.start).start..of(ranks.end - 1).end).collect())
    }

    /// Of what each host has the sum of its ranks.
    fn reduce_scatter<T: Element<Sum = T>>(
        &mut self,
        values: &mut [T],
        exchange: &Exchange,
        op: ReduceOp,
        wanted: &Wanted,
        parts: &[Range<usize>],
    ) -> Result<()> {
        let sum = if op == ReduceOp::Mean { ReduceOp::Sum } else { op };
        let own = parts[self.hosts[self.shard.rank]].clone();
        if let Some(far) = &mut self.far {
            match self.compression {
                Compression::Bf16 if exchange.rounded > 0 => {
                    far.reduce_scatter::<T::Wire>(wanted, values, parts, sum)?;
                }
                _ => far.reduce_scatter::<T>(wanted, values, parts, sum)?,
            }
            if op == ReduceOp::Mean {
                divide(&mut values[own.clone()], self.shard.world);
            }
        }
        self.locally(&mut values[own], exchange, wanted, None, 0)
    }

    /// One rank's part after the other.
    fn gather<T: Element>(
        &mut self,
        values: &mut [T],
        exchange: &Exchange,
        wanted: &Wanted,
    ) -> Result<()> {
        let (len, Shard { rank: me, world }) = (values.len(), self.shard);
        for rank in 0..world {
            let part = &mut values[exchange.parts.of(rank, world, len)];
            if part.is_empty() {
                continue;
            }
            let host = self.hosts[rank];
            if host == self.hosts[me] {
                let place = self.hosts[..rank].iter().filter(|other| **other == host).count();
                self.locally(part, exchange, wanted, None, place)?;
            }
            if let Some(far) = &mut self.far {
                far.broadcast(wanted, part, host)?;
            }
            if host != self.hosts[me] {
                self.locally(part, exchange, wanted, None, 0)?;
            }
        }
        Ok(())
    }

    /// To or from one rank of this host.
    fn locally<T: Element>(
        &mut self,
        values: &mut [T],
        whole: &Exchange,
        wanted: &Wanted,
        reduce: Option<ReduceOp>,
        root: usize,
    ) -> Result<()> {
        let Some(local) = &mut self.local else {
            return Ok(());
        };
        let (parts, gather) = (Parts::Root(root), reduce.is_none());
        // What the others wait for may be an exchange between hosts, which has deadlines of its own.
        let patience = if gather { LONG } else { whole.patience };
        let exchange = Exchange { parts, reduce, gather, patience, ..whole.clone() };
        local.exchange_as(values, &exchange, wanted.code)
    }
}
