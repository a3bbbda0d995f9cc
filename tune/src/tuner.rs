//! The tuner: a study's options, and running it.

use crate::coordinator::Coordinator;
use crate::journal::Journal;
use crate::record::StudyInfo;
use crate::study::{Limits, Study};
use crate::trial::{StopHandle, Trial};
use crate::{Error, Fifo, Metric, ResultGrid, Sampler, Scheduler, SearchSpace, TpeSampler};
use mobula_core::{BoxError, Resources, Runtime};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Runs a study: trials with parameters from a sampler, at the same time as far as the machine's
/// resources allow, stopped early by a scheduler, recorded in a journal.
///
/// ```
/// use mobula_core::{Resources, Runtime};
/// use mobula_tune::{Error, Metric, SearchSpace, Tuner};
///
/// let runtime = Runtime::local(Resources::cpus(2.0))?;
/// let space = SearchSpace::new().uniform("x", -1.0, 1.0);
/// let results = Tuner::new(space, Metric::minimize("loss"))
///     .with_trials(12)
///     .with_seed(7)
///     .quiet()
///     .run(&runtime, |trial| {
///         let x = trial.params.float("x")?;
///         let _ = trial.report(1, x * x)?;
///         Ok::<(), Error>(())
///     })?;
/// assert_eq!(results.trials().len(), 12);
/// assert!(results.best()?.value < 0.2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Tuner {
    pub(crate) space: SearchSpace,
    pub(crate) metric: Metric,
    pub(crate) sampler: Box<dyn Sampler>,
    pub(crate) scheduler: Box<dyn Scheduler>,
    pub(crate) trials: usize,
    pub(crate) seed: u64,
    pub(crate) resources: Resources,
    pub(crate) max_concurrent: Option<usize>,
    pub(crate) max_retries: u32,
    pub(crate) max_failures: Option<usize>,
    pub(crate) journal: Option<PathBuf>,
    pub(crate) quiet: bool,
    pub(crate) stop: StopHandle,
}

impl Tuner {
    /// 16 trials of 1 CPU each with TPE, no early stopping, no retries, no journal, seed 0.
    pub fn new(space: SearchSpace, metric: Metric) -> Self {
        Self {
            space,
            metric,
            sampler: Box::new(TpeSampler::default()),
            scheduler: Box::new(Fifo),
            trials: 16,
            seed: 0,
            resources: Resources::cpus(1.0),
            max_concurrent: None,
            max_retries: 0,
            max_failures: None,
            journal: None,
            quiet: false,
            stop: StopHandle::default(),
        }
    }

    /// Parameters from this sampler.
    pub fn with_sampler(self, sampler: impl Sampler + 'static) -> Self {
        Self { sampler: Box::new(sampler), ..self }
    }

    /// Early stopping by this scheduler.
    pub fn with_scheduler(self, scheduler: impl Scheduler + 'static) -> Self {
        Self { scheduler: Box::new(scheduler), ..self }
    }

    /// So many trials in all, those of a resumed journal included.
    pub fn with_trials(self, trials: usize) -> Self {
        Self { trials, ..self }
    }

    /// The seed of the parameters and of each [`Trial::seed`].
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// What each trial holds while it runs.
    pub fn with_resources(self, resources: Resources) -> Self {
        Self { resources, ..self }
    }

    /// At most so many trials at the same time; without a limit, as many as fit.
    pub fn with_max_concurrent(self, max_concurrent: impl Into<Option<usize>>) -> Self {
        Self { max_concurrent: max_concurrent.into(), ..self }
    }

    /// A trial that fails is started again up to so many times.
    pub fn with_max_retries(self, max_retries: u32) -> Self {
        Self { max_retries, ..self }
    }

    /// The study gives up once more than so many trials have failed; by default it never does.
    pub fn with_max_failures(self, max_failures: impl Into<Option<usize>>) -> Self {
        Self { max_failures: max_failures.into(), ..self }
    }

    /// Records the study in this file, or goes on with the one it holds.
    pub fn with_journal(self, path: impl Into<PathBuf>) -> Self {
        Self { journal: Some(path.into()), ..self }
    }

    /// Prints nothing.
    pub fn quiet(self) -> Self {
        Self { quiet: true, ..self }
    }

    /// Can be stopped through `stop` from another thread, or from a trial.
    pub fn with_stop(self, stop: StopHandle) -> Self {
        Self { stop, ..self }
    }

    /// Runs the study to its end.
    ///
    /// A trial that returns an error or panics is failed; the others go on. Errors: options that
    /// make no sense, resources that this machine does not have, a journal of another study,
    /// every trial failed ([`Error::AllFailed`]), stopped early ([`Error::Interrupted`]).
    pub fn run<F, E>(self, runtime: &Runtime, trial: F) -> Result<ResultGrid, Error>
    where
        F: Fn(&mut Trial) -> Result<(), E> + Send + Sync + 'static,
        E: Into<BoxError>,
    {
        let trials = self.check()?;
        let slots = self.slots(runtime)?;
        let path = self.journal.clone().unwrap_or_else(|| "memory".into());
        let (journal, events) = match &self.journal {
            Some(path) => Journal::open(path).map(|(journal, events)| (Some(journal), events))?,
            None => (None, Vec::new()),
        };
        let limits = Limits { trials, max_retries: self.max_retries };
        let info = self.info();
        let study =
            Study::open(info, limits, self.sampler, self.scheduler, &events, Path::new(&path))?;
        let work: Work = Arc::new(move |running: &mut Trial| trial(running).map_err(Into::into));
        Coordinator {
            study,
            journal,
            path: self.journal,
            runtime: runtime.clone(),
            resources: self.resources,
            slots,
            max_failures: self.max_failures,
            trials,
            stop: self.stop,
            work,
        }
        .run(self.quiet)
    }

    /// Refuses options that make no sense; the number of trials, less where a grid is smaller.
    fn check(&self) -> Result<usize, Error> {
        self.space.validate()?;
        self.scheduler.validate()?;
        let possible = self.sampler.trials(&self.space)?;
        for (option, got) in
            [("trials", Some(self.trials)), ("max_concurrent", self.max_concurrent)]
        {
            if got == Some(0) {
                return Err(Error::Option { option, expected: "at least 1", got: "0".into() });
            }
        }
        Ok(possible.map_or(self.trials, |possible| possible.min(self.trials)))
    }

    /// How many trials run at the same time.
    fn slots(&self, runtime: &Runtime) -> Result<usize, Error> {
        let total = runtime.resources();
        self.resources.check_within(&total)?;
        let limit = self.max_concurrent.unwrap_or(usize::MAX).min(self.trials);
        let fits = (2..=limit).take_while(|n| self.resources.times(*n).fits(&total)).last();
        Ok(fits.unwrap_or(1))
    }

    fn info(&self) -> StudyInfo {
        StudyInfo {
            space: self.space.clone(),
            metric: self.metric.clone(),
            seed: self.seed,
            sampler: self.sampler.config(),
            scheduler: self.scheduler.config(),
        }
    }
}

/// What every trial runs.
pub(crate) type Work = Arc<dyn Fn(&mut Trial) -> Result<(), BoxError> + Send + Sync>;
