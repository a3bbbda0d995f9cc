//! Collective operations of a training group.

mod barrier;
mod element;
mod region;
mod shared;

pub use element::{Element, ReduceOp, Values};

use crate::Result;
use mobula_core::{Member, Shard};
use region::Region;
use shared::SharedMemory;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a rank waits for the others before it names who is late.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

/// What the ranks of a group do with values that each of them has as many of. All ranks must call
/// the same, in the same order; who calls something else is an error on all of them, and so is who
/// does not come within a minute. All results are in place, have the same bits on all ranks that
/// have them, and do not depend on who came first.
pub trait Collective: std::fmt::Debug + Send + Sync {
    /// Who this is among how many.
    fn shard(&self) -> Shard;

    /// Reduces the parts of the values to the ranks they belong to, or takes them as they are, and
    /// then gives them to all ranks, or leaves them.
    fn exchange(&self, values: Values<'_>, exchange: &Exchange) -> Result<()>;
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    operation: &'static str,
    parts: Parts,
    /// `None` takes each part as its rank has it.
    reduce: Option<ReduceOp>,
    /// Whether all ranks get all parts.
    gather: bool,
}

/// Which values belong to which rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parts {
    /// As many to each, one after the other.
    Equal,
    /// All to one.
    Root(usize),
}

impl Parts {
    fn of(self, rank: usize, world: usize, len: usize) -> Range<usize> {
        match self {
            Self::Equal => len * rank / world..len * (rank + 1) / world,
            Self::Root(root) if root == rank => 0..len,
            Self::Root(_) => len..len,
        }
    }
}

impl Exchange {
    /// A number that differs between operations that do not fit each other.
    fn code<T: Element>(&self) -> u64 {
        let parts = match self.parts {
            Parts::Equal => 0,
            Parts::Root(root) => 1 + root as u64,
        };
        let reduce = self.reduce.map_or(0, |op| 1 + op as u64);
        ((parts * 4 + reduce) * 2 + u64::from(self.gather)) * 4 + T::KIND
    }
}

impl dyn Collective + '_ {
    /// Replaces the values on every rank by their reduction over all ranks.
    pub fn all_reduce<T: Element>(&self, values: &mut [T], op: ReduceOp) -> Result<()> {
        self.run("all_reduce", values, Parts::Equal, Some(op), true)
    }

    /// Replaces the [part](Self::part) of this rank by its reduction over all ranks. What becomes of
    /// the other parts is not said.
    pub fn reduce_scatter<T: Element>(&self, values: &mut [T], op: ReduceOp) -> Result<()> {
        self.run("reduce_scatter", values, Parts::Equal, Some(op), false)
    }

    /// Replaces the [part](Self::part) of each other rank by what that one has there.
    pub fn all_gather<T: Element>(&self, values: &mut [T]) -> Result<()> {
        self.run("all_gather", values, Parts::Equal, None, true)
    }

    /// Replaces the values on every rank by those of `root`.
    pub fn broadcast<T: Element>(&self, values: &mut [T], root: usize) -> Result<()> {
        self.run("broadcast", values, Parts::Root(root), None, true)
    }

    /// Returns when all ranks have come here.
    pub fn barrier(&self) -> Result<()> {
        self.run("barrier", &mut [0f32; 0], Parts::Equal, None, true)
    }

    /// The part of `len` values that belongs to this rank.
    pub fn part(&self, len: usize) -> Range<usize> {
        let Shard { rank, world } = self.shard();
        Parts::Equal.of(rank, world, len)
    }

    /// Every rank's number, by rank.
    pub(crate) fn gather_one(&self, value: f64) -> Result<Vec<f64>> {
        let Shard { rank, world } = self.shard();
        let mut values = vec![0.0; world];
        values[rank] = value;
        self.all_gather(&mut values)?;
        Ok(values)
    }

    fn run<T: Element>(
        &self,
        operation: &'static str,
        values: &mut [T],
        parts: Parts,
        reduce: Option<ReduceOp>,
        gather: bool,
    ) -> Result<()> {
        self.exchange(T::values(values), &Exchange { operation, parts, reduce, gather })
    }
}

/// A world of one.
#[derive(Debug)]
pub(crate) struct Alone;

impl Collective for Alone {
    fn shard(&self) -> Shard {
        Shard::ALL
    }

    fn exchange(&self, _: Values<'_>, _: &Exchange) -> Result<()> {
        Ok(())
    }
}

/// Ranks on one host. Locked by nobody but the one thread of this rank that takes part.
#[derive(Debug)]
struct OneHost {
    shard: Shard,
    memory: Mutex<SharedMemory>,
}

impl Collective for OneHost {
    fn shard(&self) -> Shard {
        self.shard
    }

    fn exchange(&self, values: Values<'_>, exchange: &Exchange) -> Result<()> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        match values {
            Values::F32(values) => memory.exchange(values, exchange),
            Values::F64(values) => memory.exchange(values, exchange),
            Values::Bf16(values) => memory.exchange(values, exchange),
            Values::F16(values) => memory.exchange(values, exchange),
        }
    }
}

/// Of a member of a group whose members are all on this host. Waits for all of them.
pub(crate) fn connect(member: &Arc<Member>) -> Result<Arc<dyn Collective>> {
    let shard = Shard { rank: member.rank(), world: member.world_size() };
    if shard.world == 1 {
        return Ok(Arc::new(Alone));
    }
    let made = if shard.rank == 0 { Some(Region::create(shard.world)?) } else { None };
    let path = made.as_ref().map_or("", |(_, path)| path);
    let paths = member.all_gather("shared-memory", path.as_bytes(), TIMEOUT)?;
    let path = String::from_utf8_lossy(&paths[0]).into_owned();
    let region = match made {
        Some((region, _)) => region,
        None => Region::open(Path::new(&path), shard.world)?,
    };
    let ranks = (0..shard.world).collect();
    let memory = Mutex::new(SharedMemory::new(member, ranks, region));
    Ok(Arc::new(OneHost { shard, memory }))
}
