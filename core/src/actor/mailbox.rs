//! How much may wait for an actor.

use super::ActorOptions;
use crate::current;
use crate::parcel::Parcel;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes that travel in the message; shared memory is the store's to account for.
pub(super) fn bytes_of(args: &[Parcel]) -> usize {
    let bytes = |parcel: &Parcel| match parcel {
        Parcel::Inline(encoded) => encoded.bytes(),
        Parcel::Stored(_) | Parcel::Far(_) | Parcel::Up(_) => 0,
    };
    args.iter().map(bytes).sum()
}

/// How much an actor's mailbox may hold.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Mailbox {
    pub(super) messages: usize,
    pub(super) bytes: usize,
}

impl Mailbox {
    pub(crate) fn of(options: &ActorOptions) -> Self {
        Self { messages: options.mailbox.max(1), bytes: options.mailbox_bytes }
    }
}

/// What an actor's mailbox may hold, and holds.
pub(super) struct Credits {
    pub(super) most: Mailbox,
    used: Mutex<Used>,
    room: Condvar,
}

/// A call's place in the mailbox, until dropped.
pub(super) struct Credit {
    credits: Arc<Credits>,
    bytes: usize,
}

impl Drop for Credit {
    fn drop(&mut self) {
        self.credits.give_back(self.bytes);
    }
}

#[derive(Default)]
struct Used {
    messages: usize,
    bytes: usize,
    waiting: usize,
}

impl Credits {
    pub(super) fn new(most: Mailbox) -> Arc<Self> {
        Arc::new(Self { most, used: Mutex::default(), room: Condvar::new() })
    }

    /// Calls that have a place.
    pub(super) fn messages(&self) -> usize {
        self.lock().messages
    }

    /// Waits for room. A message larger than the whole mailbox fits when it is empty.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Credit {
        if let Some(credit) = self.try_take(bytes) {
            return credit;
        }
        // Taken back last, without the lock: who gives places back must not wait for CPUs.
        let _lent = current::lend();
        let mut used = self.lock();
        used.waiting += 1;
        let full = |used: &mut Used| !self.has_room(used, bytes);
        used = self.room.wait_while(used, full).unwrap_or_else(PoisonError::into_inner);
        used.waiting -= 1;
        self.place(used, bytes)
    }

    pub(super) fn try_take(self: &Arc<Self>, bytes: usize) -> Option<Credit> {
        let used = self.lock();
        self.has_room(&used, bytes).then(|| self.place(used, bytes))
    }

    /// A place whether there is room or not.
    pub(super) fn overdraw(self: &Arc<Self>, bytes: usize) -> Credit {
        self.place(self.lock(), bytes)
    }

    fn place(self: &Arc<Self>, mut used: MutexGuard<'_, Used>, bytes: usize) -> Credit {
        used.messages += 1;
        used.bytes += bytes;
        Credit { credits: Arc::clone(self), bytes }
    }

    fn give_back(&self, bytes: usize) {
        let mut used = self.lock();
        used.messages -= 1;
        used.bytes -= bytes;
        if used.waiting > 0 {
            self.room.notify_all();
        }
    }

    fn has_room(&self, used: &Used, bytes: usize) -> bool {
        used.messages == 0
            || used.messages < self.most.messages && used.bytes + bytes <= self.most.bytes
    }

    fn lock(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
