//! What a study shows while it runs: on a terminal a bar for each running trial, and everywhere a
//! line when a trial ends.

use crate::history::TrialState;
use crate::record::{Event, TrialRecord};
use crate::result::TrialResult;
use crate::study::Study;
use mobula_core::console::{self, Progress};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// People cannot read faster, and terminals over a network should not have to draw faster.
const REDRAW: Duration = Duration::from_millis(100);

/// The live display of one study.
#[derive(Debug)]
pub(crate) struct Display {
    /// Digits of the largest trial number, so that lines align.
    width: usize,
    live: Option<Live>,
    quiet: bool,
}

/// Bars on a terminal: the study's own and one for each running trial.
#[derive(Debug)]
struct Live {
    total: Progress,
    trials: BTreeMap<usize, (Progress, Instant)>,
}

impl Display {
    pub(crate) fn new(trials: usize, quiet: bool) -> Self {
        let live = (!quiet && console::is_terminal()).then(|| Live {
            total: Progress::new("trials", trials as u64),
            trials: BTreeMap::new(),
        });
        Self { width: trials.saturating_sub(1).to_string().len(), live, quiet }
    }

    /// A study that goes on says so.
    pub(crate) fn resumed(&self, study: &Study) {
        let (done, all) =
            (study.trials().iter().filter(|t| t.state.is_finished()).count(), study.trials().len());
        if all > 0 && !self.quiet {
            let again = all - done;
            console::note(format!(
                "resuming: {done} trials are done, {again} were interrupted and run again"
            ));
        }
    }

    pub(crate) fn follow(&mut self, study: &Study, event: &Event) {
        match event {
            _ if self.quiet => {}
            Event::Started { trial, .. } => self.started(study, &study.trials()[*trial]),
            Event::Report { trial, .. } => self.reported(study, &study.trials()[*trial]),
            Event::Requeued { trial, error: Some(error) } => {
                self.ended(
                    study,
                    *trial,
                    &format!(
                        "trial {trial:>w$} failed and is tried again: {error}",
                        w = self.width
                    ),
                );
            }
            Event::Finished { trial, .. } => self.finished(study, &study.trials()[*trial]),
            _ => {}
        }
    }

    fn started(&mut self, study: &Study, trial: &TrialRecord) {
        let label = format!("trial {:>w$}", trial.number, w = self.width);
        match &mut self.live {
            Some(live) => {
                let bar = Progress::new(label, study.max_step().unwrap_or(1));
                bar.update(0, trial.params.to_string());
                live.trials.insert(trial.number, (bar, Instant::now()));
            }
            None => console::note(format!("{label} started  {}", trial.params)),
        }
    }

    fn reported(&mut self, study: &Study, trial: &TrialRecord) {
        let Some((bar, drawn)) = self.live.as_mut().and_then(|l| l.trials.get_mut(&trial.number))
        else {
            return;
        };
        if drawn.elapsed() >= REDRAW {
            *drawn = Instant::now();
            let result = TrialResult::new(trial);
            let value = result.describe_value(&study.info().metric);
            bar.update(result.step, format!("{value}  {}", trial.params));
        }
    }

    fn finished(&mut self, study: &Study, trial: &TrialRecord) {
        let result = TrialResult::new(trial);
        let head =
            format!("trial {:>w$} {:<8}", trial.number, trial.state.to_string(), w = self.width);
        let line = match (&trial.error, trial.state) {
            (Some(error), TrialState::Failed) => format!("{head} {error}  {}", trial.params),
            _ => {
                format!("{head} {}  {}", result.describe_value(&study.info().metric), trial.params)
            }
        };
        self.ended(study, trial.number, &line);
    }

    fn ended(&mut self, study: &Study, trial: usize, line: &str) {
        if let Some(live) = &mut self.live {
            live.trials.remove(&trial);
            let done = study.trials().iter().filter(|t| t.state.is_finished()).count();
            let best = crate::ResultGrid::new(&study.info().metric, study.trials());
            live.total.update(done as u64, best.best_line().unwrap_or_default());
        }
        console::note(line);
    }
}
