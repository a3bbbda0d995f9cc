//! What one node has, and what of it is free.

use super::amounts::{Amounts, UNIT};
use serde::{Deserialize, Serialize};

/// A machine, or a bundle of a placement group, which is a piece of one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub(crate) struct NodeId(pub(crate) u64);

impl NodeId {
    /// The driver's own machine.
    pub(crate) const HERE: Self = Self(0);

    /// Bundles of placement groups are numbered from here.
    const FIRST_BUNDLE: u64 = 1 << 32;

    /// The `n`th bundle that was ever granted.
    pub(crate) fn bundle(n: u64) -> Self {
        Self(Self::FIRST_BUNDLE + n)
    }

    /// Whether this is a machine, which anybody may be placed on. A bundle is only for those who
    /// name it.
    pub(crate) fn is_machine(self) -> bool {
        self.0 < Self::FIRST_BUNDLE
    }
}

/// What a request got on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) node: NodeId,
    pub(crate) amounts: Amounts,
    /// Indices of GPUs on the node, one for each that is used at least in part.
    pub(crate) gpus: Vec<usize>,
}

impl Grant {
    /// Threads to compute on: the CPUs rounded up, at least 1.
    pub(crate) fn threads(&self) -> usize {
        usize::try_from(whole(self.amounts.cpus)).unwrap_or(1).max(1)
    }

    /// The CPUs, where they are whole ones; else 0.
    pub(crate) fn whole_cpus(&self) -> usize {
        let is_whole = self.amounts.cpus % UNIT == 0;
        if is_whole { usize::try_from(self.amounts.cpus / UNIT).unwrap_or(0) } else { 0 }
    }
}

/// Free amounts, with each GPU on its own: two halves of two GPUs are not one GPU.
#[derive(Clone, Debug)]
pub(crate) struct Free {
    pub(crate) amounts: Amounts,
    gpus: Vec<i64>,
}

impl Free {
    pub(crate) fn all(total: &Amounts) -> Self {
        let gpus = vec![UNIT; (total.gpus / UNIT) as usize];
        Self { amounts: total.clone(), gpus }
    }

    /// Takes the amounts, or nothing; gives the GPUs that it chose.
    pub(crate) fn take(&mut self, asked: &Amounts) -> Option<Vec<usize>> {
        if !asked.fits(&self.amounts) {
            return None;
        }
        let gpus = self.choose_gpus(asked.gpus)?;
        self.take_gpus(asked.gpus, &gpus);
        self.amounts.subtract(asked);
        Some(gpus)
    }

    /// Keeps what there is of the amounts from whoever is asked about later.
    pub(crate) fn reserve(&mut self, asked: &Amounts) {
        if let Some(gpus) = self.choose_gpus(asked.gpus) {
            self.take_gpus(asked.gpus, &gpus);
        } else {
            let wanted = usize::try_from(whole(asked.gpus)).unwrap_or(usize::MAX);
            self.gpus.iter_mut().rev().take(wanted).for_each(|gpu| *gpu = 0);
        }
        self.amounts.subtract_what_is_there(asked);
    }

    /// Takes what was chosen in a copy of this.
    pub(crate) fn take_exactly(&mut self, grant: &Grant) {
        self.take_gpus(grant.amounts.gpus, &grant.gpus);
        self.amounts.subtract(&grant.amounts);
    }

    pub(crate) fn give_back(&mut self, grant: &Grant) {
        let share = grant.amounts.gpus.min(UNIT);
        grant.gpus.iter().for_each(|gpu| self.gpus[*gpu] += share);
        self.amounts.add(&grant.amounts);
    }

    /// Whole GPUs that are free, or the fullest one that a fraction fits on.
    fn choose_gpus(&self, asked: i64) -> Option<Vec<usize>> {
        if asked < UNIT {
            let fits = |gpu: &&usize| self.gpus[**gpu] >= asked;
            let all: Vec<usize> = (0..self.gpus.len()).collect();
            let best = all.iter().filter(fits).min_by_key(|gpu| self.gpus[**gpu]);
            return if asked == 0 { Some(Vec::new()) } else { best.map(|gpu| vec![*gpu]) };
        }
        let whole = (0..self.gpus.len()).filter(|gpu| self.gpus[*gpu] == UNIT);
        let chosen: Vec<usize> = whole.take((asked / UNIT) as usize).collect();
        (chosen.len() as i64 * UNIT == asked).then_some(chosen)
    }

    fn take_gpus(&mut self, asked: i64, chosen: &[usize]) {
        let share = asked.min(UNIT);
        chosen.iter().for_each(|gpu| self.gpus[*gpu] -= share);
    }
}

/// Units, rounded up to whole ones.
fn whole(units: i64) -> i64 {
    (units + UNIT - 1) / UNIT
}
