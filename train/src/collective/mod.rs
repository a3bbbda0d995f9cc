//! Collective operations of a training group.

mod barrier;
mod region;
mod shared;

use crate::Result;
use mobula_core::{Member, Shard};
use shared::SharedMemory;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a rank waits for the others before it names who is late.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

/// What can be summed: `f32` and `f64`. Sealed: shared memory relies on every bit pattern being a
/// value.
pub trait Element: sealed::Number {}

mod sealed {
    /// Plain numbers without padding, for which every bit pattern is a value.
    pub trait Number: Copy + Default + std::ops::AddAssign + Send + Sync + 'static {}
    impl Number for f32 {}
    impl Number for f64 {}
}

impl Element for f32 {}
impl Element for f64 {}

/// The collectives of one rank.
#[derive(Debug)]
pub(crate) enum Collective {
    /// A world of one.
    Alone,
    /// Ranks on one host.
    Shared {
        /// Tells of lost ranks.
        member: Arc<Member>,
        /// Locked by nobody but the one thread of this rank that takes part.
        memory: Mutex<SharedMemory>,
    },
}

impl Collective {
    /// Of a member of a group whose members are all on this host.
    pub(crate) fn of(member: &Arc<Member>) -> Self {
        let (rank, world) = (member.rank(), member.world_size());
        match world {
            1 => Self::Alone,
            _ => Self::Shared {
                member: Arc::clone(member),
                memory: Mutex::new(SharedMemory::new(rank, world)),
            },
        }
    }

    /// Who this is among how many.
    pub(crate) fn shard(&self) -> Shard {
        match self {
            Self::Alone => Shard::ALL,
            Self::Shared { member, .. } => {
                Shard { rank: member.rank(), world: member.world_size() }
            }
        }
    }

    /// Replaces `values` on every rank by the sum over all ranks. All ranks add in rank order, so
    /// all get the same bits. Every rank must call it with as many values.
    pub(crate) fn all_reduce<T: Element>(&self, values: &mut [T]) -> Result<()> {
        let Self::Shared { member, memory } = self else {
            return Ok(());
        };
        let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.all_reduce(member, values)
    }

    /// Every rank's number, by rank.
    pub(crate) fn all_gather(&self, value: f64) -> Result<Vec<f64>> {
        let Shard { rank, world } = self.shard();
        let mut values = vec![0.0; world];
        values[rank] = value;
        self.all_reduce(&mut values)?;
        Ok(values)
    }
}
