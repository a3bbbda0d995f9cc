//! The worker's side.

use super::wire::{Failure, Submission};
use crate::parcel::{Packed, Parcel, reader};
use crate::process::wire::FromWorker;
use crate::store::Reader;
use crate::stream::Intake;
use crate::value::Encoded;
use crate::{Error, Resources, Runtime};
use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::mpsc;

/// What a worker process has its driver run.
pub(crate) struct Nested {
    out: mpsc::UnboundedSender<FromWorker>,
    reader: Reader,
    state: Mutex<State>,
    /// For threads of this process, and for what the driver is to run.
    runtime: OnceLock<Runtime>,
}

#[derive(Default)]
struct State {
    last_ticket: u64,
    pending: HashMap<u64, Pending>,
    /// Who waits for its CPUs, the first one first.
    resumes: VecDeque<SyncSender<()>>,
}

/// What was submitted and has not ended.
struct Pending {
    done: Done,
    /// Where its values go, if it gives many.
    values: Option<Arc<dyn Intake>>,
}

/// Hears of the end of a call.
type Done = Box<dyn FnOnce(Result<Parcel, Error>) + Send>;

static NESTED: OnceLock<Arc<Nested>> = OnceLock::new();

/// Lets this worker process submit. To be called once, on the runtime of its control stream.
pub(crate) fn open(outbound: mpsc::Sender<FromWorker>) {
    let (reader, state, runtime) = (reader(), Mutex::default(), OnceLock::new());
    let (out, mut frames) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(frame) = frames.recv().await {
            if outbound.send(frame).await.is_err() {
                return;
            }
        }
    });
    // A second control stream there is none.
    let _ = NESTED.set(Arc::new(Nested { out, reader, state, runtime }));
}

/// `None` in a driver.
pub(crate) fn nested() -> Option<&'static Arc<Nested>> {
    NESTED.get()
}

impl Nested {
    /// The runtime of this worker process.
    pub(crate) fn runtime(self: &Arc<Self>) -> &Runtime {
        self.runtime.get_or_init(|| {
            let cpus = Resources::cpus(rayon::current_num_threads() as f64);
            Runtime::in_worker(&cpus, Arc::clone(self))
        })
    }

    /// Has the driver run a call; its ticket, to call it off.
    pub(crate) fn submit(&self, submission: Submission, done: Done) -> u64 {
        self.submit_pending(submission, Pending { done, values: None })
    }

    /// The same for a call that gives many values.
    pub(crate) fn submit_stream(
        self: &Arc<Self>,
        submission: Submission,
        values: Arc<dyn Intake>,
        done: Done,
    ) -> u64 {
        let granted = values.begin().1;
        let pending = Pending { done, values: Some(Arc::clone(&values)) };
        let ticket = self.submit_pending(submission, pending);
        let nested = Arc::clone(self);
        values.connect(
            granted,
            Arc::new(move |below| nested.tell(FromWorker::Grant { ticket, below })),
        );
        ticket
    }

    fn submit_pending(&self, submission: Submission, pending: Pending) -> u64 {
        let ticket = {
            let mut state = self.state();
            state.last_ticket += 1;
            let ticket = state.last_ticket;
            state.pending.insert(ticket, pending);
            ticket
        };
        self.tell(FromWorker::Submit { ticket, submission: Box::new(submission) });
        ticket
    }

    /// Values of a call that goes on. Large ones are mapped here and now, so that nobody has to keep
    /// them for this process.
    pub(crate) fn values(self: &Arc<Self>, ticket: u64, first: u64, packed: Vec<Packed>) {
        let known = self.state().pending.get(&ticket).and_then(|known| known.values.clone());
        let Some(values) = known else { return };
        let below = first + packed.len() as u64;
        let has_shared = packed.iter().any(|value| matches!(value, Packed::Shared { .. }));
        let opened = packed.into_iter().map(|value| value.open(&self.reader).map(Parcel::Inline));
        match opened.collect::<Result<Vec<_>, _>>() {
            Ok(opened) => {
                values.take_in(first, opened);
                if has_shared {
                    self.tell(FromWorker::Mapped { ticket, below });
                }
            }
            Err(error) => {
                self.call_off(ticket);
                self.resolved(ticket, Err(Box::new(Failure::from(&error))));
            }
        }
    }

    pub(crate) fn call_off(&self, ticket: u64) {
        self.tell(FromWorker::CallOff { ticket });
    }

    pub(crate) fn resolved(self: &Arc<Self>, ticket: u64, result: Result<Packed, Box<Failure>>) {
        let known = self.state().pending.remove(&ticket);
        let Some(Pending { done, .. }) = known else { return };
        done(match result {
            Ok(packed) => Ok(Parcel::Up(Arc::new(Up { nested: Arc::clone(self), ticket, packed }))),
            Err(failure) => {
                self.tell(FromWorker::Release { ticket });
                Err((*failure).into())
            }
        });
    }

    pub(crate) fn lend(&self) {
        self.tell(FromWorker::Lend);
    }

    /// Waits until the CPUs that were lent are back.
    pub(crate) fn reclaim(&self) {
        let (back, is_back) = sync_channel(1);
        self.state().resumes.push_back(back);
        self.tell(FromWorker::Reclaim);
        // Without an answer the driver is gone, and this process about to end.
        let _ = is_back.recv();
    }

    pub(crate) fn resumed(&self) {
        let first = self.state().resumes.pop_front();
        first.map(|first| first.send(()));
    }

    /// From whatever thread, in order. Bounded by what this process submits and waits for.
    fn tell(&self, frame: FromWorker) {
        // If it is not taken the driver has gone, and this process is about to.
        let _ = self.out.send(frame);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A result that the driver holds for this worker, until dropped.
#[doc(hidden)]
pub struct Up {
    pub(super) nested: Arc<Nested>,
    pub(super) ticket: u64,
    packed: Packed,
}

impl std::fmt::Debug for Up {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Up").field(&self.ticket).finish()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.nested.tell(FromWorker::Release { ticket: self.ticket });
    }
}

impl Up {
    pub(crate) fn open(&self) -> Result<Encoded, Error> {
        self.packed.open(&self.nested.reader)
    }

    /// For another call of this worker: the driver knows what it is.
    pub(crate) fn pack(&self) -> Packed {
        Packed::Held { ticket: self.ticket }
    }
}
