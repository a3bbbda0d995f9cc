//! How a deployment batches, with every default visible.

use crate::Error;
use std::time::Duration;

/// How requests are gathered into batches, and how long and how many may wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchingOptions {
    /// Most rows in a batch, and so in one request: a larger request is refused with 400. Default 32.
    pub max_batch_size: usize,
    /// How long the oldest request may wait for others while a replica is idle. Default 0: a batch
    /// forms only from what arrives while the replicas are busy, which costs no latency.
    pub max_delay: Duration,
    /// Most rows that may wait; beyond it requests are refused with 429. Default 1024.
    pub max_queue_rows: usize,
    /// How long a request may take in all, waiting and running; then it is answered with 504. A
    /// request can ask for less through its parameter `timeout`, in microseconds. Default 30 s.
    pub request_timeout: Duration,
}

impl Default for BatchingOptions {
    fn default() -> Self {
        Self {
            max_batch_size: 32,
            max_delay: Duration::ZERO,
            max_queue_rows: 1024,
            request_timeout: Duration::from_secs(30),
        }
    }
}

impl BatchingOptions {
    /// Refuses what could never serve a request.
    pub(crate) fn check(&self, model: &str) -> Result<(), Error> {
        let invalid = |option, expected: String, got: String| Error::InvalidOption {
            model: model.to_owned(),
            option,
            expected,
            got,
        };
        if self.max_batch_size == 0 {
            return Err(invalid("max_batch_size", "at least 1".into(), "0".into()));
        }
        if self.max_queue_rows < self.max_batch_size {
            let expected = format!("at least max_batch_size ({})", self.max_batch_size);
            let got = self.max_queue_rows.to_string();
            return Err(invalid("max_queue_rows", expected, got));
        }
        if self.request_timeout <= self.max_delay {
            let expected = format!("more than max_delay ({:?})", self.max_delay);
            let got = format!("{:?}", self.request_timeout);
            return Err(invalid("request_timeout", expected, got));
        }
        Ok(())
    }
}
