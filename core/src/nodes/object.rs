//! Values that lie on another machine, as the driver knows them.

use super::lineage::{self, Recipe};
use super::transfer::{self, Fetched};
use crate::object::when_ready;
use crate::parcel::{Packed, Parcel, Stored};
use crate::scheduler::NodeId;
use crate::store::{Lease, ObjectId};
use crate::{Error, ObjectRef, drops};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// How often a value is fetched that does not come, and the wait between: longer than it takes to
/// notice that its machine is lost.
const FETCHES: u32 = 12;
const FETCH_AGAIN: Duration = Duration::from_millis(500);

/// Where a value is, told to a machine that may need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FarPlace {
    pub(crate) holder: NodeId,
    pub(crate) id: ObjectId,
    pub(crate) bytes: u64,
    /// Where its holder gives it out. `None`: where the driver is, as whoever asks knows it.
    pub(crate) address: Option<SocketAddr>,
}

/// A value on another machine that is to go with this. In the driver it has an owner from the moment
/// that the frame which tells of it is decoded: where the frame goes, the value goes. The agent that
/// says so keeps the value until it is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Owned(FarPlace);

/// NODE-4.
impl Drop for Owned {
    fn drop(&mut self) {
        transfer::forget_everywhere(self.0.holder, self.0.id);
    }
}

impl Owned {
    /// In an agent, for the driver.
    pub(super) fn by_driver(place: FarPlace) -> Self {
        Self(place)
    }
}

/// A value on another machine, until dropped. Only the driver has these.
#[doc(hidden)]
pub struct Far {
    /// What gave it.
    name: Arc<str>,
    value: Owned,
    /// Why it may be gone, if its machine is.
    lost: Mutex<Option<Lost>>,
    recipe: OnceLock<Recipe>,
    /// In this process's store, once it has been fetched.
    copy: Fetched,
}

enum Lost {
    /// It is being made again, or has been.
    Again(ObjectRef<Parcel>),
    ForGood(Error),
}

impl std::fmt::Debug for Far {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Far").field("name", &self.name).field("value", &self.value).finish()
    }
}

/// It may be the last to refer to what it was made of, and that to its own inputs, and so on.
impl Drop for Far {
    fn drop(&mut self) {
        drops::in_turn((self.recipe.take(), self.lost().take()));
    }
}

impl Far {
    /// What an agent has said it keeps.
    pub(crate) fn new(name: Arc<str>, mut value: Owned) -> Self {
        let hub = super::hub().ok();
        value.0.address = hub.and_then(|hub| hub.objects_of(value.0.holder));
        let (recipe, copy) = (OnceLock::new(), Fetched::default());
        Self { name, value, lost: Mutex::default(), recipe, copy }
    }

    fn place(&self) -> FarPlace {
        self.value.0
    }

    /// How to make it again, if its machine should be lost.
    pub(crate) fn remember(&self, recipe: Recipe) {
        // The first one knows.
        let _ = self.recipe.set(recipe);
    }

    /// The task that makes it again, if its machine is gone. The first who asks has it made, and all
    /// that it was made of and that is lost too.
    pub(crate) fn remake(self: &Arc<Self>) -> Result<Option<ObjectRef<Parcel>>, Error> {
        if !self.is_gone() {
            return Ok(None);
        }
        if !self.is_settled() {
            // Not for ever: it is less deep once somebody has asked for what is on the way.
            let order = lineage::order(self).map_err(|depth| self.too_deep(depth))?;
            order.iter().for_each(|far| far.run_again());
        }
        match &*self.lost() {
            Some(Lost::Again(object)) => Ok(Some(object.clone())),
            Some(Lost::ForGood(error)) => Err(error.clone()),
            None => Err(Error::Internal(format!("nobody makes {} again", self.name))),
        }
    }

    /// Has its task run again, unless that was done already.
    fn run_again(&self) {
        let (object, promise) = ObjectRef::pending(Arc::clone(&self.name));
        if !self.settle(Lost::Again(object)) {
            return;
        }
        // Not under the lock: to submit is to start whatever can start, which may need this too.
        match self.recipe.get().and_then(Recipe::run) {
            Some(made) => when_ready(vec![made.object()], move |_| {
                let gone = || Err(Error::Internal("made without a result".to_owned()));
                let made = made.value().unwrap_or_else(gone);
                promise.resolve(made.map(|parcel| (*parcel).clone()));
            }),
            None => {
                let error = self.no_retries();
                *self.lost() = Some(Lost::ForGood(error.clone()));
                promise.error(error);
            }
        }
    }

    /// Says what becomes of it; `false` when that has been said before.
    fn settle(&self, as_this: Lost) -> bool {
        let mut lost = self.lost();
        let is_new = lost.is_none();
        if is_new {
            *lost = Some(as_this);
        }
        is_new
    }

    /// Whether it is known to be lost, and what becomes of it.
    pub(super) fn is_settled(&self) -> bool {
        self.lost().is_some()
    }

    /// What it was made of and is lost too.
    pub(super) fn lost_inputs(&self) -> Vec<Arc<Self>> {
        self.recipe.get().map(Recipe::lost_inputs).unwrap_or_default()
    }

    fn no_retries(&self) -> Error {
        self.lost_for_good("its task has no retries left")
    }

    fn too_deep(&self, depth: usize) -> Error {
        self.lost_for_good(&format!(
            "to make it again, {depth} tasks would have to run one after the other; the most is {}: \
             get() a value on the way first, which needs fewer, give results to the driver on the way, with get() and put(), or write a checkpoint",
            lineage::DEPTH
        ))
    }

    fn lost_for_good(&self, why: &str) -> Error {
        let node = self.place().holder.0;
        let reason = format!("node {node}, which had it, is gone, and {why}");
        Error::ObjectLost { object: self.name.to_string(), reason }
    }

    /// Whether its machine is gone, and no copy is here.
    pub(crate) fn is_gone(&self) -> bool {
        self.here().is_none() && is_gone(self.place().holder)
    }

    /// Whether it can be packed for this machine at once.
    pub(crate) fn is_at_hand(&self, node: NodeId) -> bool {
        let is_there = node != NodeId::HERE && !is_gone(self.place().holder);
        is_there || self.here().is_some() || self.made().is_some_and(|p| p.is_at_hand(node))
    }

    /// For a message to a machine. Never waits: what is not at hand is an error.
    pub(crate) fn pack(&self, node: NodeId) -> Result<(Packed, Option<Lease>), Error> {
        if node != NodeId::HERE && !is_gone(self.place().holder) {
            return Ok((Packed::Far(self.place()), None));
        }
        match (self.here(), self.made()) {
            (Some(stored), _) => Parcel::Stored(stored).pack(node),
            (None, Some(made)) => made.pack(node),
            (None, None) => Err(self.why_not_at_hand()),
        }
    }

    /// Fetches a copy into this process's store, if its machine is there. Waits for it.
    pub(crate) fn fetch(&self) -> Result<(), Error> {
        for attempt in 1.. {
            match transfer::bring_blocking(&self.copy, self.place()) {
                Ok(_) => return Ok(()),
                // That it is lost is known only after a while.
                Err(_) if attempt < FETCHES && !self.is_gone() => std::thread::sleep(FETCH_AGAIN),
                Err(error) => return Err(self.not_fetched(&error.to_string())),
            }
        }
        Ok(())
    }

    /// A copy in this process's store, or what was made again. Waits until it is there.
    pub(crate) fn bring(self: &Arc<Self>) -> Result<Parcel, Error> {
        loop {
            if let Some(again) = self.remake()? {
                return again.get().map(|parcel| (*parcel).clone());
            }
            match (self.fetch(), self.here()) {
                (_, Some(stored)) => return Ok(Parcel::Stored(stored)),
                // Its machine went away meanwhile.
                (Err(_), None) if self.is_gone() => {}
                (Err(error), None) => return Err(error),
                (Ok(()), None) => return Err(self.not_fetched("it was forgotten")),
            }
        }
    }

    /// The copy in this process's store, if there is one.
    fn here(&self) -> Option<Arc<Stored>> {
        self.copy.get().cloned()
    }

    /// What was made again, if it was.
    pub(super) fn made(&self) -> Option<Parcel> {
        match &*self.lost() {
            Some(Lost::Again(object)) => object.value()?.ok().map(|parcel| (*parcel).clone()),
            _ => None,
        }
    }

    fn why_not_at_hand(&self) -> Error {
        match &*self.lost() {
            Some(Lost::ForGood(error)) => error.clone(),
            _ => self.not_fetched("it has not been fetched yet"),
        }
    }

    fn not_fetched(&self, error: &str) -> Error {
        let reason =
            format!("it could not be fetched from node {}: {error}", self.place().holder.0);
        Error::ObjectLost { object: self.name.to_string(), reason }
    }

    fn lost(&self) -> MutexGuard<'_, Option<Lost>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_gone(node: NodeId) -> bool {
    super::hub().is_ok_and(|hub| !hub.has(node))
}
