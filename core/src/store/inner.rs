//! What a store knows, and the thread that moves objects to and from disk.

use super::budget::{Budget, Command, Event};
use super::memory::Memory;
use super::spill::Spill;
use super::{ObjectId, StoreError};
use crate::Error;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whoever waits for the disk waits so long at most.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) state: Mutex<State>,
    /// Something that somebody waits for has happened.
    pub(super) changed: Condvar,
    /// There is something to move, or the store is closing.
    pub(super) work: Condvar,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) budget: Budget,
    pub(super) slots: HashMap<ObjectId, Slot>,
    /// What could not be read back, until it is released.
    pub(super) lost: HashMap<ObjectId, Error>,
    /// For the mover: at most one entry an object.
    moves: VecDeque<Move>,
    pub(super) next: u64,
    pub(super) closing: bool,
}

#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) memory: Option<Memory>,
    /// How the wait for room ended.
    pub(super) admitted: Option<Result<(), StoreError>>,
    pub(super) on_disk: bool,
    pub(super) bytes: u64,
}

#[derive(Clone, Copy, Debug)]
enum Move {
    Out(ObjectId),
    In(ObjectId),
    /// Remove the file.
    Away(ObjectId),
}

impl Inner {
    pub(super) fn new(budget: u64) -> Self {
        let state = State {
            budget: Budget::new(budget),
            slots: HashMap::new(),
            lost: HashMap::new(),
            moves: VecDeque::new(),
            next: 0,
            closing: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), work: Condvar::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an event. Memory that is given back is unmapped here, after the lock.
    pub(super) fn step(&self, event: Event) {
        let _freed = self.lock().step(event);
        self.changed.notify_all();
        self.work.notify_one();
    }

    pub(super) fn wait<T>(
        &self,
        what: &str,
        mut ready: impl FnMut(&State) -> Option<Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            if let Some(result) = ready(&state) {
                return result;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { what: what.to_owned(), after: PATIENCE }.into());
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The mover's life.
    pub(super) fn serve(&self, spill: &mut Spill) {
        while let Some(next) = self.next_move() {
            match next {
                Move::Out(id) => self.move_out(spill, id),
                Move::In(id) => self.move_in(spill, id),
                Move::Away(id) => spill.remove(id),
            }
        }
    }

    fn next_move(&self) -> Option<Move> {
        let idle = |state: &mut State| state.moves.is_empty() && !state.closing;
        let waited = self.work.wait_while(self.lock(), idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.closing { None } else { state.moves.pop_front() }
    }

    fn move_out(&self, spill: &mut Spill, id: ObjectId) {
        let slot = self.lock().slots.get(&id).map(|slot| (slot.on_disk, slot.memory.clone()));
        // Moved into the arms, so that it is let go of before the budget hears that it is free.
        let written = match slot {
            None => return,
            // From the last time.
            Some((true, _memory)) => Ok(()),
            Some((false, Some(memory))) => {
                spill.folder().and_then(|folder| memory.read(|bytes| folder.write(id, bytes)))
            }
            Some((false, None)) => {
                Err(Error::Internal(format!("object {} is not in memory", id.0)))
            }
        };
        if let Err(error) = &written {
            tracing::warn!(object = id.0, %error, "an object could not be spilled");
        }
        let is_there = self.lock().slot(id, |slot| slot.on_disk |= written.is_ok());
        if !is_there {
            // Dropped meanwhile.
            spill.remove(id);
        }
        self.step(if written.is_ok() { Event::SpillDone(id) } else { Event::SpillFailed(id) });
    }

    fn move_in(&self, spill: &mut Spill, id: ObjectId) {
        let Some(bytes) = self.lock().slots.get(&id).map(|slot| slot.bytes) else { return };
        match spill
            .folder()
            .and_then(|folder| folder.open(id))
            .and_then(|file| Memory::read_back(&file, bytes))
        {
            Ok(memory) => {
                self.lock().slot(id, |slot| slot.memory = Some(memory));
                self.step(Event::LoadDone(id));
            }
            Err(reason) => {
                tracing::error!(object = id.0, %reason, "an object was lost");
                self.lock().lost.insert(id, reason);
                self.step(Event::Lost(id));
            }
        }
    }
}

impl State {
    pub(super) fn add(&mut self, bytes: u64) -> ObjectId {
        self.next += 1;
        let id = ObjectId(self.next);
        self.slots.insert(id, Slot { bytes, ..Slot::default() });
        id
    }

    pub(super) fn slot(&mut self, id: ObjectId, change: impl FnOnce(&mut Slot)) -> bool {
        self.slots.get_mut(&id).map(change).is_some()
    }

    fn step(&mut self, event: Event) -> Vec<Memory> {
        let commands = self.budget.step(event);
        commands.into_iter().filter_map(|command| self.perform(command)).collect()
    }

    /// Performs a command, or leaves it to the mover; what memory it frees.
    fn perform(&mut self, command: Command) -> Option<Memory> {
        match command {
            Command::Admit(id) => {
                self.slot(id, |slot| slot.admitted = Some(Ok(())));
            }
            Command::Refuse { id, needed, budget } => {
                let full = StoreError::Full { needed, budget };
                self.slot(id, |slot| slot.admitted = Some(Err(full)));
            }
            Command::Spill(id) => self.moves.push_back(Move::Out(id)),
            // Somebody waits for it.
            Command::Load(id) => self.moves.push_front(Move::In(id)),
            Command::Free(id) => return self.slots.get_mut(&id)?.memory.take(),
            Command::Drop(id) => {
                let slot = self.slots.remove(&id)?;
                if slot.on_disk {
                    self.moves.push_back(Move::Away(id));
                }
                return slot.memory;
            }
        }
        None
    }
}

/// Keeps an object in memory.
#[derive(Debug)]
pub(crate) struct Lease {
    inner: Arc<Inner>,
    id: ObjectId,
}

impl Lease {
    pub(super) fn new(inner: &Arc<Inner>, id: ObjectId) -> Self {
        inner.step(Event::Use(id));
        Self { inner: Arc::clone(inner), id }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.inner.step(Event::EndUse(self.id));
    }
}
