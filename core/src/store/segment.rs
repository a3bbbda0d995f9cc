//! Sealed shared memory: written once, then unchangeable, and read by other processes in place.
//!
//! A segment is a memfd, which no folder lists, so nothing is left over when a process is killed. It
//! is written through the descriptor rather than a mapping: that is nearly twice as fast (the kernel
//! does not zero the pages first), and memory that is short is an error of the write instead of a
//! bus error later. Other processes of the same user open it as `/proc/PID/fd/N`.
//!
//! Invariants:
//! * SEG-1: a `Segment` exists only of a file whose seals the kernel has confirmed. Its bytes never
//!   change again and its length stays, whoever else has it open.
//! * SEG-2: a `Mapping` is of a whole segment, read only, and is unmapped once, when it is dropped.
#![allow(unsafe_code)]

use crate::Error;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;

const SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);
/// Segments of this size and more are checked against what memory there is before they are written:
/// a machine that runs out ends processes, it does not refuse a write.
const CHECKED_FROM: u64 = 64 << 20;

/// Where other processes of this user find a segment, for as long as its owner keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Location {
    pub(crate) pid: u32,
    pub(crate) fd: RawFd,
    pub(crate) bytes: u64,
    /// The file's own number, in case the descriptor's is in use again.
    pub(crate) inode: u64,
}

/// A sealed piece of shared memory.
#[derive(Debug)]
pub(crate) struct Segment {
    file: File,
    bytes: u64,
    inode: u64,
}

impl Segment {
    /// Makes a segment of so many bytes out of what `write` writes.
    pub(crate) fn create(
        bytes: u64,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<Self, Error> {
        let failed =
            |source: io::Error| Error::system("making shared memory for an object", source);
        if bytes >= CHECKED_FROM {
            check_available(bytes).map_err(failed)?;
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("mobula-object", flags).map_err(|e| failed(e.into()))?;
        let mut file = File::from(fd);
        write(&mut file).map_err(failed)?;
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(|e| failed(e.into()))?;
        Self::verify(file, bytes, None).map_err(failed)
    }

    /// Opens another process's segment.
    pub(crate) fn open(location: &Location) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::system("opening an object's shared memory", source);
        let path = format!("/proc/{}/fd/{}", location.pid, location.fd);
        // Not blocking: behind a number that is in use again there may be a pipe.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        Self::verify(File::from(fd), location.bytes, Some(location.inode)).map_err(failed)
    }

    /// Establishes SEG-1.
    fn verify(file: File, bytes: u64, inode: Option<u64>) -> io::Result<Self> {
        let refused = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let is = file.metadata()?;
        if inode.is_some_and(|inode| inode != is.ino()) {
            return refused("the descriptor belongs to another file by now".to_owned());
        }
        // Files that are no memory at all have no seals to ask for.
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        if !seals.contains(SEALS) {
            return refused(format!("expected sealed memory, got a file with seals {seals:?}"));
        }
        if is.len() != bytes {
            return refused(format!("expected {bytes} bytes, got {}", is.len()));
        }
        Ok(Self { file, bytes, inode: is.ino() })
    }

    /// Where other processes find it for as long as this value lives.
    pub(crate) fn location(&self) -> Location {
        let (pid, fd) = (std::process::id(), self.file.as_raw_fd());
        Location { pid, fd, bytes: self.bytes, inode: self.inode }
    }

    /// Maps all of it. The mapping does not need the segment any more.
    pub(crate) fn map(&self) -> Result<Mapping, Error> {
        let failed = |source: io::Error| Error::system("mapping an object's shared memory", source);
        let len = usize::try_from(self.bytes).map_err(|e| failed(io::Error::other(e)))?;
        // Private, as kernels before 6.7 refuse shared mappings of sealed files that are open for
        // writing. Nobody writes, so the pages are shared all the same.
        let (access, flags) = (ProtFlags::READ, MapFlags::PRIVATE);
        // SAFETY: a new mapping at an address that the kernel chooses. By SEG-1 its bytes do not
        // change, and exist, for as long as it does.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, flags, &self.file, 0) };
        let start = start.map_err(|e| failed(e.into()))?;
        let start = NonNull::new(start.cast()).ok_or_else(|| failed(io::Error::other("null")))?;
        Ok(Mapping { start, len })
    }
}

fn check_available(bytes: u64) -> io::Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    match kib.map(|kib| kib * 1024) {
        Some(available) if available < bytes => Err(io::Error::new(
            io::ErrorKind::OutOfMemory,
            format!("{bytes} bytes are needed, {available} are available"),
        )),
        _ => Ok(()),
    }
}

/// A segment's bytes in this process's memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: by SEG-1 and SEG-2 it is memory that nobody writes, so any thread may read and unmap it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: by SEG-2 the whole range is mapped for as long as `self` lives, and by SEG-1 it
        // is initialised (by the file's content) and not written.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: by SEG-2 this is the mapping that `map` made, unmapped here alone; what borrowed
        // from it is gone.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn segment(content: &[u8]) -> Segment {
        let made = Segment::create(content.len() as u64, |out| out.write_all(content));
        made.expect("memory for a test")
    }

    /// How many descriptors and mappings of this process are of that file.
    pub(in crate::store) fn holders(inode: u64) -> usize {
        let is_it = |fd: &std::fs::DirEntry| {
            std::fs::metadata(fd.path()).is_ok_and(|file| file.ino() == inode)
        };
        let fds = std::fs::read_dir("/proc/self/fd").expect("proc").filter_map(Result::ok);
        let maps = std::fs::read_to_string("/proc/self/maps").expect("proc");
        let maps = maps.lines().filter(|line| {
            line.contains("memfd:mobula-object")
                && line.split_whitespace().nth(4) == Some(&inode.to_string())
        });
        fds.filter(is_it).count() + maps.count()
    }

    #[test]
    fn what_was_written_is_mapped_and_outlives_the_segment() {
        let content: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let segment = segment(&content);
        let mapping = segment.map().expect("maps");
        let inode = segment.location().inode;
        assert_eq!(holders(inode), 2);
        drop(segment);
        assert_eq!(mapping.as_ref(), content);
        assert_eq!(holders(inode), 1);
        drop(mapping);
        assert_eq!(holders(inode), 0);
    }

    #[test]
    fn other_processes_read_it_and_nobody_writes_it() {
        let segment = segment(b"the content");
        let Location { pid, fd, .. } = segment.location();
        let path = format!("/proc/{pid}/fd/{fd}");
        let read = Command::new("cat").arg(&path).output().expect("cat");
        assert_eq!(read.stdout, b"the content");
        let mut file = File::options().write(true).open(&path).expect("opens");
        let kind = |result: io::Result<()>| result.expect_err("sealed").kind();
        assert_eq!(kind(file.write_all(b"x")), io::ErrorKind::PermissionDenied);
        assert_eq!(kind(file.set_len(0)), io::ErrorKind::PermissionDenied);
        assert_eq!(kind(file.set_len(100)), io::ErrorKind::PermissionDenied);
        assert_eq!(segment.map().expect("maps").as_ref(), b"the content");
    }

    #[test]
    fn a_segment_of_another_process_is_read_until_that_ends() {
        let ours = segment(b"kept by another process");
        let input = Stdio::from(ours.file.try_clone().expect("duplicates"));
        let mut keeper =
            Command::new("tail").args(["-f", "/dev/null"]).stdin(input).spawn().expect("tail");
        let theirs = Location { pid: keeper.id(), fd: 0, ..ours.location() };
        let inode = theirs.inode;
        drop(ours);
        let opened = Segment::open(&theirs).and_then(|segment| segment.map());
        keeper.kill().and_then(|()| keeper.wait()).expect("a child of ours");
        let mapping = opened.expect("opens");
        assert_eq!(mapping.as_ref(), b"kept by another process");
        assert_eq!(holders(inode), 1);
        let error = Segment::open(&theirs).expect_err("its keeper is gone").to_string();
        assert!(error.contains("opening an object's shared memory"), "{error}");
    }

    #[test]
    fn what_is_not_sealed_or_not_the_same_is_refused() {
        let sealed = segment(b"content").location();
        let file = tempfile::tempfile().expect("a file");
        let memory = rustix::fs::memfd_create("open", MemfdFlags::ALLOW_SEALING).expect("memory");
        let half = File::from(memory.try_clone().expect("duplicates"));
        rustix::fs::fcntl_add_seals(&half, SealFlags::SHRINK | SealFlags::GROW).expect("seals");
        let (pipe, _end) = io::pipe().expect("a pipe");
        let is = |fd: RawFd| Location { pid: std::process::id(), fd, bytes: 0, inode: inode(fd) };
        for (fd, expected) in [
            (file.as_raw_fd(), "expected sealed memory"),
            (memory.as_raw_fd(), "expected sealed memory"),
            (pipe.as_raw_fd(), "expected sealed memory"),
        ] {
            let error = Segment::open(&is(fd)).expect_err("not sealed");
            assert!(error.to_string().contains(expected), "{error}");
        }
        let segment = segment(b"content");
        let here = segment.location();
        for (wrong, expected) in [
            (Location { bytes: 8, ..here }, "expected 8 bytes, got 7"),
            (Location { inode: sealed.inode, ..here }, "another file"),
            (Location { fd: 1 << 30, ..here }, "No such file"),
        ] {
            let error = Segment::open(&wrong).expect_err("not the same").to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    fn inode(fd: RawFd) -> u64 {
        std::fs::metadata(format!("/proc/self/fd/{fd}")).expect("open").ino()
    }

    #[test]
    fn memory_that_is_not_there_is_an_error_and_a_failed_write_leaves_nothing() {
        let error = Segment::create(1 << 60, |_| unreachable!("not even tried"));
        let error = error.expect_err("an exbibyte").to_string();
        assert!(error.contains("1152921504606846976 bytes are needed"), "{error}");
        let short = Segment::create(10, |out| out.write_all(b"nine here"));
        assert!(short.expect_err("short").to_string().contains("expected 10 bytes, got 9"));
        let broken = Segment::create(1, |_| Err(io::Error::other("broken")));
        assert!(broken.expect_err("broken").to_string().contains("broken"));
    }
}
