//! The micro-batcher as a pure state machine: events in, commands out, time as an argument.
//!
//! It is late-bound and work-conserving: a batch is cut at the moment a replica can run it, never
//! before, so that a request joins the latest batch possible and no batch waits frozen behind a
//! busy model. With `max_delay` zero nothing ever waits while a replica is idle.
//!
//! Invariants, cited by the tests:
//!
//! * `INV-ANSWER`: every request that arrives gets exactly one of `Complete`, `Fail`, `Expire` or
//!   `Refuse`, or none if its client has gone.
//! * `INV-CAP`: no batch has more rows than `max_batch_size`.
//! * `INV-FIFO`: requests start in the order in which they arrived.
//! * `INV-WORK`: with `max_delay` zero, no request waits through a tick while a replica is idle.
//! * `INV-DEADLINE`: no request is unanswered after its deadline, whatever the models do.
//! * `INV-POISON`: a request that makes its batch fail fails alone.

use crate::options::BatchingOptions;
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// Names a request between the batcher and its caller.
pub(crate) type RequestId = u64;

/// What the batcher knows of a request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) id: RequestId,
    /// At least 1 and at most `max_batch_size`; the caller has checked.
    pub(crate) rows: usize,
    /// Only requests of one class share a batch: rows of equal shape.
    pub(crate) class: u64,
    pub(crate) arrived: Duration,
    pub(crate) deadline: Duration,
}

/// What happens to the batcher.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A request wants in. It does not start before the next event, so that requests that arrive
    /// together run together: [`Batcher::next_wake`] then asks for a tick at once.
    Arrive(Request),
    /// A request's client has hung up.
    Gone(RequestId),
    /// A replica has run the batch it was given.
    Finished { replica: usize, ok: bool },
    /// A replica is loaded.
    Up(usize),
    /// A replica is lost for good, with the batch it was given.
    Down(usize),
    /// Admit no more.
    Drain,
    /// Answer everyone now.
    Stop,
    /// Time has passed.
    Tick,
}

/// What the caller has to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Command {
    /// Run these requests as one batch on this replica.
    Run { replica: usize, batch: Vec<RequestId> },
    /// Answer with the result of the batch that has just finished.
    Complete(RequestId),
    /// Answer with the error of the batch that has just finished.
    Fail(RequestId),
    /// Answer that the deadline has passed.
    Expire(RequestId),
    /// Answer that there will be no result.
    Refuse(RequestId, Refusal),
}

/// Why a request gets no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The queue is full; it drains in about this time.
    QueueFull { retry_after: Duration },
    /// No replica is left to run it.
    NoReplica,
    /// The server is shutting down.
    Draining,
}

#[derive(Debug)]
enum Replica {
    Down,
    Idle,
    Busy(Flight),
}

#[derive(Debug)]
struct Flight {
    /// Those not answered yet: a deadline may strike while the model runs.
    waiting: Vec<Request>,
    /// Whether it started with a single request, which then is to blame for a failure.
    alone: bool,
    rows: usize,
    since: Duration,
}

/// The queue of one deployment, shared by all of its replicas.
#[derive(Debug)]
pub(crate) struct Batcher {
    options: BatchingOptions,
    queue: VecDeque<Request>,
    /// Parts of failed batches, each to be run as it is and before anything that is queued.
    retries: VecDeque<Vec<Request>>,
    /// Rows in `queue` and `retries`.
    queued_rows: usize,
    replicas: Vec<Replica>,
    /// Every unanswered request.
    deadlines: BTreeSet<(Duration, RequestId)>,
    /// Moving average of a replica's seconds per row: what Retry-After is computed from.
    seconds_per_row: f64,
    draining: bool,
}

impl Batcher {
    pub(crate) fn new(options: BatchingOptions, replicas: usize) -> Self {
        Self {
            options,
            queue: VecDeque::new(),
            retries: VecDeque::new(),
            queued_rows: 0,
            replicas: (0..replicas).map(|_| Replica::Down).collect(),
            deadlines: BTreeSet::new(),
            seconds_per_row: 0.0,
            draining: false,
        }
    }

    /// Takes in one event and says what to do about it.
    pub(crate) fn step(&mut self, event: Event, now: Duration) -> Vec<Command> {
        let mut out = Vec::new();
        let cut = !matches!(event, Event::Arrive(_));
        match event {
            Event::Arrive(request) => self.arrive(request, &mut out),
            Event::Gone(id) => self.forget(id),
            Event::Finished { replica, ok } => self.finished(replica, ok, now, &mut out),
            Event::Up(replica) => self.replicas[replica] = Replica::Idle,
            Event::Down(replica) => self.down(replica, &mut out),
            Event::Drain => self.draining = true,
            Event::Stop => {
                self.draining = true;
                self.refuse_all(Refusal::Draining, &mut out);
            }
            Event::Tick => {}
        }
        self.expire(now, &mut out);
        if cut {
            self.dispatch(now, &mut out);
        }
        out
    }

    /// When the next [`Event::Tick`] is due, if nothing else happens before.
    pub(crate) fn next_wake(&self) -> Option<Duration> {
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        let idle = self.replicas.iter().any(|r| matches!(r, Replica::Idle));
        let cut = self.queue.front().filter(|_| idle);
        let cut = cut.map(|oldest| oldest.arrived + self.options.max_delay);
        deadline.into_iter().chain(cut).min()
    }

    /// Rows that wait.
    pub(crate) fn queued_rows(&self) -> usize {
        self.queued_rows
    }

    /// Requests that have no answer yet.
    pub(crate) fn unanswered(&self) -> usize {
        self.deadlines.len()
    }

    /// Whether no more is admitted and everyone has an answer.
    pub(crate) fn is_drained(&self) -> bool {
        self.draining && self.deadlines.is_empty()
    }

    /// Replicas that are loaded, busy or not.
    pub(crate) fn replicas_up(&self) -> usize {
        let up = |r: &&Replica| !matches!(r, Replica::Down);
        self.replicas.iter().filter(up).count()
    }

    fn arrive(&mut self, request: Request, out: &mut Vec<Command>) {
        if let Some(refusal) = self.refusal(&request) {
            out.push(Command::Refuse(request.id, refusal));
            return;
        }
        self.deadlines.insert((request.deadline, request.id));
        self.queued_rows += request.rows;
        self.queue.push_back(request);
    }

    fn refusal(&self, request: &Request) -> Option<Refusal> {
        if self.draining {
            return Some(Refusal::Draining);
        }
        if self.replicas_up() == 0 {
            return Some(Refusal::NoReplica);
        }
        let full = self.queued_rows + request.rows > self.options.max_queue_rows;
        full.then(|| Refusal::QueueFull { retry_after: self.drain_time() })
    }

    /// How long the replicas need for what is queued, from what rows have cost until now.
    fn drain_time(&self) -> Duration {
        let replicas = self.replicas_up().max(1) as f64;
        let seconds = self.queued_rows as f64 * self.seconds_per_row / replicas;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    fn finished(&mut self, replica: usize, ok: bool, now: Duration, out: &mut Vec<Command>) {
        let state = std::mem::replace(&mut self.replicas[replica], Replica::Idle);
        let Replica::Busy(flight) = state else {
            return;
        };
        self.learn(&flight, now);
        if !ok {
            return self.failed(flight, out);
        }
        for request in flight.waiting {
            self.deadlines.remove(&(request.deadline, request.id));
            out.push(Command::Complete(request.id));
        }
    }

    fn learn(&mut self, flight: &Flight, now: Duration) {
        let took = now.saturating_sub(flight.since).as_secs_f64() / flight.rows as f64;
        let first = self.seconds_per_row == 0.0;
        self.seconds_per_row = if first { took } else { 0.8 * self.seconds_per_row + 0.2 * took };
    }

    /// INV-POISON: halves a failed batch until the culprit is alone. One bad request among n
    /// costs its neighbours about log2(n) more runs.
    fn failed(&mut self, flight: Flight, out: &mut Vec<Command>) {
        let mut requests = flight.waiting;
        if flight.alone {
            for culprit in requests {
                self.deadlines.remove(&(culprit.deadline, culprit.id));
                out.push(Command::Fail(culprit.id));
            }
            return;
        }
        self.queued_rows += requests.iter().map(|r| r.rows).sum::<usize>();
        let second_half = requests.split_off(requests.len() / 2);
        self.retries.push_front(second_half);
        self.retries.push_front(requests);
    }

    /// The batch of a lost replica is nobody's fault: it goes to another replica, if there is one.
    fn down(&mut self, replica: usize, out: &mut Vec<Command>) {
        let state = std::mem::replace(&mut self.replicas[replica], Replica::Down);
        if let Replica::Busy(flight) = state {
            self.queued_rows += flight.waiting.iter().map(|r| r.rows).sum::<usize>();
            self.retries.push_front(flight.waiting);
        }
        if self.replicas_up() == 0 {
            self.refuse_all(Refusal::NoReplica, out);
        }
    }

    fn refuse_all(&mut self, refusal: Refusal, out: &mut Vec<Command>) {
        while let Some((_, id)) = self.deadlines.pop_first() {
            self.remove(id);
            out.push(Command::Refuse(id, refusal));
        }
    }

    fn expire(&mut self, now: Duration, out: &mut Vec<Command>) {
        while let Some((deadline, id)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.deadlines.pop_first();
            self.remove(id);
            out.push(Command::Expire(id));
        }
    }

    fn forget(&mut self, id: RequestId) {
        if let Some(request) = self.remove(id) {
            self.deadlines.remove(&(request.deadline, id));
        }
    }

    /// Takes a request out of wherever it is.
    fn remove(&mut self, id: RequestId) -> Option<Request> {
        if let Some(at) = self.queue.iter().position(|r| r.id == id) {
            let request = self.queue.remove(at)?;
            self.queued_rows -= request.rows;
            return Some(request);
        }
        for group in &mut self.retries {
            if let Some(request) = take(group, id) {
                self.queued_rows -= request.rows;
                return Some(request);
            }
        }
        self.replicas.iter_mut().find_map(|replica| match replica {
            Replica::Busy(flight) => take(&mut flight.waiting, id),
            _ => None,
        })
    }

    fn dispatch(&mut self, now: Duration, out: &mut Vec<Command>) {
        for replica in 0..self.replicas.len() {
            if !matches!(self.replicas[replica], Replica::Idle) {
                continue;
            }
            let Some(waiting) = self.cut(now) else {
                return;
            };
            let rows = waiting.iter().map(|r| r.rows).sum();
            self.queued_rows -= rows;
            let batch = waiting.iter().map(|r| r.id).collect();
            out.push(Command::Run { replica, batch });
            self.replicas[replica] =
                Replica::Busy(Flight { alone: waiting.len() == 1, waiting, rows, since: now });
        }
    }

    /// The next batch, if one is due.
    fn cut(&mut self, now: Duration) -> Option<Vec<Request>> {
        while let Some(group) = self.retries.pop_front() {
            if !group.is_empty() {
                return Some(group);
            }
        }
        let oldest = self.queue.front()?;
        let waited = now >= oldest.arrived + self.options.max_delay;
        let (count, full) = self.pack();
        (waited || full || self.draining).then(|| self.queue.drain(..count).collect())
    }

    /// How many requests at the front make a batch, and whether waiting could add another.
    fn pack(&self) -> (usize, bool) {
        let cap = self.options.max_batch_size;
        let class = self.queue.front().map(|r| r.class);
        let mut rows = 0;
        for (count, request) in self.queue.iter().enumerate() {
            rows += request.rows;
            // An oversized head goes alone, rather than blocking the queue for ever.
            if (rows > cap && count > 0) || Some(request.class) != class {
                return (count, true);
            }
        }
        (self.queue.len(), rows >= cap)
    }
}

fn take(requests: &mut Vec<Request>, id: RequestId) -> Option<Request> {
    let at = requests.iter().position(|r| r.id == id)?;
    Some(requests.remove(at))
}

#[cfg(test)]
#[path = "batcher_tests.rs"]
mod tests;
