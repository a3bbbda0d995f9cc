//! The shell around the batcher: carries requests to replicas and answers back, and keeps time.

use crate::Error;
use crate::batcher::{Batcher, Command, Event, Refusal, Request, RequestId};
use crate::metrics::{Gauges, Metrics, ModelStats, Outcome};
use crate::model::ModelMetadata;
use crate::options::BatchingOptions;
use crate::protocol::InferRequest;
use mobula_core::Batch;
use mobula_core::clock::{Clock, SystemClock};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot, watch};

/// A batch on its way to a replica.
pub(crate) struct Flight {
    pub(crate) inputs: Vec<Batch>,
    pub(crate) ticket: Ticket,
}

/// What a flight is remembered by while the replica has its inputs.
pub(crate) struct Ticket {
    replica: usize,
    ids: Vec<RequestId>,
    rows: usize,
    launched: Duration,
}

/// The outputs of a request, and how it came by them.
pub(crate) struct Answer {
    pub(crate) outputs: Batch,
    /// Rows in the batch that it was part of.
    pub(crate) batch_rows: usize,
    pub(crate) queued: Duration,
}

/// One deployment at run time. All its state is behind one lock, held for microseconds.
pub(crate) struct Dispatcher {
    pub(crate) metadata: Arc<ModelMetadata>,
    pub(crate) batching: BatchingOptions,
    pub(crate) clock: SystemClock,
    state: Mutex<State>,
    metrics: Mutex<Metrics>,
    /// An earlier wake-up than the timer waits for.
    rearm: Notify,
    /// Whether no more is admitted and everyone has an answer.
    drained: watch::Sender<bool>,
}

struct State {
    batcher: Batcher,
    pending: HashMap<RequestId, Pending>,
    next_id: RequestId,
    flights: Vec<mpsc::Sender<Flight>>,
    /// What the timer waits for.
    armed: Option<Duration>,
}

/// A request without an answer.
struct Pending {
    inputs: Batch,
    reply: oneshot::Sender<Result<Answer, Error>>,
    arrived: Duration,
    started: Duration,
    timeout: Duration,
    batch_rows: usize,
}

/// What a batch that has just ended leaves for its requests.
enum Leavings {
    Nothing,
    Outputs(HashMap<RequestId, Batch>),
    Error(Error),
}

impl Dispatcher {
    /// A dispatcher and, for each replica, the batches it will be given.
    pub(crate) fn new(
        metadata: ModelMetadata,
        batching: BatchingOptions,
        replicas: usize,
    ) -> (Arc<Self>, Vec<mpsc::Receiver<Flight>>) {
        // One place is enough: the batcher gives a replica a batch only when it is idle.
        let channels = (0..replicas).map(|_| mpsc::channel(1));
        let (flights, receivers) = channels.unzip();
        let state = State {
            batcher: Batcher::new(batching.clone(), replicas),
            pending: HashMap::new(),
            next_id: 0,
            flights,
            armed: None,
        };
        let dispatcher = Self {
            metadata: Arc::new(metadata),
            batching,
            clock: SystemClock::new(),
            state: Mutex::new(state),
            metrics: Mutex::default(),
            rearm: Notify::new(),
            drained: watch::Sender::new(false),
        };
        let dispatcher = Arc::new(dispatcher);
        for replica in 0..replicas {
            dispatcher.step(Event::Up(replica));
        }
        (dispatcher, receivers)
    }

    /// Queues a request and waits for its answer, at most until its deadline. Dropping the future
    /// takes the request out of the queue.
    pub(crate) async fn infer(&self, request: InferRequest) -> Result<Answer, Error> {
        let (reply, answer) = oneshot::channel();
        let mut waiting =
            Waiting { dispatcher: self, id: self.submit(request, reply), answered: false };
        let answer = answer.await;
        waiting.answered = true;
        answer.unwrap_or_else(|_| Err(self.refused(Refusal::NoReplica)))
    }

    fn submit(
        &self,
        request: InferRequest,
        reply: oneshot::Sender<Result<Answer, Error>>,
    ) -> RequestId {
        let class = request.class();
        let limit = self.batching.request_timeout;
        let timeout = request.timeout.map_or(limit, |asked| asked.min(limit));
        let mut state = self.lock();
        let arrived = self.clock.now();
        let id = state.next_id;
        state.next_id += 1;
        let ask = Request {
            id,
            rows: request.inputs.rows(),
            class,
            arrived,
            deadline: arrived + timeout,
        };
        let pending = Pending {
            inputs: request.inputs,
            reply,
            arrived,
            started: arrived,
            timeout,
            batch_rows: 0,
        };
        state.pending.insert(id, pending);
        self.advance(&mut state, Event::Arrive(ask), arrived, Leavings::Nothing);
        id
    }

    /// Takes in an event that brings no results.
    pub(crate) fn step(&self, event: Event) {
        let mut state = self.lock();
        self.advance(&mut state, event, self.clock.now(), Leavings::Nothing);
    }

    /// A replica has run a flight; `result` has the outputs of its requests in their order.
    pub(crate) fn finished(&self, ticket: Ticket, result: Result<Vec<Batch>, Error>) {
        let now = self.clock.now();
        let ok = result.is_ok();
        let leavings = match result {
            Ok(outputs) => {
                let mut metrics = self.metrics();
                metrics.batch_rows.record(ticket.rows as u64);
                metrics.run_micros.record_micros(now - ticket.launched);
                Leavings::Outputs(ticket.ids.into_iter().zip(outputs).collect())
            }
            Err(error) => Leavings::Error(error),
        };
        let replica = ticket.replica;
        let event = Event::Finished { replica, ok };
        self.advance(&mut self.lock(), event, now, leavings);
    }

    /// A replica will run nothing more, nor has it run this flight.
    pub(crate) fn lost(&self, ticket: &Ticket) {
        self.step(Event::Down(ticket.replica));
    }

    /// An answer has left; its request had arrived `took` ago.
    pub(crate) fn answered(&self, answer: &Answer, took: Duration) {
        let mut metrics = self.metrics();
        metrics.count(Outcome::Ok);
        metrics.queue_micros.record_micros(answer.queued);
        metrics.request_micros.record_micros(took);
    }

    fn advance(&self, state: &mut State, event: Event, now: Duration, mut leavings: Leavings) {
        for command in state.batcher.step(event, now) {
            match command {
                Command::Run { replica, batch } => self.launch(state, replica, batch, now),
                Command::Complete(id) => self.complete(state, id, &mut leavings),
                Command::Fail(id) => {
                    let error = match std::mem::replace(&mut leavings, Leavings::Nothing) {
                        Leavings::Error(error) => error,
                        _ => self.refused(Refusal::NoReplica),
                    };
                    state.answer(id, |_| Err(error));
                }
                Command::Expire(id) => state.answer(id, |pending| {
                    Err(Error::DeadlineExceeded {
                        model: self.metadata.name.clone(),
                        after: pending.timeout,
                    })
                }),
                Command::Refuse(id, refusal) => state.answer(id, |_| Err(self.refused(refusal))),
            }
        }
        let wake = state.batcher.next_wake();
        if wake.is_some_and(|wake| state.armed.is_none_or(|armed| wake < armed)) {
            self.rearm.notify_one();
        }
        if state.batcher.is_drained() {
            self.drained.send_replace(true);
        }
    }

    /// Returns once no more is admitted and everyone has an answer.
    pub(crate) async fn drained(&self) {
        let _ = self.drained.subscribe().wait_for(|drained| *drained).await;
    }

    fn launch(&self, state: &mut State, replica: usize, ids: Vec<RequestId>, now: Duration) {
        let rows_of = |id: &RequestId| state.pending.get(id).map_or(0, |p| p.inputs.rows());
        let rows = ids.iter().map(rows_of).sum();
        let mut inputs = Vec::with_capacity(ids.len());
        for id in &ids {
            if let Some(pending) = state.pending.get_mut(id) {
                pending.started = now;
                pending.batch_rows = rows;
                inputs.push(pending.inputs.clone());
            }
        }
        let launched = now;
        let ticket = Ticket { replica, ids, rows, launched };
        // Refused only when the replica's driver has ended, as the whole server then does.
        let _ = state.flights[replica].try_send(Flight { inputs, ticket });
    }

    fn complete(&self, state: &mut State, id: RequestId, leavings: &mut Leavings) {
        let Leavings::Outputs(outputs) = leavings else {
            return;
        };
        let Some(outputs) = outputs.remove(&id) else {
            return;
        };
        state.answer(id, |pending| {
            Ok(Answer {
                outputs,
                batch_rows: pending.batch_rows,
                queued: pending.started - pending.arrived,
            })
        });
    }

    fn refused(&self, refusal: Refusal) -> Error {
        let model = self.metadata.name.clone();
        let unavailable = |reason| Error::Unavailable { model: model.clone(), reason };
        match refusal {
            Refusal::QueueFull { retry_after } => Error::QueueFull {
                limit: self.batching.max_queue_rows,
                // Whole seconds, as the header counts.
                retry_after: Duration::from_secs(retry_after.as_secs().min(3599) + 1),
                model,
            },
            Refusal::NoReplica => unavailable("none of its replicas is running"),
            Refusal::Draining => unavailable("the server is shutting down"),
        }
    }

    /// Lets deadlines and delays strike on time. Runs as long as the server.
    pub(crate) async fn keep_time(self: Arc<Self>) {
        loop {
            let wake = self.arm();
            let Some(wake) = wake else {
                self.rearm.notified().await;
                continue;
            };
            let pause = wake.saturating_sub(self.clock.now());
            if pause.is_zero() {
                // A turn of the event loop: what other connections have already received joins
                // the batch that is about to be cut. A lone request loses a microsecond.
                tokio::task::yield_now().await;
                self.step(Event::Tick);
                continue;
            }
            tokio::select! {
                biased;
                () = tokio::time::sleep(pause) => self.step(Event::Tick),
                () = self.rearm.notified() => {}
            }
        }
    }

    fn arm(&self) -> Option<Duration> {
        let mut state = self.lock();
        state.armed = state.batcher.next_wake();
        state.armed
    }

    pub(crate) fn gauges(&self) -> Gauges {
        let state = self.lock();
        Gauges {
            queued_rows: state.batcher.queued_rows(),
            unanswered: state.batcher.unanswered(),
            replicas_up: state.batcher.replicas_up(),
        }
    }

    pub(crate) fn stats(&self) -> ModelStats {
        let gauges = self.gauges();
        self.metrics().stats(gauges)
    }

    pub(crate) fn metrics(&self) -> MutexGuard<'_, Metrics> {
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn answer(&mut self, id: RequestId, with: impl FnOnce(&Pending) -> Result<Answer, Error>) {
        if let Some(pending) = self.pending.remove(&id) {
            let answer = with(&pending);
            // Nobody listens when the client has just hung up.
            let _ = pending.reply.send(answer);
        }
    }
}

/// A client that waits. Dropped before the answer when the client hangs up.
struct Waiting<'a> {
    dispatcher: &'a Dispatcher,
    id: RequestId,
    answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        self.dispatcher.metrics().count(Outcome::Cancelled);
        let mut state = self.dispatcher.lock();
        state.pending.remove(&self.id);
        let now = self.dispatcher.clock.now();
        self.dispatcher.advance(&mut state, Event::Gone(self.id), now, Leavings::Nothing);
    }
}
