//! Sums of tensors.

use crate::backward::parameter_gradient;
use crate::cpu::{unsupported, with_values};
use crate::kernels::{Real, add_assign, column_sums, output};
use crate::link::{Source, result};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// `a + b` of one shape: as candle's, and cheaper to differentiate.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() {
        return Err(Error::shape("the second term of a sum", format!("{:?}", a.dims()), b.dims()));
    }
    if !crate::cpu::has_kernels(a) {
        return Ok((a + b)?);
    }
    let (a, b) = (&a.contiguous()?, &b.contiguous()?);
    Ok(match a.dtype() {
        DType::F32 => add_as::<f32>(a, b)?,
        DType::F64 => add_as::<f64>(a, b)?,
        other => return Err(unsupported(other, "add").into()),
    })
}

fn add_as<T: Real>(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let y = with_values([a, b], |[a, b]| {
        Ok(output(a.len(), |y: &mut [T]| {
            y.copy_from_slice(a);
            add_assign(y, b);
        }))
    })?;
    let sources = [Source::of(a), Source::of(b)];
    let to = sources.clone();
    result::<T>(y, a.shape().clone(), &[&sources[0], &sources[1]], move |gradient| {
        to.iter().map(|to| to.give_shared::<T>(&gradient)).collect()
    })
}

/// Adds a parameter of the shape of a row to each row: `[rows, ..]` and `[..]`.
pub(crate) fn add_to_rows(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    if x.dims().get(1..) != Some(row.dims()) {
        return Err(Error::shape(
            "a row that is added",
            format!("{:?}", &x.dims()[1..]),
            row.dims(),
        ));
    }
    if !crate::cpu::has_kernels(x) {
        return Ok(x.broadcast_add(row)?);
    }
    let x = &x.contiguous()?;
    Ok(match x.dtype() {
        DType::F32 => add_row::<f32>(x, row)?,
        DType::F64 => add_row::<f64>(x, row)?,
        other => return Err(unsupported(other, "add").into()),
    })
}

fn add_row<T: Real>(x: &Tensor, row: &Tensor) -> candle_core::Result<Tensor> {
    let y = with_values([x, row], |[x, row]| {
        Ok(output(x.len(), |y: &mut [T]| {
            y.copy_from_slice(x);
            y.chunks_exact_mut(row.len().max(1)).for_each(|y| add_assign(y, row));
        }))
    })?;
    let (to, parameter) = (Source::of(x), row.clone());
    let sources = [to.clone(), Source::of(row)];
    result::<T>(y, x.shape().clone(), &[&sources[0], &sources[1]], move |gradient| {
        let values = T::cpu_storage_as_slice(&gradient)?;
        let sums =
            parameter_gradient(&parameter, |sums, is_added| column_sums(values, sums, is_added))?;
        Ok(vec![to.give_shared::<T>(&gradient)?, sums])
    })
}
