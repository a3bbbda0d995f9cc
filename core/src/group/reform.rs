//! What the losses of members, and room for more, lead to. Pure: times go in.
//!
//! A loss sets a time for the next generation. When that has come it is announced, then room is
//! found for the new processes, then they are started and the generation has begun. Losses before
//! room is looked for belong to it; later ones lead to one more generation. An elastic group knows
//! before that step where all of its members have room, and goes on without those that have none.

use crate::actor::RestartPolicy;
use crate::actor::supervisor::Supervisor;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Who gets a new process when members of a group are lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnLoss {
    /// Every member. The default.
    #[default]
    RestartAll,
    /// The lost ones; the others stay where they are and are told, see
    /// [`Member::rendezvous`](crate::Member::rendezvous). Where the strategy is a strict one and a
    /// whole machine was lost, every member.
    ReplaceLost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    /// Its function has ended. Its process waits in case that it is called again, or is gone.
    Finished {
        is_gone: bool,
    },
    /// It has no process.
    Lost,
}

/// Where a group is on its way to the next generation.
#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Its members run. A loss may have set a time for the next generation.
    Running { due: Option<Instant> },
    /// The driver knows of the generation.
    Announced { replaced: Vec<usize> },
    /// Room is being found for these.
    Placing { replaced: Vec<usize> },
}

/// The members of a group, and how far the next generation is.
#[derive(Debug)]
pub(super) struct Reform {
    on_loss: OnLoss,
    supervisor: Supervisor,
    generation: u64,
    states: Vec<State>,
    phase: Phase,
    /// A loss on the way to a generation sets a time for the one after it.
    next: Option<Instant>,
}

impl Reform {
    pub(super) fn new(
        on_loss: OnLoss,
        policy: RestartPolicy,
        generation: u64,
        size: usize,
    ) -> Self {
        Self {
            on_loss,
            supervisor: Supervisor::new(policy),
            generation,
            states: vec![State::Running; size],
            phase: Phase::Running { due: None },
            next: None,
        }
    }

    /// The newest one, announced or begun.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The one that a loss leads to now.
    pub(super) fn coming(&self) -> u64 {
        match self.phase {
            // Whom it replaces is still open.
            Phase::Announced { .. } => self.generation,
            _ => self.generation + 1,
        }
    }

    /// When the next generation is to be announced, if it is to be.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Running { due } => due,
            _ => None,
        }
    }

    /// Whether members were lost and the generation that follows has not begun: what others say
    /// now does not count.
    pub(super) fn is_under_way(&self) -> bool {
        self.phase != Phase::Running { due: None }
    }

    /// Whether nothing more can come from any member.
    pub(super) fn is_over(&self) -> bool {
        !self.is_under_way() && !self.is_any_running()
    }

    pub(super) fn is_any_running(&self) -> bool {
        self.states.contains(&State::Running)
    }

    /// Whether the next generation is announced, and nobody has been placed for it.
    pub(super) fn is_announced(&self) -> bool {
        matches!(self.phase, Phase::Announced { .. })
    }

    /// Whether all members run, and are to go on.
    pub(super) fn is_steady(&self) -> bool {
        !self.is_under_way() && self.states.iter().all(|state| *state == State::Running)
    }

    /// A member's function has ended.
    pub(super) fn ended(&mut self, rank: usize) {
        if self.states[rank] == State::Running {
            self.states[rank] = State::Finished { is_gone: false };
        }
    }

    /// The process of a member whose function has ended is gone too, which is no loss.
    pub(super) fn gone(&mut self, rank: usize) {
        if let State::Finished { is_gone } = &mut self.states[rank] {
            *is_gone = true;
        }
    }

    /// A member was lost. `Some`: a new generation follows, after so long. `None`: too many were
    /// lost.
    pub(super) fn lost(&mut self, rank: usize, now: Instant) -> Option<Duration> {
        self.states[rank] = State::Lost;
        let due = match &mut self.phase {
            Phase::Running { due } => due,
            _ => &mut self.next,
        };
        if due.is_none() {
            *due = Some(now + self.supervisor.lost(now)?);
        }
        due.map(|due| due.saturating_duration_since(now))
    }

    /// Whose processes cannot be called again, and are ended if they have not: they get new ones.
    pub(super) fn doomed(&self, all: bool) -> Vec<usize> {
        let all = all || self.on_loss == OnLoss::RestartAll;
        let is_gone = |rank: &usize| {
            matches!(self.states[*rank], State::Lost | State::Finished { is_gone: true })
        };
        (0..self.states.len()).filter(|rank| all || is_gone(rank)).collect()
    }

    /// The next generation is announced. Gives who gets a new process.
    pub(super) fn announce(&mut self, all: bool) -> Vec<usize> {
        let replaced = self.doomed(all);
        self.generation += 1;
        self.phase = Phase::Announced { replaced: replaced.clone() };
        replaced
    }

    /// The generation that is announced goes on without these.
    pub(super) fn shrink(&mut self, gone: &[usize]) {
        let stays = |rank: &usize| !gone.contains(rank);
        if let Phase::Announced { replaced } = &mut self.phase {
            replaced.retain(stays);
            let before = |rank: usize| gone.iter().filter(|gone| **gone < rank).count();
            replaced.iter_mut().for_each(|rank| *rank -= before(*rank));
            let states = std::mem::take(&mut self.states).into_iter().enumerate();
            self.states = states.filter(|(rank, _)| stays(rank)).map(|(_, state)| state).collect();
        }
    }

    /// Where all is steady, a generation with so many more members is to be announced then. That is no
    /// restart, and neither is what is lost until then.
    pub(super) fn grow(&mut self, more: usize, at: Instant) {
        self.states.resize(self.states.len() + more, State::Lost);
        self.phase = Phase::Running { due: Some(at) };
    }

    /// The driver has heard of it: room is to be found for these, and for whom has been lost since.
    /// `None` when nothing was announced.
    pub(super) fn place(&mut self, all: bool) -> Option<Vec<usize>> {
        let Phase::Announced { replaced } = &self.phase else { return None };
        let mut replaced = replaced.clone();
        replaced.extend(self.doomed(all));
        replaced.sort_unstable();
        replaced.dedup();
        self.next = None;
        self.phase = Phase::Placing { replaced: replaced.clone() };
        Some(replaced)
    }

    /// For whom room is being found.
    pub(super) fn replaced(&self) -> &[usize] {
        match &self.phase {
            Phase::Placing { replaced } => replaced,
            _ => &[],
        }
    }

    /// Their processes have been started: the generation begins. Gives who has a new process.
    pub(super) fn begin(&mut self) -> Vec<usize> {
        let due = self.next.take();
        let replaced = match std::mem::replace(&mut self.phase, Phase::Running { due }) {
            Phase::Placing { replaced } => replaced,
            _ => Vec::new(),
        };
        // Who finished is called again, and who was lost meanwhile is not.
        for (rank, state) in self.states.iter_mut().enumerate() {
            let is_here = matches!(state, State::Finished { is_gone: false });
            if is_here || replaced.contains(&rank) {
                *state = State::Running;
            }
        }
        replaced
    }

    /// The generation cannot begin. Gives one of those who have no process, to be blamed.
    pub(super) fn abandon(&mut self) -> usize {
        self.next = None;
        let replaced = match std::mem::replace(&mut self.phase, Phase::Running { due: None }) {
            Phase::Announced { replaced } | Phase::Placing { replaced } => replaced,
            Phase::Running { .. } => Vec::new(),
        };
        replaced.iter().for_each(|rank| self.states[*rank] = State::Lost);
        replaced.first().copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reform(on_loss: OnLoss, max_restarts: u32) -> Reform {
        Reform::new(on_loss, RestartPolicy::at_most(max_restarts), 0, 3)
    }

    /// All the way to the next generation.
    fn next(reform: &mut Reform) -> Vec<usize> {
        reform.announce(false);
        reform.place(false).expect("announced");
        reform.begin()
    }

    #[test]
    fn without_restarts_a_loss_is_the_end() {
        let mut reform = reform(OnLoss::RestartAll, 0);
        assert_eq!(reform.lost(1, Instant::now()), None);
        assert_eq!(reform.due(), None);
        assert!(!reform.is_under_way());
    }

    #[test]
    fn losses_of_one_moment_are_one_restart() {
        let mut reform = reform(OnLoss::ReplaceLost, 1);
        let now = Instant::now();
        let delay = reform.lost(1, now).expect("one restart");
        assert_eq!(reform.lost(2, now + delay / 2), Some(delay - delay / 2));
        assert_eq!(reform.due(), Some(now + delay));
        assert_eq!(next(&mut reform), [1, 2]);
        assert_eq!(reform.generation(), 1);
        assert_eq!(reform.lost(0, now + delay), None, "a second restart within the window");
    }

    #[test]
    fn everyone_begins_anew_where_all_restart() {
        let mut reform = reform(OnLoss::RestartAll, 1);
        reform.ended(0);
        reform.lost(2, Instant::now()).expect("restarts");
        assert_eq!(next(&mut reform), [0, 1, 2]);
    }

    #[test]
    fn who_had_finished_takes_part_again_where_it_is_if_it_is() {
        let mut reform = reform(OnLoss::ReplaceLost, 1);
        reform.ended(0);
        reform.ended(1);
        reform.gone(1);
        reform.lost(2, Instant::now()).expect("restarts");
        assert_eq!(next(&mut reform), [1, 2]);
        assert_eq!(reform.states, [State::Running; 3]);
    }

    #[test]
    fn a_loss_while_room_is_found_leads_to_one_more_generation() {
        let mut reform = reform(OnLoss::ReplaceLost, 2);
        let now = Instant::now();
        reform.lost(0, now).expect("restarts");
        reform.announce(false);
        reform.place(false).expect("announced");
        let delay = reform.lost(1, now).expect("restarts once more");
        assert_eq!(reform.due(), None, "first this one");
        assert_eq!(reform.begin(), [0]);
        assert_eq!(reform.due(), Some(now + delay));
        assert_eq!(next(&mut reform), [1]);
        assert_eq!(reform.generation(), 2);
    }

    #[test]
    fn what_cannot_begin_is_over() {
        let mut reform = reform(OnLoss::RestartAll, 1);
        reform.lost(2, Instant::now()).expect("restarts");
        reform.announce(false);
        reform.place(false).expect("announced");
        assert_eq!(reform.abandon(), 0);
        assert!(reform.is_over());
    }

    #[test]
    fn a_loss_after_the_announcement_belongs_to_it() {
        let mut reform = reform(OnLoss::ReplaceLost, 2);
        let now = Instant::now();
        reform.lost(0, now).expect("restarts");
        assert_eq!(reform.coming(), 1);
        assert_eq!(reform.announce(false), [0]);
        assert_eq!(reform.coming(), 1);
        reform.lost(2, now).expect("restarts");
        assert_eq!(reform.place(false), Some(vec![0, 2]));
        assert_eq!(reform.coming(), 2);
        assert_eq!(reform.begin(), [0, 2]);
        assert_eq!(reform.due(), None);
    }

    #[test]
    fn it_goes_on_without_those_that_have_no_room() {
        let mut reform = Reform::new(OnLoss::ReplaceLost, RestartPolicy::at_most(2), 0, 5);
        let now = Instant::now();
        for rank in [0, 2, 3] {
            reform.lost(rank, now).expect("restarts");
        }
        assert_eq!(reform.announce(false), [0, 2, 3]);
        // Room is being looked for.
        reform.lost(4, now).expect("restarts");
        reform.shrink(&[0, 2]);
        // Of 1, 3 and 4, which are 0, 1 and 2 now.
        assert_eq!(reform.place(false), Some(vec![1, 2]));
        assert_eq!(reform.begin(), [1, 2]);
        assert_eq!((reform.generation(), reform.due()), (1, None));
        assert_eq!(reform.states, [State::Running; 3]);
    }

    #[test]
    fn growth_is_no_loss() {
        let (mut reform, now) = (reform(OnLoss::ReplaceLost, 1), Instant::now());
        assert!(reform.is_steady());
        reform.grow(2, now);
        assert!(!reform.is_steady());
        assert_eq!((reform.generation(), reform.coming(), reform.due()), (0, 1, Some(now)));
        assert_eq!(next(&mut reform), [3, 4]);
        assert_eq!(reform.states, [State::Running; 5]);
        reform.lost(4, now).expect("the one restart that there is");
        reform.ended(0);
        assert_eq!(next(&mut reform), [4]);
        reform.ended(0);
        assert!(!reform.is_steady(), "it is about to end");
    }

    #[test]
    fn a_loss_while_it_grows_belongs_to_the_growth() {
        let (mut reform, now) = (reform(OnLoss::ReplaceLost, 1), Instant::now());
        reform.grow(1, now);
        assert_eq!(reform.lost(1, now), Some(Duration::ZERO));
        assert_eq!(next(&mut reform), [1, 3]);
        assert_eq!(reform.due(), None);
    }

    #[derive(Clone, Copy, Debug)]
    enum Act {
        End(usize),
        Go(usize),
        Lose(usize),
        Step,
        Abandon,
        Grow,
        Shrink(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            2 => (0usize..4).prop_map(Act::End),
            2 => (0usize..4).prop_map(Act::Go),
            3 => (0usize..4).prop_map(Act::Lose),
            6 => Just(Act::Step),
            1 => Just(Act::Abandon),
            1 => Just(Act::Grow),
            2 => (0usize..4).prop_map(Act::Shrink),
        ]
    }

    proptest! {
        /// INV-GANG: nobody is taken to run without a process, and as long as a group is not over
        /// something is still to come.
        #[test]
        fn something_is_to_come_until_it_is_over(
            acts in prop::collection::vec(act(), 1..100),
            replaces in any::<bool>(),
            restarts in 0u32..4,
        ) {
            let on_loss = if replaces { OnLoss::ReplaceLost } else { OnLoss::RestartAll };
            let mut reform = reform(on_loss, restarts);
            let now = Instant::now();
            let mut has_process = vec![true; 3];
            for act in acts {
                let before = reform.generation();
                match act {
                    Act::End(rank) | Act::Go(rank) | Act::Lose(rank) | Act::Shrink(rank)
                        if rank >= has_process.len() => {}
                    Act::Grow if reform.is_steady() && has_process.len() < 4 => {
                        reform.grow(1, now);
                        has_process.push(false);
                    }
                    Act::Shrink(rank) if reform.is_announced() && has_process.len() > 1 => {
                        reform.shrink(&[rank]);
                        has_process.remove(rank);
                    }
                    Act::End(rank) => reform.ended(rank),
                    Act::Go(rank) if has_process[rank] => {
                        has_process[rank] = false;
                        match reform.states[rank] {
                            State::Running => drop(reform.lost(rank, now)),
                            _ => reform.gone(rank),
                        }
                    }
                    Act::Lose(rank) if has_process[rank] && reform.states[rank] == State::Running => {
                        has_process[rank] = false;
                        reform.lost(rank, now);
                    }
                    Act::Step => match &reform.phase {
                        Phase::Running { due: Some(_) } => {
                            let replaced = reform.announce(false);
                            replaced.iter().for_each(|rank| has_process[*rank] = false);
                        }
                        Phase::Running { due: None } => {}
                        Phase::Announced { .. } => drop(reform.place(false)),
                        Phase::Placing { .. } => {
                            reform.begin().iter().for_each(|rank| has_process[*rank] = true);
                        }
                    },
                    Act::Abandon if reform.is_under_way() && reform.due().is_none() => {
                        reform.abandon();
                    }
                    _ => {}
                }
                prop_assert!(reform.generation() - before <= 1);
                if !reform.is_under_way() {
                    for (state, has_process) in reform.states.iter().zip(&has_process) {
                        prop_assert!(*state != State::Running || *has_process, "{reform:?}");
                    }
                }
                prop_assert_eq!(
                    reform.is_over(),
                    !reform.is_under_way() && !reform.is_any_running()
                );
            }
            // Left alone, it comes to rest.
            for _ in 0..3 * (restarts as usize + 1) {
                match &reform.phase {
                    Phase::Running { due: Some(_) } => drop(reform.announce(false)),
                    Phase::Announced { .. } => drop(reform.place(false)),
                    Phase::Placing { .. } => drop(reform.begin()),
                    Phase::Running { due: None } => {}
                }
            }
            prop_assert!(!reform.is_under_way());
        }
    }
}
