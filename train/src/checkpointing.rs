//! When a run is saved, and what it goes on from.

use crate::context::Place;
use crate::report::{Resumed, WorkerReport};
use crate::snapshot::broadcast_text;
use crate::{Error, Result, TrainState, WorkerContext};
use mobula_core::BatchStream;
use std::sync::Arc;

impl WorkerContext<'_> {
    /// Has every checkpoint hold one more file, such as the fitted preprocessor that goes with
    /// the model.
    pub fn add_checkpoint_file(&mut self, name: &str, content: impl Into<Vec<u8>>) {
        if let Some(keeper) = self.keeper() {
            keeper.files.insert(name.to_owned(), content.into());
        }
    }

    /// Continues from what other ranks still have, if this is after the loss of some, else from the
    /// run's newest valid checkpoint, if there is one. Says whether.
    pub fn restore(
        &mut self,
        state: &mut TrainState,
        stream: &mut dyn BatchStream,
    ) -> Result<bool> {
        self.prepare(state)?;
        let resumed = self.resume(state)?;
        let is_first = self.keeper().is_none_or(|keeper| keeper.is_first_generation());
        let setup = self.setup.clone();
        self.keeper().map_or(Ok(()), |keeper| keeper.make_room(state, &setup))?;
        if resumed.is_none() && is_first {
            return Ok(false);
        }
        let (is_resumed, resumed) = (resumed.is_some(), resumed.unwrap_or_default());
        let is_healed = resumed.from_rank.is_some();
        if is_resumed {
            stream.restore(&state.saved().stream)?;
        }
        if let Place::Member(member, keeper) = &mut self.place {
            if is_resumed {
                keeper.remember(state)?;
            }
            if member.rank() == 0 {
                member.report(&WorkerReport::Resumed(resumed))?;
            }
        }
        // The one that was due when a rank was lost may not have been taken.
        if is_healed && (state.is_finished() || (state.tally.rows == 0 && state.step() > 0)) {
            self.checkpoint_after_epoch(state)?;
        }
        self.meter.restart_clock();
        Ok(is_resumed)
    }

    fn resume(&mut self, state: &mut TrainState) -> Result<Option<Resumed>> {
        let collective = Arc::clone(&self.collective);
        if let Some(keeper) = self.keeper()
            && let Some(resumed) = keeper.heal(state, collective.as_ref())?
        {
            return Ok(Some(resumed));
        }
        let Some(checkpoint) = &self.setup.resume_from else {
            return Ok(None);
        };
        state.restore(checkpoint)?;
        let (step, epoch, metrics) = (state.step(), state.epoch(), state.metrics().clone());
        Ok(Some(Resumed { step, epoch, metrics, from_rank: None }))
    }

    /// Ends the training within an epoch, with a checkpoint if there are any: `state` is finished
    /// afterwards. All ranks must call it alike, and without [`end_epoch`](Self::end_epoch) for the
    /// epoch that is not over. A training that goes on from there ends the epoch.
    pub fn stop(&mut self, state: &mut TrainState) -> Result<()> {
        self.synchronise(state)?;
        state.stop();
        if let Some(keeper) = self.keeper() {
            keeper.remember(state)?;
        }
        match state.has_position() {
            true => self.checkpoint(state),
            false => Ok(()),
        }
    }

    /// If one is due. The one before it may still be written: then it is due later, within the epoch,
    /// or, where the best ones are kept, which are those after epochs, it is waited for.
    pub(crate) fn checkpoint_after_epoch(&mut self, state: &mut TrainState) -> Result<()> {
        let is_due = state.epoch().is_multiple_of(self.setup.every_epochs.max(1));
        if self.setup.checkpoints.is_none() || !(is_due || state.is_finished()) {
            return Ok(());
        }
        let is_busy = self.keeper().is_some_and(|keeper| !keeper.is_idle());
        match self.any(is_busy)? && !state.is_finished() {
            true if self.setup.best.is_none() => {
                self.is_due = true;
                Ok(())
            }
            true => {
                let saved = self.checkpoint(state);
                self.agree(saved)
            }
            false => self.checkpoint(state),
        }
    }

    /// Rank 0 writes. The others wait for a last one, which may be all that is left of the training,
    /// and for each where they are not written in the background.
    fn checkpoint(&mut self, state: &mut TrainState) -> Result<()> {
        let in_background = self.setup.asynchronous && !state.is_finished();
        self.is_due = false;
        let setup = self.setup.clone();
        let Some(keeper) = self.keeper().filter(|_| setup.checkpoints.is_some()) else {
            return Ok(());
        };
        let saved = keeper.save(state, &setup, in_background);
        if in_background { saved } else { self.agree(saved) }
    }

    /// Waits for what rank 0 does. If it fails, all fail by the same reason.
    fn agree(&self, saved: Result<()>) -> Result<()> {
        if !self.collective.patient_any(saved.is_err())? {
            return Ok(());
        }
        let mut reason = saved.as_ref().err().map(ToString::to_string).unwrap_or_default();
        broadcast_text(self.collective(), &mut reason, 0)?;
        saved?;
        Err(Error::Unwritten { rank: 0, reason })
    }

    /// The weights are about to change.
    pub(crate) fn before_update(&mut self, state: &TrainState) {
        if let Some(keeper) = self.keeper() {
            keeper.let_go(state);
        }
    }

    /// Remembers, saves and reports what is due.
    pub(crate) fn after_step(&mut self, state: &mut TrainState) -> Result<()> {
        if let Some(keeper) = self.keeper() {
            keeper.remember(state)?;
            keeper.poll()?;
        }
        let every = self.setup.every_steps.filter(|_| self.setup.checkpoints.is_some());
        self.is_due |= every.is_some_and(|steps| state.step().is_multiple_of(steps));
        if self.is_due && every.is_some() && !state.has_position() {
            return Err(Error::NoPosition);
        }
        if self.is_due && state.has_position() && state.is_synchronised() && !self.waits(state)? {
            self.checkpoint(state)?;
        }
        self.report_progress(state)
    }

    /// Whether a checkpoint is being written, on any of the ranks that write one.
    pub(crate) fn waits(&mut self, state: &TrainState) -> Result<bool> {
        let is_busy = self.keeper().is_some_and(|keeper| !keeper.is_idle());
        match state.updater.shared() {
            _ if !self.setup.asynchronous => Ok(false),
            None => Ok(is_busy),
            Some(_) => self.any(is_busy),
        }
    }
}
