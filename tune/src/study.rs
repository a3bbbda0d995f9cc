//! A study: its trials and what to do next. A pure state machine.
//!
//! INV-REPLAY: an `Event` is the only thing that changes a study, live as on replay. Every
//! method that decides something applies the events of its decision and leaves them in an outbox;
//! the coordinator makes them durable before it acts on the answer.

use crate::history::{History, TrialState};
use crate::record::{Event, StudyInfo, TrialRecord, compare};
use crate::{Decision, Error, Flow, Params, Sampler, Scheduler};
use std::path::Path;

/// A trial to run.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    pub(crate) number: usize,
    pub(crate) attempt: u32,
    pub(crate) params: Params,
}

/// How many trials, and what becomes of failed ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) trials: usize,
    pub(crate) max_retries: u32,
}

/// The state of a study.
#[derive(Debug)]
pub(crate) struct Study {
    info: StudyInfo,
    limits: Limits,
    sampler: Box<dyn Sampler>,
    scheduler: Box<dyn Scheduler>,
    trials: Vec<TrialRecord>,
    history: History,
    outbox: Vec<Event>,
}

impl Study {
    /// A new study, or the one that `events` recorded; `path` is named in errors. Trials that
    /// were running are queued again.
    pub(crate) fn open(
        info: StudyInfo,
        limits: Limits,
        sampler: Box<dyn Sampler>,
        scheduler: Box<dyn Scheduler>,
        events: &[Event],
        path: &Path,
    ) -> Result<Self, Error> {
        let history = History::new(info.space.parameters().len());
        let (trials, outbox) = (Vec::new(), Vec::new());
        let mut study = Self { info, limits, sampler, scheduler, trials, history, outbox };
        match events.first() {
            None => study.outbox.push(Event::Study(study.info.clone())),
            Some(Event::Study(recorded)) => compare(recorded, &study.info, path)?,
            Some(_) => {
                return Err(Error::NotAJournal { path: path.to_owned() });
            }
        }
        for event in events.iter().skip(1) {
            study.apply(event)?;
        }
        let running: Vec<usize> = study.in_state(TrialState::Running).map(|t| t.number).collect();
        for trial in running {
            study.record(Event::Requeued { trial, error: None })?;
        }
        Ok(study)
    }

    pub(crate) fn trials(&self) -> &[TrialRecord] {
        &self.trials
    }

    pub(crate) fn info(&self) -> &StudyInfo {
        &self.info
    }

    pub(crate) fn max_step(&self) -> Option<u64> {
        self.scheduler.max_step()
    }

    /// Events that have been applied but are not durable yet.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.outbox)
    }

    /// Whether every trial has come to its end.
    pub(crate) fn is_done(&self) -> bool {
        self.trials.len() >= self.limits.trials && self.trials.iter().all(|t| t.state.is_finished())
    }

    /// A slot is free: the trial to run in it, a waiting one before a new one.
    pub(crate) fn next_trial(&mut self) -> Result<Option<Start>, Error> {
        let waiting = self.in_state(TrialState::Waiting).map(|t| t.number).next();
        let number = match waiting {
            Some(number) => number,
            None if self.trials.len() < self.limits.trials => self.create()?,
            None => return Ok(None),
        };
        let attempt = self.trials[number].attempt + 1;
        self.record(Event::Started { trial: number, attempt })?;
        let params = self.trials[number].params.clone();
        Ok(Some(Start { number, attempt, params }))
    }

    fn create(&mut self) -> Result<usize, Error> {
        let trial = self.trials.len();
        let params = self.sampler.sample(&self.info.space, &self.history, self.info.seed, trial);
        self.record(Event::Created { trial, params })?;
        Ok(trial)
    }

    /// A running trial reports; one that has been ended is told to stop.
    pub(crate) fn report(
        &mut self,
        trial: usize,
        attempt: u32,
        step: u64,
        value: f64,
    ) -> Result<Flow, Error> {
        if !self.is_live(trial, attempt) {
            return Ok(Flow::Stop);
        }
        let value = if value.is_finite() { value } else { f64::NAN };
        let decision = self.record(Event::Report { trial, step, value })?;
        match decision {
            Decision::Continue => return Ok(Flow::Continue),
            Decision::Stop => self.finish(trial, TrialState::Pruned, None)?,
            Decision::Complete => self.complete(trial)?,
        }
        Ok(Flow::Stop)
    }

    /// The work of a trial has ended, with an error or by itself.
    pub(crate) fn ended(
        &mut self,
        trial: usize,
        attempt: u32,
        error: Option<String>,
    ) -> Result<(), Error> {
        if !self.is_live(trial, attempt) {
            return Ok(());
        }
        match error {
            Some(_) if attempt <= self.limits.max_retries => {
                self.record(Event::Requeued { trial, error })?;
                Ok(())
            }
            Some(_) => self.finish(trial, TrialState::Failed, error),
            None => self.complete(trial),
        }
    }

    /// A trial that came to its end counts if its last value is a number.
    fn complete(&mut self, trial: usize) -> Result<(), Error> {
        let metric = &self.info.metric.name;
        let problem = match self.trials[trial].value() {
            Some(value) if value.is_finite() => {
                return self.finish(trial, TrialState::Complete, None);
            }
            Some(_) => format!("its last {metric} is not a finite number"),
            None => format!("it ended without a report of {metric:?}"),
        };
        self.finish(trial, TrialState::Failed, Some(problem))
    }

    fn finish(
        &mut self,
        trial: usize,
        state: TrialState,
        error: Option<String>,
    ) -> Result<(), Error> {
        self.record(Event::Finished { trial, state, error }).map(|_| ())
    }

    fn is_live(&self, trial: usize, attempt: u32) -> bool {
        let live = |t: &TrialRecord| t.state == TrialState::Running && t.attempt == attempt;
        self.trials.get(trial).is_some_and(live)
    }

    pub(crate) fn in_state(&self, state: TrialState) -> impl Iterator<Item = &TrialRecord> {
        self.trials.iter().filter(move |t| t.state == state)
    }

    fn record(&mut self, event: Event) -> Result<Decision, Error> {
        let decision = self.apply(&event)?;
        self.outbox.push(event);
        Ok(decision)
    }

    /// The only place where a study changes.
    fn apply(&mut self, event: &Event) -> Result<Decision, Error> {
        match event {
            Event::Study(_) => return Err(out_of_order(event)),
            Event::Created { trial, params } => return self.add(*trial, params, event),
            Event::Started { trial, .. }
            | Event::Report { trial, .. }
            | Event::Requeued { trial, .. }
            | Event::Finished { trial, .. } => {
                let record = self.trials.get_mut(*trial).ok_or_else(|| out_of_order(event))?;
                record.apply(event);
            }
        }
        Ok(self.follow(event))
    }

    fn add(&mut self, trial: usize, params: &Params, event: &Event) -> Result<Decision, Error> {
        if trial != self.trials.len() {
            return Err(out_of_order(event));
        }
        self.history.push(&self.info.space.encode(params)?);
        self.trials.push(TrialRecord {
            number: trial,
            params: params.clone(),
            state: TrialState::Waiting,
            attempt: 0,
            reports: Vec::new(),
            error: None,
        });
        Ok(Decision::Continue)
    }

    /// Brings the sampler's and the scheduler's view up to date.
    fn follow(&mut self, event: &Event) -> Decision {
        match event {
            Event::Report { trial, step, value } => {
                let loss = self.info.metric.loss(*value);
                self.history.set_value(*trial, Some(*step), loss);
                return self.scheduler.on_report(*trial, *step, loss);
            }
            Event::Started { trial, .. } => {
                self.history.set_state(*trial, TrialState::Running);
                self.history.set_value(*trial, None, f64::NAN);
                self.scheduler.on_start(*trial);
            }
            Event::Requeued { trial, .. } => self.history.set_state(*trial, TrialState::Waiting),
            Event::Finished { trial, state, .. } => self.history.set_state(*trial, *state),
            Event::Study(_) | Event::Created { .. } => {}
        }
        Decision::Continue
    }
}

/// The trials that a journal's events describe, without sampler and scheduler.
pub(crate) fn replay(
    events: &[Event],
    path: &Path,
) -> Result<(StudyInfo, Vec<TrialRecord>), Error> {
    let Some(Event::Study(info)) = events.first() else {
        return Err(Error::NotAJournal { path: path.to_owned() });
    };
    let limits = Limits { trials: 0, max_retries: 0 };
    let (sampler, scheduler) = (Box::new(crate::RandomSampler), Box::new(crate::Fifo));
    let mut study = Study::open(info.clone(), limits, sampler, scheduler, &[], path)?;
    for event in &events[1..] {
        study.apply(event)?;
    }
    Ok((study.info, study.trials))
}

fn out_of_order(event: &Event) -> Error {
    Error::Internal(format!("an event does not follow from those before it: {event:?}"))
}

#[cfg(test)]
#[path = "study_tests.rs"]
mod tests;
