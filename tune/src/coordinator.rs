//! Drives a study: starts its trials as tasks, makes its events durable, answers its reports.
//!
//! One thread, the one that called `run`. Each turn takes every message that has come in, commits
//! all their events with one write, and only then answers: what a trial was told is on disk.

use crate::display::Display;
use crate::history::TrialState;
use crate::journal::Journal;
use crate::session::{Ended, Running, Session};
use crate::study::{Start, Study};
use crate::trial::{Message, StopHandle, Trial};
use crate::tuner::Work;
use crate::{Error, ResultGrid};
use mobula_core::random::Stream;
use mobula_core::{Resources, Runtime, Task, console};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// How often the stop flag is looked at.
const TICK: Duration = Duration::from_millis(50);
/// Trials that run get so long to notice that the study was stopped.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// A task that said it ended has its result within this.
const RESULT_TIMEOUT: Duration = Duration::from_secs(10);
/// A study whose trials get no resources for so long says so and ends.
const PLACEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// A study and everything it takes to run it.
pub(crate) struct Coordinator {
    pub(crate) study: Study,
    pub(crate) journal: Option<Journal>,
    pub(crate) path: Option<PathBuf>,
    pub(crate) runtime: Runtime,
    pub(crate) resources: Resources,
    pub(crate) slots: usize,
    pub(crate) max_failures: Option<usize>,
    pub(crate) trials: usize,
    pub(crate) stop: StopHandle,
    pub(crate) work: Work,
}

impl Coordinator {
    pub(crate) fn run(mut self, quiet: bool) -> Result<ResultGrid, Error> {
        let mut session = self.session(quiet);
        let _interrupt = mobula_core::on_interrupt(self.interrupt_hook(&session));
        session.display.resumed(&self.study);
        while !(self.stop.is_stopped() || self.study.is_done() && session.running.is_empty()) {
            let starts = self.fill(&session)?;
            self.commit(&mut session)?;
            self.start(&mut session, starts);
            self.listen(&mut session)?;
            self.check_failures()?;
        }
        self.commit(&mut session)?;
        if !self.study.is_done() {
            return Err(self.wind_up(session));
        }
        drop(session);
        self.results(quiet)
    }

    fn session(&self, quiet: bool) -> Session {
        let (sender, inbox) = sync_channel(1024);
        Session {
            running: BTreeMap::new(),
            inbox,
            sender,
            answers: Vec::new(),
            display: Display::new(self.trials, quiet),
            finished: Arc::new(AtomicUsize::new(0)),
            last_heard: Instant::now(),
            began: false,
            stop: self.stop.clone(),
        }
    }

    /// Trials for every free slot.
    fn fill(&mut self, session: &Session) -> Result<Vec<Start>, Error> {
        let free = self.slots.saturating_sub(session.running.len());
        let next = std::iter::from_fn(|| self.study.next_trial().transpose());
        next.take(free).collect()
    }

    /// Makes all events durable, shows them, then gives the answers that follow from them.
    fn commit(&mut self, session: &mut Session) -> Result<(), Error> {
        let events = self.study.take_events();
        if let Some(journal) = &mut self.journal {
            events.iter().try_for_each(|event| journal.append(event))?;
            journal.commit()?;
        }
        for event in &events {
            session.display.follow(&self.study, event);
        }
        let finished = self.study.trials().iter().filter(|t| t.state.is_finished()).count();
        session.finished.store(finished, Ordering::Release);
        session.give_answers();
        Ok(())
    }

    fn start(&self, session: &mut Session, starts: Vec<Start>) {
        for start in starts {
            let (number, attempt) = (start.number, start.attempt);
            let object = self.runtime.submit(self.task(start, session.sender.clone()));
            session.running.insert(number, Running { attempt, object });
        }
    }

    fn task(&self, start: Start, coordinator: SyncSender<Message>) -> Task<()> {
        let ended = Ended { number: start.number, coordinator: coordinator.clone() };
        let stream = Stream::new(self.study.info().seed, "tune/trial").child(start.number as u64);
        let [low, high] = stream.key();
        let mut trial = Trial {
            number: start.number,
            params: start.params,
            attempt: start.attempt,
            seed: u64::from(low) | u64::from(high) << 32,
            metric: self.study.info().metric.name.clone(),
            coordinator,
            stop: self.stop.clone(),
            stopped: false,
        };
        let work = Arc::clone(&self.work);
        let body = move || {
            let ended = ended;
            // Without a coordinator there is nobody to work for.
            ended
                .coordinator
                .send(Message::Began)
                .map_err(|_| Error::StudyGone { trial: trial.number })?;
            work(&mut trial)
        };
        Task::new(format!("trial {}", start.number), body).with_resources(self.resources.clone())
    }

    /// Waits for a message, then takes all that are there.
    fn listen(&mut self, session: &mut Session) -> Result<(), Error> {
        let first = match session.inbox.recv_timeout(TICK) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => return self.check_placement(session),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Internal("the study's own channel closed".into()));
            }
        };
        session.last_heard = Instant::now();
        let rest: Vec<Message> = session.inbox.try_iter().collect();
        for message in std::iter::once(first).chain(rest) {
            // A trial that ended because the study was stopped has not come to its own end:
            // asked before each message, because the trial saw the flag before it sent it.
            if self.stop.is_stopped() {
                session.dismiss(message);
            } else {
                self.handle(session, message)?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, session: &mut Session, message: Message) -> Result<(), Error> {
        match message {
            Message::Began => session.began = true,
            Message::Report { number, attempt, step, value, answer } => {
                let flow = self.study.report(number, attempt, step, value)?;
                session.answers.push((answer, flow));
            }
            Message::Ended { number } => {
                let Some(running) = session.running.remove(&number) else {
                    return Ok(());
                };
                match running.object.get_timeout(RESULT_TIMEOUT) {
                    // The runtime shuts down: an interruption, not a failure of the trial.
                    Err(mobula_core::Error::Cancelled { .. }) => self.stop.stop(),
                    result => self.ended(number, running.attempt, result.err())?,
                }
            }
        }
        Ok(())
    }

    fn ended(
        &mut self,
        number: usize,
        attempt: u32,
        error: Option<mobula_core::Error>,
    ) -> Result<(), Error> {
        let error = error.map(|error| match error {
            mobula_core::Error::TaskFailed { message, .. } => message,
            mobula_core::Error::TaskPanicked { message, location, .. } => {
                format!("panicked at {location}: {message}")
            }
            other => other.to_string(),
        });
        // The journal keeps a line, not a page.
        let error = error.map(|text| text.trim().replace('\n', " | "));
        self.study.ended(number, attempt, error)
    }

    /// Trials that are queued behind someone who never lets go must not wait for ever.
    fn check_placement(&self, session: &Session) -> Result<(), Error> {
        let waiting = !session.began && !session.running.is_empty();
        if !waiting || session.last_heard.elapsed() < PLACEMENT_TIMEOUT {
            return Ok(());
        }
        let free = self.runtime.free_resources();
        let what = format!("placing the first trial ({}; free: {free})", self.resources);
        Err(mobula_core::Error::Timeout { what, after: PLACEMENT_TIMEOUT }.into())
    }

    fn check_failures(&self) -> Result<(), Error> {
        let failed = self.study.in_state(TrialState::Failed).count();
        let Some((allowed, (number, message))) = self.max_failures.zip(self.first_failure()) else {
            return Ok(());
        };
        if failed <= allowed {
            return Ok(());
        }
        Err(Error::TooManyFailures { failed, allowed, number, message })
    }

    fn first_failure(&self) -> Option<(usize, String)> {
        let first = self.study.in_state(TrialState::Failed).next()?;
        Some((first.number, first.error.clone().unwrap_or_default()))
    }

    /// Stopped: what runs is told so and waited for a little; its trials stay `running` in the
    /// journal, and are queued again when it is opened.
    fn wind_up(&self, mut session: Session) -> Error {
        session.running.values().for_each(|running| running.object.cancel());
        let deadline = Instant::now() + STOP_GRACE;
        while !session.running.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            match session.inbox.recv_timeout(left) {
                Ok(message) => session.dismiss(message),
                Err(_) => break,
            }
        }
        let finished = session.finished.load(Ordering::Acquire);
        let resume = resume_line(self.path.as_ref());
        Error::Interrupted { finished, trials: self.trials, resume }
    }

    fn interrupt_hook(
        &self,
        session: &Session,
    ) -> impl FnOnce() -> Option<String> + Send + 'static {
        let (finished, trials) = (Arc::clone(&session.finished), self.trials);
        let (path, stop) = (self.path.clone(), self.stop.clone());
        move || {
            stop.stop();
            let finished = finished.load(Ordering::Acquire);
            Some(format!(
                "study: {finished} of {trials} trials are done; {}",
                resume_line(path.as_ref())
            ))
        }
    }

    fn results(&self, quiet: bool) -> Result<ResultGrid, Error> {
        let records = self.study.trials();
        if records.iter().all(|t| t.state == TrialState::Failed)
            && let Some((number, message)) = self.first_failure()
        {
            return Err(Error::AllFailed { trials: records.len(), number, message });
        }
        let grid = ResultGrid::new(&self.study.info().metric, records);
        if !quiet {
            console::line(grid.best_line()?);
        }
        Ok(grid)
    }
}

fn resume_line(journal: Option<&PathBuf>) -> String {
    match journal {
        Some(path) => format!("run it again to go on ({} has everything)", path.display()),
        None => "nothing was kept; give the tuner a journal to be able to go on".to_owned(),
    }
}
