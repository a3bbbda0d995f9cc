//! What becomes of a training whose numbers are not finite any more.
//!
//! The stream goes on from where it is: the same rows after the same checkpoint would lead to the same
//! numbers. PaLM was trained so, by hand (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).

use crate::keeper::store;
use crate::state::Bearing;
use crate::{Error, Result, TrainState, WorkerContext};
use mobula_core::checkpoint::Checkpoint;

impl WorkerContext<'_> {
    /// Leaves out the step or goes back, as the policy says; or this is the error. All ranks come here
    /// alike, after the sums over all.
    pub(crate) fn bear(&mut self, state: &mut TrainState, error: Error) -> Result<()> {
        match state.bearing(&error) {
            Bearing::Fail => Err(error),
            Bearing::LeaveOut => {
                state.skip();
                Ok(())
            }
            Bearing::RollBack { at_most } if state.skips().rollbacks >= at_most => {
                Err(cannot(error, format!("that was done {at_most} time(s), as often as allowed")))
            }
            Bearing::RollBack { .. } => self.roll_back(state, error),
        }
    }

    fn roll_back(&mut self, state: &mut TrainState, error: Error) -> Result<()> {
        self.keeper().map_or(Ok(()), |keeper| keeper.settle())?;
        // It may take longer to write than others wait in a step.
        self.collective.patient_any(false)?;
        let before = state.skips().gone_back_to;
        let checkpoint = match (self.agreed_checkpoint(before)?, before) {
            (Ok(Some(checkpoint)), _) => checkpoint,
            (Ok(None), None) => return Err(cannot(error, "there is none".to_owned())),
            (Ok(None), Some(step)) => {
                let reason =
                    format!("that of step {step} has not helped, and there is none before it");
                return Err(cannot(error, reason));
            }
            (Err(reason), _) => return Err(cannot(error, reason)),
        };
        state.roll_back(&checkpoint)?;
        let text = format!("{error}; back to the checkpoint of step {}", checkpoint.step());
        self.keeper().map_or(Ok(()), |keeper| keeper.note(text))
    }

    /// The newest one before a step, the same on all ranks, or why there is no such.
    fn agreed_checkpoint(
        &self,
        before: Option<u64>,
    ) -> Result<std::result::Result<Option<Checkpoint>, String>> {
        let Some(dir) = &self.setup.checkpoints else {
            return Ok(Ok(None));
        };
        let store = store(dir, &self.setup);
        let found = match before {
            Some(step) => store.latest_before(step),
            None => store.latest(),
        };
        let step = match &found {
            Ok(found) => found.as_ref().map_or(-1.0, |found| found.step() as f64),
            Err(_) => -2.0,
        };
        let steps = self.collective.gather_one(step)?;
        let differs = steps.iter().any(|other| *other != step);
        Ok(match found {
            Err(error) => Err(error.to_string()),
            Ok(_) if differs => {
                Err("ranks find different ones: do all workers see the run directory?".to_owned())
            }
            Ok(found) => Ok(found),
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
