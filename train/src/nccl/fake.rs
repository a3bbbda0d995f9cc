//! Stands in for NCCL's library where there is none.
#![allow(unsafe_code)]

use super::library::{Code, Config, Functions, Handle, IN_PROGRESS, SUCCESS, UniqueId};
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::sync::{Mutex, PoisonError};

/// A library of one rank, of the thread of a test.
#[derive(Default)]
pub(super) struct Fake {
    pub(super) version: c_int,
    /// How often it says that a call is under way before it is done.
    pub(super) busy: u32,
    /// What calls come to, and what is said of them later.
    pub(super) refuses: Code,
    pub(super) fails: Code,
    /// The end of a communicator does not come.
    pub(super) hangs: bool,
    pub(super) calls: Vec<&'static str>,
}

thread_local! {
    static FAKE: Cell<Option<&'static Mutex<Fake>>> = const { Cell::new(None) };
}

fn of_this_thread() -> &'static Mutex<Fake> {
    let fake = FAKE.get().unwrap_or_else(|| Box::leak(Box::default()));
    FAKE.set(Some(fake));
    fake
}

/// That of this thread.
pub(super) fn fake<R>(f: impl FnOnce(&mut Fake) -> R) -> R {
    f(&mut of_this_thread().lock().unwrap_or_else(PoisonError::into_inner))
}

/// That of a communicator, on whatever thread.
fn of<R>(handle: Handle, f: impl FnOnce(&mut Fake) -> R) -> R {
    // SAFETY: `init` has made the handle of one that stays.
    let fake = unsafe { &*handle.cast::<Mutex<Fake>>() };
    f(&mut fake.lock().unwrap_or_else(PoisonError::into_inner))
}

fn call(handle: Handle, name: &'static str) -> Code {
    of(handle, |fake| {
        fake.calls.push(name);
        match fake.refuses {
            SUCCESS if fake.busy > 0 => IN_PROGRESS,
            code => code,
        }
    })
}

extern "C" fn get_version(version: *mut c_int) -> Code {
    // SAFETY: the caller's.
    unsafe { *version = fake(|fake| fake.version) };
    SUCCESS
}

extern "C" fn get_unique_id(id: *mut UniqueId) -> Code {
    // SAFETY: the caller's.
    unsafe { (*id).0[127] = 7 };
    SUCCESS
}

extern "C" fn init(
    handle: *mut Handle,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
    config: *mut Config,
) -> Code {
    assert_eq!((ranks, rank, id.0[127]), (2, 1, 7));
    assert!(!config.is_null());
    let own: Handle = std::ptr::from_ref(of_this_thread()).cast_mut().cast();
    // SAFETY: the caller's.
    unsafe { *handle = own };
    call(own, "init")
}

extern "C" fn async_error(handle: Handle, code: *mut Code) -> Code {
    let state = of(handle, |fake| match fake.busy {
        0 => fake.fails,
        _ => {
            fake.busy -= u32::from(fake.busy < u32::MAX);
            IN_PROGRESS
        }
    });
    // SAFETY: the caller's.
    unsafe { *code = state };
    SUCCESS
}

extern "C" fn finalize(handle: Handle) -> Code {
    call(handle, "finalize")
}

extern "C" fn destroy(handle: Handle) -> Code {
    end(handle, "destroy")
}

extern "C" fn abort(handle: Handle) -> Code {
    end(handle, "abort")
}

fn end(handle: Handle, name: &'static str) -> Code {
    let code = call(handle, name);
    while of(handle, |fake| fake.hangs) {
        std::thread::park();
    }
    code
}

/// The other rank has the same numbers.
extern "C" fn all_reduce(
    from: *const c_void,
    to: *mut c_void,
    len: usize,
    kind: c_int,
    operation: c_int,
    handle: Handle,
    _: *mut c_void,
) -> Code {
    assert_eq!((kind, operation), (7, 0), "f32, a sum");
    for at in 0..len {
        // SAFETY: the caller's.
        unsafe { *to.cast::<f32>().add(at) = 2.0 * *from.cast::<f32>().add(at) };
    }
    call(handle, "all_reduce")
}

extern "C" fn error_string(code: Code) -> *const c_char {
    match code {
        5 => c"invalid usage".as_ptr(),
        _ => c"remote process exited or there was a network error".as_ptr(),
    }
}

extern "C" fn last_error(_: Handle) -> *const c_char {
    match fake(|fake| fake.refuses) {
        SUCCESS => std::ptr::null(),
        _ => c"Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000".as_ptr(),
    }
}

pub(super) const FUNCTIONS: Functions = Functions {
    get_version,
    get_unique_id,
    init,
    async_error,
    finalize,
    destroy,
    abort,
    all_reduce,
    error_string,
    last_error,
};
