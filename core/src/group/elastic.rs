//! How many members a group has, and when that changes. Pure: times go in.

use super::{GroupOptions, far};
use crate::{Error, PlacementStrategy};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How often room is looked for that was not there.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How a group may have fewer members than its size, as torchrun's `--nnodes MIN:MAX`: it starts with
/// as many as there is room for, goes on with those that are left when nobody can take the places of
/// lost ones, and grows when there is room again. Every default is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elastic {
    /// The fewest members, at least 1. Default: 1.
    pub min_size: usize,
    /// Whether their number is always a power of two: who is too many then is let go. Default: no.
    pub powers_of_two: bool,
    /// How long room is looked for in place of a machine that was lost, before the group goes on
    /// without it. Members whose machine is there are always replaced. Default: 5 seconds.
    pub replace_within: Duration,
    /// How long after the start, or another change of its members, the group may grow.
    /// Default: 10 seconds.
    pub grow_interval: Duration,
}

impl Default for Elastic {
    fn default() -> Self {
        Self {
            min_size: 1,
            powers_of_two: false,
            replace_within: Duration::from_secs(5),
            grow_interval: Duration::from_secs(10),
        }
    }
}

impl Elastic {
    pub(super) fn check(&self, group: &GroupOptions) -> Result<(), Error> {
        use PlacementStrategy::{StrictPack, StrictSpread};
        let invalid = |option, got: String, expected: String| {
            Err(Error::InvalidGroup { group: group.name.clone(), option, got, expected })
        };
        let (min, max) = (self.min_size, group.size);
        if min == 0 || self.within(min, max).next().is_none() {
            let kind = if self.powers_of_two { ", with a power of two between them" } else { "" };
            return invalid("min_size", min.to_string(), format!("1 to its size {max}{kind}"));
        }
        if matches!(group.strategy, StrictPack | StrictSpread) {
            let expected = "pack or spread in an elastic group".to_owned();
            return invalid("strategy", format!("{:?}", group.strategy), expected);
        }
        Ok(())
    }

    /// The sizes that it may have, the largest first.
    fn within(&self, least: usize, most: usize) -> impl Iterator<Item = usize> + use<> {
        let (least, any) = (least.max(self.min_size), !self.powers_of_two);
        (least..=most).rev().filter(move |size| any || size.is_power_of_two())
    }
}

fn grow_at(elastic: Option<Elastic>, now: Instant) -> Instant {
    far(now, elastic.map_or(Duration::ZERO, |elastic| elastic.grow_interval))
}

/// The size of a group, and the room that it looks for.
#[derive(Debug)]
pub(super) struct Sizes {
    elastic: Option<Elastic>,
    max: usize,
    /// When room is looked for in place of what was lost: until when, and the next time.
    seek: Option<(Instant, Instant)>,
    /// When it may grow.
    grow_at: Instant,
}

impl Sizes {
    pub(super) fn new(elastic: Option<Elastic>, max: usize, now: Instant) -> Self {
        let grow_at = grow_at(elastic, now);
        Self { elastic, max, seek: None, grow_at }
    }

    /// With how many members it may start, the most first.
    pub(super) fn at_start(&self) -> Vec<usize> {
        self.elastic.map_or(vec![self.max], |elastic| elastic.within(1, self.max).collect())
    }

    /// The largest size of at most so many members.
    pub(super) fn largest(&self, members: usize) -> Option<usize> {
        self.elastic?.within(1, members).next()
    }

    /// Whether it may go on without some of its members.
    pub(super) fn is_elastic(&self) -> bool {
        self.elastic.is_some()
    }

    /// A generation has begun.
    pub(super) fn begun(&mut self, now: Instant) {
        self.grow_at = grow_at(self.elastic, now);
    }

    /// So many members are without a place: for how many to ask, the most first, or nothing if it is
    /// not time. None asked for: the group goes on with those that are `placed`.
    pub(super) fn seek(
        &mut self,
        placed: usize,
        homeless: usize,
        now: Instant,
    ) -> Option<Vec<usize>> {
        let elastic = self.elastic?;
        let (until, next) = *self.seek.get_or_insert((far(now, elastic.replace_within), now));
        if now < next {
            return None;
        }
        self.seek = Some((until, (now + LOOK_AGAIN).min(until.max(now))));
        if now < until {
            return Some(vec![homeless]);
        }
        let mut asks: Vec<usize> =
            elastic.within(1, placed + homeless).map(|size| size.saturating_sub(placed)).collect();
        asks.dedup();
        Some(asks)
    }

    /// When to look for room in place of what was lost, if it is looked for.
    pub(super) fn seek_at(&self) -> Option<Instant> {
        self.seek.map(|(_, next)| next)
    }

    /// Whether room in place of what was lost has been looked for long enough.
    pub(super) fn has_sought(&self, now: Instant) -> bool {
        self.seek.is_none_or(|(until, _)| until <= now)
    }

    /// All have a place, or it goes on without them, or not at all.
    pub(super) fn end_seek(&mut self) {
        self.seek = None;
    }

    /// When to look for room for more members.
    pub(super) fn grow_at(&self, members: usize) -> Option<Instant> {
        let elastic = self.elastic?;
        elastic.within(members + 1, self.max).next().map(|_| self.grow_at)
    }

    /// For how many more to ask, the most first; none if it is not time.
    pub(super) fn growth(&mut self, members: usize, now: Instant) -> Vec<usize> {
        let Some(elastic) = self.elastic.filter(|_| self.grow_at <= now) else {
            return Vec::new();
        };
        self.grow_at = now + LOOK_AGAIN;
        elastic.within(members + 1, self.max).map(|size| size - members).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn sizes(min_size: usize, max: usize, powers_of_two: bool) -> (Sizes, Instant) {
        let elastic = Elastic { min_size, powers_of_two, ..Elastic::default() };
        let now = Instant::now();
        (Sizes::new(Some(elastic), max, now), now)
    }

    #[test]
    fn it_starts_with_as_many_as_may_be() {
        assert_eq!(sizes(2, 5, false).0.at_start(), [5, 4, 3, 2]);
        assert_eq!(sizes(2, 5, true).0.at_start(), [4, 2]);
        let fixed = Sizes::new(None, 3, Instant::now());
        assert_eq!((fixed.at_start(), fixed.grow_at(2)), (vec![3], None));
    }

    #[test]
    fn first_it_waits_for_all_then_it_takes_what_there_is() {
        let (mut sizes, now) = sizes(2, 4, false);
        assert_eq!(sizes.seek(2, 2, now), Some(vec![2]));
        assert_eq!(sizes.seek(2, 2, now), None, "not so soon");
        assert_eq!(sizes.seek_at(), Some(now + LOOK_AGAIN));
        assert_eq!(sizes.seek(2, 2, now + 4 * SECOND), Some(vec![2]));
        assert!(!sizes.has_sought(now + 4 * SECOND));
        assert_eq!(sizes.seek(2, 2, now + 5 * SECOND), Some(vec![2, 1, 0]));
        assert!(sizes.has_sought(now + 5 * SECOND));
    }

    #[test]
    fn it_does_not_sleep_through_the_end_of_its_patience() {
        let elastic = Elastic { replace_within: LOOK_AGAIN / 2, ..Elastic::default() };
        let now = Instant::now();
        let mut sizes = Sizes::new(Some(elastic), 4, now);
        assert_eq!(sizes.seek(3, 1, now), Some(vec![1]));
        assert_eq!(sizes.seek_at(), Some(now + LOOK_AGAIN / 2));
        let elastic = Elastic { replace_within: Duration::ZERO, ..elastic };
        let mut sizes = Sizes::new(Some(elastic), 4, now);
        assert_eq!(sizes.seek(3, 1, now), Some(vec![1, 0]), "without patience at once");
    }

    #[test]
    fn below_its_least_size_it_asks_for_as_many_as_it_needs() {
        let (mut sizes, now) = sizes(3, 4, false);
        sizes.seek(1, 3, now);
        assert_eq!(sizes.seek(1, 3, now + 5 * SECOND), Some(vec![3, 2]));
        assert_eq!(sizes.largest(2), None);
    }

    #[test]
    fn of_three_two_go_on_where_only_powers_of_two_will_do() {
        let (mut sizes, now) = sizes(1, 4, true);
        sizes.seek(3, 1, now);
        assert_eq!(sizes.seek(3, 1, now + 5 * SECOND), Some(vec![1, 0]));
        assert_eq!(sizes.largest(3), Some(2));
    }

    #[test]
    fn another_loss_has_patience_of_its_own() {
        let (mut sizes, now) = sizes(1, 4, false);
        sizes.seek(3, 1, now);
        sizes.end_seek();
        assert_eq!(sizes.seek(2, 1, now + 9 * SECOND), Some(vec![1]));
    }

    #[test]
    fn it_grows_an_interval_after_the_last_change() {
        let (mut sizes, now) = sizes(2, 4, false);
        assert_eq!(sizes.grow_at(2), Some(now + 10 * SECOND));
        assert!(sizes.growth(2, now + 9 * SECOND).is_empty());
        assert_eq!(sizes.growth(2, now + 10 * SECOND), [2, 1]);
        assert!(sizes.growth(2, now + 10 * SECOND).is_empty(), "it looks now and then");
        sizes.begun(now + 11 * SECOND);
        assert!(sizes.growth(3, now + 20 * SECOND).is_empty());
        assert_eq!(sizes.growth(3, now + 21 * SECOND), [1]);
        assert_eq!(sizes.grow_at(4), None);
    }

    #[test]
    fn by_powers_of_two_it_grows_to_the_next_one_at_least() {
        let (mut sizes, now) = sizes(1, 8, true);
        assert_eq!(sizes.growth(2, now + 10 * SECOND), [6, 2]);
        assert_eq!(sizes.grow_at(8), None);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let check = |size, elastic: Elastic, strategy| {
            let group = GroupOptions { strategy, ..GroupOptions::new("g", size) };
            elastic.check(&group).map_err(|error| error.to_string())
        };
        let (pack, elastic) = (PlacementStrategy::Pack, Elastic::default());
        assert_eq!(check(1, elastic, pack), Ok(()));
        let error = |min_size, powers_of_two, size| {
            check(size, Elastic { min_size, powers_of_two, ..elastic }, pack).expect_err("refused")
        };
        assert_eq!(error(0, false, 4), "min_size of group g is 0, expected 1 to its size 4");
        assert_eq!(error(5, false, 4), "min_size of group g is 5, expected 1 to its size 4");
        let text =
            "min_size of group g is 5, expected 1 to its size 7, with a power of two between them";
        assert_eq!(error(5, true, 7), text);
        let text = check(2, elastic, PlacementStrategy::StrictSpread).expect_err("refused");
        assert_eq!(
            text,
            "strategy of group g is StrictSpread, expected pack or spread in an elastic group"
        );
    }
}
