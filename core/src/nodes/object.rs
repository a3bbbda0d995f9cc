//! Values that lie on another machine, as the driver knows them.

use super::transfer::{self, Copies};
use crate::parcel::{Parcel, Stored};
use crate::scheduler::NodeId;
use crate::store::ObjectId;
use crate::{Error, ObjectRef};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Where a value is, told to a machine that may need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FarPlace {
    pub(crate) holder: NodeId,
    pub(crate) id: ObjectId,
    pub(crate) bytes: u64,
    /// Where its holder gives it out. `None`: where the driver is, as whoever asks knows it.
    pub(crate) address: Option<SocketAddr>,
}

/// How a value can be made again.
pub(crate) type Recipe = Box<dyn Fn() -> Option<ObjectRef<Parcel>> + Send + Sync>;

/// A value on another machine, until dropped. Only the driver has these.
#[doc(hidden)]
pub struct Far {
    /// What gave it.
    name: Arc<str>,
    place: FarPlace,
    /// Why it may be gone, if its machine is.
    lost: Mutex<Option<Lost>>,
    recipe: OnceLock<Recipe>,
    copies: Copies,
}

enum Lost {
    /// It is being made again, or has been.
    Again(ObjectRef<Parcel>),
    ForGood(Error),
}

impl std::fmt::Debug for Far {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Far").field("name", &self.name).field("place", &self.place).finish()
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        transfer::forget_everywhere(self.place.holder, self.place.id);
    }
}

impl Far {
    /// What an agent has said it keeps.
    pub(crate) fn new(name: Arc<str>, place: FarPlace) -> Self {
        let address = super::hub().ok().and_then(|hub| hub.objects_of(place.holder));
        let (place, recipe) = (FarPlace { address, ..place }, OnceLock::new());
        Self { name, place, lost: Mutex::default(), recipe, copies: Copies::default() }
    }

    /// How to make it again, if its machine should be lost.
    pub(crate) fn remember(&self, recipe: Recipe) {
        // The first one knows.
        let _ = self.recipe.set(recipe);
    }

    pub(crate) fn place(&self) -> FarPlace {
        self.place
    }

    /// The task that makes it again, if its machine is gone. The first who asks has it made.
    pub(crate) fn remake(&self) -> Result<Option<ObjectRef<Parcel>>, Error> {
        if !self.is_gone() {
            return Ok(None);
        }
        let mut lost = self.lost();
        match lost.get_or_insert_with(|| self.find_out()) {
            Lost::Again(object) => Ok(Some(object.clone())),
            Lost::ForGood(error) => Err(error.clone()),
        }
    }

    fn find_out(&self) -> Lost {
        match self.recipe.get().and_then(|recipe| recipe()) {
            Some(object) => Lost::Again(object),
            None => Lost::ForGood(Error::ObjectLost {
                object: self.name.to_string(),
                reason: format!(
                    "node {}, which had it, is gone, and its task has no retries left",
                    self.place.holder.0
                ),
            }),
        }
    }

    /// Whether its machine is gone, and no copy is here.
    pub(crate) fn is_gone(&self) -> bool {
        !self.copies.has_one() && is_gone(self.place.holder)
    }

    /// A copy in this process's store. Waits until it has been fetched, or made again.
    pub(crate) fn bring(&self) -> Result<Parcel, Error> {
        loop {
            if let Some(again) = self.remake()? {
                return again.get().map(|parcel| (*parcel).clone());
            }
            match self.copies.bring_blocking(self.place) {
                Ok(stored) => return Ok(Parcel::Stored(stored)),
                // Its machine went away meanwhile: another look says what comes of it.
                Err(_) if is_gone(self.place.holder) => {}
                Err(error) => return Err(self.not_fetched(&error)),
            }
        }
    }

    /// The copy in this process's store, if there is one.
    pub(crate) fn here(&self) -> Option<Arc<Stored>> {
        self.copies.only()
    }

    fn not_fetched(&self, error: &Error) -> Error {
        let reason = format!("it could not be fetched from node {}: {error}", self.place.holder.0);
        Error::ObjectLost { object: self.name.to_string(), reason }
    }

    fn lost(&self) -> MutexGuard<'_, Option<Lost>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_gone(node: NodeId) -> bool {
    super::hub().is_ok_and(|hub| !hub.has(node))
}
