//! Groups that have more members in one generation than in another: asks for the room that
//! [`Sizes`](super::elastic::Sizes) says, and does what follows.

use super::GroupEvent;
use super::elastic::Sizes;
use super::gang::Gang;
use super::launch::Port;
use crate::process::wire::ToWorker;
use crate::runtime::{Lease, Runtime};
use crate::task::Placement;
use crate::{Error, GroupOptions};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long members that are told of a growth still count as those of the generation before: what they
/// have said until then is on its way.
const LAST_WORDS: Duration = Duration::from_millis(50);

impl Runtime {
    /// Room for the first members: for as many as there is now, or else for as many as are needed.
    pub(super) fn first_room(
        &self,
        options: &GroupOptions,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Vec<Arc<Lease>>, Error> {
        let mut sizes = Sizes::new(options.elastic, options.size, Instant::now()).at_start();
        let least = sizes.pop().unwrap_or(options.size);
        if let Some(leases) = self.room_now(options, &sizes) {
            return Ok(leases);
        }
        let timeout = options.placement_timeout;
        Ok(self.lease_while(options.request(least), timeout, is_wanted)?.split())
    }

    /// The first of these numbers of members for which there is room now, and that room.
    fn room_now(&self, options: &GroupOptions, asks: &[usize]) -> Option<Vec<Arc<Lease>>> {
        asks.iter().find_map(|members| match members {
            0 => Some(Vec::new()),
            _ => Some(self.lease(options.request(*members), Duration::ZERO).ok()?.split()),
        })
    }
}

impl<T> Gang<T> {
    /// When there is room to be looked for.
    pub(super) fn resize_at(&self) -> Option<Instant> {
        let growth = || self.sizes.grow_at(self.members.len()).filter(|_| self.may_grow());
        self.sizes.seek_at().or_else(growth)
    }

    /// Before a generation is placed: says which members it has.
    pub(super) fn settle_size(&mut self, now: Instant) -> Option<GroupEvent<T>> {
        match self.reform.is_announced() && self.sizes.is_elastic() {
            true => self.grown().or_else(|| self.replace(now)),
            false => None,
        }
    }

    /// The driver is told.
    pub(super) fn grown(&mut self) -> Option<GroupEvent<T>> {
        self.grown_from.take()?;
        let (generation, size) = (self.reform.generation(), self.members.len());
        Some(GroupEvent::Resized { generation, gone: Vec::new(), size })
    }

    /// Its members have room afterwards, or it is still looked for, or it was in vain.
    fn replace(&mut self, now: Instant) -> Option<GroupEvent<T>> {
        let is_homeless = |rank: &usize| self.is_homeless(&self.members[*rank]);
        let homeless: Vec<usize> = (0..self.members.len()).filter(is_homeless).collect();
        if homeless.is_empty() {
            self.sizes.end_seek();
            return None;
        }
        let placed = self.members.len() - homeless.len();
        let asks = self.sizes.seek(placed, homeless.len(), now)?;
        match self.runtime.room_now(&self.options, &asks) {
            Some(leases) => self.settle(&homeless, leases),
            None if self.sizes.has_sought(now) => self.too_few(placed),
            None => None,
        }
    }

    /// The first of those without a place get these. The generation goes on without the others, and
    /// without the last members that are too many then.
    fn settle(&mut self, homeless: &[usize], leases: Vec<Arc<Lease>>) -> Option<GroupEvent<T>> {
        self.sizes.end_seek();
        let mut gone = homeless[leases.len()..].to_vec();
        for (rank, lease) in homeless.iter().zip(leases) {
            self.members[*rank].lease = Some(lease);
        }
        let stay: Vec<usize> =
            (0..self.members.len()).filter(|rank| !gone.contains(rank)).collect();
        let size = self.sizes.largest(stay.len()).unwrap_or(stay.len());
        gone.extend(&stay[size..]);
        gone.sort_unstable();
        if gone.is_empty() {
            return None;
        }
        gone.iter().rev().for_each(|rank| self.members.remove(*rank).doom());
        self.reform.shrink(&gone);
        Some(GroupEvent::Resized { generation: self.reform.generation(), gone, size })
    }

    fn too_few(&mut self, left: usize) -> Option<GroupEvent<T>> {
        self.sizes.end_seek();
        let elastic = self.options.elastic.unwrap_or_default();
        let (group, min) = (self.options.name.clone(), elastic.min_size);
        self.not_begun(Error::TooFewMembers { group, left, min, after: elastic.replace_within })
    }

    /// Those on threads cannot be told to begin anew, and who has finished is not to.
    fn may_grow(&self) -> bool {
        let is_calm = self.reform.is_steady() && self.failures.is_empty() && !self.is_stopping;
        is_calm && self.options.placement == Placement::Process
    }

    /// Takes in more members, if it is time and there is room for some.
    pub(super) fn grow(&mut self, now: Instant) {
        if !self.may_grow() {
            return;
        }
        let asks = self.sizes.growth(self.members.len(), now);
        let Some(leases) = self.runtime.room_now(&self.options, &asks) else { return };
        self.grown_from = Some(self.members.len());
        self.reform.grow(leases.len(), now + LAST_WORDS);
        let generation = self.reform.coming();
        self.members.iter().for_each(|member| member.send(ToWorker::Reforming { generation }));
        self.members.extend(leases.into_iter().map(Port::vacant));
    }
}
