//! The part of NCCL's C interface that is used here, as its `nccl.h` has it since version 2.14.
//!
//! `unsafe` is what C asks for: the types are the header's, and a communicator is there until it is dropped.
#![allow(unsafe_code)]

#[cfg(feature = "cuda")]
use crate::{Error, Result};
use mobula_core::Shard;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// An `ncclComm_t`.
pub(super) type Handle = *mut c_void;

/// An `ncclResult_t`.
pub(super) type Code = c_int;
pub(super) const SUCCESS: Code = 0;
pub(super) const SYSTEM_ERROR: Code = 2;
pub(super) const REMOTE_ERROR: Code = 6;
pub(super) const IN_PROGRESS: Code = 7;

/// An `ncclDataType_t`.
const FLOAT32: c_int = 7;
/// An `ncclRedOp_t`.
const SUM: c_int = 0;

/// What the ranks that belong together know, and no others.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// The first fields of an `ncclConfig_t`: later versions take the ones behind them as not said.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

impl Config {
    /// Of a communicator whose calls return at once, so that waiting for others can have an end.
    pub(super) fn non_blocking() -> Self {
        const MAGIC: c_uint = 0xcafe_beef;
        const VERSION: c_uint = 21_400;
        Self { size: size_of::<Self>(), magic: MAGIC, version: VERSION, blocking: 0 }
    }
}

/// The functions of a library that is there until the process ends.
#[derive(Clone, Copy)]
pub(super) struct Functions {
    pub(super) get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    pub(super) init: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Code,
    pub(super) async_error: unsafe extern "C" fn(Handle, *mut Code) -> Code,
    pub(super) abort: unsafe extern "C" fn(Handle) -> Code,
    pub(super) all_reduce: AllReduce,
    pub(super) error_string: unsafe extern "C" fn(Code) -> *const c_char,
    pub(super) last_error: unsafe extern "C" fn(Handle) -> *const c_char,
    pub(super) version: unsafe extern "C" fn(*mut c_int) -> Code,
}

/// `ncclAllReduce`: from, to, how many of what, by which operation, and on which stream.
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    Handle,
    *mut c_void,
) -> Code;

impl Functions {
    /// Those of this machine's library, which the loader has to find.
    #[cfg(feature = "cuda")]
    pub(super) fn load() -> Result<Self> {
        use std::sync::OnceLock;
        static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
        let load = || Self::load_from("libnccl.so.2");
        LOADED.get_or_init(load).clone().map_err(|reason| Error::NoNccl { reason })
    }

    /// Says why not.
    fn load_from(name: &str) -> std::result::Result<Self, String> {
        Self::find_in(name).map_err(|error| match std::error::Error::source(&error) {
            Some(source) => source.to_string(),
            None => error.to_string(),
        })
    }

    fn find_in(name: &str) -> std::result::Result<Self, libloading::Error> {
        // SAFETY: what NCCL does when it is loaded and unloaded has no conditions, and it stays loaded.
        let library = Box::leak(Box::new(unsafe { libloading::Library::new(name) }?));
        // SAFETY: these are the types that `nccl.h` declares.
        unsafe {
            Ok(Self {
                get_unique_id: *library.get(b"ncclGetUniqueId")?,
                init: *library.get(b"ncclCommInitRankConfig")?,
                async_error: *library.get(b"ncclCommGetAsyncError")?,
                abort: *library.get(b"ncclCommAbort")?,
                all_reduce: *library.get(b"ncclAllReduce")?,
                error_string: *library.get(b"ncclGetErrorString")?,
                last_error: *library.get(b"ncclGetLastError")?,
                version: *library.get(b"ncclGetVersion")?,
            })
        }
    }

    /// Such as `2.27.3`.
    pub(super) fn version(&self) -> std::result::Result<String, String> {
        let mut version = 0;
        // SAFETY: it writes one number.
        match unsafe { (self.version)(&raw mut version) } {
            SUCCESS => {
                Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
            }
            code => Err(self.explain(code, std::ptr::null_mut())),
        }
    }

    /// For one rank to make, and all to know.
    pub(super) fn make_unique_id(&self) -> std::result::Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: it writes an identifier.
        match unsafe { (self.get_unique_id)(&raw mut id) } {
            SUCCESS => Ok(id),
            code => Err(self.explain(code, std::ptr::null_mut())),
        }
    }

    /// What a code means, and what the library said of it last.
    fn explain(&self, code: Code, communicator: Handle) -> String {
        // SAFETY: both give texts that are there as long as the library, or until its next call.
        let [meaning, last] =
            unsafe { [read((self.error_string)(code)), read((self.last_error)(communicator))] };
        match last.trim() {
            "" => meaning,
            last => format!("{meaning}: {last}"),
        }
    }
}

/// An `ncclComm_t`, until it is dropped: then whatever still waits for others on the device ends, for whoever
/// frees the device's memory would wait for it.
pub(super) struct RawCommunicator {
    functions: Functions,
    handle: Handle,
}

// SAFETY: NCCL's functions may be called from any thread, with one communicator by one at a time. All but
// `state`, which reads, take `&mut self` here, and nothing is `Sync`.
unsafe impl Send for RawCommunicator {}

impl RawCommunicator {
    /// Begins to connect this rank, whose device is the thread's, with all that have the same identifier.
    pub(super) fn begin(functions: Functions, id: UniqueId, shard: Shard) -> (Self, Code) {
        let mut this = Self { functions, handle: std::ptr::null_mut() };
        let [world, rank] = [shard.world, shard.rank].map(|number| number as c_int);
        let mut config = Config::non_blocking();
        // SAFETY: it reads the configuration, and writes the handle, before it returns.
        let code =
            unsafe { (functions.init)(&raw mut this.handle, world, id, rank, &raw mut config) };
        (this, code)
    }

    /// What became of the last call.
    pub(super) fn state(&self) -> Code {
        let mut state = SUCCESS;
        // SAFETY: it writes a code.
        match unsafe { (self.functions.async_error)(self.handle, &raw mut state) } {
            SUCCESS => state,
            code => code,
        }
    }

    /// Has `len` numbers become their sums over all ranks, once the stream comes to it.
    ///
    /// # Safety
    ///
    /// `values` are as many `f32` on the communicator's device, of which nobody else knows until the stream
    /// has come past this or the communicator is dropped; the stream is of that device.
    pub(super) unsafe fn sum(
        &mut self,
        values: *mut c_void,
        len: usize,
        stream: *mut c_void,
    ) -> Code {
        let all_reduce = self.functions.all_reduce;
        // SAFETY: the caller's, and `nccl.h` allows for both buffers to be one.
        unsafe { all_reduce(values, values, len, FLOAT32, SUM, self.handle, stream) }
    }

    pub(super) fn explain(&self, code: Code) -> String {
        self.functions.explain(code, self.handle)
    }
}

impl Drop for RawCommunicator {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: the handle is of a communicator that nobody has ended.
            unsafe { (self.functions.abort)(self.handle) };
        }
    }
}

/// # Safety
///
/// Null, or a text that ends with a zero.
unsafe fn read(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// The version of this machine's NCCL, such as `2.27.3`. Errors where there is none.
#[cfg(feature = "cuda")]
pub fn nccl_version() -> Result<String> {
    Functions::load()?.version().map_err(|reason| Error::NoNccl { reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_as_the_header_has_it() {
        let config = Config::non_blocking();
        assert_eq!((config.size, config.blocking), (24, 0));
        assert_eq!(std::mem::offset_of!(Config, blocking), 16);
    }

    #[test]
    fn a_library_that_is_none_is_told() {
        let missing = Functions::load_from("libnccl-of-nobody.so.2").err().expect("there is none");
        assert!(missing.contains("libnccl-of-nobody"), "{missing}");
        let other = Functions::load_from("libc.so.6").err().expect("another library");
        assert!(other.contains("ncclGetUniqueId"), "{other}");
    }

    /// Needs no GPU, but the library.
    #[cfg(feature = "cuda")]
    #[test]
    fn the_library_of_this_machine_is_what_it_is_taken_for() {
        let functions = match Functions::load() {
            Ok(functions) => functions,
            Err(error) => return eprintln!("SKIPPED: {error}, so nothing called it"),
        };
        let version = nccl_version().expect("a version");
        assert!(version.starts_with("2."), "{version}");
        let [one, other] = [(), ()].map(|()| functions.make_unique_id().expect("an identifier").0);
        assert!(one != other && one != [0; 128]);
        let said = functions.explain(5, std::ptr::null_mut());
        assert!(said.starts_with("invalid usage"), "{said}");
    }
}
