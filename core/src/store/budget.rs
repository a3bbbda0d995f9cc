//! Which objects are in memory and which on disk: a pure state machine, events in, commands out.
//!
//! Invariants, which the property tests cite:
//! * B-1: the accounted bytes are those of the objects in memory, being written out or read back.
//! * B-2: they exceed the budget only while all that could be written out is being written out:
//!   the rest is pinned, in use, or could not be written.
//! * B-3: an object is dropped only when nobody refers to it or uses it, or when it is lost; what
//!   is pinned or in use is not written out, and memory is given back only for what is on disk.
//! * B-4: as long as something waits for room, something is being written out that makes room.
//!
//! When there is no room and none can be made, a new object is refused. An object that somebody
//! wants to read back, or that is already in memory when it arrives, is let in over the budget:
//! the excess is what is in use at one time, and it is written out as soon as it is not.

use super::ObjectId;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Somebody wants to put an object. It starts with one reference, and in use by its writer,
    /// who ends the use when the object is whole.
    Insert {
        id: ObjectId,
        bytes: u64,
        /// Stays in memory for as long as it lives.
        pinned: bool,
        /// Its memory is taken already.
        adopted: bool,
    },
    /// One fewer refers to it.
    Release(ObjectId),
    /// Somebody starts to use it, and needs it in memory.
    Use(ObjectId),
    /// Somebody no longer uses it.
    EndUse(ObjectId),
    /// It is on disk.
    SpillDone(ObjectId),
    /// It could not be written to disk.
    SpillFailed(ObjectId),
    /// It is in memory again.
    LoadDone(ObjectId),
    /// It is gone: could not be written, or read back.
    Lost(ObjectId),
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// There is room for the new object.
    Admit(ObjectId),
    /// There is no room for the new object, nor can it be made; it is forgotten.
    Refuse { id: ObjectId, needed: u64, budget: u64 },
    /// Write it to disk, unless it is there from before, and say so.
    Spill(ObjectId),
    /// It is on disk, and nobody uses it: give its memory back.
    Free(ObjectId),
    /// Read it back, and say so.
    Load(ObjectId),
    /// Give back its memory and its file.
    Drop(ObjectId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// New, waiting for room.
    Asked,
    Memory,
    /// In memory, being written out.
    Spilling,
    Disk,
    /// On disk, waiting for room.
    Wanted,
    /// Has room, being read back.
    Loading,
}

#[derive(Debug)]
struct Object {
    bytes: u64,
    pinned: bool,
    /// Could not be written out the last time.
    stuck: bool,
    references: u32,
    uses: u32,
    place: Place,
    /// When it was last used, in steps.
    used_at: u64,
}

impl Object {
    fn is_idle(&self) -> bool {
        self.place == Place::Memory && self.uses == 0 && !self.pinned && !self.stuck
    }
}

/// The state machine.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: u64,
    used: u64,
    /// Bytes that are on disk alone.
    spilled: u64,
    /// Bytes that spills under way will give back.
    leaving: u64,
    objects: HashMap<ObjectId, Object>,
    /// What may be spilled, least recently used first.
    idle: BTreeMap<u64, ObjectId>,
    idle_bytes: u64,
    /// What waits for room, in the order of asking.
    waiting: VecDeque<ObjectId>,
    /// What could not be written out since the last insertion.
    stuck: Vec<ObjectId>,
    step: u64,
}

impl Budget {
    /// At most `limit` bytes in memory.
    pub(crate) fn new(limit: u64) -> Self {
        Self {
            limit,
            used: 0,
            spilled: 0,
            leaving: 0,
            objects: HashMap::new(),
            idle: BTreeMap::new(),
            idle_bytes: 0,
            waiting: VecDeque::new(),
            stuck: Vec::new(),
            step: 0,
        }
    }

    /// Bytes in memory.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// Objects that are not yet dropped.
    pub(crate) fn objects(&self) -> usize {
        self.objects.len()
    }

    /// Bytes that are on disk alone.
    pub(crate) fn spilled(&self) -> u64 {
        self.spilled
    }

    /// Bytes that may be in memory.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes an event; events of objects that are gone are ignored.
    pub(crate) fn step(&mut self, event: Event) -> Vec<Command> {
        self.step += 1;
        let mut commands = Vec::new();
        match event {
            Event::Insert { id, bytes, pinned, adopted } => {
                self.insert(id, bytes, pinned, adopted);
            }
            Event::Release(id) => {
                self.change(id, |object| object.references = object.references.saturating_sub(1));
                self.collect(id, &mut commands);
            }
            Event::Use(id) => self.start_use(id),
            Event::EndUse(id) => self.end_use(id, &mut commands),
            Event::SpillDone(id) => self.spill_done(id, &mut commands),
            Event::SpillFailed(id) => {
                self.move_to(id, Place::Spilling, Place::Memory);
                self.change(id, |object| object.stuck = true);
                self.stuck.push(id);
                self.collect(id, &mut commands);
            }
            Event::LoadDone(id) => {
                self.move_to(id, Place::Loading, Place::Memory);
                self.collect(id, &mut commands);
            }
            Event::Lost(id) => self.remove(id, &mut commands),
        }
        self.make_room(&mut commands);
        commands
    }

    fn insert(&mut self, id: ObjectId, bytes: u64, pinned: bool, adopted: bool) {
        if self.objects.contains_key(&id) {
            return;
        }
        // The disk may have room again for what could not be written the last time.
        for id in std::mem::take(&mut self.stuck) {
            self.change(id, |object| object.stuck = false);
        }
        let place = if adopted { Place::Memory } else { Place::Asked };
        let (references, uses, used_at) = (1, 1, self.step);
        let object = Object { bytes, pinned, stuck: false, references, uses, place, used_at };
        self.objects.insert(id, object);
        if adopted {
            self.used = self.used.saturating_add(bytes);
        } else {
            self.waiting.push_back(id);
        }
    }

    fn start_use(&mut self, id: ObjectId) {
        let step = self.step;
        self.change(id, |object| {
            object.uses += 1;
            object.used_at = step;
        });
        if self.move_to(id, Place::Disk, Place::Wanted) {
            self.waiting.push_back(id);
        }
    }

    fn end_use(&mut self, id: ObjectId, commands: &mut Vec<Command>) {
        let step = self.step;
        self.change(id, |object| {
            object.uses = object.uses.saturating_sub(1);
            object.used_at = step;
        });
        let unused = self.objects.get(&id).is_some_and(|object| object.uses == 0);
        if unused && self.move_to(id, Place::Wanted, Place::Disk) {
            self.waiting.retain(|waiting| *waiting != id);
        }
        self.collect(id, commands);
    }

    fn spill_done(&mut self, id: ObjectId, commands: &mut Vec<Command>) {
        let Some(object) = self.objects.get(&id) else { return };
        // Whoever started to use it meanwhile keeps it in memory.
        if object.uses > 0 {
            self.move_to(id, Place::Spilling, Place::Memory);
        } else if self.move_to(id, Place::Spilling, Place::Disk) {
            commands.push(Command::Free(id));
        }
        self.collect(id, commands);
    }

    /// Drops what nobody refers to or uses; what is on its way to or from disk, when it is there.
    fn collect(&mut self, id: ObjectId, commands: &mut Vec<Command>) {
        let Some(object) = self.objects.get(&id) else { return };
        let settled = matches!(object.place, Place::Memory | Place::Disk);
        if object.references == 0 && object.uses == 0 && settled {
            self.remove(id, commands);
        }
    }

    fn remove(&mut self, id: ObjectId, commands: &mut Vec<Command>) {
        self.change(id, |object| object.place = Place::Disk);
        if let Some(object) = self.objects.remove(&id) {
            self.spilled -= object.bytes;
            self.waiting.retain(|waiting| *waiting != id);
            commands.push(Command::Drop(id));
        }
    }

    /// Lets in what waits, in its order, and starts to write out what is in the way.
    fn make_room(&mut self, commands: &mut Vec<Command>) {
        while let Some(id) = self.waiting.front().copied() {
            let Some(&Object { bytes: needed, place, .. }) = self.objects.get(&id) else {
                self.waiting.pop_front();
                continue;
            };
            let short = self.used.saturating_add(needed).saturating_sub(self.limit);
            let can_be_made = short <= self.leaving + self.idle_bytes;
            if short > 0 && can_be_made {
                return self.spill(short, commands);
            }
            self.waiting.pop_front();
            match place {
                Place::Wanted => {
                    self.move_to(id, Place::Wanted, Place::Loading);
                    commands.push(Command::Load(id));
                }
                _ if short > 0 => {
                    self.objects.remove(&id);
                    commands.push(Command::Refuse { id, needed, budget: self.limit });
                }
                _ => {
                    self.move_to(id, Place::Asked, Place::Memory);
                    commands.push(Command::Admit(id));
                }
            }
        }
        self.spill(self.used.saturating_sub(self.limit), commands);
    }

    /// Starts spills until so many bytes are leaving, least recently used first.
    fn spill(&mut self, bytes: u64, commands: &mut Vec<Command>) {
        while self.leaving < bytes
            && let Some((_, id)) = self.idle.first_key_value()
        {
            let id = *id;
            self.move_to(id, Place::Memory, Place::Spilling);
            commands.push(Command::Spill(id));
        }
    }

    /// Moves an object, if it is where it is thought to be.
    fn move_to(&mut self, id: ObjectId, from: Place, to: Place) -> bool {
        let is_there = self.objects.get(&id).is_some_and(|object| object.place == from);
        if is_there {
            self.change(id, |object| object.place = to);
        }
        is_there
    }

    /// Changes an object; the sums and the list of idle objects follow.
    fn change(&mut self, id: ObjectId, change: impl FnOnce(&mut Object)) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        let parts = |object: &Object| {
            let bytes = |yes: bool| if yes { object.bytes } else { 0 };
            let held = matches!(object.place, Place::Memory | Place::Spilling | Place::Loading);
            let leaves = object.place == Place::Spilling && object.uses == 0;
            let away = matches!(object.place, Place::Disk | Place::Wanted);
            (bytes(held), bytes(leaves), bytes(object.is_idle()), bytes(away))
        };
        let (before, was_idle) = (parts(object), object.is_idle().then_some(object.used_at));
        change(object);
        let (after, is_idle) = (parts(object), object.is_idle().then_some(object.used_at));
        self.used = self.used - before.0 + after.0;
        self.leaving = self.leaving - before.1 + after.1;
        self.idle_bytes = self.idle_bytes - before.2 + after.2;
        self.spilled = self.spilled - before.3 + after.3;
        if let Some(step) = was_idle {
            self.idle.remove(&step);
        }
        if let Some(step) = is_idle {
            self.idle.insert(step, id);
        }
    }
}

#[cfg(test)]
mod tests;
