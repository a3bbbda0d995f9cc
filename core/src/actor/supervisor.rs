//! Whether an actor whose process was lost gets another one. Pure: times go in.

use crate::task::Backoff;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How often an actor is started again. Every default is here.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// Restarts within the window before it stays dead. Default: 0.
    pub max_restarts: u32,
    /// The window. Default: 60 s.
    pub window: Duration,
    /// The wait before a restart; it grows with the restarts within the window.
    pub backoff: Backoff,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self { max_restarts: 0, window: Duration::from_secs(60), backoff: Backoff::default() }
    }
}

impl RestartPolicy {
    /// So many restarts within the window.
    pub fn at_most(max_restarts: u32) -> Self {
        Self { max_restarts, ..Self::default() }
    }
}

/// Counts the restarts of one actor.
#[derive(Debug)]
pub(crate) struct Supervisor {
    policy: RestartPolicy,
    restarts: VecDeque<Instant>,
}

impl Supervisor {
    pub(crate) fn new(policy: RestartPolicy) -> Self {
        Self { policy, restarts: VecDeque::new() }
    }

    /// The actor was lost: how long to wait before it is started again, or `None`: it is not.
    pub(crate) fn lost(&mut self, now: Instant) -> Option<Duration> {
        let recent = |at: &Instant| now.saturating_duration_since(*at) < self.policy.window;
        self.restarts.retain(recent);
        if self.restarts.len() >= self.policy.max_restarts as usize {
            return None;
        }
        self.restarts.push_back(now);
        let count = u32::try_from(self.restarts.len()).unwrap_or(u32::MAX);
        Some(self.policy.backoff.delay(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_dead_after_too_many_restarts_within_the_window() {
        let mut supervisor = Supervisor::new(RestartPolicy::at_most(2));
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        assert_eq!(supervisor.lost(start), Some(Duration::from_millis(50)));
        assert_eq!(supervisor.lost(start + second), Some(Duration::from_millis(100)));
        assert_eq!(supervisor.lost(start + 2 * second), None);
        let after_the_window = start + Duration::from_secs(61) + 2 * second;
        assert_eq!(supervisor.lost(after_the_window), Some(Duration::from_millis(50)));
    }
}
