//! Groups: gangs of ranked workers that run one function together, placed all or nothing.
//!
//! A group has a generation. When a member is lost and the group may restart, the next generation is
//! formed: of new members only, or of the survivors and a new member for each lost one.

mod launch;
mod member;
mod reform;
mod room;

pub(crate) use member::{Inbox, Line};
pub use member::{Member, Rendezvous};
pub use reform::OnLoss;

use crate::parcel::Parcel;
use crate::process::wire::{FromWorker, Outcome, ToWorker};
use crate::process::{WorkerEvent, check_build, into_result, lost};
use crate::remote::{Inputs, decode, encode};
use crate::runtime::Runtime;
use crate::task::Placement;
use crate::{Error, PlacementStrategy, Resources, RestartPolicy, console};
use bytes::Bytes;
use launch::Port;
use reform::Reform;
use room::Placed;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

/// By then the loss of a process of this machine has been noticed, and that of another machine: with
/// its last words, and after its silence.
const LOSS_HERE: Duration = Duration::from_secs(1);
const LOSS_ELSEWHERE: Duration = Duration::from_secs(6);

/// How a group is placed. Every default is here.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// Its name in errors and logs.
    pub name: String,
    /// Members. Default: 1.
    pub size: usize,
    /// What each member holds. Default: 1 CPU.
    pub resources: Resources,
    /// Where the members run. Default: each in a process of its own.
    pub placement: Placement,
    /// How the members are laid out over the nodes. Default: pack.
    pub strategy: PlacementStrategy,
    /// Bytes of resident memory beyond which a member's process is killed. Default: none.
    pub memory_limit: Option<u64>,
    /// How long to wait for resources that others hold. Default: 10 minutes.
    pub placement_timeout: Duration,
    /// How often the group goes on after the loss of members, and how soon. Errors and panics of the
    /// function are no losses: they would come again. But as long as others run, they are told a
    /// second later, or six where members are on other machines: they may be the consequence of a
    /// loss that has yet to be noticed. Default: never.
    pub restart: RestartPolicy,
    /// Who gets a new process then. Default: every member.
    pub on_loss: OnLoss,
    /// The first generation. Default: 0.
    pub generation: u64,
    /// What [`Member::context`] gives to every member: the business of the layer that makes the
    /// group, beside the arguments that the user gives. Default: nothing.
    pub context: Bytes,
    /// Folder for `rank-<r>.log`, if the output of worker processes is to be kept. Default: none.
    pub log_dir: Option<PathBuf>,
    /// Whether what workers print is shown on the driver's stderr, behind `[rank r]`.
    /// Default: yes.
    pub show_logs: bool,
}

impl GroupOptions {
    /// The same with this context.
    pub fn with_context(mut self, context: &impl Serialize) -> Result<Self, Error> {
        self.context = encode("the context of a group", context)?;
        Ok(self)
    }

    /// So many members in processes, 1 CPU each.
    pub fn new(name: impl Into<String>, size: usize) -> Self {
        Self {
            name: name.into(),
            size,
            resources: Resources::cpus(1.0),
            placement: Placement::Process,
            strategy: PlacementStrategy::default(),
            memory_limit: None,
            placement_timeout: Duration::from_secs(600),
            restart: RestartPolicy::default(),
            on_loss: OnLoss::default(),
            generation: 0,
            context: Bytes::new(),
            log_dir: None,
            show_logs: true,
        }
    }
}

/// The program of a group: what `some_function::remote(…)` gives for a `#[remote]` function whose
/// first parameter is a [`Member`].
pub struct GroupTask<T> {
    function: &'static str,
    inputs: Inputs,
    encode: Arc<dyn Fn() -> Result<Vec<Parcel>, Error> + Send + Sync>,
    decode: fn(&Parcel) -> Result<T, Error>,
}

impl<T> Clone for GroupTask<T> {
    fn clone(&self) -> Self {
        Self {
            function: self.function,
            inputs: self.inputs.clone(),
            encode: Arc::clone(&self.encode),
            decode: self.decode,
        }
    }
}

impl<T> std::fmt::Debug for GroupTask<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupTask").field("function", &self.function).finish_non_exhaustive()
    }
}

impl<T: DeserializeOwned> GroupTask<T> {
    pub(crate) fn new(
        function: &'static str,
        inputs: Inputs,
        encode: impl Fn() -> Result<Vec<Parcel>, Error> + Send + Sync + 'static,
    ) -> Self {
        let decode = |parcel: &Parcel| parcel.decode("the result of a group member");
        Self { function, inputs, encode: Arc::new(encode), decode }
    }
}

/// What a driver hears from its group.
#[derive(Debug)]
pub enum GroupEvent<T> {
    /// A member reported something, in the encoding of [`Member::report`].
    Report {
        /// Who.
        rank: usize,
        /// Decode with [`decode_report`].
        payload: Bytes,
    },
    /// A member's function returned.
    Finished {
        /// Who.
        rank: usize,
        /// Its result.
        value: T,
    },
    /// A member's function failed or panicked, or its process was lost and is not to be replaced.
    Failed {
        /// Who.
        rank: usize,
        /// How.
        error: Error,
    },
    /// Members were lost, and the next generation is formed when the next event is asked for:
    /// until then [`Group::set_context`] can change what it is given. Whatever members have
    /// finished is void: they are called again.
    Restarting {
        /// The number of the new generation.
        generation: u64,
        /// Who gets a new process, the lowest rank first.
        replaced: Vec<usize>,
        /// The first loss.
        error: Error,
    },
}

/// Decodes the payload of a [`GroupEvent::Report`].
pub fn decode_report<R: DeserializeOwned>(payload: &[u8]) -> Result<R, Error> {
    decode("a report", payload)
}

/// A running group. Dropping it ends all of its members.
pub struct Group<T> {
    runtime: Runtime,
    options: GroupOptions,
    task: GroupTask<T>,
    args: Vec<Parcel>,
    notices: Receiver<Notice>,
    notify: SyncSender<Notice>,
    members: Vec<Port>,
    gathering: HashMap<String, Vec<Option<Bytes>>>,
    reform: Reform,
    /// The first loss since a generation was announced.
    cause: Option<Error>,
    failures: VecDeque<Failure>,
    is_stopping: bool,
    /// Goes with the group: who looks for room for it stops.
    wanted: Arc<()>,
    /// The CPUs of the task that watches over the group.
    _lent: Option<crate::current::Lent>,
}

/// A member's function has failed. It may be the consequence of a loss of which nobody has heard yet:
/// until then the driver is not told.
struct Failure {
    rank: usize,
    error: Error,
    until: Instant,
}

impl<T> std::fmt::Debug for Group<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group")
            .field("options", &self.options)
            .field("members", &self.members)
            .field("reform", &self.reform)
            .finish_non_exhaustive()
    }
}

/// What a group is told by its members and helpers.
enum Notice {
    /// By the process that the member was given in that generation.
    Member { rank: usize, process: u64, event: WorkerEvent },
    /// There is room for new members, or there is none.
    Placed(Result<Placed, Error>),
}

impl<T> Group<T> {
    /// The next event, or `None` when none came within `timeout`, or when all members have ended.
    /// Call it often: gatherings of the members, and restarts, advance here.
    pub fn next_event(&mut self, timeout: Duration) -> Option<GroupEvent<T>> {
        let deadline = far_deadline(timeout);
        loop {
            if let Some(event) = self.advance() {
                return Some(event);
            }
            let event = match self.next_notice(deadline) {
                Some(notice) => self.take_in(notice),
                None if self.wake().is_some_and(|wake| wake < deadline) => None,
                None => return None,
            };
            if event.is_some() {
                return event;
            }
        }
    }

    /// Which generation runs, or is being formed.
    pub fn generation(&self) -> u64 {
        self.reform.generation()
    }

    /// What [`Member::context`] gives to the members of the next generation.
    pub fn set_context(&mut self, context: &impl Serialize) -> Result<(), Error> {
        self.options.context = encode("the context of a group", context)?;
        Ok(())
    }

    /// Waits until every member has returned and gives their results by rank, or the first
    /// failure. Reports are dropped.
    pub fn join(mut self, timeout: Duration) -> Result<Vec<T>, Error> {
        let deadline = far_deadline(timeout);
        let mut values: Vec<Option<T>> = self.members.iter().map(|_| None).collect();
        while values.iter().any(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next_event(left) {
                Some(GroupEvent::Finished { rank, value }) => values[rank] = Some(value),
                Some(GroupEvent::Failed { error, .. }) => return Err(error),
                Some(GroupEvent::Report { .. }) => {}
                Some(GroupEvent::Restarting { .. }) => values.fill_with(|| None),
                None => {
                    let what = format!("group {}", self.options.name);
                    return Err(Error::Timeout { what, after: timeout });
                }
            }
        }
        Ok(values.into_iter().flatten().collect())
    }

    /// Asks every member to finish soon; they see it in [`Member::stop_requested`], and so do those
    /// that replace them.
    pub fn stop(&mut self) {
        self.is_stopping = true;
        self.members.iter().for_each(|member| member.send(ToWorker::Stop));
    }

    /// Sends a message to every member, such as "checkpoint now"; they find it in
    /// [`Member::next_message`], however long the computation that they are in the middle of.
    pub fn tell(&self, message: &impl Serialize) -> Result<(), Error> {
        let message = encode("a message to a group", message)?;
        let tell = |member: &Port| member.send(ToWorker::Told { message: message.clone() });
        self.members.iter().for_each(tell);
        Ok(())
    }

    /// Process ids of the members that are processes, by rank.
    pub fn pids(&self) -> Vec<Option<u32>> {
        self.members.iter().map(Port::pid).collect()
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
        self.reform.due().into_iter().chain(failure).min()
    }

    /// Takes the next step towards the next generation, or tells of a failure, if it is time.
    fn advance(&mut self) -> Option<GroupEvent<T>> {
        if let Some(replaced) = self.reform.place(self.must_move()) {
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
        let replaced = self.reform.announce(self.must_move());
        replaced.iter().for_each(|rank| self.members[*rank].doom());
        let error = self.cause.take()?;
        Some(GroupEvent::Restarting { generation: self.reform.generation(), replaced, error })
    }

    fn take_in(&mut self, notice: Notice) -> Option<GroupEvent<T>> {
        match notice {
            Notice::Member { rank, process, event } if self.members[rank].is(process) => {
                self.heard(rank, event)
            }
            // Of one that has been replaced.
            Notice::Member { .. } => None,
            Notice::Placed(placed) => {
                let begun = placed.and_then(|placed| self.begin(placed));
                begun.err().and_then(|error| self.not_begun(error))
            }
        }
    }

    /// The next generation cannot begin. If that is for another loss, there is one more attempt.
    fn not_begun(&mut self, error: Error) -> Option<GroupEvent<T>> {
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
            WorkerEvent::Frame(FromWorker::Gather { generation, key, value })
                if generation == self.reform.generation() =>
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

/// A time that one can count with, however long the timeout.
fn far_deadline(timeout: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + timeout.min(YEAR)
}
