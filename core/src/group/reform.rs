//! What the losses of members lead to. Pure: times go in.

use crate::actor::RestartPolicy;
use crate::actor::supervisor::Supervisor;
use std::time::{Duration, Instant};

/// Who begins anew when members of a group are lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLoss {
    /// Every member, in a new process. The default.
    #[default]
    RestartAll,
    /// The lost ones, each in a new process; the others stay where they are and are told, see
    /// [`Member::rendezvous`](crate::Member::rendezvous). Where the strategy is a strict one and a
    /// whole machine was lost, every member begins anew.
    ReplaceLost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Finished,
    /// Its function failed, which is nobody's loss.
    Failed,
    Lost,
}

/// The members of a group, and when those that were lost are replaced.
#[derive(Debug)]
pub(super) struct Reform {
    on_loss: OnLoss,
    supervisor: Supervisor,
    generation: u64,
    /// The generation in which each member's function began.
    born: Vec<u64>,
    states: Vec<State>,
    due: Option<Instant>,
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
            born: vec![generation; size],
            states: vec![State::Running; size],
            due: None,
        }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn born(&self) -> &[u64] {
        &self.born
    }

    /// When the next generation is to be formed, if it is.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether nothing more can come from any member.
    pub(super) fn is_over(&self) -> bool {
        self.due.is_none() && !self.states.contains(&State::Running)
    }

    pub(super) fn ended(&mut self, rank: usize, is_ok: bool) {
        self.states[rank] = if is_ok { State::Finished } else { State::Failed };
    }

    /// A member was lost. `Some`: a new generation will be formed, after so long; losses until
    /// then belong to it. `None`: too many were lost, or another one has failed.
    pub(super) fn lost(&mut self, rank: usize, now: Instant) -> Option<Duration> {
        self.states[rank] = State::Lost;
        if let Some(due) = self.due {
            return Some(due.saturating_duration_since(now));
        }
        if self.states.contains(&State::Failed) {
            return None;
        }
        let delay = self.supervisor.lost(now)?;
        self.due = Some(now + delay);
        Some(delay)
    }

    /// Whose processes are to be ended before the next generation: they get new ones.
    pub(super) fn doomed(&self, must_move: bool) -> Vec<usize> {
        let all = must_move || self.on_loss == OnLoss::RestartAll;
        (0..self.states.len()).filter(|rank| all || self.states[*rank] == State::Lost).collect()
    }

    /// Forms the next generation, in which these members have new processes. Gives the ranks whose
    /// function begins anew: those, and those that had finished.
    pub(super) fn form(&mut self, replaced: &[usize]) -> Vec<usize> {
        self.due = None;
        self.generation += 1;
        let finished = |rank: &usize| self.states[*rank] == State::Finished;
        let begins = |rank: &usize| replaced.contains(rank) || finished(rank);
        let ranks: Vec<usize> = (0..self.states.len()).filter(begins).collect();
        for rank in &ranks {
            self.born[*rank] = self.generation;
            self.states[*rank] = State::Running;
        }
        ranks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reform(on_loss: OnLoss, max_restarts: u32) -> Reform {
        Reform::new(on_loss, RestartPolicy::at_most(max_restarts), 0, 3)
    }

    #[test]
    fn without_restarts_a_loss_is_the_end() {
        let mut reform = reform(OnLoss::RestartAll, 0);
        assert_eq!(reform.lost(1, Instant::now()), None);
        assert_eq!(reform.due(), None);
    }

    #[test]
    fn losses_of_one_moment_are_one_restart() {
        let mut reform = reform(OnLoss::ReplaceLost, 1);
        let now = Instant::now();
        let delay = reform.lost(1, now).expect("one restart");
        assert_eq!(reform.lost(2, now + delay / 2), Some(delay - delay / 2));
        assert_eq!(reform.due(), Some(now + delay));
        let doomed = reform.doomed(false);
        assert_eq!(doomed, [1, 2]);
        assert_eq!(reform.form(&doomed), [1, 2]);
        assert_eq!((reform.generation(), reform.born()), (1, &[0, 1, 1][..]));
        assert_eq!(reform.lost(0, now + delay), None, "a second restart within the window");
    }

    #[test]
    fn everyone_begins_anew_where_all_restart() {
        let mut reform = reform(OnLoss::RestartAll, 1);
        reform.ended(0, true);
        reform.lost(2, Instant::now()).expect("restarts");
        let doomed = reform.doomed(false);
        assert_eq!(doomed, [0, 1, 2]);
        assert_eq!(reform.form(&doomed), [0, 1, 2]);
        assert_eq!(reform.born(), [1, 1, 1]);
    }

    #[test]
    fn who_had_finished_takes_part_again() {
        let mut reform = reform(OnLoss::ReplaceLost, 1);
        reform.ended(0, true);
        reform.lost(2, Instant::now()).expect("restarts");
        assert_eq!(reform.form(&reform.doomed(false)), [0, 2]);
        assert_eq!(reform.born(), [1, 0, 1]);
        assert!(!reform.is_over());
    }

    #[test]
    fn nothing_is_restarted_after_a_failure() {
        let mut reform = reform(OnLoss::ReplaceLost, 5);
        reform.ended(0, false);
        assert_eq!(reform.lost(1, Instant::now()), None);
        reform.ended(2, true);
        assert!(reform.is_over());
    }
}
