//! Groups: gangs of ranked workers that run one function together, placed all or nothing.
//!
//! A group has a generation. When a member is lost and the group may restart, the next generation is
//! formed: of new members only, or of the survivors and a new member for each lost one. An elastic
//! group may have fewer members in the next generation, and more in a later one.

mod elastic;
mod gang;
mod launch;
mod member;
mod reform;
mod remote;
mod resize;
mod room;

pub use elastic::Elastic;
pub(crate) use gang::{Gang, HangUp};
pub use member::{Host, Member, Rendezvous};
pub(crate) use member::{Inbox, Line};
pub use reform::OnLoss;

use crate::object::block_until_ready;
use crate::parcel::Parcel;
use crate::remote::{Inputs, decode, encode};
use crate::runtime::Runtime;
use crate::task::Placement;
use crate::{Error, PlacementStrategy, Resources, RestartPolicy, current};
use bytes::Bytes;
use remote::Remote;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a group is placed. Every default is here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupOptions {
    /// Its name in errors and logs.
    pub name: String,
    /// Members; the most, if it is elastic. Default: 1.
    pub size: usize,
    /// Whether there may be fewer of them, in processes, and when their number changes. Default: it
    /// does not.
    pub elastic: Option<Elastic>,
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
    /// Folder of the driver's machine for `rank-<r>.log`, if the output of worker processes is to be
    /// kept. Default: none.
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
            elastic: None,
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

impl GroupTask<Parcel> {
    /// For who passes on what the members give.
    pub(crate) fn raw(function: &'static str) -> Self {
        let (inputs, encode) = (Inputs(Vec::new()), || Ok(Vec::new()));
        Self {
            function,
            inputs,
            encode: Arc::new(encode),
            decode: |parcel| parcel.clone().brought(),
        }
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
        /// Who gets a new process, the lowest rank first; in an elastic group, if there is room.
        replaced: Vec<usize>,
        /// The first loss.
        error: Error,
    },
    /// An elastic group has more or fewer members in the generation that is formed when the next event
    /// is asked for. Follows `Restarting` where there was no room for those that were lost; a growth
    /// comes alone, and whatever members have finished is void. Those that stay keep their order, and
    /// new ones have the highest ranks.
    Resized {
        /// The number of the new generation.
        generation: u64,
        /// Which ranks are not in it any more, the lowest first.
        gone: Vec<usize>,
        /// How many members it has.
        size: usize,
    },
}

/// Decodes the payload of a [`GroupEvent::Report`].
pub fn decode_report<R: DeserializeOwned>(payload: &[u8]) -> Result<R, Error> {
    decode("a report", payload)
}

/// A running group. Dropping it ends all of its members.
pub struct Group<T> {
    name: String,
    seat: Seat<T>,
    /// The CPUs of the task that watches over the group; back when the group is gone.
    _lent: Option<current::Lent>,
}

/// Where the group is watched over.
enum Seat<T> {
    Here(Box<Gang<T>>),
    /// In a worker process: by its driver.
    Driver(Remote<T>),
}

impl<T> std::fmt::Debug for Group<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut group = f.debug_struct("Group");
        match &self.seat {
            Seat::Here(gang) => group.field("here", gang),
            Seat::Driver(remote) => group.field("name", &self.name).field("driver", remote),
        };
        group.finish_non_exhaustive()
    }
}

impl Runtime {
    /// Starts a group, all members or none; of an elastic one as many as there is room for. Waits for
    /// its arguments and its resources; errors at once when they can never be had, or when processes
    /// are asked for in a program without `init()`. In a worker process, it is the driver that starts
    /// the members that are processes.
    ///
    /// A task that watches over a group lends its CPUs until the group is dropped.
    pub fn group<T>(&self, options: &GroupOptions, task: &GroupTask<T>) -> Result<Group<T>, Error> {
        block_until_ready(&task.inputs.0);
        let args = (task.encode)()?;
        args.iter().filter(|parcel| parcel.is_gone()).try_for_each(Parcel::bring)?;
        // It needs no CPU of its own, and the group may need it.
        let lent = current::lend();
        let seat = match self.nested() {
            Some(nested) if options.placement == Placement::Process => {
                Seat::Driver(Remote::start(nested, options, task, &args)?)
            }
            _ => Seat::Here(Box::new(self.gang(options, task, args, &|| true)?)),
        };
        Ok(Group { name: options.name.clone(), seat, _lent: lent })
    }
}

impl<T> Group<T> {
    /// The next event, or `None` when none came within `timeout`, or when all members have ended.
    /// Call it often: gatherings of the members, and restarts, advance here.
    pub fn next_event(&mut self, timeout: Duration) -> Option<GroupEvent<T>> {
        match &mut self.seat {
            Seat::Here(gang) => gang.next_event(timeout),
            Seat::Driver(remote) => remote.next_event(timeout),
        }
    }

    /// Which generation runs, or is being formed.
    pub fn generation(&self) -> u64 {
        match &self.seat {
            Seat::Here(gang) => gang.generation(),
            Seat::Driver(remote) => remote.generation(),
        }
    }

    /// Members of the generation that runs, or is being formed.
    pub fn size(&self) -> usize {
        match &self.seat {
            Seat::Here(gang) => gang.size(),
            Seat::Driver(remote) => remote.size(),
        }
    }

    /// What [`Member::context`] gives to the members of the next generation.
    pub fn set_context(&mut self, context: &impl Serialize) -> Result<(), Error> {
        let context = encode("the context of a group", context)?;
        match &mut self.seat {
            Seat::Here(gang) => gang.set_context(context),
            Seat::Driver(remote) => remote.set_context(context)?,
        }
        Ok(())
    }

    /// Waits until every member has returned and gives their results by rank, or the first
    /// failure. Reports are dropped.
    pub fn join(mut self, timeout: Duration) -> Result<Vec<T>, Error> {
        let deadline = far_deadline(timeout);
        let mut values: Vec<Option<T>> = (0..self.size()).map(|_| None).collect();
        while values.iter().any(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next_event(left) {
                Some(GroupEvent::Finished { rank, value }) => values[rank] = Some(value),
                Some(GroupEvent::Failed { error, .. }) => return Err(error),
                Some(GroupEvent::Report { .. }) => {}
                Some(GroupEvent::Restarting { .. }) => values.fill_with(|| None),
                Some(GroupEvent::Resized { size, .. }) => {
                    values = (0..size).map(|_| None).collect();
                }
                None => {
                    let what = format!("group {}", self.name);
                    return Err(Error::Timeout { what, after: timeout });
                }
            }
        }
        Ok(values.into_iter().flatten().collect())
    }

    /// Asks every member to finish soon; they see it in [`Member::stop_requested`], and so do those
    /// that replace them.
    pub fn stop(&mut self) {
        match &mut self.seat {
            Seat::Here(gang) => gang.stop(),
            Seat::Driver(remote) => remote.stop(),
        }
    }

    /// Sends a message to every member, such as "checkpoint now"; they find it in
    /// [`Member::next_message`], however long the computation that they are in the middle of.
    pub fn tell(&self, message: &impl Serialize) -> Result<(), Error> {
        let message = encode("a message to a group", message)?;
        match &self.seat {
            Seat::Here(gang) => gang.tell(&message),
            Seat::Driver(remote) => remote.tell(message)?,
        }
        Ok(())
    }

    /// Process ids of the members that are processes, by rank.
    pub fn pids(&self) -> Vec<Option<u32>> {
        match &self.seat {
            Seat::Here(gang) => gang.pids(),
            Seat::Driver(remote) => remote.pids(),
        }
    }
}

/// A time that one can count with, however long the timeout.
fn far_deadline(timeout: Duration) -> Instant {
    far(Instant::now(), timeout)
}

/// The same from then on.
fn far(from: Instant, timeout: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    from + timeout.min(YEAR)
}
