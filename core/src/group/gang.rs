//! The running group itself: takes in what its members say, and sees to it that they go on.

use super::elastic::Sizes;
use super::launch::Port;
use super::reform::Reform;
use super::room::Placed;
use super::{GroupEvent, GroupOptions, GroupTask, far_deadline};
use crate::parcel::Parcel;
use crate::process::wire::{FromWorker, Outcome, ToWorker};
use crate::process::{EVENTS, WorkerEvent, check_build, into_result, lost};
use crate::runtime::Runtime;
use crate::{Error, console};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// By then the loss of a process of this machine has been noticed, and that of another machine: with
/// its last words, and after its silence.
const LOSS_HERE: Duration = Duration::from_secs(1);
const LOSS_ELSEWHERE: Duration = Duration::from_secs(6);

/// A running group, in the process that starts its members. Dropping it ends all of them.
pub(crate) struct Gang<T> {
    pub(super) runtime: Runtime,
    pub(super) options: GroupOptions,
    pub(super) task: GroupTask<T>,
    pub(super) args: Vec<Parcel>,
    notices: Receiver<Notice>,
    pub(super) notify: SyncSender<Notice>,
    /// By rank.
    pub(super) members: Vec<Port>,
    /// Processes started so far.
    pub(super) processes: u64,
    pub(super) sizes: Sizes,
    /// How many members it had, if it grows and the driver has yet to be told.
    pub(super) grown_from: Option<usize>,
    pub(super) gathering: HashMap<String, Vec<Option<Bytes>>>,
    pub(super) reform: Reform,
    /// The first loss since a generation was announced.
    pub(super) cause: Option<Error>,
    pub(super) failures: VecDeque<Failure>,
    pub(super) is_stopping: bool,
    /// Until it is about to go: then nobody looks for room for it, or waits for its events.
    pub(super) is_wanted: Arc<AtomicBool>,
}

/// A member's function has failed. It may be the consequence of a loss of which nobody has heard yet:
/// until then the driver is not told.
pub(super) struct Failure {
    rank: usize,
    error: Error,
    until: Instant,
}

impl<T> std::fmt::Debug for Gang<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gang")
            .field("options", &self.options)
            .field("members", &self.members)
            .field("reform", &self.reform)
            .finish_non_exhaustive()
    }
}

/// What a group is told by its members and helpers.
pub(super) enum Notice {
    /// By a process that was started for a member.
    Member { process: u64, event: WorkerEvent },
    /// There is room for new members, or there is none.
    Placed(Result<Placed, Error>),
    /// It is not wanted any more.
    HungUp,
}

/// Ends a group's wait for its next event, for who is about to drop it on another thread.
pub(crate) struct HangUp {
    is_wanted: Arc<AtomicBool>,
    notify: SyncSender<Notice>,
}

impl HangUp {
    /// Never waits.
    pub(crate) fn now(&self) {
        self.is_wanted.store(false, Ordering::Release);
        // Where there is no room for a notice, nobody waits for one.
        let _ = self.notify.try_send(Notice::HungUp);
    }
}

impl<T> Gang<T> {
    /// One of so many members, and without them yet.
    pub(super) fn new(
        runtime: Runtime,
        options: &GroupOptions,
        task: &GroupTask<T>,
        args: Vec<Parcel>,
        size: usize,
    ) -> Self {
        let (notify, notices) = sync_channel(EVENTS);
        let (on_loss, restart) = (options.on_loss, options.restart);
        Self {
            runtime,
            options: options.clone(),
            task: task.clone(),
            args,
            notices,
            notify,
            members: Vec::with_capacity(size),
            processes: 0,
            sizes: Sizes::new(options.elastic, options.size, Instant::now()),
            grown_from: None,
            gathering: HashMap::new(),
            reform: Reform::new(on_loss, restart, options.generation, size),
            cause: None,
            failures: VecDeque::new(),
            is_stopping: false,
            is_wanted: Arc::new(AtomicBool::new(true)),
        }
    }

    /// See [`Group::next_event`](super::Group::next_event).
    pub(crate) fn next_event(&mut self, timeout: Duration) -> Option<GroupEvent<T>> {
        let deadline = far_deadline(timeout);
        while self.is_wanted.load(Ordering::Acquire) {
            if let Some(event) = self.advance() {
                return Some(event);
            }
            let event = match self.next_notice(deadline) {
                Some(notice) => self.take_in(notice),
                None if self.wake().is_some_and(|wake| wake < deadline) => {
                    self.grow(Instant::now());
                    None
                }
                None => return None,
            };
            if event.is_some() {
                return event;
            }
        }
        None
    }

    pub(super) fn generation(&self) -> u64 {
        self.reform.generation()
    }

    pub(super) fn size(&self) -> usize {
        self.members.len()
    }

    pub(crate) fn set_context(&mut self, context: Bytes) {
        self.options.context = context;
    }

    pub(crate) fn stop(&mut self) {
        self.is_stopping = true;
        self.members.iter().for_each(|member| member.send(ToWorker::Stop));
    }

    pub(crate) fn tell(&self, message: &Bytes) {
        let tell = |member: &Port| member.send(ToWorker::Told { message: message.clone() });
        self.members.iter().for_each(tell);
    }

    pub(crate) fn pids(&self) -> Vec<Option<u32>> {
        self.members.iter().map(Port::pid).collect()
    }

    pub(crate) fn hang_up(&self) -> HangUp {
        HangUp { is_wanted: Arc::clone(&self.is_wanted), notify: self.notify.clone() }
    }

    /// Waits for a notice, at most until the deadline, or until there is something to do. When no
    /// member runs any more it only gives what is there.
    fn next_notice(&self, deadline: Instant) -> Option<Notice> {
        if let Ok(notice) = self.notices.try_recv() {
            return Some(notice);
        }
        if self.reform.is_over() && self.failures.is_empty() {
            return None;
        }
        let wake = self.wake().map_or(deadline, |wake| wake.min(deadline));
        self.notices.recv_timeout(wake.saturating_duration_since(Instant::now())).ok()
    }

    /// When there is something to do that nobody will notify of.
    fn wake(&self) -> Option<Instant> {
        let failure = self.failures.front().map(|failure| failure.until);
        self.reform.due().into_iter().chain(failure).chain(self.resize_at()).min()
    }

    /// Takes the next step towards the next generation, or tells of a failure, if it is time.
    fn advance(&mut self) -> Option<GroupEvent<T>> {
        if let Some(event) = self.settle_size(Instant::now()) {
            return Some(event);
        }
        if self.sizes.seek_at().is_none()
            && let Some(replaced) = self.reform.place(self.must_move())
        {
            replaced.iter().for_each(|rank| self.members[*rank].doom());
            let sought = self.find_room(&replaced);
            return sought.err().and_then(|error| self.not_begun(error));
        }
        let now = Instant::now();
        if self.reform.due().is_some_and(|due| due <= now) {
            return self.announce();
        }
        let is_time = |failure: &mut Failure| failure.until <= now || !self.reform.is_any_running();
        let Failure { rank, error, .. } = self.failures.pop_front_if(is_time)?;
        Some(GroupEvent::Failed { rank, error })
    }

    /// The driver hears of the next generation before it begins.
    fn announce(&mut self) -> Option<GroupEvent<T>> {
        let mut replaced = self.reform.announce(self.must_move());
        replaced.iter().for_each(|rank| self.members[*rank].doom());
        let Some(error) = self.cause.take() else {
            return self.grown();
        };
        replaced.retain(|rank| self.grown_from.is_none_or(|size| *rank < size));
        Some(GroupEvent::Restarting { generation: self.reform.generation(), replaced, error })
    }

    fn take_in(&mut self, notice: Notice) -> Option<GroupEvent<T>> {
        match notice {
            Notice::Member { process, event } => {
                // None, if it has been replaced.
                let rank = self.members.iter().position(|member| member.is(process))?;
                self.heard(rank, event)
            }
            Notice::HungUp => None,
            Notice::Placed(placed) => {
                let begun = placed.and_then(|placed| self.begin(placed));
                begun.err().and_then(|error| self.not_begun(error))
            }
        }
    }

    /// The next generation cannot begin. If that is for another loss, there is one more attempt.
    pub(super) fn not_begun(&mut self, error: Error) -> Option<GroupEvent<T>> {
        let rank = self.reform.abandon();
        if error.is_retryable() {
            return self.restart_for(rank, error);
        }
        Some(GroupEvent::Failed { rank, error })
    }

    fn heard(&mut self, rank: usize, event: WorkerEvent) -> Option<GroupEvent<T>> {
        match event {
            WorkerEvent::Frame(FromWorker::Report { generation, payload })
                if generation == self.reform.generation() =>
            {
                Some(GroupEvent::Report { rank, payload })
            }
            WorkerEvent::Frame(FromWorker::Done { generation, outcome })
                if generation == self.reform.generation() =>
            {
                self.done(rank, outcome)
            }
            WorkerEvent::Frame(FromWorker::Hello { build }) => {
                check_build(&build).err().map(|error| GroupEvent::Failed { rank, error })
            }
            // Once members know that another generation follows, an answer would be taken for one in that.
            WorkerEvent::Frame(FromWorker::Gather { generation, key, value })
                if generation == self.reform.generation() && self.reform.due().is_none() =>
            {
                self.gather(rank, key, value);
                None
            }
            // What an older generation says counts no more.
            WorkerEvent::Frame(_) => None,
            WorkerEvent::Ended(_) if self.members[rank].is_done() => {
                self.reform.gone(rank);
                None
            }
            WorkerEvent::Ended(end) => {
                let error = lost(&self.who(rank), end.reason);
                self.restart_for(rank, error)
            }
        }
    }

    fn done(&mut self, rank: usize, outcome: Outcome) -> Option<GroupEvent<T>> {
        let value = into_result(&self.who(rank), outcome);
        let value = value.and_then(|parcel| (self.task.decode)(&parcel));
        if let Err(error) = &value
            && error.is_retryable()
        {
            // Its result, or an argument, was lost.
            return self.restart_for(rank, error.clone());
        }
        self.members[rank].set_done();
        self.members[rank].lend();
        self.reform.ended(rank);
        if self.reform.is_under_way() {
            // It is called again.
            return None;
        }
        match value {
            Ok(value) => Some(GroupEvent::Finished { rank, value }),
            Err(error) => {
                let until = Instant::now() + self.patience();
                self.failures.push_back(Failure { rank, error, until });
                None
            }
        }
    }

    /// How long a failure is held back in case that it is the consequence of a loss.
    fn patience(&self) -> Duration {
        match self.options.restart.max_restarts {
            0 => Duration::ZERO,
            _ if self.members.iter().all(Port::is_here) => LOSS_HERE,
            _ => LOSS_ELSEWHERE,
        }
    }

    /// A member was lost: the next generation follows, or this is the end.
    fn restart_for(&mut self, rank: usize, error: Error) -> Option<GroupEvent<T>> {
        self.members[rank].set_done();
        let Some(delay) = self.reform.lost(rank, Instant::now()) else {
            return Some(GroupEvent::Failed { rank, error });
        };
        let next = self.reform.coming();
        console::note(format!("{error}; generation {next} follows in {delay:?}"));
        self.failures.clear();
        self.cause.get_or_insert(error);
        // Who is to get a new process need not go on until then, and nobody need wait for it.
        self.reform.doomed(false).into_iter().for_each(|rank| self.members[rank].doom());
        let hears = self.members.iter().filter(|member| !member.is_doomed());
        hears.for_each(|member| member.send(ToWorker::Reforming { generation: next }));
        None
    }

    /// Keeps a member's part; the last one completes the gathering for everybody.
    fn gather(&mut self, rank: usize, key: String, value: Bytes) {
        let size = self.members.len();
        let parts = self.gathering.entry(key.clone()).or_insert_with(|| vec![None; size]);
        parts[rank] = Some(value);
        if parts.iter().any(Option::is_none) {
            return;
        }
        let values: Vec<Bytes> =
            self.gathering.remove(&key).into_iter().flatten().flatten().collect();
        for member in &self.members {
            member.send(ToWorker::Gathered { key: key.clone(), values: values.clone() });
        }
    }

    fn who(&self, rank: usize) -> String {
        format!("{} rank {rank}", self.options.name)
    }
}
