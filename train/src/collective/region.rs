//! A piece of memory that the ranks on one host share.
//!
//! Layout: one cache line of counters for each rank, then for each rank some sets of cells, used in
//! turns. A set has one cell for each rank, for what is given to that one, and one for the result
//! of this rank.
//!
//! Invariants:
//! * SHM-1: a rank writes only its own counters and its own cells.
//! * SHM-2: what a rank wrote into a cell is read by another only after a counter of the writer said
//!   so, and is written again only after counters of all readers said that they have read it. The
//!   release stores and acquire loads of the counters order the plain accesses.
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
/// every cell.
const LINE: usize = 64;
/// Sets of cells of a rank.
pub(super) const SETS: usize = 4;
/// Bytes of a set of cells of two ranks: what two of them have in hand stays in their caches.
const SET: usize = 256 << 10;
/// Bytes of a cell at least.
const LEAST: usize = 4 << 10;

/// Mapped memory with the layout above.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapRaw,
    world: usize,
    /// Rank 0 keeps the descriptor open until the others have opened it by path.
    _file: File,
}

/// A place in the region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    /// Whose it is.
    pub(crate) owner: usize,
    /// Which turn; those that follow each other have different cells.
    pub(crate) turn: u64,
    /// Which rank it is for; `world` for the result.
    pub(crate) index: usize,
}

impl Region {
    /// Bytes that fit into a cell.
    pub(crate) fn cell_bytes(world: usize) -> usize {
        (SET / world).max(LEAST).next_multiple_of(LINE)
    }

    fn bytes(world: usize) -> usize {
        world * (LINE + SETS * (world + 1) * Self::cell_bytes(world))
    }

    /// Makes a region; gives it and the path by which the other ranks open it.
    pub(crate) fn create(world: usize) -> Result<(Self, String)> {
        let bytes = Self::bytes(world);
        let reserve = |source: rustix::io::Errno| shared_memory("reserve", bytes, source.into());
        let fd = memfd_create("mobula-collective", MemfdFlags::CLOEXEC).map_err(reserve)?;
        // Reserved now: memory that is missing later would be a bus error in the middle of a sum.
        fallocate(&fd, FallocateFlags::empty(), 0, bytes as u64).map_err(reserve)?;
        let file = File::from(fd);
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        Ok((Self::map(file, world)?, path))
    }

    /// Opens the region that another rank made.
    pub(crate) fn open(path: &Path, world: usize) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path);
        Self::map(file.map_err(|e| shared_memory("open", Self::bytes(world), e))?, world)
    }

    fn map(file: File, world: usize) -> Result<Self> {
        let bytes = Self::bytes(world);
        let has = file.metadata().map_err(|e| shared_memory("open", bytes, e))?.len();
        if has < bytes as u64 {
            // Memory behind the end of the file would be a bus error.
            let short = std::io::Error::other(format!("the file has {has}"));
            return Err(shared_memory("map", bytes, short));
        }
        let map = MmapOptions::new().len(bytes).populate().map_raw(&file);
        Ok(Self { map: map.map_err(|e| shared_memory("map", bytes, e))?, world, _file: file })
    }

    /// Counter `index` (below 8) of a rank.
    pub(crate) fn counter(&self, rank: usize, index: usize) -> &AtomicU64 {
        assert!(rank < self.world && index < LINE / 8, "counter {index} of rank {rank}");
        // SAFETY: inside the mapping by the assertion, 8-byte aligned since the mapping is page
        // aligned, zeroed by the kernel at first, and only ever accessed as an atomic.
        unsafe { &*self.map.as_mut_ptr().add(rank * LINE + index * 8).cast::<AtomicU64>() }
    }

    /// Copies values into a cell of this rank, from element `first` of it on.
    pub(crate) fn write<T: Element>(&self, cell: Cell, first: usize, values: &[T]) {
        let to = self.start::<T>(cell, first + values.len());
        // SAFETY: the cell holds that many values (`start` asserts it) and, by SHM-1 and SHM-2, no
        // other rank reads or writes it now; `values` is ordinary memory outside of the mapping.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to.add(first), values.len()) }
    }

    /// What a rank wrote into a cell.
    pub(crate) fn read<T: Element>(&self, cell: Cell, len: usize) -> &[T] {
        let from = self.start::<T>(cell, len);
        // SAFETY: the cell holds that many values, every bit pattern is one, and by SHM-2 nobody
        // writes it before this rank's counter says that it is done with it.
        unsafe { std::slice::from_raw_parts(from, len) }
    }

    /// The start of a cell that must hold `len` values.
    fn start<T: Element>(&self, Cell { owner, turn, index }: Cell, len: usize) -> *mut T {
        let bytes = Self::cell_bytes(self.world);
        let fits = owner < self.world && index <= self.world && len * size_of::<T>() <= bytes;
        assert!(fits, "{len} values in cell {index} of rank {owner}");
        let set = owner * SETS + (turn % SETS as u64) as usize;
        let at = self.world * LINE + (set * (self.world + 1) + index) * bytes;
        // SAFETY: inside the mapping, by the assertion and the layout.
        unsafe { self.map.as_mut_ptr().add(at).cast() }
    }
}

fn shared_memory(action: &'static str, bytes: usize, source: std::io::Error) -> Error {
    Error::SharedMemory { action, bytes, source }
}
