//! What happens goes to the scheduler, and what it commands is done.

use super::request::{Start, Turn};
use super::{Lease, Runtime, State, lock};
use crate::Error;
use crate::process::pool::Worker;
use crate::scheduler::{Command, Event, Grant, Id};
use std::sync::{Arc, TryLockError};

impl Runtime {
    pub(super) fn share(&self, holder: Id, worker: &Arc<Worker>, max: usize) {
        self.take_steps(Event::Join { holder, max }, |_| {}, Some(worker));
    }

    /// Tells the scheduler what happened, and does what it says.
    pub(super) fn step(&self, event: Event) {
        self.step_with(event, |_| {});
    }

    /// The same, after a change of the state under the same lock.
    pub(super) fn step_with(&self, event: Event, change: impl FnOnce(&mut State)) {
        self.take_steps(event, change, None);
    }

    fn take_steps(
        &self,
        event: Event,
        change: impl FnOnce(&mut State),
        joined: Option<&Arc<Worker>>,
    ) {
        let mut steps = Vec::new();
        {
            let mut state = lock(&self.inner.state);
            // First what came first.
            self.empty_inbox(&mut state, &mut steps);
            change(&mut state);
            self.decide(&mut state, event, joined, &mut steps);
        }
        // Who submitted meanwhile relies on this look.
        self.take_in();
        steps.into_iter().for_each(Step::take);
    }

    /// Takes in what is new. If another thread has the state, it looks here when it has done.
    pub(super) fn take_in(&self) {
        while !lock(&self.inner.inbox).is_empty() {
            let mut state = match self.inner.state.try_lock() {
                Ok(state) => state,
                Err(TryLockError::Poisoned(state)) => state.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            let mut steps = Vec::new();
            self.empty_inbox(&mut state, &mut steps);
            drop(state);
            if !steps.is_empty() {
                self.take_in();
            }
            steps.into_iter().for_each(Step::take);
        }
    }

    fn empty_inbox(&self, state: &mut State, steps: &mut Vec<Step>) {
        let inbox = std::mem::take(&mut *lock(&self.inner.inbox));
        for (event, id, waiting) in inbox {
            state.starts.insert(id, waiting);
            self.decide(state, event, None, steps);
        }
    }

    fn decide(
        &self,
        state: &mut State,
        event: Event,
        joined: Option<&Arc<Worker>>,
        steps: &mut Vec<Step>,
    ) {
        let mut commands = std::mem::take(&mut state.commands);
        state.scheduler.step(event, &mut commands);
        commands.drain(..).for_each(|command| self.perform(state, command, joined, steps));
        state.commands = commands;
    }

    fn perform(
        &self,
        state: &mut State,
        command: Command,
        joined: Option<&Arc<Worker>>,
        steps: &mut Vec<Step>,
    ) {
        match command {
            Command::Start { id, mut grants } => {
                grants.iter_mut().for_each(|grant| state.locate(grant));
                let runtime = self.inside();
                let lease = Arc::new(Lease::new(runtime, id, grants));
                let start = state.starts.remove(&id).map(|waiting| waiting.start);
                steps.push(Step { start, turn: Ok(Turn::Granted(lease)) });
            }
            Command::Joined { ids, .. } => {
                for waiting in ids.iter().filter_map(|id| state.starts.remove(id)) {
                    let Some(worker) = joined.cloned() else { continue };
                    let turn = Ok(Turn::Joined(worker));
                    steps.push(Step { start: Some(waiting.start), turn });
                }
            }
            Command::Resume { id } => {
                if let Some(back) = state.resumes.remove(&id) {
                    let _ = back.send(());
                }
            }
            Command::Refuse { id, refusal } => {
                let Some(waiting) = state.starts.remove(&id) else { return };
                let error = waiting.request.refused(refusal, &state.scheduler.total());
                steps.push(Step { start: Some(waiting.start), turn: Err(error) });
            }
            Command::Lost { id } => drop(state.resumes.remove(&id)),
        }
    }

    /// Looks at the state, after all that was submitted.
    pub(super) fn with_state<R>(&self, look: impl FnOnce(&mut State) -> R) -> R {
        self.take_in();
        let result = look(&mut lock(&self.inner.state));
        // Who submitted meanwhile relies on this look.
        self.take_in();
        result
    }
}

impl State {
    /// A bundle is a piece of a machine, and counts its GPUs from 0: which machine, which GPUs.
    fn locate(&self, grant: &mut Grant) {
        if let Some(bundle) = self.bundles.get(&grant.node) {
            grant.node = bundle.node;
            grant.gpus.iter_mut().for_each(|gpu| *gpu = bundle.gpus[*gpu]);
        }
    }
}

/// A request whose turn has come, to be told so outside of the lock.
struct Step {
    start: Option<Start>,
    turn: Result<Turn, Error>,
}

impl Step {
    fn take(self) {
        match self.start {
            Some(start) => start(self.turn),
            // Cancelled in this moment: what it was granted goes back.
            None => drop(self.turn),
        }
    }
}
