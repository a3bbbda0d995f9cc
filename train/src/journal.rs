//! What a training tells of itself: a progress bar, metrics, and what was resumed.

use crate::pace::Spread;
use crate::report::{EpochReport, Progress, Resumed, WorkerReport};
use crate::workers::Changes;
use mobula_core::Error;
use mobula_core::console::{self, Progress as Bar};
use mobula_core::run::{MetricsWriter, RunDir};
use std::collections::BTreeMap;

/// Where reports go: the run's metrics, and the user's eyes.
pub(crate) struct Journal {
    bar: Option<Bar>,
    name: String,
    run: Option<RunDir>,
    metrics: Option<MetricsWriter>,
    /// The step and epoch behind which metrics are made again, if those that were there are not gone yet.
    rewind: Option<(u64, u64)>,
    /// Whether the last metrics were not written, which has been told then.
    is_lossy: bool,
    pub(crate) last: BTreeMap<String, f64>,
    /// How long each rank computes in a step, as far as it has told.
    step_ms: BTreeMap<usize, f64>,
    pub(crate) changes: Changes,
}

impl Journal {
    pub(crate) fn new(name: &str, run: Option<&RunDir>) -> crate::Result<Self> {
        Ok(Self {
            bar: None,
            name: name.to_owned(),
            run: run.cloned(),
            metrics: run.map(RunDir::metrics_writer).transpose()?,
            rewind: None,
            is_lossy: false,
            last: BTreeMap::new(),
            step_ms: BTreeMap::new(),
            changes: Changes::default(),
        })
    }

    pub(crate) fn record(&mut self, rank: usize, report: WorkerReport) -> crate::Result<()> {
        match report {
            WorkerReport::Progress(progress) => {
                self.step_ms.insert(rank, progress.step_ms);
                self.progress(&progress)
            }
            WorkerReport::StepMs(step_ms) => {
                self.step_ms.insert(rank, step_ms);
                Ok(())
            }
            WorkerReport::Epoch(report) => self.epoch(report),
            WorkerReport::Metrics { step, metrics } => self.log(step, &metrics),
            WorkerReport::Resumed(resumed) => self.resume(resumed),
            WorkerReport::Note(text) => {
                console::note(format!("{}: {text}", self.name));
                Ok(())
            }
        }
    }

    /// Goes back to the step that training goes on from: what comes after it will be made again.
    fn resume(&mut self, resumed: Resumed) -> crate::Result<()> {
        let Resumed { step, epoch, metrics, from_rank } = resumed;
        let kept = from_rank.map_or(String::new(), |rank| format!(", which rank {rank} has kept"));
        let (changes, workers) = self.changes.take();
        console::note(match step {
            0 => format!("{}: {changes}beginning anew{workers}", self.name),
            _ => format!("{}: {changes}continuing{workers} from step {step}{kept}", self.name),
        });
        self.last = metrics;
        self.step_ms.clear();
        (self.metrics, self.rewind) = (None, Some((step, epoch)));
        let opened = self.open();
        self.unless_lost(opened)
    }

    /// Opens the metrics once those are gone that are made again.
    fn open(&mut self) -> Result<(), Error> {
        if let (Some(run), Some((step, epoch))) = (&self.run, self.rewind) {
            run.rewind_metrics(step, epoch)?;
            self.metrics = Some(run.metrics_writer()?);
            self.rewind = None;
        }
        Ok(())
    }

    fn progress(&mut self, progress: &Progress) -> crate::Result<()> {
        let Progress { step, epoch, epochs, loss, lr, samples_per_second, .. } = progress;
        let spread = self.show(*epoch, *epochs, *step, *loss, *samples_per_second);
        let values = [("loss", *loss), ("lr", *lr), ("samples_per_second", *samples_per_second)];
        let spread = spread.map(|spread| spread.metrics());
        let values = values.into_iter().chain(spread.into_iter().flatten());
        let values = values.map(|(name, value)| (format!("step/{name}"), value));
        self.log(*step, &values.collect())
    }

    fn epoch(&mut self, report: EpochReport) -> crate::Result<()> {
        let value = |name: &str| report.metrics.get(name).copied().unwrap_or(f64::NAN);
        let (loss, rate) = (value("loss"), value("samples_per_second"));
        self.show(report.epoch, report.epochs, report.step, loss, rate);
        let mut values = report.metrics.clone();
        values.insert("epoch".to_owned(), report.epoch as f64);
        self.last = report.metrics;
        self.log(report.step, &values)
    }

    /// With how the ranks differ, as far as that is known, which it gives.
    fn show(&mut self, epoch: u64, epochs: u64, step: u64, loss: f64, rate: f64) -> Option<Spread> {
        let spread = Spread::of(self.step_ms.clone());
        let shown = spread.map_or(String::new(), |spread| format!("  {spread}"));
        let bar = self.bar.get_or_insert_with(|| Bar::new(format!("{} epoch", self.name), epochs));
        bar.update(epoch, format!("step {step}  loss {loss:.4}  {rate:.0} samples/s{shown}"));
        spread
    }

    fn log(&mut self, step: u64, values: &BTreeMap<String, f64>) -> crate::Result<()> {
        let logged = self.open().and_then(|()| match &mut self.metrics {
            Some(metrics) => metrics.log(step, values),
            None => Ok(()),
        });
        self.unless_lost(logged)
    }

    /// Metrics that cannot be written, as a disk is full, are no reason to end a training. It is told once,
    /// until there is room again.
    fn unless_lost(&mut self, written: Result<(), Error>) -> crate::Result<()> {
        let Err(error @ Error::Io { .. }) = written else {
            self.is_lossy &= written.is_err();
            return Ok(written?);
        };
        if !std::mem::replace(&mut self.is_lossy, true) {
            let name = &self.name;
            console::note(format!("{name}: metrics are not written, training goes on: {error}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(step_ms: f64) -> WorkerReport {
        let (step, epoch, epochs) = (1, 0, 2);
        let (loss, lr, samples_per_second) = (0.5, 0.1, 100.0);
        let progress = Progress { step, epoch, epochs, loss, lr, samples_per_second, step_ms };
        WorkerReport::Progress(progress)
    }

    #[test]
    fn the_slowest_rank_is_shown_until_all_begin_anew() {
        let mut journal = Journal::new("test", None).expect("a journal");
        let mut shown = |reports: Vec<(usize, WorkerReport)>| {
            for (rank, report) in reports {
                journal.record(rank, report).expect("recorded");
            }
            journal.show(0, 2, 1, 0.5, 100.0).map(|spread| spread.to_string())
        };
        assert_eq!(shown(vec![(0, progress(5.14))]), None);
        let others = vec![(1, WorkerReport::StepMs(9.76)), (2, WorkerReport::StepMs(6.0))];
        assert_eq!(shown(others).as_deref(), Some("steps 5.1-9.8 ms, rank 1 slowest"));
        assert_eq!(shown(vec![(0, WorkerReport::Resumed(Resumed::default()))]), None);
    }

    /// As a full disk would: the file that they are to be written to cannot be made.
    #[test]
    fn metrics_that_find_no_room_after_a_restart_are_not_there_twice() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::open_or_create(folder.path(), "run", 0, &()).expect("a run");
        let mut journal = Journal::new("test", Some(&run)).expect("a journal");
        let mut record = |report| journal.record(0, report).expect("recorded");
        let metrics = |step| {
            let metrics = BTreeMap::from([("x".to_owned(), 1.0)]);
            WorkerReport::Metrics { step, metrics }
        };
        (1..=4).for_each(|step| record(metrics(step)));
        let in_the_way = run.path().join(".tmp-metrics.jsonl");
        std::fs::create_dir(&in_the_way).expect("in the way");
        record(WorkerReport::Resumed(Resumed { step: 2, ..Resumed::default() }));
        record(metrics(3));
        std::fs::remove_dir(&in_the_way).expect("room");
        (4..=5).for_each(|step| record(metrics(step)));
        let steps: Vec<_> = run.metrics().expect("metrics").iter().map(|line| line.step).collect();
        assert_eq!(steps, [1, 2, 4, 5]);
    }
}
