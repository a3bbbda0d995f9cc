//! Options in their ranges.

use crate::{Error, Result};

/// Errors unless `good`, naming the option, its value and what it may be.
pub(super) fn option(
    option: &'static str,
    value: f64,
    good: bool,
    expected: &'static str,
) -> Result<()> {
    match good {
        true => Ok(()),
        false => Err(Error::Option { option, got: value.to_string(), expected }),
    }
}

pub(super) fn positive(name: &'static str, value: f64) -> Result<()> {
    option(name, value, value.is_finite() && value > 0.0, "a finite number above 0")
}

pub(super) fn not_negative(name: &'static str, value: f64) -> Result<()> {
    option(name, value, value.is_finite() && value >= 0.0, "a finite number, 0 or above")
}

/// A decay or a momentum.
pub(super) fn below_one(name: &'static str, value: f64) -> Result<()> {
    option(name, value, (0.0..1.0).contains(&value), "from 0 to below 1")
}

pub(super) fn at_least_one(name: &'static str, value: u64) -> Result<()> {
    option(name, value as f64, value > 0, "at least 1")
}
