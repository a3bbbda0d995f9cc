//! The part of NCCL's C interface that is used here, as its `nccl.h` has it since version 2.18.
//!
//! `unsafe` is what C asks for: the types are the header's, and a communicator is there until it is ended.
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

/// 2.18. Before, a communicator that was still being made was written to behind its caller's back.
const OLDEST: c_int = 21_800;

/// What the ranks that belong together know, and no others.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// The first fields of an `ncclConfig_t`, as version 2.14 began it: NCCL takes what is behind them as not said.
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
    pub(super) get_version: unsafe extern "C" fn(*mut c_int) -> Code,
    pub(super) get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    pub(super) init: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Code,
    pub(super) async_error: unsafe extern "C" fn(Handle, *mut Code) -> Code,
    pub(super) finalize: unsafe extern "C" fn(Handle) -> Code,
    pub(super) destroy: unsafe extern "C" fn(Handle) -> Code,
    pub(super) abort: unsafe extern "C" fn(Handle) -> Code,
    pub(super) all_reduce: AllReduce,
    pub(super) error_string: unsafe extern "C" fn(Code) -> *const c_char,
    pub(super) last_error: unsafe extern "C" fn(Handle) -> *const c_char,
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
        let load = || Self::load_from("libnccl.so.2")?.unless_too_old();
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
                get_version: *library.get(b"ncclGetVersion")?,
                get_unique_id: *library.get(b"ncclGetUniqueId")?,
                init: *library.get(b"ncclCommInitRankConfig")?,
                async_error: *library.get(b"ncclCommGetAsyncError")?,
                finalize: *library.get(b"ncclCommFinalize")?,
                destroy: *library.get(b"ncclCommDestroy")?,
                abort: *library.get(b"ncclCommAbort")?,
                all_reduce: *library.get(b"ncclAllReduce")?,
                error_string: *library.get(b"ncclGetErrorString")?,
                last_error: *library.get(b"ncclGetLastError")?,
            })
        }
    }

    pub(super) fn unless_too_old(self) -> std::result::Result<Self, String> {
        match self.version_number()? {
            OLDEST.. => Ok(self),
            version => {
                Err(format!("it is version {}, 2.18 is the oldest that will do", dotted(version)))
            }
        }
    }

    /// Such as `2.27.3`.
    pub(super) fn version(&self) -> std::result::Result<String, String> {
        self.version_number().map(dotted)
    }

    fn version_number(&self) -> std::result::Result<c_int, String> {
        let mut version = 0;
        // SAFETY: it writes one number.
        match unsafe { (self.get_version)(&raw mut version) } {
            SUCCESS => Ok(version),
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

    /// What a code means, and the last warning of the library, which may be of something else.
    fn explain(&self, code: Code, communicator: Handle) -> String {
        // SAFETY: both give texts that end and are there as long as the library. That of the warning is
        // written in place by any of its threads, so it may be a mixture, but it has an end.
        let [meaning, last] =
            unsafe { [read((self.error_string)(code)), read((self.last_error)(communicator))] };
        match last.trim() {
            "" => meaning,
            last => format!("{meaning}: {last}"),
        }
    }
}

fn dotted(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
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

/// An `ncclComm_t`, which is there until [`destroy`](Self::destroy) or [`abort`](Self::abort) ends it.
pub(super) struct RawCommunicator {
    functions: Functions,
    handle: Handle,
}

// SAFETY: NCCL's functions may be called from any thread, with one communicator by one at a time: all take
// `&mut self` here but `explain`, which only reads, and nothing is `Sync`.
unsafe impl Send for RawCommunicator {}

impl RawCommunicator {
    /// Begins to connect this rank, whose device is the thread's, with all that have the same identifier.
    pub(super) fn begin(functions: Functions, id: UniqueId, shard: Shard) -> (Self, Code) {
        let mut this = Self { functions, handle: std::ptr::null_mut() };
        let [world, rank] = [shard.world, shard.rank].map(|number| number as c_int);
        let mut config = Config::non_blocking();
        // SAFETY: since version 2.18 it reads the configuration, and writes the handle, before it returns.
        let code =
            unsafe { (functions.init)(&raw mut this.handle, world, id, rank, &raw mut config) };
        (this, code)
    }

    /// What became of the last call.
    pub(super) fn state(&mut self) -> Code {
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
    /// has come past this, and which stay until then; the stream is of that device.
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

    /// Begins to send what others have yet to get, before the end.
    pub(super) fn finalize(&mut self) -> Code {
        // SAFETY: the handle is of a communicator that nobody has ended.
        unsafe { (self.functions.finalize)(self.handle) }
    }

    /// Ends one that is finalized.
    pub(super) fn destroy(self) {
        if !self.handle.is_null() {
            // SAFETY: as before, and nobody has the handle afterwards.
            unsafe { (self.functions.destroy)(self.handle) };
        }
    }

    /// Ends it, with whatever still waits for others on the device.
    pub(super) fn abort(self) {
        if !self.handle.is_null() {
            // SAFETY: as before, and nobody has the handle afterwards.
            unsafe { (self.functions.abort)(self.handle) };
        }
    }

    pub(super) fn explain(&self, code: Code) -> String {
        self.functions.explain(code, self.handle)
    }
}

/// The version of this machine's NCCL, such as `2.27.3`. Errors where there is none that will do.
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
        assert!(other.contains("ncclGetVersion"), "{other}");
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
