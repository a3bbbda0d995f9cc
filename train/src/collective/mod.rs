//! Collective operations of a training group.

pub(crate) mod barrier;
pub(crate) mod connect;
mod element;
mod hosts;
mod links;
#[cfg(test)]
mod model;
mod region;
mod shared;
mod tcp;
#[cfg(test)]
mod threads;
mod turns;

pub use element::{Element, ReduceOp, Values};

pub(crate) use connect::connect;
#[cfg(test)]
pub(crate) use threads::threads;

use crate::{Error, Result};
use mobula_core::Shard;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a rank waits for the others before it names who is late, unless told otherwise.
pub(crate) fn default_timeout() -> Duration {
    Duration::from_secs(60)
}

/// How ranks reach each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// Through shared memory on one host, and over sockets between hosts.
    #[default]
    Auto,
    /// Over sockets also on one host: to measure and to test what happens between hosts.
    Tcp,
    /// Gradients where they are, on the workers' GPUs, by NVIDIA's NCCL, which the loader has to find as
    /// `libnccl.so.2`; all else as [`Auto`](Self::Auto). For workers that hold a GPU each, and not with
    /// `virtual_shards`, `local_sgd` or `compression`.
    Nccl,
}

/// How gradients travel between hosts. On one host they are never rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// As they are, in `f32`.
    #[default]
    None,
    /// In half as many bytes, as with PyTorch's `bf16_compress_hook`. What is on its way is rounded
    /// to `bf16`, added up in `f32`, and the sum rounded once more: each of at most as many roundings
    /// as there are hosts is off by at most 2⁻⁸ of the sum so far. All ranks get the same bits.
    Bf16,
}

/// What the ranks of a group do with values that each of them has as many of, in place. All ranks must
/// call the same, in the same order. Results have the same bits on all ranks that have them, and do
/// not depend on who came first.
///
/// A rank that notices that another one calls something else, brings another number of values or
/// does not come in time gets an error that names it; others may wait until their own time is up.
/// After an error every further operation is one.
pub trait Collective: std::fmt::Debug + Send + Sync {
    /// Who this is among how many.
    fn shard(&self) -> Shard;

    /// Reduces the parts of the values to the ranks they belong to, or takes them as they are, and
    /// then gives them to all ranks, or leaves them.
    fn exchange(&self, values: Values<'_>, exchange: &Exchange) -> Result<()>;

    /// Whether ranks are on several hosts, so that an exchange takes long and no processor of this one.
    fn is_between_hosts(&self) -> bool {
        false
    }

    /// A number of the machine of each rank, however they reach each other. By default the same for all.
    fn machines(&self) -> Vec<u64> {
        vec![0; self.shard().world]
    }
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
    /// How many values, the first ones, are gradients, which may be rounded between hosts.
    rounded: usize,
    /// The least time that a rank waits for the others, whatever the timeout is.
    patience: Duration,
}

/// For what one rank does while the others wait, such as to write a checkpoint. A lost rank is
/// noticed sooner, by its heartbeats.
const LONG: Duration = Duration::from_secs(600);

/// Which values belong to which rank.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Parts {
    /// As many to each, one after the other.
    Equal,
    /// All to one.
    Root(usize),
    /// From each of these to the next.
    Bounds(Arc<[usize]>),
}

impl Parts {
    fn of(&self, rank: usize, world: usize, len: usize) -> Range<usize> {
        match self {
            Self::Equal => len * rank / world..len * (rank + 1) / world,
            Self::Root(root) if *root == rank => 0..len,
            Self::Root(_) => len..len,
            Self::Bounds(bounds) => bounds[rank]..bounds[rank + 1],
        }
    }

    fn code(&self) -> u64 {
        match self {
            Self::Equal => 0,
            Self::Root(root) => 1 + *root as u64,
            Self::Bounds(bounds) => {
                let bytes: Vec<u8> = bounds.iter().flat_map(|at| at.to_le_bytes()).collect();
                1 << 32 | u64::from(crc32fast::hash(&bytes))
            }
        }
    }
}

impl Exchange {
    /// A number that differs between operations that do not fit each other.
    fn code<T: Element>(&self) -> u64 {
        let reduce = self.reduce.map_or(0, |op| 1 + op as u64);
        ((self.parts.code() * 4 + reduce) * 2 + u64::from(self.gather)) * 4 + T::KIND
    }
}

impl dyn Collective + '_ {
    /// Replaces the values on every rank by their reduction over all ranks.
    pub fn all_reduce<T: Element>(&self, values: &mut [T], op: ReduceOp) -> Result<()> {
        self.run("all_reduce", values, Parts::Equal, Some(op), true)
    }

    /// Sums gradients, which [`Compression`] is for, and `exact` more numbers behind them, which it is
    /// not.
    pub(crate) fn sum_gradients(&self, values: &mut [f32], exact: usize) -> Result<()> {
        let rounded = values.len().saturating_sub(exact);
        let (parts, reduce, patience) = (Parts::Equal, Some(ReduceOp::Sum), Duration::ZERO);
        let operation = "all_reduce";
        let exchange = Exchange { operation, parts, reduce, gather: true, rounded, patience };
        self.exchange(Values::F32(values), &exchange)
    }

    /// Replaces the `part` of this rank by its reduction over all ranks. What becomes of
    /// the other parts is not said.
    pub fn reduce_scatter<T: Element>(&self, values: &mut [T], op: ReduceOp) -> Result<()> {
        self.run("reduce_scatter", values, Parts::Equal, Some(op), false)
    }

    /// Replaces the `part` of each other rank by what that one has there.
    pub fn all_gather<T: Element>(&self, values: &mut [T]) -> Result<()> {
        self.run("all_gather", values, Parts::Equal, None, true)
    }

    /// Sums gradients of which each rank gets a part; parts begin at these places, and the last is their
    /// number.
    pub(crate) fn scatter_gradients(
        &self,
        values: &mut [f32],
        bounds: &Arc<[usize]>,
    ) -> Result<()> {
        let (parts, reduce) = (Parts::Bounds(Arc::clone(bounds)), Some(ReduceOp::Sum));
        let (operation, rounded, patience) = ("reduce_scatter", values.len(), Duration::ZERO);
        let exchange = Exchange { operation, parts, reduce, gather: false, rounded, patience };
        self.exchange(Values::F32(values), &exchange)
    }

    /// The same as `all_gather` for such parts.
    pub(crate) fn all_gather_parts<T: Element>(
        &self,
        values: &mut [T],
        bounds: &Arc<[usize]>,
    ) -> Result<()> {
        self.run("all_gather", values, Parts::Bounds(Arc::clone(bounds)), None, true)
    }

    /// Replaces the values on every rank by those of `root`.
    pub fn broadcast<T: Element>(&self, values: &mut [T], root: usize) -> Result<()> {
        let world = self.shard().world;
        if root >= world {
            return Err(Error::CollectiveRoot { root, world });
        }
        self.run("broadcast", values, Parts::Root(root), None, true)
    }

    /// Returns when all ranks have come here.
    pub fn barrier(&self) -> Result<()> {
        self.wait_for_all(Duration::ZERO, false).map(drop)
    }

    /// The same after something that may take long on one of them. Whether it is so on any rank.
    pub(crate) fn patient_any(&self, here: bool) -> Result<bool> {
        self.wait_for_all(LONG, here)
    }

    fn wait_for_all(&self, patience: Duration, here: bool) -> Result<bool> {
        let (operation, parts, reduce) = ("barrier", Parts::Equal, Some(ReduceOp::Max));
        let exchange = Exchange { operation, parts, reduce, gather: true, rounded: 0, patience };
        let mut any = [f32::from(u8::from(here))];
        self.exchange(Values::F32(&mut any), &exchange)?;
        Ok(any[0] > 0.0)
    }

    /// The part of `len` values that belongs to this rank.
    pub fn part(&self, len: usize) -> Range<usize> {
        let Shard { rank, world } = self.shard();
        Parts::Equal.of(rank, world, len)
    }

    /// Every rank's number, by rank.
    pub(crate) fn gather_one(&self, value: f64) -> Result<Vec<f64>> {
        Ok(self.gather_each([value])?.into_iter().map(|[value]| value).collect())
    }

    /// The same of some.
    pub(crate) fn gather_each<const N: usize>(&self, own: [f64; N]) -> Result<Vec<[f64; N]>> {
        let Shard { rank, world } = self.shard();
        // A sum with zeros is one operation, also between hosts.
        let mut values = vec![[0.0; N]; world];
        values[rank] = own;
        self.all_reduce(values.as_flattened_mut(), ReduceOp::Sum)?;
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
        let (rounded, patience) = (0, Duration::ZERO);
        let exchange = Exchange { operation, parts, reduce, gather, rounded, patience };
        self.exchange(T::values(values), &exchange)
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

/// Ranks that are connected in some way.
#[derive(Debug)]
struct Connected<W> {
    shard: Shard,
    /// Locked by nobody but the one thread of this rank that takes part.
    state: Mutex<State<W>>,
    is_between_hosts: bool,
    machines: Vec<u64>,
}

#[derive(Debug)]
struct State<W> {
    way: W,
    /// Why it is of no use any more: what the others have in hand after an operation that failed is
    /// not known.
    broken: Option<String>,
}

/// A way to exchange values.
trait Way: std::fmt::Debug + Send {
    fn exchange<T: Element>(&mut self, values: &mut [T], exchange: &Exchange) -> Result<()>;
}

impl<W: Way> Connected<W> {
    fn new(shard: Shard, way: W, is_between_hosts: bool, machines: Vec<u64>) -> Self {
        Self { shard, state: Mutex::new(State { way, broken: None }), is_between_hosts, machines }
    }
}

impl<W: Way> Collective for Connected<W> {
    fn shard(&self) -> Shard {
        self.shard
    }

    fn is_between_hosts(&self) -> bool {
        self.is_between_hosts
    }

    fn machines(&self) -> Vec<u64> {
        self.machines.clone()
    }

    fn exchange(&self, values: Values<'_>, exchange: &Exchange) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = &state.broken {
            let (operation, first) = (exchange.operation, first.clone());
            return Err(Error::CollectiveBroken { operation, first });
        }
        state.broken = Some("a panic".to_owned());
        let done = match values {
            Values::F32(values) => state.way.exchange(values, exchange),
            Values::F64(values) => state.way.exchange(values, exchange),
            Values::Bf16(values) => state.way.exchange(values, exchange),
            Values::F16(values) => state.way.exchange(values, exchange),
        };
        state.broken = done.as_ref().err().map(ToString::to_string);
        done
    }
}
