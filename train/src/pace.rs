//! How long each rank computes in a step, so that one that the others wait for is seen.

use crate::Result;
use crate::collective::{Collective, Exchange, Values};
use mobula_core::Shard;
use mobula_core::clock::Clock;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The time that a rank has spent in collectives: for the most part it waits for others there.
#[derive(Debug, Default)]
pub(crate) struct Waits(AtomicU64);

impl Waits {
    pub(crate) fn add(&self, time: Duration) {
        self.0.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Since it was last asked.
    pub(crate) fn take(&self) -> Duration {
        Duration::from_nanos(self.0.swap(0, Ordering::Relaxed))
    }
}

/// A collective whose operations are timed.
#[derive(Debug)]
pub(crate) struct Timed {
    pub(crate) inner: Arc<dyn Collective>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) waits: Arc<Waits>,
}

impl Collective for Timed {
    fn shard(&self) -> Shard {
        self.inner.shard()
    }

    fn is_between_hosts(&self) -> bool {
        self.inner.is_between_hosts()
    }

    fn machines(&self) -> Vec<u64> {
        self.inner.machines()
    }

    fn exchange(&self, values: Values<'_>, exchange: &Exchange) -> Result<()> {
        let start = self.clock.now();
        let done = self.inner.exchange(values, exchange);
        self.waits.add(self.clock.now().saturating_sub(start));
        done
    }
}

/// The time that one rank has computed in some steps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    time: Duration,
    steps: u32,
}

impl Pace {
    pub(crate) fn count(&mut self, time: Duration) {
        self.time += time;
        self.steps += 1;
    }

    /// The mean over the steps; not a number where there are none.
    pub(crate) fn step_ms(&self) -> f64 {
        self.time.as_secs_f64() * 1e3 / f64::from(self.steps)
    }
}

/// By how much the ranks differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    min_ms: f64,
    max_ms: f64,
    slowest: usize,
}

impl Spread {
    /// Of what some ranks need for a step. One alone does not differ from anybody.
    pub(crate) fn of(ranks: impl IntoIterator<Item = (usize, f64)>) -> Option<Self> {
        let mut ranks: Vec<_> = ranks.into_iter().filter(|rank| rank.1.is_finite()).collect();
        ranks.sort_by(|a, b| a.1.total_cmp(&b.1));
        match ranks[..] {
            [(_, min_ms), .., (slowest, max_ms)] => Some(Self { min_ms, max_ms, slowest }),
            _ => None,
        }
    }

    /// Under the names of an epoch's metrics.
    pub(crate) fn metrics(&self) -> [(&'static str, f64); 3] {
        let (min, max) = ("ranks/step_ms_min", "ranks/step_ms_max");
        [(min, self.min_ms), (max, self.max_ms), ("ranks/slowest", self.slowest as f64)]
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { min_ms, max_ms, slowest } = self;
        write!(f, "steps {min_ms:.1}-{max_ms:.1} ms, rank {slowest} slowest")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_of_several_is_named() {
        let spread = Spread::of([(0, 5.14), (1, f64::NAN), (2, 9.76), (3, 6.0)]).expect("three");
        assert_eq!(spread.to_string(), "steps 5.1-9.8 ms, rank 2 slowest");
        assert_eq!(spread.metrics().map(|metric| metric.1), [5.14, 9.76, 2.0]);
    }

    #[test]
    fn one_rank_has_no_spread() {
        assert_eq!(Spread::of([(0, 5.0)]), None);
        assert_eq!(Spread::of([(0, 5.0), (1, f64::NAN)]), None);
    }
}
