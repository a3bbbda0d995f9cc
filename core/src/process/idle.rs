//! Workers without work: kept for a while, since starting one takes milliseconds, but not for
//! ever, and not too many. Pure: times go in, workers that are to end come out.

use super::Environment;
use crate::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// In a driver's environment: how long a worker may idle, in seconds.
const LIFETIME_VARIABLE: &str = "MOBULA_IDLE_WORKER_SECONDS";
const LIFETIME: Duration = Duration::from_secs(60);

/// Idle workers of all kinds, those that have idled the longest first.
#[derive(Debug)]
pub(super) struct Idle<W> {
    lifetime: Duration,
    most: usize,
    resting: Vec<Resting<W>>,
}

#[derive(Debug)]
struct Resting<W> {
    environment: Environment,
    since: Instant,
    worker: Arc<W>,
}

impl<W> Idle<W> {
    /// At most two a CPU, each for as long as the environment says.
    pub(super) fn of_this_machine() -> Result<Self, Error> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let lifetime = match std::env::var(LIFETIME_VARIABLE) {
            Ok(seconds) => parse_lifetime(&seconds)?,
            Err(_) => LIFETIME,
        };
        Ok(Self::new(lifetime, 2 * cpus))
    }

    fn new(lifetime: Duration, most: usize) -> Self {
        Self { lifetime, most, resting: Vec::new() }
    }

    /// The one of this kind that has worked last.
    pub(super) fn take(&mut self, environment: &Environment) -> Option<Arc<W>> {
        let last = self.resting.iter().rposition(|resting| resting.environment == *environment)?;
        Some(self.resting.remove(last).worker)
    }

    /// Keeps a worker; gives those that are too many now.
    pub(super) fn keep(
        &mut self,
        environment: &Environment,
        worker: &Arc<W>,
        now: Instant,
    ) -> Vec<Arc<W>> {
        let (environment, worker) = (environment.clone(), Arc::clone(worker));
        self.resting.push(Resting { environment, since: now, worker });
        let too_many = self.resting.len().saturating_sub(self.most);
        self.resting.drain(..too_many).map(|resting| resting.worker).collect()
    }

    /// One that has ended.
    pub(super) fn forget(&mut self, worker: &Arc<W>) {
        self.resting.retain(|resting| !Arc::ptr_eq(&resting.worker, worker));
    }

    /// Takes out those that have idled for too long.
    pub(super) fn expired(&mut self, now: Instant) -> Vec<Arc<W>> {
        let lifetime = self.lifetime;
        self.take_out(|resting| now.saturating_duration_since(resting.since) >= lifetime)
    }

    /// Takes out those that hold what one of this kind is to have for itself: GPUs, and so many
    /// CPUs that they are bound to.
    pub(super) fn rivals(
        &mut self,
        environment: &Environment,
        mut missing_cpus: usize,
    ) -> Vec<Arc<W>> {
        self.take_out(|resting| {
            let has_cpus = missing_cpus > 0 && resting.environment.bound_cpus > 0;
            let is_rival = has_cpus || resting.environment.shares_gpus(environment);
            if is_rival {
                missing_cpus = missing_cpus.saturating_sub(resting.environment.bound_cpus);
            }
            is_rival
        })
    }

    /// How long until the next one has idled for too long.
    pub(super) fn next_end(&self, now: Instant) -> Option<Duration> {
        let idled = now.saturating_duration_since(self.resting.first()?.since);
        Some(self.lifetime.saturating_sub(idled))
    }

    fn take_out(&mut self, which: impl FnMut(&Resting<W>) -> bool) -> Vec<Arc<W>> {
        let (out, rest) = std::mem::take(&mut self.resting).into_iter().partition(which);
        self.resting = rest;
        let out: Vec<Resting<W>> = out;
        out.into_iter().map(|resting| resting.worker).collect()
    }
}

fn parse_lifetime(seconds: &str) -> Result<Duration, Error> {
    let parsed = seconds.parse().ok().and_then(|n| Duration::try_from_secs_f64(n).ok());
    parsed.ok_or_else(|| Error::LaunchVariable {
        variable: LIFETIME_VARIABLE.to_owned(),
        got: Some(seconds.to_owned()),
        expected: "how long a worker process may idle, in seconds, such as 60 or 0.5".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(threads: usize, gpus: &str) -> Environment {
        let gpus = gpus.split(',').filter_map(|gpu| gpu.parse().ok()).collect();
        Environment { threads, gpus, ..Environment::default() }
    }

    /// The names of workers.
    fn names(workers: &[Arc<u32>]) -> Vec<u32> {
        workers.iter().map(|worker| **worker).collect()
    }

    #[test]
    fn the_last_one_of_a_kind_is_taken_and_too_many_or_too_old_end() {
        let (start, minute) = (Instant::now(), Duration::from_secs(60));
        let mut idle = Idle::new(minute, 3);
        for n in 0..4u64 {
            let kind = kind(1 + n as usize % 2, "");
            let ended = idle.keep(&kind, &Arc::new(n as u32), start + Duration::from_secs(n));
            assert_eq!(names(&ended), if n == 3 { vec![0] } else { vec![] });
        }
        assert_eq!(idle.take(&kind(2, "")).as_deref(), Some(&3));
        assert_eq!(idle.take(&kind(7, "")), None);
        assert_eq!(names(&idle.expired(start + minute)), [0u32; 0]);
        assert_eq!(idle.next_end(start + minute), Some(Duration::from_secs(1)));
        assert_eq!(names(&idle.expired(start + minute + Duration::from_secs(1))), [1]);
        assert_eq!(names(&idle.expired(start + 2 * minute)), [2]);
        assert_eq!(idle.next_end(start), None);
    }

    #[test]
    fn who_wants_a_gpu_ends_those_that_idle_on_it() {
        let mut idle = Idle::new(Duration::from_secs(60), 9);
        for (n, gpus) in ["", "0", "0,1", "2", "10"].into_iter().enumerate() {
            idle.keep(&kind(1, gpus), &Arc::new(n as u32), Instant::now());
        }
        assert_eq!(names(&idle.rivals(&kind(2, ""), 0)), [0u32; 0], "who has none has no rival");
        assert_eq!(names(&idle.rivals(&kind(2, "1"), 0)), [2]);
        assert_eq!(names(&idle.rivals(&kind(2, "0"), 0)), [1]);
    }

    #[test]
    fn as_many_end_as_have_the_cpus_that_are_missing() {
        let mut idle = Idle::new(Duration::from_secs(60), 9);
        for (n, bound_cpus) in [1, 0, 1, 1].into_iter().enumerate() {
            let kind = Environment { bound_cpus, ..kind(1, "") };
            idle.keep(&kind, &Arc::new(n as u32), Instant::now());
        }
        assert_eq!(names(&idle.rivals(&kind(2, ""), 2)), [0, 2]);
    }

    #[test]
    fn a_lifetime_is_a_number_of_seconds() {
        assert_eq!(parse_lifetime("0.5").expect("half"), Duration::from_millis(500));
        for wrong in ["", "soon", "-1", "NaN"] {
            let error = parse_lifetime(wrong).expect_err("no time").to_string();
            assert!(error.contains(LIFETIME_VARIABLE) && error.contains("in seconds"), "{error}");
        }
    }
}
