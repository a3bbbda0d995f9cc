//! Exchanges between hosts, over sockets of their own.
//!
//! Thakur, Rabenseifner and Gropp: *Optimization of Collective Communication Operations in MPICH*
//! (2005). Of P ranks and n bytes, the ring moves 2(P−1)/P·n a rank, in 2(P−1) messages, in which
//! only neighbours talk; halving and doubling moves as much in 2·log₂P messages, to ranks further
//! and further away, and is for what is small. Which one it is, and so the order of additions,
//! depends on the size and the number of ranks, unless that order is to be that of a tree: the halves of the ranks,
//! of these the halves, and so on.

use super::links::{Links, SEGMENT, Transfer, Wanted};
use super::{Element, ReduceOp};
use crate::Result;
use std::ops::Range;

/// Bytes a rank from which on a ring is faster: then each of its messages is long enough that their
/// number does not matter.
const RING: usize = 1 << 18;

/// What one rank of several hosts does.
#[derive(Debug)]
pub(super) struct Tcp {
    /// The ranks that take part, the lowest first.
    ranks: Vec<usize>,
    /// This one's place among them.
    me: usize,
    /// Whether ranks are added up in a tree.
    in_tree: bool,
    links: Links,
}

impl Tcp {
    /// The places that `me` of `world` talks to.
    pub(super) fn peers(me: usize, world: usize) -> Vec<usize> {
        let core = largest_power(world);
        let mut peers = vec![(me + 1) % world, (me + world - 1) % world];
        match me < core {
            true => {
                peers.extend((0..core.ilog2()).map(|bit| me ^ (1 << bit)));
                peers.extend((me + core < world).then_some(me + core));
            }
            false => peers.push(me - core),
        }
        peers.sort_unstable();
        peers.dedup();
        peers.retain(|peer| *peer != me);
        peers
    }

    pub(super) fn new(ranks: Vec<usize>, me: usize, in_tree: bool, links: Links) -> Self {
        Self { ranks, me, in_tree, links }
    }

    /// Replaces the values on all ranks by their reduction, but for the division of a mean.
    pub(super) fn all_reduce<T: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        match self.in_tree || size_of_val(values) < RING * self.ranks.len() {
            true => self.halve_and_double(wanted, values, op),
            false => self.ring(wanted, values, op),
        }
    }

    /// Replaces the values on all ranks by those of `root`: along a chain, segment by segment.
    pub(super) fn broadcast<T: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [T],
        root: usize,
    ) -> Result<()> {
        let (me, world) = (self.me, self.ranks.len());
        let (next, before) = ((me + 1) % world, (me + world - 1) % world);
        let (is_first, is_last) = (me == root, next == root);
        let size = SEGMENT / size_of::<T>();
        let segments = values.len().div_ceil(size);
        let segment = |at: usize, is_wanted: bool| match is_wanted && at < segments {
            true => at * size..((at + 1) * size).min(values.len()),
            false => 0..0,
        };
        let steps: Vec<_> = (0..=segments)
            .map(|at| (segment(at.wrapping_sub(1), !is_last), segment(at, !is_first)))
            .collect();
        for (send, receive) in steps {
            let step = Step { to: next, send, from: before, receive };
            self.exchange(wanted, values, step, replace)?;
        }
        Ok(())
    }

    fn ring<T: Element>(&mut self, wanted: &Wanted, values: &mut [T], op: ReduceOp) -> Result<()> {
        let (me, world, len) = (self.me, self.ranks.len(), values.len());
        let (next, before) = ((me + 1) % world, (me + world - 1) % world);
        let part = |rank: usize| len * rank / world..len * (rank + 1) / world;
        for step in 0..world - 1 {
            let (send, receive) = ((me + world - step) % world, (me + world - step - 1) % world);
            let (send, receive) = (part(send), part(receive));
            let step = Step { to: next, send, from: before, receive };
            self.exchange(wanted, values, step, combine(op))?;
        }
        for step in 0..world - 1 {
            let (send, receive) = ((me + world + 1 - step) % world, (me + world - step) % world);
            let (send, receive) = (part(send), part(receive));
            let step = Step { to: next, send, from: before, receive };
            self.exchange(wanted, values, step, replace)?;
        }
        Ok(())
    }

    fn halve_and_double<T: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        let (me, world, all) = (self.me, self.ranks.len(), 0..values.len());
        let core = largest_power(world);
        let none = || 0..0;
        if me >= core {
            // Too many for a power of two: another one works for this one.
            let other = me - core;
            let there = Step::with(other, all.clone(), none());
            self.exchange(wanted, values, there, combine(op))?;
            return self.exchange(wanted, values, Step::with(other, none(), all), replace);
        }
        let extra = (me + core < world).then_some(me + core);
        if let Some(extra) = extra {
            let here = Step::with(extra, none(), all.clone());
            self.exchange(wanted, values, here, combine(op))?;
        }
        let (mut own, mut halves) = (all.clone(), Vec::new());
        for bit in 0..core.ilog2() {
            let other = me ^ (1 << bit);
            let middle = own.start + own.len() / 2;
            let (low, high) = (own.start..middle, middle..own.end);
            let (kept, given) = if me < other { (low, high) } else { (high, low) };
            let step = Step::with(other, given.clone(), kept.clone());
            self.exchange(wanted, values, step, combine(op))?;
            halves.push((other, given));
            own = kept;
        }
        for (other, given) in halves.into_iter().rev() {
            let step = Step::with(other, own.clone(), given.clone());
            self.exchange(wanted, values, step, replace)?;
            own = own.start.min(given.start)..own.end.max(given.end);
        }
        match extra {
            Some(extra) => self.exchange(wanted, values, Step::with(extra, all, none()), replace),
            None => Ok(()),
        }
    }

    /// Sends a part of the values, and puts what comes to another.
    fn exchange<T: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [T],
        step: Step,
        put: impl Fn(&mut T, T),
    ) -> Result<()> {
        let (send, place) = split(values, step.send, step.receive);
        let job = Transfer {
            wanted,
            to: self.ranks[step.to],
            send: bytemuck::cast_slice(send),
            from: self.ranks[step.from],
            receive: size_of_val(place),
            grain: size_of::<T>(),
        };
        self.links.transfer(&job, |at, bytes| {
            let (first, came) = (at / size_of::<T>(), bytemuck::cast_slice::<_, T>(bytes));
            place[first..].iter_mut().zip(came).for_each(|(old, new)| put(old, *new));
        })
    }
}

/// What goes where at one time; places among the ranks, and parts of the values.
struct Step {
    to: usize,
    send: Range<usize>,
    from: usize,
    receive: Range<usize>,
}

impl Step {
    fn with(other: usize, send: Range<usize>, receive: Range<usize>) -> Self {
        Self { to: other, send, from: other, receive }
    }
}

/// Adds what comes.
fn combine<T: Element>(op: ReduceOp) -> impl Fn(&mut T, T) {
    move |old, new| *old = T::narrow(T::combine(op, old.widen(), new.widen()))
}

/// Takes what comes for what was there.
fn replace<T>(old: &mut T, new: T) {
    *old = new;
}

/// Two parts that do not overlap: one to read and one to write.
fn split<T>(values: &mut [T], read: Range<usize>, write: Range<usize>) -> (&[T], &mut [T]) {
    match (read.is_empty(), write.is_empty()) {
        (true, _) => (&[], &mut values[write]),
        (_, true) => (&values[read], &mut []),
        _ if read.start < write.start => {
            let (low, high) = values.split_at_mut(write.start);
            (&low[read], &mut high[..write.len()])
        }
        _ => {
            let (low, high) = values.split_at_mut(read.start);
            (&high[..read.len()], &mut low[write])
        }
    }
}

fn largest_power(world: usize) -> usize {
    1 << world.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_talks_to_whom_is_mutual() {
        for world in 2..40 {
            for me in 0..world {
                let peers = Tcp::peers(me, world);
                assert!(peers.iter().all(|peer| Tcp::peers(*peer, world).contains(&me)));
            }
        }
        assert_eq!(Tcp::peers(0, 8), [1, 2, 4, 7]);
        assert_eq!(Tcp::peers(0, 2), [1]);
    }
}
