//! What a member's function has in its hands, and where what the driver says arrives.

use crate::process::wire::{FromWorker, MemberSpec};
use crate::remote::{decode, encode};
use crate::{Error, store};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the keys begin with under which all members meet. User keys do not begin like this.
const RENDEZVOUS: &str = "mobula: rendezvous";

/// A member's line to its driver.
pub(crate) type Line = Arc<dyn Fn(FromWorker) -> Result<(), Error> + Send + Sync>;

/// What a group's function knows of itself, and its line to the driver and the other members.
pub struct Member {
    spec: MemberSpec,
    /// The generation that it takes part in, which its process looks at when it has ended.
    life: Arc<Mutex<Life>>,
    line: Line,
    inbox: Arc<Inbox>,
}

/// The generation that a member takes part in.
#[derive(Debug)]
pub(crate) struct Life {
    spec: MemberSpec,
    /// The generation of its last rendezvous.
    met: Option<u64>,
    /// How often it has met in this generation.
    meetings: u64,
}

impl Life {
    pub(crate) fn generation(&self) -> u64 {
        self.spec.generation
    }
}

/// Where a member of a group runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The machine's number in the program: the same for members that can share memory.
    pub node: u64,
    /// By which the program's other machines reach it; loopback where there are none.
    pub address: IpAddr,
}

/// All members of a generation have met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// Which one.
    pub generation: u64,
    /// The ranks whose function has begun since this member's last rendezvous, the lowest first;
    /// all of them at its first one. Who is not among them still has what it had.
    pub started: Vec<usize>,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Member").field(&self.life().spec).finish()
    }
}

impl Member {
    pub(crate) fn new(spec: MemberSpec, line: Line, inbox: Arc<Inbox>) -> Self {
        let life = Life { spec: spec.clone(), met: None, meetings: 0 };
        Self { spec, life: Arc::new(Mutex::new(life)), line, inbox }
    }

    /// What can be looked at when its function has ended.
    pub(crate) fn share_life(&self) -> Arc<Mutex<Life>> {
        Arc::clone(&self.life)
    }

    /// This member, in `0..world_size()`. In an elastic group another generation may have another
    /// rank for it.
    pub fn rank(&self) -> usize {
        self.life().spec.rank
    }

    /// All members of this generation.
    pub fn world_size(&self) -> usize {
        self.life().spec.world
    }

    /// Which generation of the group this member takes part in: 0 at first, one more each time
    /// that lost members were replaced, or the group has grown.
    pub fn generation(&self) -> u64 {
        self.life().generation()
    }

    /// What the maker of the group gave to all members of this generation.
    pub fn context<C: DeserializeOwned>(&self) -> Result<C, Error> {
        decode("the context of the group", &self.life().spec.context)
    }

    /// The group's name.
    pub fn group(&self) -> &str {
        &self.spec.group
    }

    /// Threads that this member may compute on.
    pub fn threads(&self) -> usize {
        self.spec.threads
    }

    /// Where this member runs.
    pub fn host(&self) -> Host {
        self.spec.host
    }

    /// Sends a value to the driver. Waits when the driver is far behind.
    pub fn report(&self, value: &impl Serialize) -> Result<(), Error> {
        let payload = encode("a report", value)?;
        (self.line)(FromWorker::Report { generation: self.generation(), payload })
    }

    /// Whether the driver asked this member to finish soon.
    pub fn stop_requested(&self) -> bool {
        self.inbox.stop.load(Ordering::Acquire)
    }

    /// The oldest message of [`Group::tell`](crate::Group::tell) that has not been taken, if there
    /// is one; never waits. Errors when it is not a `T`.
    pub fn next_message<T: DeserializeOwned>(&self) -> Result<Option<T>, Error> {
        let message = self.inbox.messages().pop_front();
        message.map(|message| decode("a message to a group", &message)).transpose()
    }

    /// Errors with [`Error::Reformed`] when a newer generation follows, as a member was lost or the
    /// group grows: no gathering of this generation will be complete any more. To be asked where a long wait or computation depends
    /// on the other members.
    pub fn check_generation(&self) -> Result<(), Error> {
        let current = self.generation();
        match self.inbox.newest() {
            newest if newest > current => Err(self.reformed(current, newest)),
            _ => Ok(()),
        }
    }

    /// Takes part in the newest generation, and waits until all of its members have come here.
    /// Errors when they have not within `timeout`, in which new processes may have to be placed.
    ///
    /// A function may do without: in a group that replaces lost members
    /// ([`OnLoss::ReplaceLost`](crate::OnLoss)), the others get [`Error::Reformed`] from what they
    /// wait for; when a function ends while a newer generation is coming, however it ends, it is
    /// called again with a member of the new one. Who calls this instead keeps what it has in hand.
    pub fn rendezvous(&self, timeout: Duration) -> Result<Rendezvous, Error> {
        let deadline = super::far_deadline(timeout);
        let left = || deadline.saturating_duration_since(Instant::now());
        loop {
            if let Some(newest) = self.inbox.wait_for_newest(self.generation(), left()) {
                self.join(newest);
            }
            match self.meet(left()) {
                Err(Error::Reformed { .. }) if !left().is_zero() => {}
                Err(Error::Reformed { .. } | Error::Timeout { .. }) => {
                    return Err(self.late("for a rendezvous of all members", timeout));
                }
                met => return met,
            }
        }
    }

    fn join(&self, newest: MemberSpec) {
        let mut life = self.life();
        life.spec = newest;
        life.meetings = 0;
    }

    /// Each tells when its function began.
    fn meet(&self, timeout: Duration) -> Result<Rendezvous, Error> {
        let key = format!("{RENDEZVOUS} {}", self.life().meetings);
        let began = self.spec.generation.to_le_bytes();
        let all = self.all_gather(&key, &began, timeout)?;
        let mut life = self.life();
        life.meetings += 1;
        let generation = life.generation();
        let before = life.met.replace(generation);
        let is_new = |began: &Bytes| before.is_none_or(|before| number(began) > before);
        let started = (0..all.len()).filter(|rank| is_new(&all[*rank])).collect();
        Ok(Rendezvous { generation, started })
    }

    /// Gives `value` under `key` and waits for the values of all members, by rank. Each key is
    /// for one use in a generation, also by who has waited in vain. Errors when they are not all
    /// there within `timeout`, and with [`Error::Reformed`] as soon as a member was lost and is
    /// replaced.
    pub fn all_gather(
        &self,
        key: &str,
        value: &[u8],
        timeout: Duration,
    ) -> Result<Vec<Bytes>, Error> {
        let generation = self.generation();
        let (key, value) = (key.to_owned(), Bytes::copy_from_slice(value));
        (self.line)(FromWorker::Gather { generation, key: key.clone(), value })?;
        match self.inbox.take(generation, &key, timeout) {
            Taken::Values(values) => Ok(values),
            Taken::Reformed(newest) => Err(self.reformed(generation, newest)),
            Taken::Nothing => Err(self.late(&format!("for all members at {key:?}"), timeout)),
        }
    }

    fn late(&self, waiting: &str, after: Duration) -> Error {
        Error::Timeout { what: format!("{} waiting {waiting}", self.who()), after }
    }

    fn reformed(&self, generation: u64, newest: u64) -> Error {
        Error::Reformed { member: self.who(), generation, newest }
    }

    fn who(&self) -> String {
        format!("{} rank {}", self.spec.group, self.rank())
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        lock(&self.life)
    }
}

/// What the driver has sent to a member.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    stop: AtomicBool,
    mail: Mutex<Mail>,
    arrived: Condvar,
    messages: Mutex<VecDeque<Bytes>>,
    /// Large results of a member on a thread.
    offers: Mutex<Vec<store::Offer>>,
}

/// What a member may wait for.
#[derive(Debug, Default)]
struct Mail {
    gathered: HashMap<String, Vec<Bytes>>,
    /// The number of the newest generation that follows.
    coming: u64,
    /// The newest one that has begun, if it is not the member's first.
    newest: Option<MemberSpec>,
    /// Nobody will send any more.
    is_closed: bool,
}

enum Taken {
    Values(Vec<Bytes>),
    /// There is this newer generation.
    Reformed(u64),
    /// In time, or ever.
    Nothing,
}

impl Inbox {
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    pub(crate) fn told(&self, message: Bytes) {
        self.messages().push_back(message);
    }

    pub(crate) fn gathered(&self, key: String, values: Vec<Bytes>) {
        lock(&self.mail).gathered.insert(key, values);
        self.arrived.notify_all();
    }

    /// This generation follows.
    pub(crate) fn reforming(&self, generation: u64) {
        lock(&self.mail).expect(generation);
        self.arrived.notify_all();
    }

    /// It has begun.
    pub(crate) fn reformed(&self, newest: MemberSpec) {
        let mut mail = lock(&self.mail);
        mail.expect(newest.generation);
        mail.newest = Some(newest);
        drop(mail);
        self.arrived.notify_all();
    }

    /// Nobody will send any more: whoever waits is woken.
    pub(super) fn close(&self) {
        lock(&self.mail).is_closed = true;
        self.stop();
        self.arrived.notify_all();
    }

    /// The newest generation, once it has begun; `None` if that is this one, or it is too late.
    fn wait_for_newest(&self, generation: u64, timeout: Duration) -> Option<MemberSpec> {
        let comes = |mail: &mut Mail| mail.coming > generation && mail.newer().is_none();
        let waited = self.arrived.wait_timeout_while(lock(&self.mail), timeout, comes);
        let mail = waited.unwrap_or_else(PoisonError::into_inner).0;
        mail.newer().filter(|newest| newest.generation > generation).cloned()
    }

    /// The next generation after this one that begins; for as long as the process lives.
    pub(crate) fn wait_for_newer(&self, generation: u64) -> MemberSpec {
        let mut mail = lock(&self.mail);
        loop {
            match mail.newer() {
                Some(newest) if newest.generation > generation => return newest.clone(),
                _ => mail = self.arrived.wait(mail).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Whether this generation is the newest, as far as is known.
    pub(crate) fn is_newest(&self, generation: u64) -> bool {
        self.newest() <= generation
    }

    pub(super) fn offers(&self) -> MutexGuard<'_, Vec<store::Offer>> {
        lock(&self.offers)
    }

    fn newest(&self) -> u64 {
        lock(&self.mail).coming
    }

    fn messages(&self) -> MutexGuard<'_, VecDeque<Bytes>> {
        lock(&self.messages)
    }

    fn take(&self, generation: u64, key: &str, timeout: Duration) -> Taken {
        let waits = |mail: &mut Mail| {
            !mail.gathered.contains_key(key) && !mail.is_closed && mail.coming <= generation
        };
        let waited = self.arrived.wait_timeout_while(lock(&self.mail), timeout, waits);
        let mut mail = waited.unwrap_or_else(PoisonError::into_inner).0;
        match mail.coming {
            coming if coming > generation => Taken::Reformed(coming),
            _ => mail.gathered.remove(key).map_or(Taken::Nothing, Taken::Values),
        }
    }
}

impl Mail {
    fn expect(&mut self, generation: u64) {
        if generation > self.coming {
            self.coming = generation;
            self.gathered.clear();
        }
    }

    /// The newest generation, if it has begun.
    fn newer(&self) -> Option<&MemberSpec> {
        self.newest.as_ref().filter(|newest| newest.generation >= self.coming)
    }
}

fn number(bytes: &Bytes) -> u64 {
    bytes.as_ref().try_into().map_or(0, u64::from_le_bytes)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
