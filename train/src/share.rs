//! An optimizer whose state is divided among the ranks: ZeRO, stage 1 (Rajbhandari et al. 2020, arXiv
//! 1910.02054).
//!
//! Each rank has the gradients' sums of some parameters only, updates these, and gives the new
//! weights to the others. What is added up is what it is without; so is the order, but for rings between
//! machines, where it depends on what else travels along.
//!
//! With mirrors each rank also updates the part of another one, on another machine if it can be, so that
//! a lost part is still there. As all gradients' sums are needed in two places then, all ranks get all.

use crate::Result;
use crate::collective::{Collective, ReduceOp};
use crate::optim::{Optimizer, OptimizerState, ParamOptions, in_place};
use mobula_core::Shard;
use mobula_nn::{Gradients, Params};
use std::ops::Range;
use std::sync::Arc;

/// The parameters whose optimizer state a rank has.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// Of all parameters, in order.
    names: Arc<[String]>,
    /// Of them.
    own: Range<usize>,
    /// Those of another rank, if there are mirrors.
    mirrored: Range<usize>,
}

impl Held {
    pub(crate) fn ranges(&self) -> [Range<usize>; 2] {
        [self.own.clone(), self.mirrored.clone()]
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        let has = |range: Range<usize>| {
            self.names[range].binary_search_by(|own| own.as_str().cmp(name)).is_ok()
        };
        self.ranges().into_iter().any(has)
    }

    /// How the optimizer treats a parameter: those of other ranks it leaves alone.
    pub(crate) fn options(
        &self,
        optimizer: &dyn Optimizer,
        name: &str,
        shape: &[usize],
    ) -> Option<ParamOptions> {
        self.has(name).then(|| optimizer.param_options(name, shape)).flatten()
    }
}

/// This rank's share of the parameters.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    collective: Arc<dyn Collective>,
    held: Held,
    is_mirrored: bool,
    /// Where each rank's gradients begin in the flat buffer, and where the last one's end.
    bounds: Arc<[usize]>,
}

impl Share {
    /// Whole parameters, neighbours in the order of names, so that the largest share is as small as
    /// it can be.
    pub(crate) fn of(
        gradients: &Gradients,
        collective: &Arc<dyn Collective>,
        is_mirrored: bool,
    ) -> Self {
        let Shard { rank, world } = collective.shard();
        let places = gradients.places();
        let lens: Vec<usize> = places.iter().map(|(_, range)| range.len()).collect();
        let cuts = partition(&lens, world);
        let of = |rank: usize| cuts[rank]..cuts[rank + 1];
        let names = places.iter().map(|(name, _)| name.clone()).collect();
        let mirrored =
            if is_mirrored { of(mirrored_by(rank, &collective.machines())) } else { 0..0 };
        let held = Held { names, own: of(rank), mirrored };
        let ends = cuts.iter().map(|cut| lens[..*cut].iter().sum());
        Self { collective: Arc::clone(collective), held, is_mirrored, bounds: ends.collect() }
    }

    pub(crate) fn held(&self) -> &Held {
        &self.held
    }

    pub(crate) fn is_mirrored(&self) -> bool {
        self.is_mirrored
    }

    pub(crate) fn is_with(&self, collective: &Arc<dyn Collective>) -> bool {
        Arc::ptr_eq(&self.collective, collective)
    }

    pub(crate) fn shard(&self) -> Shard {
        self.collective.shard()
    }

    /// Of all parameters, in the order of their names.
    pub(crate) fn params(&self) -> Range<usize> {
        self.held.own.clone()
    }

    /// In the flat buffer.
    pub(crate) fn range(&self) -> Range<usize> {
        let rank = self.shard().rank;
        self.bounds[rank]..self.bounds[rank + 1]
    }

    /// The gradients whose sums this rank gets, in the flat buffer.
    pub(crate) fn summed(&self) -> Range<usize> {
        if self.is_mirrored { 0..self.bounds[self.shard().world] } else { self.range() }
    }

    /// Sums this rank's gradients over all ranks, or all of them where there are mirrors, and loss and
    /// weight. The other gradients are of no use then.
    pub(crate) fn reduce(&self, gradients: &mut Gradients) -> Result<()> {
        let len = gradients.values().len();
        if self.is_mirrored {
            let exact = gradients.as_reduced().len() - len;
            return self.collective.sum_gradients(gradients.as_reduced_mut(), exact);
        }
        let (values, behind) = gradients.as_reduced_mut().split_at_mut(len);
        self.collective.scatter_gradients(values, &self.bounds)?;
        self.collective.all_reduce(behind, ReduceOp::Sum)
    }

    /// The parameter that the first gradient which is not finite belongs to, on whatever rank.
    pub(crate) fn first_non_finite(&self, gradients: &Gradients) -> Result<Option<String>> {
        let at = gradients.first_non_finite_in(self.params());
        let mut last = [-at.map_or(f64::INFINITY, |at| at as f64)];
        self.collective.all_reduce(&mut last, ReduceOp::Max)?;
        let [at] = last.map(|last| -last);
        Ok(at.is_finite().then(|| self.held.names[at as usize].clone()))
    }

    /// Sums over all ranks what each has of its own parameters.
    pub(crate) fn sum(&self, values: &mut [f64]) -> Result<()> {
        self.collective.all_reduce(values, ReduceOp::Sum)
    }

    /// Gives the own weights to all ranks, and takes theirs, by way of the memory of the gradients.
    pub(crate) fn gather(&self, params: &Params, gradients: &mut Gradients) -> Result<()> {
        let vars = params.vars();
        let places: Vec<_> = gradients.places().iter().map(|(_, range)| range.clone()).collect();
        let values = gradients.values_mut();
        for at in self.params() {
            in_place(&vars[at].1, |weights| {
                values[places[at].clone()].copy_from_slice(weights);
                Ok(())
            })?;
        }
        self.collective.all_gather_parts(values, &self.bounds)?;
        for at in (0..vars.len()).filter(|at| !self.held.own.contains(at)) {
            in_place(&vars[at].1, |weights| {
                weights.copy_from_slice(&values[places[at].clone()]);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Forgets what belongs to other ranks.
    pub(crate) fn trim(&self, state: &mut OptimizerState) {
        for param in state.params.iter_mut().filter(|param| !self.held.has(&param.name)) {
            (param.steps, param.slots) = (0, Vec::new());
        }
    }
}

/// Whose part is mirrored by a rank: one on another machine, unless a machine has more than half of
/// the ranks. Machine behind machine, ranks are as far from their mirrors as the longest is long.
fn mirrored_by(rank: usize, machines: &[u64]) -> usize {
    let world = machines.len();
    let mut order: Vec<usize> = (0..world).collect();
    order.sort_by_key(|rank| machines[*rank]);
    let longest = order.chunk_by(|a, b| machines[*a] == machines[*b]).map(<[_]>::len).max();
    let distance = longest.filter(|longest| *longest < world).unwrap_or(1);
    let place = order.iter().position(|other| *other == rank).unwrap_or_default();
    order[(place + world - distance) % world]
}

/// Cuts a row of things into `world` runs whose largest sum is as small as it can be. Gives where
/// each begins, and the end.
fn partition(lens: &[usize], world: usize) -> Vec<usize> {
    let (mut least, mut most) = (lens.iter().copied().max().unwrap_or(0), lens.iter().sum());
    while least < most {
        let middle = least + (most - least) / 2;
        match runs(lens, middle).len() <= world {
            true => most = middle,
            false => least = middle + 1,
        }
    }
    let mut cuts = runs(lens, most);
    cuts.resize(world, lens.len());
    cuts.push(lens.len());
    cuts
}

/// Where runs begin that are as long as they can be, if none is to sum up to more than `most`.
fn runs(lens: &[usize], most: usize) -> Vec<usize> {
    let (mut starts, mut sum) = (vec![0], 0);
    for (at, len) in lens.iter().enumerate() {
        if sum + len > most && sum > 0 {
            starts.push(at);
            sum = 0;
        }
        sum += len;
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::{mirrored_by, partition};
    use proptest::prelude::*;

    #[test]
    fn mirrors_on_one_machine_are_neighbours() {
        assert_eq!([0, 1, 2].map(|rank| mirrored_by(rank, &[7; 3])), [2, 0, 1]);
        assert_eq!([0, 1, 2].map(|rank| mirrored_by(rank, &[1, 2, 3])), [2, 0, 1]);
    }

    #[test]
    fn no_share_is_larger_than_it_must_be() {
        assert_eq!(partition(&[512, 401_408, 512, 262_144, 10, 5120], 2), [0, 2, 6]);
        assert_eq!(partition(&[1, 1, 1, 1, 1, 1], 3), [0, 2, 4, 6]);
        assert_eq!(partition(&[5, 1], 4), [0, 1, 2, 2, 2], "more ranks than parameters");
        assert_eq!(partition(&[], 2), [0, 0, 0]);
    }

    proptest! {
        /// Each part has one, not with its owner, and where it can be on another machine.
        #[test]
        fn mirrors_are_elsewhere(machines in prop::collection::vec(0u64..4, 2..12)) {
            let world = machines.len();
            let mirrored: Vec<usize> = (0..world).map(|rank| mirrored_by(rank, &machines)).collect();
            let mut all = mirrored.clone();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(0..world));
            prop_assert!((0..world).all(|rank| mirrored[rank] != rank));
            let ranks_of = |machine| machines.iter().filter(|other| **other == machine).count();
            if (0..4).all(|machine| 2 * ranks_of(machine) <= world) {
                prop_assert!((0..world).all(|rank| machines[mirrored[rank]] != machines[rank]));
            }
        }

        #[test]
        fn of_all_cuts_the_best(lens in prop::collection::vec(0usize..20, 0..8), world in 1usize..4) {
            let cuts = partition(&lens, world);
            prop_assert!(cuts.len() == world + 1 && cuts[0] == 0 && cuts[world] == lens.len());
            prop_assert!(cuts.is_sorted());
            let largest = |cuts: &[usize]| {
                cuts.windows(2).map(|run| lens[run[0]..run[1]].iter().sum::<usize>()).max()
            };
            let ends = 0..=lens.len();
            for a in ends.clone() {
                for b in a..=lens.len() {
                    let other = [&[0, a, b][..world.min(3)], &[lens.len()]].concat();
                    prop_assert!(!other.is_sorted() || largest(&cuts) <= largest(&other));
                }
            }
        }
    }
}
