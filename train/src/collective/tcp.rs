//! Exchanges between hosts, over sockets of their own.
//!
//! Thakur, Rabenseifner and Gropp: *Optimization of Collective Communication Operations in MPICH*
//! (2005). Of P ranks and n bytes, the ring moves 2(P−1)/P·n a rank, in 2(P−1) messages, in which
//! only neighbours talk; halving and doubling moves as much in 2·log₂P messages, to ranks further
//! and further away, and is for what is small. Which one it is, and so the order of additions,
//! depends on the size and the number of ranks, unless that order is to be that of a tree: the halves of the ranks,
//! of these the halves, and so on.

use super::element::{narrow, round};
use super::links::{Links, SEGMENT, Transfer, Wanted};
use super::{Element, ReduceOp};
use crate::Result;
use bytemuck::Pod;
use std::ops::Range;

/// Bytes a rank from which on a ring is faster: then each of its messages is long enough that their
/// number does not matter.
pub(super) const RING: usize = 1 << 18;

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
    /// What is sent, where it travels as something else. Aligned for every type.
    packed: Vec<u64>,
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
        Self { ranks, me, in_tree, links, packed: Vec::new() }
    }

    /// Replaces the values on all ranks by their reduction, but for the division of a mean. They
    /// travel as `W`: what is added up is rounded to it before each of its ways, and the results
    /// once more, before they go to all.
    pub(super) fn all_reduce<W: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [W::Sum],
        op: ReduceOp,
    ) -> Result<()> {
        let bytes = values.len() * size_of::<W>();
        match self.in_tree || bytes < RING * self.ranks.len() {
            true => self.halve_and_double::<W>(wanted, values, op),
            false => self.ring::<W>(wanted, values, op),
        }
    }

    /// Replaces on each rank its part of the values by their reduction, with half of the bytes and
    /// messages of a ring that gives all of them to all. Of the other parts nothing is left.
    pub(super) fn reduce_scatter<W: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [W::Sum],
        parts: &[Range<usize>],
        op: ReduceOp,
    ) -> Result<()> {
        self.around::<W>(wanted, values, &|rank| parts[rank].clone(), self.me, op)
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
            self.exchange(wanted, values, step, |send, _| bytemuck::cast_slice(send), replace)?;
        }
        Ok(())
    }

    fn ring<W: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [W::Sum],
        op: ReduceOp,
    ) -> Result<()> {
        let (me, world, len) = (self.me, self.ranks.len(), values.len());
        let (next, before) = ((me + 1) % world, (me + world - 1) % world);
        let part = |rank: usize| len * rank / world..len * (rank + 1) / world;
        self.around::<W>(wanted, values, &part, next, op)?;
        Self::settle::<W>(&mut values[part(next)]);
        for step in 0..world - 1 {
            let (send, receive) = ((me + world + 1 - step) % world, (me + world - step) % world);
            let (send, receive) = (part(send), part(receive));
            let step = Step { to: next, send, from: before, receive };
            self.exchange_as::<W>(wanted, values, step, replace)?;
        }
        Ok(())
    }

    /// Reduces parts on their way around the ring, of which `last` ends here.
    fn around<W: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [W::Sum],
        part: &dyn Fn(usize) -> Range<usize>,
        last: usize,
        op: ReduceOp,
    ) -> Result<()> {
        let (me, world) = (self.me, self.ranks.len());
        let (to, from) = ((me + 1) % world, (me + world - 1) % world);
        // Each sends what has come to it in the step before.
        let first = last + 2 * world - 1;
        for step in 0..world - 1 {
            let (send, receive) = ((first - step) % world, (first - step - 1) % world);
            let step = Step { to, send: part(send), from, receive: part(receive) };
            self.exchange_as::<W>(wanted, values, step, combine::<W>(op))?;
        }
        Ok(())
    }

    fn halve_and_double<W: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [W::Sum],
        op: ReduceOp,
    ) -> Result<()> {
        let (me, world, all) = (self.me, self.ranks.len(), 0..values.len());
        let core = largest_power(world);
        let none = || 0..0;
        if me >= core {
            // Too many for a power of two: another one works for this one.
            let other = me - core;
            let there = Step::with(other, all.clone(), none());
            self.exchange_as::<W>(wanted, values, there, combine::<W>(op))?;
            return self.exchange_as::<W>(wanted, values, Step::with(other, none(), all), replace);
        }
        let extra = (me + core < world).then_some(me + core);
        if let Some(extra) = extra {
            let here = Step::with(extra, none(), all.clone());
            self.exchange_as::<W>(wanted, values, here, combine::<W>(op))?;
        }
        let (mut own, mut halves) = (all.clone(), Vec::new());
        for bit in 0..core.ilog2() {
            let other = me ^ (1 << bit);
            let middle = own.start + own.len() / 2;
            let (low, high) = (own.start..middle, middle..own.end);
            let (kept, given) = if me < other { (low, high) } else { (high, low) };
            let step = Step::with(other, given.clone(), kept.clone());
            self.exchange_as::<W>(wanted, values, step, combine::<W>(op))?;
            halves.push((other, given));
            own = kept;
        }
        Self::settle::<W>(&mut values[own.clone()]);
        for (other, given) in halves.into_iter().rev() {
            let step = Step::with(other, own.clone(), given.clone());
            self.exchange_as::<W>(wanted, values, step, replace)?;
            own = own.start.min(given.start)..own.end.max(given.end);
        }
        match extra {
            Some(extra) => {
                self.exchange_as::<W>(wanted, values, Step::with(extra, all, none()), replace)
            }
            None => Ok(()),
        }
    }

    /// What goes to all ranks from here is what this one has, too.
    fn settle<W: Element>(values: &mut [W::Sum]) {
        if !is_exact::<W>() {
            round::<W>(values);
        }
    }

    /// Sends a part of the values as `W`, and puts what comes to another.
    fn exchange_as<W: Element>(
        &mut self,
        wanted: &Wanted,
        values: &mut [W::Sum],
        step: Step,
        put: impl Fn(&mut W::Sum, W::Sum),
    ) -> Result<()> {
        self.exchange(wanted, values, step, pack::<W>, |old, new: W| put(old, new.widen()))
    }

    fn exchange<T: Pod, W: Pod>(
        &mut self,
        wanted: &Wanted,
        values: &mut [T],
        step: Step,
        pack: impl for<'a> Fn(&'a [T], &'a mut Vec<u64>) -> &'a [u8],
        put: impl Fn(&mut T, W),
    ) -> Result<()> {
        let (send, place) = split(values, step.send, step.receive);
        let job = Transfer {
            wanted,
            to: self.ranks[step.to],
            send: pack(send, &mut self.packed),
            from: self.ranks[step.from],
            receive: place.len() * size_of::<W>(),
            grain: size_of::<W>(),
        };
        self.links.transfer(&job, |at, bytes| {
            let (first, came) = (at / size_of::<W>(), bytemuck::cast_slice::<_, W>(bytes));
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
fn combine<W: Element>(op: ReduceOp) -> impl Fn(&mut W::Sum, W::Sum) {
    move |old, new| *old = W::combine(op, *old, new)
}

/// Whether sums travel as they are.
fn is_exact<W: Element>() -> bool {
    size_of::<W>() == size_of::<W::Sum>()
}

/// The values as they travel.
fn pack<'a, W: Element>(values: &'a [W::Sum], packed: &'a mut Vec<u64>) -> &'a [u8] {
    if is_exact::<W>() {
        return bytemuck::cast_slice(values);
    }
    packed.resize(size_of_val(values).div_ceil(8), 0);
    let packed = &mut bytemuck::cast_slice_mut(packed)[..values.len()];
    narrow::<W>(values, packed);
    bytemuck::cast_slice(packed)
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
