//! Which of an actor's calls starts next. Pure.
//!
//! A call belongs to a group; each group has a lane of urgent calls and one of ordinary ones.
//!
//! * `L-1`: an exclusive call, one that may change the state, runs alone; others run together.
//! * `L-2`: no group has more calls running than it may.
//! * `L-3`: calls of one lane start in the order of their arrival, urgent ones of a group before
//!   its ordinary ones.
//! * `L-4`: when nothing runs, and something waits, something can start.
//! * `L-5`: an exclusive call that waits at the front of its lane is passed by later ordinary calls
//!   of other groups only while one runs that ran already when it came there. So a method in a
//!   group of its own answers during a long computation that a change waits for, and the change is
//!   never put off for ever.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Groups beside the nameless one that an actor may have.
pub(crate) const MOST_GROUPS: usize = 64;

/// What decides about a call's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Class {
    pub(crate) group: usize,
    /// Whether it may change the state.
    pub(crate) is_exclusive: bool,
    pub(crate) is_urgent: bool,
}

impl Class {
    /// A number for the group and the urgency, below `2 * (MOST_GROUPS + 1)`.
    pub(crate) fn lane(self) -> usize {
        2 * self.group + usize::from(self.is_urgent)
    }
}

/// The calls of one actor.
#[derive(Debug)]
pub(crate) struct Lanes<W> {
    /// How many calls of each group may run.
    limits: Vec<usize>,
    /// Two for each group, by [`Class::lane`].
    lanes: Vec<VecDeque<Waiting<W>>>,
    running: Vec<Running>,
    arrivals: u64,
    starts: u64,
}

#[derive(Debug)]
struct Waiting<W> {
    arrival: u64,
    class: Class,
    /// How many had started when it could not, being exclusive.
    held_since: Option<u64>,
    work: W,
}

#[derive(Clone, Copy, Debug)]
struct Running {
    ticket: u64,
    class: Class,
}

impl<W> Lanes<W> {
    /// As many groups as limits, each at least 1.
    pub(crate) fn new(limits: &[usize]) -> Self {
        let limits: Vec<usize> = limits.iter().map(|limit| (*limit).max(1)).collect();
        let lanes = limits.iter().flat_map(|_| [VecDeque::new(), VecDeque::new()]).collect();
        Self { limits, lanes, running: Vec::new(), arrivals: 0, starts: 0 }
    }

    /// Calls that can run at the same time.
    pub(crate) fn most_running(&self) -> usize {
        self.limits.iter().sum()
    }

    /// Gives a call back whose group there is not.
    pub(crate) fn add(&mut self, class: Class, work: W) -> Result<(), W> {
        let Some(lane) = self.lanes.get_mut(class.lane()) else { return Err(work) };
        self.arrivals += 1;
        lane.push_back(Waiting { arrival: self.arrivals, class, held_since: None, work });
        Ok(())
    }

    /// Whether no call waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.lanes.iter().all(VecDeque::is_empty)
    }

    pub(crate) fn can_start(&mut self) -> bool {
        self.choose().is_some()
    }

    /// The next call, if one can start, and the ticket of its end.
    pub(crate) fn start(&mut self) -> Option<(u64, Class, W)> {
        let lane = self.choose()?;
        let Waiting { class, work, .. } = self.lanes[lane].pop_front()?;
        self.starts += 1;
        self.running.push(Running { ticket: self.starts, class });
        Some((self.starts, class, work))
    }

    pub(crate) fn end(&mut self, ticket: u64) {
        self.running.retain(|running| running.ticket != ticket);
    }

    /// The lane whose first call can start: of the urgent ones the oldest, then of the others.
    fn choose(&mut self) -> Option<usize> {
        if self.running.iter().any(|running| running.class.is_exclusive) {
            return None;
        }
        let mut last = None;
        while let Some((rank, lane)) = self.after(last) {
            last = Some(rank);
            let Some(class) = self.lanes[lane].front().map(|waiting| waiting.class) else {
                continue;
            };
            if !self.has_room(class) || self.is_overtaken(class) {
                continue;
            }
            if !class.is_exclusive || self.running.is_empty() {
                return Some(lane);
            }
            if !self.may_be_passed(lane) {
                return None;
            }
        }
        None
    }

    /// The first of the waiting calls at the front of their lanes that ranks behind `last`.
    fn after(&self, last: Option<(bool, u64)>) -> Option<((bool, u64), usize)> {
        let fronts = self.lanes.iter().enumerate().filter_map(|(lane, waiting)| {
            let front = waiting.front()?;
            Some(((!front.class.is_urgent, front.arrival), lane))
        });
        fronts.filter(|(rank, _)| last.is_none_or(|last| *rank > last)).min()
    }

    fn has_room(&self, class: Class) -> bool {
        let running = self.running.iter().filter(|running| running.class.group == class.group);
        running.count() < self.limits[class.group]
    }

    /// Whether an urgent call of its group waits.
    fn is_overtaken(&self, class: Class) -> bool {
        let urgent = Class { is_urgent: true, ..class };
        !class.is_urgent && !self.lanes[urgent.lane()].is_empty()
    }

    /// `L-5`, for an exclusive call that cannot start.
    fn may_be_passed(&mut self, lane: usize) -> bool {
        let starts = self.starts;
        let Some(front) = self.lanes[lane].front_mut() else { return true };
        let since = *front.held_since.get_or_insert(starts);
        self.running.iter().any(|running| running.ticket <= since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const READ: Class = Class { group: 0, is_exclusive: false, is_urgent: false };
    const WRITE: Class = Class { is_exclusive: true, ..READ };

    fn started(lanes: &mut Lanes<u32>) -> Vec<(u64, u32)> {
        std::iter::from_fn(|| lanes.start()).map(|(ticket, _, work)| (ticket, work)).collect()
    }

    fn works(lanes: &mut Lanes<u32>) -> Vec<u32> {
        started(lanes).into_iter().map(|(_, work)| work).collect()
    }

    #[test]
    fn without_groups_and_urgency_calls_run_one_after_the_other() {
        let mut lanes = Lanes::new(&[1]);
        (0..3).for_each(|n| lanes.add(READ, n).expect("group 0"));
        for n in 0..3 {
            let [(ticket, work)] = started(&mut lanes)[..] else { panic!("one at a time") };
            assert_eq!(work, n);
            lanes.end(ticket);
        }
        assert!(lanes.is_empty());
        assert_eq!(lanes.add(Class { group: 1, ..READ }, 7), Err(7));
    }

    #[test]
    fn urgent_calls_overtake_those_that_wait() {
        let mut lanes = Lanes::new(&[1]);
        let urgent = Class { is_urgent: true, ..WRITE };
        for (class, n) in [(WRITE, 0), (WRITE, 1), (urgent, 2), (urgent, 3)] {
            lanes.add(class, n).expect("group 0");
        }
        let mut order = Vec::new();
        while let Some((ticket, _, work)) = lanes.start() {
            order.push(work);
            lanes.end(ticket);
        }
        assert_eq!(order, [2, 3, 0, 1]);
    }

    #[test]
    fn a_change_waits_for_readers_and_is_not_put_off_for_ever() {
        let mut lanes = Lanes::new(&[2, 1]);
        let health = Class { group: 1, ..READ };
        lanes.add(READ, 0).expect("group 0");
        let long = started(&mut lanes)[0].0;
        lanes.add(WRITE, 1).expect("group 0");
        lanes.add(READ, 2).expect("group 0");
        lanes.add(health, 3).expect("group 1");
        let [(first, 3)] = started(&mut lanes)[..] else { panic!("health passes the change") };
        lanes.end(first);
        lanes.add(health, 4).expect("group 1");
        let [(second, 4)] = started(&mut lanes)[..] else { panic!("while the long one runs") };
        lanes.end(long);
        lanes.add(health, 5).expect("group 1");
        assert_eq!(works(&mut lanes), [] as [u32; 0], "now the change is next");
        lanes.end(second);
        let [(change, 1)] = started(&mut lanes)[..] else { panic!("the change runs alone") };
        lanes.end(change);
        assert_eq!(works(&mut lanes), [2, 5]);
    }

    proptest! {
        #[test]
        fn the_rules_hold_whatever_comes(
            limits in prop::collection::vec(1_usize..4, 1..4),
            // A call to add, or, a third of the time, one of those that run to end.
            events in prop::collection::vec(
                (0_usize..3, any::<bool>(), any::<bool>(), 0_u8..3, any::<prop::sample::Index>()),
                0..200,
            ),
        ) {
            let mut lanes = Lanes::new(&limits);
            let mut running: Vec<(u64, Class)> = Vec::new();
            let mut newest = HashMap::new();
            let mut waiting = 0_usize;
            let events = events.into_iter().map(Some).chain(std::iter::repeat(None));
            for (number, event) in events.enumerate() {
                match event {
                    Some((group, is_exclusive, is_urgent, 1.., _)) if group < limits.len() => {
                        let class = Class { group, is_exclusive, is_urgent };
                        lanes.add(class, number).expect("a known group");
                        waiting += 1;
                    }
                    Some((.., index)) if !running.is_empty() => {
                        let at = index.index(running.len());
                        lanes.end(running.swap_remove(at).0);
                    }
                    Some(_) => {}
                    None if running.is_empty() => break,
                    None => lanes.end(running.swap_remove(0).0),
                }
                while let Some((ticket, class, work)) = lanes.start() {
                    waiting -= 1;
                    running.push((ticket, class));
                    let before = newest.insert(class.lane(), work);
                    prop_assert!(before.is_none_or(|before| before < work), "L-3");
                }
                if running.iter().any(|(_, class)| class.is_exclusive) {
                    prop_assert_eq!(running.len(), 1, "L-1");
                }
                for (group, limit) in limits.iter().enumerate() {
                    let of_group = running.iter().filter(|(_, class)| class.group == group);
                    prop_assert!(of_group.count() <= *limit, "L-2");
                }
                prop_assert!(!running.is_empty() || waiting == 0, "L-4");
            }
            prop_assert!(lanes.is_empty(), "all have run");
        }
    }
}
