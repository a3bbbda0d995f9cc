//! From Arrow columns to tensors: one copy, from the block's buffer into the tensor's.

use crate::error::{Error, Result};
use crate::preprocess::numbers;
use arrow::array::{Array, ArrayRef, AsArray, Int64Array};
use arrow::buffer::ScalarBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float32Type, Int64Type, Schema, UInt8Type};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A column of a stream and the tensor that it becomes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ColumnSpec {
    name: String,
    /// Values of a row: some for lists.
    width: Option<usize>,
    class: bool,
}

/// The columns asked for, each once, if they can be tensors.
pub(super) fn specs(
    schema: &Schema,
    features: &[String],
    label: Option<&str>,
) -> Result<Vec<ColumnSpec>> {
    let mut specs: Vec<ColumnSpec> = Vec::new();
    for name in features.iter().map(String::as_str).chain(label) {
        if specs.iter().any(|spec| spec.name == name) {
            return Err(Error::InvalidOption {
                option: "the list of features and label",
                expected: "each column once".to_owned(),
                got: format!("{name:?} twice"),
            });
        }
        specs.push(ColumnSpec::new(schema, name, label == Some(name))?);
    }
    Ok(specs)
}

impl ColumnSpec {
    fn new(schema: &Schema, name: &str, is_label: bool) -> Result<Self> {
        let field =
            schema.field_with_name(name).map_err(|_| Error::no_such_column(name, schema))?;
        let data_type = field.data_type();
        let width =
            numbers::width(data_type).ok_or_else(|| numbers::not_numeric(name, data_type))?;
        let width = matches!(data_type, DataType::FixedSizeList(..)).then_some(width);
        let whole = data_type.is_integer() || *data_type == DataType::Boolean;
        Ok(Self { name: name.to_owned(), width, class: is_label && whole })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Decodes the column of a block. `place` names the block in errors.
    pub(super) fn decode(&self, array: &ArrayRef, place: &str) -> Result<Column> {
        let values = match array.data_type() {
            DataType::FixedSizeList(..) => array.as_fixed_size_list().values(),
            _ => array,
        };
        let missing = array.null_count().max(values.null_count().div_ceil(self.width.unwrap_or(1)));
        if missing > 0 {
            let (column, place) = (self.name.clone(), place.to_owned());
            return Err(Error::Nulls { column, rows: missing, place });
        }
        if self.class {
            return self.classes(values);
        }
        Ok(match values.data_type() {
            // Images stay as small as they are until they are gathered.
            DataType::UInt8 => Column::U8(values.as_primitive::<UInt8Type>().values().clone()),
            _ => {
                let values = cast(values, &DataType::Float32)?;
                Column::F32(values.as_primitive::<Float32Type>().values().clone())
            }
        })
    }

    fn classes(&self, values: &ArrayRef) -> Result<Column> {
        let values: Int64Array =
            cast(values, &DataType::Int64)?.as_primitive::<Int64Type>().clone();
        let out_of_range = |value| Error::LabelRange { column: self.name.clone(), value };
        let class = |value: &i64| u32::try_from(*value).map_err(|_| out_of_range(*value));
        Ok(Column::Class(values.values().iter().map(class).collect::<Result<Vec<_>>>()?.into()))
    }

    /// The tensor of the rows given, as runs of them in decoded columns.
    pub(super) fn gather<'a>(
        &self,
        rows: usize,
        runs: impl Iterator<Item = (&'a Column, Range<usize>)>,
    ) -> Result<Tensor> {
        let width = self.width.unwrap_or(1);
        if self.class {
            let mut classes = Vec::with_capacity(rows);
            runs.for_each(|(column, rows)| column.push_classes(rows, &mut classes));
            return Ok(Tensor::from_vec(classes, rows, &Device::Cpu)?);
        }
        let mut values = Vec::with_capacity(rows * width);
        runs.for_each(|(column, rows)| {
            column.push(rows.start * width..rows.end * width, &mut values);
        });
        Ok(match self.width {
            Some(width) => Tensor::from_vec(values, (rows, width), &Device::Cpu)?,
            None => Tensor::from_vec(values, rows, &Device::Cpu)?,
        })
    }
}

/// A decoded column of a block, without missing values.
#[derive(Debug)]
pub(super) enum Column {
    U8(ScalarBuffer<u8>),
    F32(ScalarBuffer<f32>),
    Class(ScalarBuffer<u32>),
}

impl Column {
    fn push(&self, elements: Range<usize>, out: &mut Vec<f32>) {
        match self {
            Self::U8(values) => out.extend(values[elements].iter().map(|v| f32::from(*v))),
            Self::F32(values) => out.extend_from_slice(&values[elements]),
            Self::Class(values) => out.extend(values[elements].iter().map(|v| *v as f32)),
        }
    }

    fn push_classes(&self, rows: Range<usize>, out: &mut Vec<u32>) {
        match self {
            Self::Class(values) => out.extend_from_slice(&values[rows]),
            Self::U8(values) => out.extend(values[rows].iter().map(|v| u32::from(*v))),
            Self::F32(values) => out.extend(values[rows].iter().map(|v| *v as u32)),
        }
    }
}
