//! A closed-loop load generator: so many clients, each with one request under way at a time.

use crate::client::{Connection, current_thread, infer_path, read_answer};
use crate::{Error, protocol};
use bytes::Bytes;
use candle_core::Tensor;
use hyper::Method;
use mobula_core::{Batch, BoxError};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What to send: so many requests, by so many clients at once.
#[derive(Clone, Debug)]
pub struct LoadTest {
    /// Keep-alive connections, each with one request under way. Default 64.
    pub clients: usize,
    /// Requests in all. Default 1000.
    pub requests: usize,
    /// Limit on the time that one answer may take. Default 60 s.
    pub timeout: Duration,
}

impl Default for LoadTest {
    fn default() -> Self {
        Self { clients: 64, requests: 1000, timeout: Duration::from_secs(60) }
    }
}

/// What came back.
#[derive(Debug)]
pub struct LoadReport {
    /// Requests sent.
    pub requests: usize,
    /// Requests that were not answered with 200.
    pub failures: usize,
    /// Time from the first request to the last answer. Connections were open before.
    pub elapsed: Duration,
    /// Requests, failed ones included, over the elapsed time.
    pub requests_per_second: f64,
    /// Median time of a request as its client saw it.
    pub p50: Duration,
    /// 99th percentile of the same.
    pub p99: Duration,
    /// The outputs of each request, in the order of the requests.
    pub responses: Vec<Result<Batch, Error>>,
}

impl LoadReport {
    /// One output of all requests, in their order, as one tensor. Errors with the first request
    /// that failed.
    pub fn output(&self, name: &str) -> Result<Tensor, mobula_core::Error> {
        let mut parts = Vec::with_capacity(self.responses.len());
        for (index, response) in self.responses.iter().enumerate() {
            let failed =
                |error: &Error| mobula_core::Error::layer(format!("request {index}: {error}"));
            parts.push(response.as_ref().map_err(failed)?.get(name)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let (p50, p99) = (ms(self.p50), ms(self.p99));
        write!(f, "{} requests, {} failed, ", self.requests, self.failures)?;
        write!(f, "{:.0} requests/s, p50 {p50:.1} ms, p99 {p99:.1} ms", self.requests_per_second)
    }
}

/// The raw answer to request `index`.
struct Reply {
    index: usize,
    took: Duration,
    answer: Result<(u16, Bytes), Error>,
}

struct Job {
    addr: String,
    path: String,
    bodies: Vec<Bytes>,
    next: AtomicUsize,
    timeout: Duration,
}

impl LoadTest {
    /// Sends `rows(0)`, `rows(1)` … to `model` at `addr`, from a thread of its own.
    ///
    /// Requests are encoded before and answers decoded after the measurement. Errors when a
    /// request cannot be made or no connection opened; a failed request only counts as one.
    pub fn run(
        &self,
        addr: impl fmt::Display,
        model: &str,
        rows: impl Fn(usize) -> Result<Batch, BoxError>,
    ) -> Result<LoadReport, Error> {
        let body = |index| {
            let batch = rows(index).map_err(mobula_core::Error::layer)?;
            protocol::encode_request(&batch).map(Bytes::from)
        };
        let job = Arc::new(Job {
            addr: addr.to_string(),
            path: infer_path(model),
            bodies: (0..self.requests).map(body).collect::<Result<_, Error>>()?,
            next: AtomicUsize::new(0),
            timeout: self.timeout,
        });
        let clients = self.clients.clamp(1, self.requests.max(1));
        let thread = std::thread::Builder::new().name("mobula-load".to_owned());
        let thread = thread.spawn(move || current_thread()?.block_on(send_all(job, clients)));
        let thread = thread.map_err(|source| Error::Threads { source })?;
        let (elapsed, replies) = thread.join().unwrap_or_else(|panic| {
            std::panic::resume_unwind(panic) // A bug here: let it be seen.
        })?;
        Ok(report(elapsed, replies))
    }
}

async fn send_all(job: Arc<Job>, clients: usize) -> Result<(Duration, Vec<Reply>), Error> {
    let mut connections = Vec::with_capacity(clients);
    for _ in 0..clients {
        connections.push(connect(&job).await?);
    }
    let start = Instant::now();
    let clients: Vec<_> =
        connections.into_iter().map(|c| tokio::spawn(client(job.clone(), c))).collect();
    let mut replies = Vec::with_capacity(job.bodies.len());
    for client in clients {
        replies.extend(client.await.unwrap_or_default());
    }
    Ok((start.elapsed(), replies))
}

async fn connect(job: &Job) -> Result<Connection, Error> {
    within(job, Connection::open(&job.addr)).await
}

/// Sends the next request until there is none left.
async fn client(job: Arc<Job>, connection: Connection) -> Vec<Reply> {
    let mut connection = Some(connection);
    let mut replies = Vec::new();
    loop {
        let index = job.next.fetch_add(1, Ordering::Relaxed);
        let Some(body) = job.bodies.get(index) else {
            return replies;
        };
        let start = Instant::now();
        let answer = ask(&job, &mut connection, body.clone()).await;
        let took = start.elapsed();
        replies.push(Reply { index, took, answer });
    }
}

async fn ask(
    job: &Job,
    connection: &mut Option<Connection>,
    body: Bytes,
) -> Result<(u16, Bytes), Error> {
    let mut open = match connection.take().filter(Connection::is_open) {
        Some(open) => open,
        None => connect(job).await?,
    };
    let answer = within(job, open.ask(Method::POST, &job.path, body)).await?;
    *connection = Some(open);
    Ok(answer)
}

async fn within<T>(job: &Job, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(job.timeout, work).await.unwrap_or_else(|elapsed| {
        Err(Error::Connection { addr: job.addr.clone(), source: elapsed.into() })
    })
}

fn report(elapsed: Duration, mut replies: Vec<Reply>) -> LoadReport {
    let requests = replies.len();
    let mut times: Vec<Duration> = replies.iter().map(|reply| reply.took).collect();
    times.sort_unstable();
    replies.sort_unstable_by_key(|reply| reply.index);
    let answer = |reply: Reply| reply.answer.and_then(|(status, body)| read_answer(status, &body));
    let responses: Vec<_> = replies.into_iter().map(answer).collect();
    LoadReport {
        requests,
        failures: responses.iter().filter(|response| response.is_err()).count(),
        elapsed,
        requests_per_second: requests as f64 / elapsed.as_secs_f64().max(1e-9),
        p50: quantile(&times, 0.5),
        p99: quantile(&times, 0.99),
        responses,
    }
}

/// The value that a share of `q` of the sorted `times` does not exceed.
fn quantile(times: &[Duration], q: f64) -> Duration {
    let rank = (times.len() as f64 * q).ceil() as usize;
    times.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}
