//! Collective operations of a training group.

mod barrier;
mod region;
mod shared;

use crate::Result;
use mobula_core::Member;
use shared::SharedMemory;
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
    Shared(SharedMemory),
}

impl Collective {
    /// Of a member of a group whose members are all on this host.
    pub(crate) fn of(member: &Member) -> Self {
        match member.world_size() {
            1 => Self::Alone,
            _ => Self::Shared(SharedMemory::new(member.rank(), member.world_size())),
        }
    }

    /// Replaces `values` on every rank by the sum over all ranks. All ranks add in rank order, so
    /// all get the same bits. Every rank must call it with as many values.
    pub(crate) fn all_reduce<T: Element>(
        &mut self,
        member: Option<&Member>,
        values: &mut [T],
    ) -> Result<()> {
        match (self, member) {
            (Self::Shared(shared), Some(member)) => shared.all_reduce(member, values),
            _ => Ok(()),
        }
    }
}
