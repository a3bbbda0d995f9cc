//! Which CPUs each worker process is bound to, where that was asked for: neighbours that use much
//! memory then keep their caches and their memory node, at the price of CPUs that idle while
//! others have too much to do.

use crate::Error;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// In a driver's environment: 1 to bind workers to CPUs.
const VARIABLE: &str = "MOBULA_CPU_AFFINITY";

static IS_ON: LazyLock<bool> = LazyLock::new(|| std::env::var(VARIABLE).as_deref() == Ok("1"));

/// Whether workers are bound at all. Where they are not, one serves grants of 1 and of 0.5 CPUs.
pub(super) fn is_on() -> bool {
    *IS_ON
}

/// The CPUs of this process, and how many workers are bound to each; none where that is off.
/// Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Cpus {
    bound: Arc<Mutex<BTreeMap<usize, usize>>>,
}

impl Cpus {
    pub(super) fn of_this_machine() -> Result<Self, Error> {
        match std::env::var(VARIABLE).as_deref() {
            Err(_) | Ok("" | "0") => Ok(Self::default()),
            Ok("1") => {
                let allowed = sched_getaffinity(None);
                let allowed = allowed.map_err(|e| Error::system("asking for the CPUs", e))?;
                Ok(Self::new((0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu))))
            }
            Ok(other) => Err(Error::LaunchVariable {
                variable: VARIABLE.to_owned(),
                got: Some(other.to_owned()),
                expected: "1 to bind worker processes to CPUs, or 0".to_owned(),
            }),
        }
    }

    fn new(cpus: impl Iterator<Item = usize>) -> Self {
        Self { bound: Arc::new(Mutex::new(cpus.map(|cpu| (cpu, 0)).collect())) }
    }

    /// How many of so many CPUs would have to be shared now.
    pub(super) fn missing(&self, wanted: usize) -> usize {
        let bound = self.bound();
        if bound.is_empty() {
            return 0;
        }
        wanted.saturating_sub(bound.values().filter(|workers| **workers == 0).count())
    }

    /// So many distinct CPUs, those with the fewest workers. `None` where they are not bound, or
    /// there are not so many.
    pub(super) fn bind(&self, wanted: usize) -> Option<Bound> {
        let mut bound = self.bound();
        if wanted == 0 || wanted > bound.len() {
            return None;
        }
        let mut cpus: Vec<usize> = bound.keys().copied().collect();
        cpus.sort_by_key(|cpu| (bound.get(cpu).copied(), *cpu));
        cpus.truncate(wanted);
        for cpu in &cpus {
            *bound.entry(*cpu).or_default() += 1;
        }
        Some(Bound { cpus, of: self.clone() })
    }

    fn bound(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The CPUs of one worker, until dropped.
#[derive(Debug)]
pub(super) struct Bound {
    cpus: Vec<usize>,
    of: Cpus,
}

impl Bound {
    /// To be called while the process has one thread: those that it starts inherit this.
    pub(super) fn apply(&self, process: Pid) {
        let mut set = CpuSet::new();
        self.cpus.iter().for_each(|cpu| set.set(*cpu));
        if let Err(error) = sched_setaffinity(Some(process), &set) {
            // It may have ended; else it works all the same.
            tracing::debug!(%error, ?process, "a worker is not bound to CPUs");
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let mut bound = self.of.bound();
        for cpu in &self.cpus {
            bound.entry(*cpu).and_modify(|workers| *workers -= 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_have_cpus_of_their_own_as_long_as_there_are_some() {
        let cpus = Cpus::new([0, 1, 4, 5].into_iter());
        let (first, second) = (cpus.bind(2).expect("2 of 4"), cpus.bind(1).expect("1 of 2"));
        assert_eq!((&first.cpus[..], &second.cpus[..]), (&[0, 1][..], &[4][..]));
        assert_eq!(cpus.missing(2), 1);
        let shared = cpus.bind(2).expect("the least loaded are shared");
        assert_eq!(shared.cpus, [5, 0]);
        drop((first, shared));
        assert_eq!(cpus.missing(3), 0);
        assert_eq!(cpus.bind(3).expect("3 of 3").cpus, [0, 1, 5]);
        assert!(cpus.bind(5).is_none() && cpus.bind(0).is_none());
    }

    #[test]
    fn where_it_is_off_nothing_is_bound() {
        assert!(Cpus::default().bind(1).is_none());
        assert_eq!(Cpus::default().missing(1), 0);
    }
}
