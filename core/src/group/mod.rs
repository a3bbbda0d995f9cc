//! Groups: gangs of ranked workers that run one function together, placed all or nothing.
//!
//! A group has a generation. When a member is lost and the group may restart, the next generation is
//! formed: of new members only, or of the survivors and a new member for each lost one.

mod launch;
mod member;
mod reform;

pub(crate) use member::{Inbox, Line};
pub use member::{Member, Rendezvous};
pub use reform::OnLoss;

use crate::parcel::Parcel;
use crate::process::wire::{FromWorker, Outcome, ToWorker};
use crate::process::{End, WorkerEvent, check_build, into_result, lost};
use crate::remote::{Inputs, decode, encode};
use crate::runtime::Runtime;
use crate::task::Placement;
use crate::{Error, PlacementStrategy, Resources, RestartPolicy, console};
use bytes::Bytes;
use launch::{Placed, Port};
use reform::Reform;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::time::{Duration, Instant};

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
    /// function are no losses: they would come again. Default: never.
    pub restart: RestartPolicy,
    /// Who begins anew then. Default: every member.
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
    /// until then [`Group::set_context`] can change what it is given.
    Restarting {
        /// The number of the new generation.
        generation: u64,
        /// Whose function begins anew, the lowest first: forget what they have finished. The others
        /// go on, and are told.
        ranks: Vec<usize>,
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
    phase: Phase,
    /// The first loss since a generation was formed.
    cause: Option<(usize, Error)>,
    is_stopping: bool,
    /// The CPUs of the task that watches over the group.
    _lent: Option<crate::current::Lent>,
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

/// Where a group is on its way to the next generation.
enum Phase {
    /// Its members run. A loss may have set a time for the next generation.
    Running,
    /// The driver knows of the restart; these are to have new processes.
    Announced { replaced: Vec<usize> },
    /// Room for them is being found.
    Placing { replaced: Vec<usize> },
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
            match self.next_notice(deadline) {
                Some(notice) => {
                    if let Some(event) = self.take_in(notice) {
                        return Some(event);
                    }
                }
                None if self.is_due() => {}
                None => return None,
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
                Some(GroupEvent::Restarting { ranks, .. }) => {
                    ranks.into_iter().for_each(|rank| values[rank] = None);
                }
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

    /// Waits for a notice, at most until the deadline or until a restart is due. All that is there is
    /// taken first when no more can come.
    fn next_notice(&self, deadline: Instant) -> Option<Notice> {
        match self.notices.try_recv() {
            Ok(notice) => return Some(notice),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) if self.is_over() => return None,
            Err(TryRecvError::Empty) => {}
        }
        let wake = self.reform.due().map_or(deadline, |due| due.min(deadline));
        self.notices.recv_timeout(wake.saturating_duration_since(Instant::now())).ok()
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Running) && self.reform.is_over()
    }

    fn is_due(&self) -> bool {
        let due = self.reform.due().is_some_and(|due| due <= Instant::now());
        due && matches!(self.phase, Phase::Running)
    }

    /// Takes the next step towards the next generation, if it is time.
    fn advance(&mut self) -> Option<GroupEvent<T>> {
        if let Phase::Announced { replaced } = &mut self.phase {
            let replaced = std::mem::take(replaced);
            let sought = self.find_room(&replaced);
            self.phase = Phase::Placing { replaced };
            return sought.err().map(|error| self.give_up(error));
        }
        if !self.is_due() {
            return None;
        }
        let (_, error) = self.cause.clone()?;
        let replaced = self.reform.doomed(self.must_move());
        replaced.iter().for_each(|rank| self.members[*rank].doom());
        let ranks = self.reform.form(&replaced);
        self.phase = Phase::Announced { replaced };
        Some(GroupEvent::Restarting { generation: self.reform.generation(), ranks, error })
    }

    fn take_in(&mut self, notice: Notice) -> Option<GroupEvent<T>> {
        match notice {
            Notice::Member { rank, process, event } if self.members[rank].is(process) => {
                self.heard(rank, event)
            }
            // Of one that has been replaced.
            Notice::Member { .. } => None,
            Notice::Placed(placed) => {
                let formed = placed.and_then(|placed| self.form(placed));
                formed.err().map(|error| self.give_up(error))
            }
        }
    }

    /// Starts the new members of a generation, and tells the others.
    fn form(&mut self, placed: Placed) -> Result<(), Error> {
        let Phase::Placing { replaced } = std::mem::replace(&mut self.phase, Phase::Running) else {
            return Ok(());
        };
        self.gathering.clear();
        self.begin(&replaced, placed)?;
        if self.reform.due().is_none() {
            self.cause = None;
        }
        for rank in (0..self.members.len()).filter(|rank| !replaced.contains(rank)) {
            let member = self.spec(rank);
            self.members[rank].go_on(member);
        }
        if self.is_stopping {
            self.stop();
        }
        Ok(())
    }

    /// The next generation cannot be formed.
    fn give_up(&mut self, error: Error) -> GroupEvent<T> {
        let rank = self.cause.take().map_or(0, |(rank, _)| rank);
        self.phase = Phase::Running;
        self.reform.ended(rank, false);
        GroupEvent::Failed { rank, error }
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
            WorkerEvent::Ended(_) if self.members[rank].is_done() => None,
            WorkerEvent::Ended(end) => self.lost(rank, &end),
        }
    }

    fn done(&mut self, rank: usize, outcome: Outcome) -> Option<GroupEvent<T>> {
        let value = into_result(&self.who(rank), outcome);
        let value = value.and_then(|parcel| (self.task.decode)(&parcel));
        self.members[rank].set_done();
        if self.reform.due().is_some() {
            // Another was lost, which this may be the consequence of: it is asked again.
            self.reform.ended(rank, true);
            return None;
        }
        self.reform.ended(rank, value.is_ok());
        Some(match value {
            Ok(value) => GroupEvent::Finished { rank, value },
            Err(error) => GroupEvent::Failed { rank, error },
        })
    }

    fn lost(&mut self, rank: usize, end: &End) -> Option<GroupEvent<T>> {
        let error = lost(&self.who(rank), end.reason.clone());
        self.members[rank].set_done();
        let Some(delay) = self.reform.lost(rank, Instant::now()) else {
            return Some(GroupEvent::Failed { rank, error });
        };
        let next = self.reform.generation() + 1;
        console::note(format!("{error}; generation {next} follows in {delay:?}"));
        // Who is to begin anew need not go on until then.
        self.reform.doomed(false).into_iter().for_each(|rank| self.members[rank].doom());
        self.cause.get_or_insert((rank, error));
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
