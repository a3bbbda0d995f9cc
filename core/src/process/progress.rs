//! How far a worker has come, in a page of memory that it shares with its driver: so the driver
//! knows, even after a `kill -9`, which calls had begun and which may run elsewhere.
#![allow(unsafe_code)]

use crate::Error;
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// In a worker's environment: the descriptor of the page in its driver.
pub(crate) const PROGRESS_VARIABLE: &str = "MOBULA_PROGRESS_FD";

const BYTES: usize = 4096;

/// Numbers that the page has room for: a lane's calls begin in order, so one number each is enough.
pub(crate) const LANES: usize = BYTES / size_of::<AtomicU64>();

/// What had begun when a worker ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Begun {
    /// The newest call of each lane; nothing in those beyond.
    UpTo(Vec<u64>),
    /// Nobody knows: perhaps all of it.
    Unknown,
}

impl Begun {
    pub(crate) fn newest(&self) -> u64 {
        self.newest_in(0)
    }

    pub(crate) fn newest_in(&self, lane: usize) -> u64 {
        match self {
            Self::UpTo(lanes) => lanes.get(lane).copied().unwrap_or(0),
            Self::Unknown => u64::MAX,
        }
    }
}

/// The number of the newest call that has begun in each lane, seen by both sides.
#[derive(Debug)]
pub(crate) struct Progress {
    page: NonNull<AtomicU64>,
    file: OwnedFd,
}

// SAFETY: the page is only reached through an atomic, and lives as long as this.
unsafe impl Send for Progress {}
// SAFETY: as above.
unsafe impl Sync for Progress {}

impl Progress {
    /// A new page, for a worker to come.
    pub(crate) fn create() -> Result<Self, Error> {
        let failed = |error| Error::system("creating a shared page", error);
        let file =
            rustix::fs::memfd_create("mobula-progress", MemfdFlags::CLOEXEC).map_err(failed)?;
        rustix::fs::ftruncate(&file, BYTES as u64).map_err(failed)?;
        Self::map(file)
    }

    /// The page that the driver of this process has created for it.
    pub(crate) fn inherited() -> Result<Self, Error> {
        let variable = |name| std::env::var(name).unwrap_or_default();
        let (driver, fd) = (variable(super::spawn::DRIVER_VARIABLE), variable(PROGRESS_VARIABLE));
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{driver}/fd/{fd}"))
            .map_err(|error| Error::system("opening the shared page", error))?;
        Self::map(file.into())
    }

    fn map(file: OwnedFd) -> Result<Self, Error> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice; the file has `BYTES` bytes
        // and nobody shortens it.
        let page = unsafe { mmap(std::ptr::null_mut(), BYTES, protection, flags, file.as_fd(), 0) };
        let page = page.map_err(|error| Error::system("mapping a shared page", error))?;
        let page = NonNull::new(page.cast()).ok_or_else(|| Error::Internal("mmap: null".into()))?;
        Ok(Self { page, file })
    }

    /// This end's descriptor, which the other side opens through `/proc`.
    pub(crate) fn descriptor(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// Call number `call` is about to run.
    pub(crate) fn begin(&self, call: u64) {
        self.begin_in(0, call);
    }

    /// The same in another lane than the first. Two threads may say so in either order.
    pub(crate) fn begin_in(&self, lane: usize, call: u64) {
        self.cell(lane).fetch_max(call, Ordering::AcqRel);
    }

    /// The number of the newest call of a lane that has begun.
    pub(crate) fn newest_in(&self, lane: usize) -> u64 {
        self.cell(lane).load(Ordering::Acquire)
    }

    /// What has begun so far.
    pub(crate) fn begun(&self) -> Begun {
        let mut lanes: Vec<u64> = (0..LANES).map(|lane| self.newest_in(lane)).collect();
        let used = lanes.iter().rposition(|newest| *newest > 0).map_or(0, |last| last + 1);
        lanes.truncate(used);
        Begun::UpTo(lanes)
    }

    fn cell(&self, lane: usize) -> &AtomicU64 {
        assert!(lane < LANES, "a lane beyond the page");
        // SAFETY: the page is mapped until `drop`, page-aligned, holds so many of these atomics, and
        // is only used as such by both processes.
        unsafe { self.page.add(lane).as_ref() }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length, and not used after this.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_see_the_same_page() {
        let ours = Progress::create().expect("page");
        let theirs = Progress::map(ours.file.try_clone().expect("duplicate")).expect("mapped");
        assert_eq!(ours.newest_in(0), 0);
        theirs.begin(7);
        assert_eq!(ours.newest_in(0), 7);
        theirs.begin_in(LANES - 1, 9);
        theirs.begin_in(LANES - 1, 8);
        assert_eq!((ours.newest_in(0), ours.newest_in(LANES - 1)), (7, 9));
    }
}
