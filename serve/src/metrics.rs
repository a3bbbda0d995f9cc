//! What a deployment counts, as [`ModelStats`] and as Prometheus text.

use std::fmt::Write;
use std::time::Duration;

/// Each power of two is split into this many buckets: quantiles are exact to 1/16.
const SUB: u64 = 16;

/// A histogram of whole numbers with logarithmic buckets, as in Tene's HdrHistogram. Buckets
/// end at powers of two inclusively, as Prometheus counts; 0 counts as 1.
#[derive(Clone, Debug, Default)]
pub(crate) struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: u64,
}

impl Histogram {
    pub(crate) fn record(&mut self, value: u64) {
        let bucket = bucket_of(value.saturating_sub(1));
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.count += 1;
        self.sum += value;
    }

    pub(crate) fn record_micros(&mut self, value: Duration) {
        self.record(u64::try_from(value.as_micros()).unwrap_or(u64::MAX >> 1));
    }

    pub(crate) fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum as f64 / self.count as f64 }
    }

    /// The value that a share of `q` does not exceed: the upper end of its bucket.
    pub(crate) fn quantile(&self, q: f64) -> u64 {
        let rank = (self.count as f64 * q).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank && seen > 0 {
                return last_of(bucket) + 1;
            }
        }
        0
    }

    fn micros(&self, q: f64) -> Duration {
        Duration::from_micros(self.quantile(q))
    }

    /// How many values are at most `limit`, a power of two.
    fn at_most(&self, limit: u64) -> u64 {
        let end = (bucket_of(limit - 1) + 1).min(self.counts.len());
        self.counts[..end].iter().sum()
    }
}

fn bucket_of(value: u64) -> usize {
    if value < SUB {
        return value as usize;
    }
    let shift = value.ilog2() - SUB.ilog2();
    (u64::from(shift) * SUB + (value >> shift)) as usize
}

fn last_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * SUB {
        return bucket;
    }
    let shift = bucket / SUB - 1;
    ((bucket % SUB + SUB + 1) << shift) - 1
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    Invalid,
    Shed,
    Expired,
    Cancelled,
    Failed,
    Unavailable,
}

impl Outcome {
    const ALL: [Self; 7] = [
        Self::Ok,
        Self::Invalid,
        Self::Shed,
        Self::Expired,
        Self::Cancelled,
        Self::Failed,
        Self::Unavailable,
    ];

    pub(crate) fn of_status(status: u16) -> Self {
        match status {
            200 => Self::Ok,
            429 => Self::Shed,
            503 => Self::Unavailable,
            504 => Self::Expired,
            400..=499 => Self::Invalid,
            _ => Self::Failed,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Invalid => "invalid",
            Self::Shed => "shed",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Unavailable => "unavailable",
        }
    }
}

/// The counters of one deployment. Times are in microseconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    outcomes: [u64; 7],
    pub(crate) batch_rows: Histogram,
    pub(crate) queue_micros: Histogram,
    pub(crate) run_micros: Histogram,
    pub(crate) request_micros: Histogram,
}

/// What is true of a deployment now, rather than since its start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gauges {
    pub(crate) queued_rows: usize,
    pub(crate) unanswered: usize,
    pub(crate) replicas_up: usize,
}

/// A model's figures since its server started.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelStats {
    /// Requests answered with 200.
    pub requests: u64,
    /// Requests answered with an error, and those whose client hung up.
    pub failures: u64,
    /// Rows in the batches that ran.
    pub rows: u64,
    /// Batches that ran to their end.
    pub batches: u64,
    /// Rows per batch.
    pub mean_batch_size: f64,
    /// Median time from a request's arrival to its answer, of those answered with 200. Quantiles
    /// are upper bounds, at most 1/16 too high.
    pub p50: Duration,
    /// 99th percentile of the same.
    pub p99: Duration,
    /// Median time that requests waited for a replica.
    pub queue_p50: Duration,
    /// 99th percentile of the same.
    pub queue_p99: Duration,
    /// Replicas that are loaded.
    pub replicas: usize,
}

impl Metrics {
    pub(crate) fn count(&mut self, outcome: Outcome) {
        self.outcomes[outcome as usize] += 1;
    }

    pub(crate) fn stats(&self, gauges: Gauges) -> ModelStats {
        let requests = self.outcomes[Outcome::Ok as usize];
        ModelStats {
            requests,
            failures: self.outcomes.iter().sum::<u64>() - requests,
            rows: self.batch_rows.sum,
            batches: self.batch_rows.count,
            mean_batch_size: self.batch_rows.mean(),
            p50: self.request_micros.micros(0.5),
            p99: self.request_micros.micros(0.99),
            queue_p50: self.queue_micros.micros(0.5),
            queue_p99: self.queue_micros.micros(0.99),
            replicas: gauges.replicas_up,
        }
    }

    /// `GET /v2/models/{m}/stats`, with the field names of Triton's statistics extension.
    pub(crate) fn triton(&self, name: &str, version: &str) -> serde_json::Value {
        let duration = |h: &Histogram| serde_json::json!({"count": h.count, "ns": h.sum * 1000});
        let requests = self.outcomes[Outcome::Ok as usize];
        let failures = self.outcomes.iter().sum::<u64>() - requests;
        serde_json::json!({"model_stats": [{
            "name": name,
            "version": version,
            "inference_count": self.batch_rows.sum,
            "execution_count": self.batch_rows.count,
            "inference_stats": {
                "success": duration(&self.request_micros),
                "fail": {"count": failures},
                "queue": duration(&self.queue_micros),
                "compute_infer": duration(&self.run_micros),
            },
            "mean_batch_size": self.batch_rows.mean(),
            "latency_us": {
                "p50": self.request_micros.quantile(0.5),
                "p99": self.request_micros.quantile(0.99),
            },
        }]})
    }
}

/// The page at `/metrics`: one block per metric, one line per model in it.
pub(crate) fn prometheus(models: &[(String, Metrics, Gauges)]) -> String {
    let mut page = Page::default();
    page.head("requests_total", "counter", "Requests by how they ended.");
    for (model, metrics, _) in models {
        for outcome in Outcome::ALL {
            let labels = format!("model={model:?},outcome={:?}", outcome.name());
            page.line("requests_total", &labels, metrics.outcomes[outcome as usize]);
        }
    }
    page.counter(models, "rows_total", "Rows in batches that ran.", |m| m.batch_rows.sum);
    page.counter(models, "batches_total", "Batches that ran.", |m| m.batch_rows.count);
    page.gauge(models, "queued_rows", "Rows that wait.", |g| g.queued_rows);
    page.gauge(models, "unanswered_requests", "Requests without an answer.", |g| g.unanswered);
    page.gauge(models, "replicas", "Replicas that are loaded.", |g| g.replicas_up);
    page.histogram(models, "batch_rows", "Rows per batch.", ROWS, |m| &m.batch_rows);
    let help = "Seconds that requests waited for a replica.";
    page.histogram(models, "queue_seconds", help, SECONDS, |m| &m.queue_micros);
    let help = "Seconds that batches ran.";
    page.histogram(models, "run_seconds", help, SECONDS, |m| &m.run_micros);
    let help = "Seconds from a request's arrival to its successful answer.";
    page.histogram(models, "request_seconds", help, SECONDS, |m| &m.request_micros);
    page.text
}

/// Which powers of two bound the buckets, and what a value is divided by for the page.
struct Scale {
    powers: std::ops::RangeInclusive<u32>,
    unit: f64,
}

const ROWS: Scale = Scale { powers: 0..=12, unit: 1.0 };
/// 64 µs to 67 s.
const SECONDS: Scale = Scale { powers: 6..=26, unit: 1e6 };

#[derive(Default)]
struct Page {
    text: String,
}

type Models = [(String, Metrics, Gauges)];

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP mobula_serve_{name} {help}");
        let _ = writeln!(self.text, "# TYPE mobula_serve_{name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "mobula_serve_{name}{{{labels}}} {value}");
    }

    fn counter(&mut self, models: &Models, name: &str, help: &str, get: fn(&Metrics) -> u64) {
        self.head(name, "counter", help);
        for (model, metrics, _) in models {
            self.line(name, &format!("model={model:?}"), get(metrics));
        }
    }

    fn gauge(&mut self, models: &Models, name: &str, help: &str, get: fn(&Gauges) -> usize) {
        self.head(name, "gauge", help);
        for (model, _, gauges) in models {
            self.line(name, &format!("model={model:?}"), get(gauges));
        }
    }

    fn histogram(
        &mut self,
        models: &Models,
        name: &str,
        help: &str,
        scale: Scale,
        get: fn(&Metrics) -> &Histogram,
    ) {
        self.head(name, "histogram", help);
        for (model, metrics, _) in models {
            self.buckets(model, name, &scale, get(metrics));
        }
    }

    fn buckets(&mut self, model: &str, name: &str, scale: &Scale, histogram: &Histogram) {
        let bucket = format!("{name}_bucket");
        for power in scale.powers.clone() {
            let bound = 1u64 << power;
            let labels = format!("model={model:?},le=\"{}\"", bound as f64 / scale.unit);
            self.line(&bucket, &labels, histogram.at_most(bound));
        }
        let labels = format!("model={model:?},le=\"+Inf\"");
        self.line(&bucket, &labels, histogram.count);
        let labels = format!("model={model:?}");
        self.line(&format!("{name}_sum"), &labels, histogram.sum as f64 / scale.unit);
        self.line(&format!("{name}_count"), &labels, histogram.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn quantiles_are_upper_bounds_within_a_sixteenth(
            mut values in prop::collection::vec(1u64..1 << 40, 1..200),
            q in 0.01f64..=1.0,
        ) {
            let mut histogram = Histogram::default();
            values.iter().for_each(|v| histogram.record(*v));
            values.sort_unstable();
            let exact = values[(values.len() as f64 * q).ceil() as usize - 1];
            let got = histogram.quantile(q);
            prop_assert!(exact <= got && got <= exact + exact / 16, "{exact} {got}");
        }
    }

    #[test]
    fn the_page_has_cumulative_buckets_per_model() {
        let mut metrics = Metrics::default();
        metrics.count(Outcome::Ok);
        [1, 2, 2, 33].into_iter().for_each(|rows| metrics.batch_rows.record(rows));
        let gauges = Gauges { queued_rows: 5, unanswered: 1, replicas_up: 2 };
        let page = prometheus(&[("digits".to_owned(), metrics, gauges)]);
        for line in [
            "mobula_serve_requests_total{model=\"digits\",outcome=\"ok\"} 1",
            "mobula_serve_batch_rows_bucket{model=\"digits\",le=\"1\"} 1",
            "mobula_serve_batch_rows_bucket{model=\"digits\",le=\"2\"} 3",
            "mobula_serve_batch_rows_bucket{model=\"digits\",le=\"32\"} 3",
            "mobula_serve_batch_rows_bucket{model=\"digits\",le=\"+Inf\"} 4",
            "mobula_serve_batch_rows_sum{model=\"digits\"} 38",
            "mobula_serve_queued_rows{model=\"digits\"} 5",
            "mobula_serve_queue_seconds_bucket{model=\"digits\",le=\"0.000064\"} 0",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is missing in:\n{page}");
        }
    }
}
