//! Results that are written once.

use super::Real;

/// `len` elements that `write` sets, every one of them.
///
/// A debug build hands out NaNs, so that a test sees what a kernel forgot.
pub(crate) fn output<T: Real>(len: usize, write: impl FnOnce(&mut [T])) -> Vec<T> {
    let mut out =
        if cfg!(debug_assertions) { vec![T::from_f64(f64::NAN); len] } else { unset(len) };
    write(&mut out);
    out
}

/// Zeroing costs as much as a simple kernel takes.
#[expect(clippy::uninit_vec, reason = "every element is written before it is read")]
fn unset<T: Real>(len: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`, and `T` is `f32` or `f64`: a plain number, without a
    // destructor, valid for any bits. `output` has every element written before one is read; that
    // its callers do so is tested in debug builds, where this function is not used.
    unsafe {
        out.set_len(len);
    }
    out
}
