//! Memory that ends, or begins, where the process must not look: a read or a write beside a slice
//! is a crash of the test.

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};

/// Which side of the numbers is forbidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guard {
    Before,
    After,
}

/// Numbers between two pages that nobody may touch, at one of them.
pub(super) struct Guarded {
    map: *mut c_void,
    size: usize,
    numbers: *mut f32,
    len: usize,
}

impl Guarded {
    pub(super) fn new(values: &[f32], guard: Guard) -> Self {
        let page = rustix::param::page_size();
        let bytes = size_of_val(values).next_multiple_of(page);
        let (size, flags) = (bytes + 2 * page, MapFlags::PRIVATE);
        // SAFETY: a new mapping, wherever there is room.
        let map = unsafe {
            mmap_anonymous(std::ptr::null_mut(), size, ProtFlags::empty(), flags).expect("mmap")
        };
        // SAFETY: the pages between the first and the last of the mapping.
        let inner = unsafe {
            let inner = map.byte_add(page);
            mprotect(inner, bytes, MprotectFlags::READ | MprotectFlags::WRITE).expect("mprotect");
            inner
        };
        let before = match guard {
            Guard::Before => 0,
            Guard::After => bytes - size_of_val(values),
        };
        // SAFETY: `before` and the numbers fill no more than the pages between.
        let numbers = unsafe { inner.byte_add(before).cast::<f32>() };
        let mut guarded = Self { map, size, numbers, len: values.len() };
        guarded.copy_from_slice(values);
        guarded
    }
}

impl Deref for Guarded {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: numbers of a mapping that lives as long as `self`, aligned as pages and whole
        // numbers are, and zeros or what was copied there.
        unsafe { std::slice::from_raw_parts(self.numbers, self.len) }
    }
}

impl DerefMut for Guarded {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above; `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.numbers, self.len) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, which nothing borrows any more.
        unsafe { munmap(self.map, self.size).expect("munmap") };
    }
}
