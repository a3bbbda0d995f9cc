//! What a task may give, and whether it did.

use crate::tally::Tally;
use crate::work::Mark;
use anyhow::{Result, bail, ensure};
use mobula_core::{Error, ObjectRef};
use std::collections::HashMap;
use std::time::Duration;

/// Whoever has not ended after that never will.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// What was asked for.
pub(crate) struct Expected<T> {
    pub(crate) mark: Mark,
    pub(crate) object: ObjectRef<T>,
    pub(crate) value: Value<T>,
    pub(crate) retries: u32,
    pub(crate) is_cancelled: bool,
    /// Whether its process, or that of an input, may have been killed.
    pub(crate) may_be_lost: bool,
}

pub(crate) enum Value<T> {
    Is(T),
    /// It fails, and says this.
    Error(&'static str),
    /// It takes longer than it may.
    Late,
}

/// A run that is still to be judged.
pub(crate) type Verdict = Box<dyn FnOnce(&HashMap<u64, u32>, &mut Tally) -> Result<()>>;

impl<T: PartialEq + Send + Sync + 'static> Expected<T> {
    /// Waits for the answer. The runs are counted once all have ended.
    pub(crate) fn settle(self) -> Result<Verdict> {
        let answer = self.object.get_timeout(LONG);
        let name = format!("{} (number {})", self.object.task(), self.mark.number());
        ensure!(self.object.is_ready(), "{name} has not ended after {LONG:?}");
        Ok(Box::new(move |runs, tally| {
            let runs = runs.get(&self.mark.number()).copied().unwrap_or(0);
            tally.tasks += 1;
            tally.repeated += u64::from(runs.saturating_sub(1));
            let most = self.retries + 1;
            ensure!(runs <= most, "{name} ran {runs} times, expected at most {most}");
            self.judge(&name, answer.as_deref(), runs, tally)
        }))
    }

    fn judge(
        &self,
        name: &str,
        answer: Result<&T, &Error>,
        runs: u32,
        tally: &mut Tally,
    ) -> Result<()> {
        match (answer, &self.value) {
            (Ok(value), Value::Is(expected)) => {
                ensure!(value == expected, "{name} gave a wrong value");
                ensure!(runs > 0, "{name} gave a value without having run");
                tally.right += 1;
            }
            (Err(Error::TaskFailed { message, .. }), Value::Error(expected)) => {
                ensure!(message == expected, "{name} failed with {message:?}");
                tally.right += 1;
            }
            (Err(Error::Timeout { .. }), Value::Late) => tally.timed_out += 1,
            (Err(Error::Cancelled { .. }), _) if self.is_cancelled => tally.cancelled += 1,
            (Err(error), _) if self.may_be_lost && is_loss(error) => tally.lost += 1,
            (Err(error), _) => bail!("{name} gave an error that nothing explains: {error}"),
            (Ok(_), _) => bail!("{name} gave a value, expected an error"),
        }
        Ok(())
    }
}

/// Whether it says that a process was lost, and how.
pub(crate) fn is_loss(error: &Error) -> bool {
    match error {
        Error::WorkerLost { reason, .. } => {
            // The last: it was killed after it had said that it has a large result.
            let known = ["killed by signal", "called off", "its result went with its process"];
            known.iter().any(|known| reason.contains(known))
        }
        Error::InputFailed { root, .. } => is_loss(root),
        _ => false,
    }
}
