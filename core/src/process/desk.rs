//! The worker's queue of calls, and the thread that runs them one after the other.

use super::child::outcome_of;
use super::progress::Progress;
use super::wire::{FromWorker, MAX_FRAME_BYTES, What};
use crate::actor::checkpoint::Saves;
use crate::actor::crew::{Crew, Place};
use crate::actor::lanes::Class;
use crate::actor::stage::{Done, Stage};
use crate::current::{self, Current};
use crate::parcel::{Outgoing, Packed, reader};
use crate::remote::RemoteFn;
use crate::store::{Offer, Reader};
use crate::stream::{Outbox, Outlet};
use crate::threads::{STACK_BYTES, own_pool};
use crate::{Error, panics};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};

/// Behind a call that takes longer, others need not wait.
const PATIENCE: Duration = Duration::from_millis(10);

/// A call that waits for its turn.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) call: u64,
    pub(super) what: What,
    pub(super) function: String,
    pub(super) args: Vec<Packed>,
}

/// The queue. Clones share it.
#[derive(Clone)]
pub(super) struct Desk {
    inner: Arc<Inner>,
    outbound: mpsc::Sender<FromWorker>,
    tokio: tokio::runtime::Handle,
}

struct Inner {
    queue: Mutex<Queue>,
    /// The calls of the actor that lives here, if one does.
    crew: OnceLock<Arc<Crew<Work>>>,
    saves: OnceLock<Saves>,
    more: Condvar,
    /// Wakes the control thread when there is a reason to look at the clock.
    waiting: Notify,
    progress: Progress,
    reader: Reader,
    /// Large results that the driver has not taken yet.
    offers: Mutex<HashMap<u64, Offer>>,
    /// Large states of the actor that the driver has not taken yet.
    saved: Mutex<HashMap<u64, Offer>>,
    /// What calls that give many values have to send.
    outboxes: Mutex<HashMap<u64, Arc<Outbox>>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Work>,
    /// The call that runs.
    current: Option<u64>,
    /// Nothing begins any more.
    is_doomed: bool,
    /// Since when it has been running.
    busy_since: Option<Instant>,
}

impl Desk {
    /// Starts the thread. To be called where async tasks can be spawned.
    pub(super) fn open(outbound: mpsc::Sender<FromWorker>) -> Result<Self, Error> {
        let inner = Inner {
            queue: Mutex::default(),
            crew: OnceLock::new(),
            saves: OnceLock::new(),
            more: Condvar::new(),
            waiting: Notify::new(),
            progress: Progress::inherited()?,
            reader: reader(),
            offers: Mutex::default(),
            saved: Mutex::default(),
            outboxes: Mutex::default(),
        };
        let tokio = tokio::runtime::Handle::current();
        let desk = Self { inner: Arc::new(inner), outbound, tokio };
        let thread = std::thread::Builder::new().name("mobula-task".into()).stack_size(STACK_BYTES);
        let copy = desk.clone();
        let spawned = thread.spawn(move || copy.work());
        spawned.map_err(|source| Error::system("starting a thread", source))?;
        Ok(desk)
    }

    /// This process is for an actor.
    pub(super) fn for_actor(&self, limits: &[usize], saves: Saves) {
        self.inner.saves.get_or_init(|| saves);
        self.inner.crew.get_or_init(|| Crew::new(limits, self.clone()));
    }

    pub(super) fn add(&self, work: Work) {
        if let (What::Method(class), Some(crew)) = (work.what, self.inner.crew.get()) {
            if let Err(refused) = crew.add(class, work) {
                // Its driver has sent it the wrong way, and learns that from its end.
                eprintln!("worker {}: {} has no group", std::process::id(), refused.function);
                std::process::exit(101);
            }
            return;
        }
        if let What::Stream { skip, granted } = work.what {
            let (outbound, tokio) = (self.outbound.clone(), self.tokio.clone());
            let outbox = Outbox::new(work.call, (skip, granted), outbound, tokio);
            self.outboxes().insert(work.call, outbox);
        }
        let mut queue = self.queue();
        queue.waiting.push_back(work);
        if queue.busy_since.is_some() {
            self.inner.waiting.notify_one();
        } else {
            self.inner.more.notify_one();
        }
    }

    /// The driver has no use for this call. If it runs, no other call begins and the driver is
    /// asked to end this process; if it waits, it is given back; if it has ended, its reply is on
    /// its way.
    pub(super) fn forget(&self, call: u64) {
        let mut queue = self.queue();
        if queue.current == Some(call) {
            queue.is_doomed = true;
            drop(queue);
            return self.tell_later(FromWorker::Doomed { call });
        }
        let before = queue.waiting.len();
        queue.waiting.retain(|work| work.call != call);
        let was_waiting = queue.waiting.len() < before;
        drop(queue);
        if was_waiting {
            self.outboxes().remove(&call);
            self.tell_later(FromWorker::Returned { calls: vec![call] });
        }
    }

    /// Sends a frame from the control thread, which must not wait for room that it makes itself.
    fn tell_later(&self, frame: FromWorker) {
        let outbound = self.outbound.clone();
        tokio::spawn(async move { drop(outbound.send(frame).await) });
    }

    /// The driver has the result.
    pub(super) fn adopted(&self, call: u64) {
        let offer = self.offers().remove(&call);
        drop(offer);
    }

    /// The driver has the state that was saved after this call.
    pub(super) fn saved_adopted(&self, call: u64) {
        let offer = self.saved().remove(&call);
        drop(offer);
    }

    /// A call may yield the values below this number.
    pub(super) fn granted(&self, call: u64, below: u64) {
        if let Some(outbox) = self.outbox(call) {
            outbox.grant(below);
        }
    }

    /// The driver has the large values below this number.
    pub(super) fn taken_over(&self, call: u64, below: u64) {
        if let Some(outbox) = self.outbox(call) {
            outbox.adopted(below);
            self.forget_outbox(&outbox, call);
        }
    }

    fn outbox(&self, call: u64) -> Option<Arc<Outbox>> {
        self.outboxes().get(&call).cloned()
    }

    /// Once it has nothing to send, nor to keep for the driver.
    fn forget_outbox(&self, outbox: &Outbox, call: u64) {
        if outbox.is_done() {
            self.outboxes().remove(&call);
        }
    }

    fn outboxes(&self) -> MutexGuard<'_, HashMap<u64, Arc<Outbox>>> {
        self.inner.outboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offers(&self) -> MutexGuard<'_, HashMap<u64, Offer>> {
        self.inner.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn saved(&self) -> MutexGuard<'_, HashMap<u64, Offer>> {
        self.inner.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until tasks are stuck behind a long one.
    pub(super) async fn stuck(&self) {
        loop {
            let busy_since = {
                let queue = self.queue();
                queue.busy_since.filter(|_| queue.has_tasks())
            };
            match busy_since {
                None => self.inner.waiting.notified().await,
                Some(since) if since.elapsed() >= PATIENCE => return,
                Some(since) => tokio::time::sleep_until((since + PATIENCE).into()).await,
            }
        }
    }

    /// Gives waiting tasks back to the driver, who may have room for them elsewhere.
    pub(super) fn send_back(&self) {
        let tasks = {
            let mut queue = self.queue();
            let (tasks, rest) = std::mem::take(&mut queue.waiting)
                .into_iter()
                .partition::<VecDeque<_>, _>(|work| work.what.is_task());
            queue.waiting = rest;
            tasks
        };
        let calls: Vec<u64> = tasks.iter().map(|work| work.call).collect();
        self.outboxes().retain(|call, _| !calls.contains(call));
        self.tell_later(FromWorker::Returned { calls });
    }

    fn work(&self) {
        // A panic that nothing has caught, such as one in a destructor, would leave a process
        // that lives and never answers.
        let _end = EndWithThread;
        let (mut stage, mut pool) = (Stage::default(), None);
        loop {
            let work = self.next();
            // A worker for a group never has calls.
            pool.get_or_insert_with(|| own_pool(rayon::current_num_threads()));
            let (call, what, since) = (work.call, work.what, Instant::now());
            self.inner.progress.begin(call);
            let outbox = self.outbox(call);
            let result = self.perform(work, &mut stage, outbox.as_ref()).result;
            if let Some(outbox) = outbox {
                outbox.close();
                self.forget_outbox(&outbox, call);
            }
            let is_built = what == What::Build && result.is_ok();
            let reply = self.reply(call, since, result);
            self.rest();
            if self.outbound.blocking_send(reply).is_err() {
                return;
            }
            if let (true, Some(crew)) = (is_built, self.inner.crew.get()) {
                // From now on this thread is the actor's.
                return crew.serve(&mut stage);
            }
        }
    }

    /// What is large stays in an offer until the driver has it.
    fn reply(&self, call: u64, since: Instant, result: Result<Outgoing, Error>) -> FromWorker {
        let (outcome, offer) = outcome_of(result);
        if let Some(offer) = offer {
            self.offers().insert(call, offer);
        }
        let micros = u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX);
        FromWorker::Reply { call, micros, outcome }
    }

    /// Keeps what was saved after a call, and tells the driver, before the call's reply.
    fn save(&self, stage: &Stage, call: u64, saved: Result<Outgoing, Error>) {
        let state = match saved.and_then(|saved| self.keep(stage, call, saved)) {
            Ok(None) => return,
            Ok(Some(packed)) => Ok(packed),
            Err(error) => Err(error.to_string()),
        };
        // If it is not taken the driver has gone, and this process is about to.
        let _ = self.outbound.blocking_send(FromWorker::Saved { call, state });
    }

    /// In the stage for the next panic, and for the driver, if it can make use of it.
    fn keep(&self, stage: &Stage, call: u64, saved: Outgoing) -> Result<Option<Packed>, Error> {
        if !self.inner.saves.get().is_some_and(|saves| saves.are_sent) {
            stage.keep(saved.into_encoded()?);
            return Ok(None);
        }
        let (packed, offer) = saved.into_packed()?;
        if packed.bytes() >= MAX_FRAME_BYTES {
            let bytes = packed.bytes();
            let message = format!("it has {bytes} bytes, at most {MAX_FRAME_BYTES} fit");
            return Err(Error::TaskFailed { task: "saving the state".to_owned(), message });
        }
        stage.keep(match &offer {
            Some(offer) => offer.open()?,
            None => packed.open(&self.inner.reader)?,
        });
        if let Some(offer) = offer {
            self.saved().insert(call, offer);
        }
        Ok(Some(packed))
    }

    fn perform(&self, work: Work, stage: &mut Stage, outbox: Option<&Arc<Outbox>>) -> Done {
        let current = Current { object: None, lease: None, call: Some(work.call) };
        let every = self.inner.saves.get().map_or(1, |saves| saves.every);
        let run = || run_as_current(work, &self.inner.reader, stage, every, outbox);
        current::run(current, || run().unwrap_or_else(Done::failed))
    }

    /// Nothing runs, so nothing can be stuck behind it.
    fn rest(&self) {
        let mut queue = self.queue();
        queue.busy_since = None;
        queue.current = None;
    }

    fn next(&self) -> Work {
        let mut queue = self.queue();
        loop {
            if let Some(work) = queue.take_next() {
                queue.busy_since = Some(Instant::now());
                queue.current = Some(work.call);
                if queue.has_tasks() {
                    self.inner.waiting.notify_one();
                }
                return work;
            }
            queue = self.inner.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.inner.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of the actor that lives in this process.
impl Place<Work> for Desk {
    fn run(&self, stage: &mut Stage, class: Class, work: Work) {
        let (call, since) = (work.call, Instant::now());
        self.inner.progress.begin_in(class.lane(), call);
        let done = self.perform(work, stage, None);
        if let Some(saved) = done.saved {
            self.save(stage, call, saved);
        }
        // If it is not taken the driver has gone, and this process is about to.
        let _ = self.outbound.blocking_send(self.reply(call, since, done.result));
    }

    fn spawn(&self, help: Box<dyn FnOnce() + Send>) -> Result<(), Error> {
        let thread = std::thread::Builder::new().name("mobula-task".into()).stack_size(STACK_BYTES);
        let spawned = thread.spawn(move || {
            let _end = EndWithThread;
            help();
        });
        spawned.map(drop).map_err(|source| Error::system("starting a thread", source))
    }
}

/// Ends the process if its thread ends by a panic.
struct EndWithThread;

impl Drop for EndWithThread {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("worker {}: the thread that runs calls has panicked", std::process::id());
            std::process::exit(101);
        }
    }
}

impl Queue {
    fn take_next(&mut self) -> Option<Work> {
        if self.is_doomed { None } else { self.waiting.pop_front() }
    }

    fn has_tasks(&self) -> bool {
        self.waiting.front().is_some_and(|work| work.what.is_task())
    }
}

fn run_as_current(
    work: Work,
    reader: &Reader,
    stage: &mut Stage,
    every: u64,
    outbox: Option<&Arc<Outbox>>,
) -> Result<Done, Error> {
    let args = work.args.into_iter().map(|packed| packed.open(reader));
    let (name, args) = (&*work.function, args.collect::<Result<Vec<_>, _>>()?);
    let result = match work.what {
        What::Task => panics::catch(name, || RemoteFn::find(name)?.run(None, &args)),
        What::Stream { .. } => {
            let gone = || Error::Internal(format!("{name} has nowhere to put its values"));
            let outlet = Outlet::far(outbox.ok_or_else(gone)?);
            panics::catch(name, || RemoteFn::find(name)?.yields(outlet, &args))
                .and_then(|()| Outgoing::new("nothing", &()))
        }
        What::Build => stage.build(name, args, every).and_then(|()| Outgoing::new("nothing", &())),
        What::Method(_) => return Ok(stage.invoke(name, &args)),
    };
    Ok(Done { result, saved: None })
}
