//! Memory that training steps free and want again.
//!
//! Allocators give it back to the system in between, which zeroes it and faults it in again: 31 MB
//! a step for a small CNN with glibc's, 10 MB a step for a small MLP with mimalloc.
#![allow(unsafe_code)]

/// How long mimalloc keeps what is free, in milliseconds; 10 by default.
pub(crate) const PURGE_DELAY: &str = "30000";
/// The variable that says otherwise.
pub(crate) const PURGE_DELAY_VARIABLE: &str = "MIMALLOC_PURGE_DELAY";

/// Has the program's allocator keep freed memory for what comes next.
pub(crate) fn keep_freed_memory() {
    glibc();
    #[cfg(feature = "mimalloc")]
    mimalloc();
}

#[cfg(feature = "mimalloc")]
fn mimalloc() {
    /// `mi_option_purge_delay` in mimalloc's header, of versions 2 and 3.
    const OPTION: std::ffi::c_int = 15;
    if let (None, Ok(delay)) = (std::env::var_os(PURGE_DELAY_VARIABLE), PURGE_DELAY.parse()) {
        // SAFETY: sets one of mimalloc's numbers, from any thread; nothing else where the program
        // has another allocator.
        unsafe { libmimalloc_sys::mi_option_set(OPTION, delay) };
    }
}

/// By default each block above a threshold (128 KiB, growing with use) is a mapping of its own, and
/// the end of the heap goes back when it is free.
fn glibc() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The largest that glibc takes.
        const MAPPED_FROM: libc::c_int = 32 << 20;
        const TRIMMED_FROM: libc::c_int = 1 << 30;
        // SAFETY: `mallopt` takes two integers and is safe to call from any thread; a value that
        // it does not take changes nothing.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
            libc::mallopt(libc::M_TRIM_THRESHOLD, TRIMMED_FROM);
        }
    }
}
