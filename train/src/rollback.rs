//! What becomes of a training whose numbers are not finite any more.
//!
//! The stream goes on from where it is: the same rows after the same checkpoint would lead to the same
//! numbers. PaLM was trained so, by hand (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).

use crate::keeper::store;
use crate::state::Verdict;
use crate::{Error, Result, TrainState, WorkerContext};
use mobula_core::checkpoint::Checkpoint;

impl WorkerContext<'_> {
    /// What the policy says to this error of a step, or the error. All ranks come here alike, after the
    /// sums over all.
    pub(crate) fn leave_out_or_roll_back(
        &mut self,
        state: &mut TrainState,
        error: Error,
    ) -> Result<()> {
        match state.verdict(&error) {
            Verdict::Fail => Err(error),
            Verdict::LeaveOut => {
                state.skip();
                Ok(())
            }
            Verdict::RollBack { at_most } if state.skips().rollbacks >= at_most => {
                Err(cannot(error, format!("that was done {at_most} time(s), as often as allowed")))
            }
            Verdict::RollBack { .. } => self.roll_back(state, error),
        }
    }

    /// Until all ranks have seen the checkpoint none changes anything: if one is lost meanwhile, the
    /// others have what they had before the step.
    fn roll_back(&mut self, state: &mut TrainState, error: Error) -> Result<()> {
        self.keeper().map_or(Ok(()), |keeper| keeper.settle())?;
        // To write, look for and read a checkpoint may take longer than others wait in a step.
        self.collective.patient_any(false)?;
        let checkpoint = match self.agreed_checkpoint(state.first_spoilt())? {
            Ok(checkpoint) => checkpoint,
            Err(reason) => return Err(cannot(error, reason)),
        };
        self.before_update(state);
        state.roll_back(&checkpoint)?;
        self.collective.patient_any(false)?;
        let text = format!("{error}; back to the checkpoint of step {}", checkpoint.step());
        self.keeper().map_or(Ok(()), |keeper| keeper.note(text))
    }

    /// The newest one from before a step, the same on all ranks, or why there is no such.
    fn agreed_checkpoint(&self, before: u64) -> Result<std::result::Result<Checkpoint, String>> {
        let found = match &self.setup.checkpoints {
            Some(dir) => store(dir, &self.setup).latest_before(before),
            None => Ok(None),
        };
        self.collective.patient_any(false)?;
        let step = match &found {
            Ok(Some(found)) => found.step() as f64,
            Ok(None) => -1.0,
            Err(_) => -2.0,
        };
        let differs = self.collective.gather_one(step)?.iter().any(|other| *other != step);
        Ok(match found {
            Err(error) => Err(error.to_string()),
            Ok(_) if differs => {
                Err("ranks find different ones: do all workers see the run directory?".to_owned())
            }
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err(format!("there is none from before step {before}")),
        })
    }

    /// Errors when the policy needs what the training does not have.
    pub(crate) fn check_policy(&self, state: &TrainState) -> Result<()> {
        if state.rollbacks().is_none() || self.setup.checkpoints.is_some() {
            return Ok(());
        }
        let (option, got) = ("non_finite", "RollBack".to_owned());
        let expected = "another policy, or a `Trainer` with a run directory, to whose checkpoints it can go back";
        Err(Error::Option { option, got, expected })
    }
}

fn cannot(error: Error, reason: String) -> Error {
    Error::NoRollBack { error: Box::new(error), reason }
}
