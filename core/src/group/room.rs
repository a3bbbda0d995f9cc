//! Where members run: what they hold, and new room for those whose machine is gone.

use super::gang::{Gang, Notice};
use super::launch::{GOODBYE, Port};
use crate::parcel::Parcel;
use crate::runtime::{Lease, Runtime};
use crate::scheduler::NodeId;
use crate::{Error, PlacementStrategy, panics, threads};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What new members hold whose machine is gone.
pub(super) type Placed = Vec<(usize, Arc<Lease>)>;

/// What is needed to find room in the background.
struct Search {
    runtime: Runtime,
    request: crate::runtime::Request,
    patience: std::time::Duration,
    args: Vec<Parcel>,
    homeless: Vec<usize>,
    /// The machines of those that have a place.
    nodes: Vec<NodeId>,
    /// What finished members have lent.
    lent: Vec<Arc<Lease>>,
    is_wanted: Arc<AtomicBool>,
}

impl<T> Gang<T> {
    /// Whether a machine with members is gone, and new places must be found for all of them: those of
    /// a strict strategy depend on each other.
    pub(super) fn must_move(&self) -> bool {
        use PlacementStrategy::{StrictPack, StrictSpread};
        matches!(self.options.strategy, StrictPack | StrictSpread)
            && self.members.iter().any(|port| self.is_homeless(port))
    }

    pub(super) fn is_homeless(&self, port: &Port) -> bool {
        port.lease.as_ref().is_none_or(|lease| !self.runtime.has_node(lease.node()))
    }

    /// Finds room for the new processes whose old place is gone, and brings the arguments to where
    /// they are to run. In the background: both may take long.
    pub(super) fn find_room(&mut self, replaced: &[usize]) -> Result<(), Error> {
        let must_move = self.must_move();
        let is_homeless = |rank: &&usize| must_move || self.is_homeless(&self.members[**rank]);
        let homeless: Vec<usize> = replaced.iter().filter(is_homeless).copied().collect();
        // What they hold of a machine that is there is to be free before others get it.
        self.wait_for(&homeless);
        homeless.iter().for_each(|rank| self.members[*rank].lease = None);
        let lent = self.members.iter_mut().filter_map(Port::take_lent).collect();
        let lease = |rank: &usize| self.members[*rank].lease.as_ref();
        let search = Search {
            runtime: self.runtime.clone(),
            request: self.options.request(homeless.len()),
            patience: self.options.placement_timeout,
            args: self.args.clone(),
            nodes: replaced.iter().filter_map(lease).map(|lease| lease.node()).collect(),
            homeless,
            lent,
            is_wanted: Arc::clone(&self.is_wanted),
        };
        let (notify, name) = (self.notify.clone(), self.options.name.clone());
        let find = move || {
            let placed = panics::catch(&name, || Ok(search.run()));
            let _ = notify.send(Notice::Placed(placed.and_then(|placed| placed)));
        };
        Ok(threads::run(1, find)?)
    }

    /// Starts the new processes of a generation, and tells the other members who they are in it.
    pub(super) fn begin(&mut self, placed: Placed) -> Result<(), Error> {
        for (rank, lease) in placed {
            self.members[rank].lease = Some(lease);
        }
        self.gathering.clear();
        let replaced = self.reform.replaced().to_vec();
        // What they hold of a GPU is to be free first.
        self.wait_for(&replaced);
        for rank in &replaced {
            let homeless = || Error::Internal(format!("rank {rank} has no place"));
            let lease = self.members[*rank].lease.clone().ok_or_else(homeless)?;
            self.members[*rank] = self.start(*rank, lease)?;
        }
        self.reform.begin();
        self.sizes.begun(Instant::now());
        if !self.reform.is_under_way() {
            self.cause = None;
        }
        let goes_on = |rank: &usize| !replaced.contains(rank) && !self.members[*rank].is_doomed();
        for rank in (0..self.members.len()).filter(goes_on).collect::<Vec<_>>() {
            let member = self.spec(rank, self.members[rank].lease.as_deref());
            self.members[rank].go_on(member);
        }
        if self.is_stopping {
            self.stop();
        }
        Ok(())
    }

    /// Until the old processes of these have ended, which they were made to.
    fn wait_for(&self, ranks: &[usize]) {
        let deadline = Instant::now() + GOODBYE;
        ranks.iter().for_each(|rank| self.members[*rank].wait_until(deadline));
    }
}

impl Search {
    fn run(self) -> Result<Placed, Error> {
        self.lent.iter().for_each(|lease| lease.reclaim());
        let leases = match self.homeless.is_empty() {
            true => Vec::new(),
            false => {
                let is_wanted = || self.is_wanted.load(Ordering::Acquire);
                self.runtime.lease_while(self.request, self.patience, &is_wanted)?.split()
            }
        };
        let placed: Placed = self.homeless.into_iter().zip(leases).collect();
        let new = placed.iter().map(|(_, lease)| lease.node());
        self.nodes.into_iter().chain(new).try_for_each(|node| bring(&self.args, node))?;
        Ok(placed)
    }
}

/// Waits until the arguments can be packed for this machine.
pub(super) fn bring(args: &[Parcel], node: NodeId) -> Result<(), Error> {
    args.iter().filter(|parcel| !parcel.is_at_hand(node)).try_for_each(Parcel::bring)
}
