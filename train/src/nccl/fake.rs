//! Stands in for NCCL's library where there is none.
#![allow(unsafe_code)]

use super::library::{Code, Config, Functions, Handle, IN_PROGRESS, SUCCESS, UniqueId};
use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void};

/// A library of one rank, on the thread of a test.
#[derive(Default)]
pub(super) struct Fake {
    /// How often it says that a call is under way before it is done.
    pub(super) busy: u32,
    /// What calls come to, and what is said of them later.
    pub(super) refuses: Code,
    pub(super) fails: Code,
    pub(super) calls: Vec<&'static str>,
}

thread_local! {
    pub(super) static FAKE: RefCell<Fake> = RefCell::default();
}

fn call(name: &'static str) -> Code {
    FAKE.with_borrow_mut(|fake| {
        fake.calls.push(name);
        match fake.refuses {
            SUCCESS if fake.busy > 0 => IN_PROGRESS,
            code => code,
        }
    })
}

extern "C" fn get_unique_id(id: *mut UniqueId) -> Code {
    // SAFETY: the caller's.
    unsafe { (*id).0[127] = 7 };
    call("id")
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
    // SAFETY: the caller's.
    unsafe { *handle = std::ptr::dangling_mut::<u64>().cast() };
    call("init")
}

extern "C" fn async_error(_: Handle, code: *mut Code) -> Code {
    let state = FAKE.with_borrow_mut(|fake| match fake.busy {
        0 => fake.fails,
        _ => {
            fake.busy = fake.busy.saturating_sub(u32::from(fake.busy < u32::MAX));
            IN_PROGRESS
        }
    });
    // SAFETY: the caller's.
    unsafe { *code = state };
    SUCCESS
}

extern "C" fn abort(_: Handle) -> Code {
    call("abort")
}

/// The other rank has the same numbers.
extern "C" fn all_reduce(
    from: *const c_void,
    to: *mut c_void,
    len: usize,
    kind: c_int,
    operation: c_int,
    _: Handle,
    _: *mut c_void,
) -> Code {
    assert_eq!((kind, operation), (7, 0), "f32, a sum");
    for at in 0..len {
        // SAFETY: the caller's.
        unsafe { *to.cast::<f32>().add(at) = 2.0 * *from.cast::<f32>().add(at) };
    }
    call("all_reduce")
}

extern "C" fn error_string(code: Code) -> *const c_char {
    match code {
        5 => c"invalid usage".as_ptr(),
        _ => c"remote process exited or there was a network error".as_ptr(),
    }
}

extern "C" fn last_error(_: Handle) -> *const c_char {
    match FAKE.with_borrow(|fake| fake.refuses) {
        SUCCESS => std::ptr::null(),
        _ => c"Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000".as_ptr(),
    }
}

extern "C" fn version(version: *mut c_int) -> Code {
    // SAFETY: the caller's.
    unsafe { *version = 22_703 };
    SUCCESS
}

pub(super) const FUNCTIONS: Functions = Functions {
    get_unique_id,
    init,
    async_error,
    abort,
    all_reduce,
    error_string,
    last_error,
    version,
};
