//! Memory that training steps free and want again.
#![allow(unsafe_code)]

/// Has glibc's allocator, where the program has no other, keep freed memory for what comes next.
///
/// By default each block above a threshold (128 KiB, growing with use) is a mapping of its own, and
/// the end of the heap goes back to the system when it is free: a training step then faults in, and
/// the system zeroes, the same memory every time; 31 MB a step for a small CNN, none with this.
pub(crate) fn keep_freed_memory() {
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
