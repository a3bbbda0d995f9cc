//! A piece of memory that the ranks on one host share.
//!
//! Layout: one cache line of counters per rank, then one slot of `capacity` bytes per rank for
//! what it gives, then one slot for the sum.
//!
//! Invariants:
//! * SHM-1: a rank writes only its own counters, its own slot, and its own chunk of the sum.
//! * SHM-2: what a rank wrote is read by another only after a barrier that both have passed
//!   since, and is written again only after the next one. The barrier's release store and acquire
//!   load order the plain accesses.
#![allow(unsafe_code)]

use super::Element;
use crate::{Error, Result};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::AtomicU64;

/// A cache line, so that waiting for one rank does not disturb another; also the alignment of
/// every slot.
const LINE: usize = 64;

/// Mapped memory with the layout above.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapRaw,
    world: usize,
    capacity: usize,
    /// Rank 0 keeps the descriptor open until the others have opened it by path.
    _file: File,
}

impl Region {
    /// Bytes of a region whose slots hold `capacity` bytes.
    fn bytes(world: usize, capacity: usize) -> usize {
        world * LINE + (world + 1) * capacity
    }

    /// Makes a region; gives it and the path by which the other ranks open it.
    pub(crate) fn create(world: usize, capacity: usize) -> Result<(Self, String)> {
        let capacity = capacity.next_multiple_of(LINE);
        let bytes = Self::bytes(world, capacity);
        let reserve = |source: rustix::io::Errno| shared_memory("reserve", bytes, source.into());
        let fd = memfd_create("mobula-collective", MemfdFlags::CLOEXEC).map_err(reserve)?;
        // Reserved now: memory that is missing later would be a bus error in the middle of a sum.
        fallocate(&fd, FallocateFlags::empty(), 0, bytes as u64).map_err(reserve)?;
        let file = File::from(fd);
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        Ok((Self::map(file, world, capacity)?, path))
    }

    /// Opens the region that another rank made.
    pub(crate) fn open(path: &Path, world: usize, capacity: usize) -> Result<Self> {
        let capacity = capacity.next_multiple_of(LINE);
        let bytes = Self::bytes(world, capacity);
        let file = File::options().read(true).write(true).open(path);
        Self::map(file.map_err(|e| shared_memory("open", bytes, e))?, world, capacity)
    }

    fn map(file: File, world: usize, capacity: usize) -> Result<Self> {
        let bytes = Self::bytes(world, capacity);
        let has = file.metadata().map_err(|e| shared_memory("open", bytes, e))?.len();
        if has < bytes as u64 {
            // Memory behind the end of the file would be a bus error.
            let short = std::io::Error::other(format!("the file has {has}"));
            return Err(shared_memory("map", bytes, short));
        }
        let map = MmapOptions::new().len(bytes).map_raw(&file);
        Ok(Self {
            map: map.map_err(|e| shared_memory("map", bytes, e))?,
            world,
            capacity,
            _file: file,
        })
    }

    /// Bytes that fit into a slot.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Counter `index` (below 8) of a rank.
    pub(crate) fn counter(&self, rank: usize, index: usize) -> &AtomicU64 {
        assert!(rank < self.world && index < LINE / 8, "counter {index} of rank {rank}");
        // SAFETY: inside the mapping by the assertion, 8-byte aligned since the mapping is page
        // aligned, zeroed by the kernel at first, and only ever accessed as an atomic.
        unsafe { &*self.map.as_mut_ptr().add(rank * LINE + index * 8).cast::<AtomicU64>() }
    }

    /// Copies a rank's values into its slot.
    pub(crate) fn give<T: Element>(&self, rank: usize, values: &[T]) {
        let slot = self.slot::<T>(rank, values.len());
        // SAFETY: the slot holds that many values (`slot` asserts it) and, by SHM-1 and SHM-2, no
        // other rank reads or writes it now; `values` is ordinary memory outside of the mapping.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), slot, values.len()) }
    }

    /// Adds up the slots of all ranks, in rank order, for the elements of `range` of the sum.
    pub(crate) fn reduce<T: Element>(&self, range: std::ops::Range<usize>, len: usize) {
        assert!(range.start <= range.end && range.end <= len, "{range:?} of {len}");
        let count = range.len();
        let part = |slot: usize| {
            // SAFETY: `slot` has room for `len` values and the range lies within.
            unsafe { self.slot::<T>(slot, len).add(range.start) }
        };
        // SAFETY: by SHM-1 this chunk of the sum belongs to this rank alone now.
        let sum = unsafe { std::slice::from_raw_parts_mut(part(self.world), count) };
        for rank in 0..self.world {
            // SAFETY: by SHM-2 nobody writes the slots between the barriers around this call, and
            // a slot does not overlap the sum. Every bit pattern is a valid `Element`.
            let given = unsafe { std::slice::from_raw_parts(part(rank).cast_const(), count) };
            match rank {
                0 => sum.copy_from_slice(given),
                _ => sum.iter_mut().zip(given).for_each(|(total, value)| *total += *value),
            }
        }
    }

    /// Copies the sum out.
    pub(crate) fn take<T: Element>(&self, values: &mut [T]) {
        let sum = self.slot::<T>(self.world, values.len()).cast_const();
        // SAFETY: as in `give`, with the sum, which by SHM-2 nobody writes now.
        unsafe { std::ptr::copy_nonoverlapping(sum, values.as_mut_ptr(), values.len()) }
    }

    /// The start of a slot that must hold `len` values; slot `world` is the sum.
    fn slot<T: Element>(&self, slot: usize, len: usize) -> *mut T {
        assert!(slot <= self.world && len * size_of::<T>() <= self.capacity, "slot {slot}");
        // SAFETY: inside the mapping, by the assertion and the layout.
        unsafe { self.map.as_mut_ptr().add(self.world * LINE + slot * self.capacity).cast() }
    }
}

fn shared_memory(action: &'static str, bytes: usize, source: std::io::Error) -> Error {
    Error::SharedMemory { action, bytes, source }
}
