//! The same preprocessor on tensors: into Arrow columns, through `transform`, and back.

use super::Preprocessor;
use crate::error::{Error, Result};
use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, FixedSizeListArray, PrimitiveArray, RecordBatch,
};
use arrow::datatypes::{
    ArrowNativeType, DataType, Field, Float32Type, Float64Type, Int64Type, Schema, UInt8Type,
    UInt32Type,
};
use candle_core::{DType, Device, Shape, Tensor, WithDType};
use mobula_core::Batch;
use std::sync::Arc;

impl Preprocessor {
    /// Applies it to named tensors, as serving has them: `[rows]` is a scalar column, `[rows, n]`
    /// and more dimensions are lists. It is the computation of [`transform`](Self::transform);
    /// tensors that it does not change pass as they are.
    pub fn transform_batch(&self, batch: &Batch) -> Result<Batch> {
        let columns = batch
            .tensors()
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), column(name, tensor)?)))
            .collect::<Result<Vec<_>>>()?;
        let fields = columns.iter().map(|(name, c)| Field::new(name, c.data_type().clone(), true));
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        let arrays = columns.iter().map(|(_, column)| column.clone()).collect();
        let before = RecordBatch::try_new(schema, arrays)?;
        let after = self.transform(&before)?;
        let tensors = after
            .schema()
            .fields()
            .iter()
            .zip(after.columns())
            .map(|(field, array)| {
                let name = field.name();
                let original = before.column_by_name(name).zip(batch.get(name).ok());
                let tensor = match original {
                    Some((column, tensor)) if Arc::ptr_eq(column, array) => tensor.clone(),
                    Some((_, tensor)) => like(tensor, tensor_of(name, array)?)?,
                    None => tensor_of(name, array)?,
                };
                Ok((name.clone(), tensor))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(batch.replace(tensors)?)
    }
}

/// A list of as many elements as before keeps the dimensions it had.
fn like(before: &Tensor, after: Tensor) -> Result<Tensor> {
    let same = before.elem_count() == after.elem_count();
    Ok(if same { after.reshape(before.shape())? } else { after })
}

fn column(name: &str, tensor: &Tensor) -> Result<ArrayRef> {
    match tensor.dtype() {
        DType::U8 => array::<u8, UInt8Type>(tensor),
        DType::U32 => array::<u32, UInt32Type>(tensor),
        DType::I64 => array::<i64, Int64Type>(tensor),
        DType::F32 => array::<f32, Float32Type>(tensor),
        DType::F64 => array::<f64, Float64Type>(tensor),
        other => Err(Error::ColumnType {
            column: name.to_owned(),
            expected: "a tensor of u8, u32, i64, f32 or f64",
            got: other.as_str().to_owned(),
            hint: "",
        }),
    }
}

fn array<N, T>(tensor: &Tensor) -> Result<ArrayRef>
where
    N: WithDType + ArrowNativeType,
    T: ArrowPrimitiveType<Native = N>,
{
    let values: Vec<N> = tensor.flatten_all()?.to_vec1()?;
    let values = PrimitiveArray::<T>::new(values.into(), None);
    let dims = tensor.dims();
    if dims.len() == 1 {
        return Ok(Arc::new(values));
    }
    let width: usize = dims[1..].iter().product();
    let item = Arc::new(Field::new("item", T::DATA_TYPE, true));
    Ok(Arc::new(FixedSizeListArray::try_new(item, width as i32, Arc::new(values), None)?))
}

fn tensor_of(name: &str, array: &ArrayRef) -> Result<Tensor> {
    let (values, shape) = match array.data_type() {
        DataType::FixedSizeList(_, width) => {
            (array.as_fixed_size_list().values(), Shape::from((array.len(), *width as usize)))
        }
        _ => (array, Shape::from(array.len())),
    };
    if values.null_count() + array.null_count() > 0 {
        let rows = values.null_count() + array.null_count();
        let (column, place) = (name.to_owned(), "a batch of tensors".to_owned());
        return Err(Error::Nulls { column, rows, place });
    }
    match values.data_type() {
        DataType::UInt8 => tensor::<u8, UInt8Type>(values, shape),
        DataType::UInt32 => tensor::<u32, UInt32Type>(values, shape),
        DataType::Int64 => tensor::<i64, Int64Type>(values, shape),
        DataType::Float32 => tensor::<f32, Float32Type>(values, shape),
        DataType::Float64 => tensor::<f64, Float64Type>(values, shape),
        other => Err(Error::ColumnType {
            column: name.to_owned(),
            expected: "a type that tensors have",
            got: other.to_string(),
            hint: "",
        }),
    }
}

fn tensor<N, T>(values: &ArrayRef, shape: Shape) -> Result<Tensor>
where
    N: WithDType + ArrowNativeType,
    T: ArrowPrimitiveType<Native = N>,
{
    let values = values.as_primitive::<T>().values().to_vec();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}
