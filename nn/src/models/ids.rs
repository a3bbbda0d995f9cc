//! Ids that come as numbers of any type: of tokens, of categories.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Whose ids they are, for who must be told of one that is unknown.
pub(super) struct Ids {
    /// What has them, such as `"token"`.
    pub(super) what: &'static str,
    /// The option that says how many there are.
    pub(super) option: &'static str,
}

impl Ids {
    /// `[rows, columns]` as `i64`. Errors unless each is a whole number of `0..count(column)`.
    pub(super) fn check(&self, x: &Tensor, count: impl Fn(usize) -> usize) -> Result<Tensor> {
        let (rows, columns) = x.dims2()?;
        // A batch streams as one type, mostly f32. An f64 holds all of them exactly.
        let values = x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
        let mut ids = Vec::with_capacity(rows * columns);
        for (at, got) in values.to_vec1::<f64>()?.into_iter().enumerate() {
            let (row, column) = (at / columns, at % columns);
            let (&Self { what, option }, count) = (self, count(column));
            // A NaN is none of them.
            if !(got >= 0.0 && got < count as f64 && got.fract() == 0.0) {
                return Err(Error::UnknownId { what, column, row, got, count, option });
            }
            ids.push(got as i64);
        }
        Ok(Tensor::from_vec(ids, (rows, columns), &Device::Cpu)?)
    }
}
