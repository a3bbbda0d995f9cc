//! One list of columns for files that have different ones.

use crate::error::{Error, Result};
use crate::source::columns;
use arrow::array::{RecordBatchOptions, new_null_array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use std::path::Path;
use std::sync::Arc;

/// Adds the columns of a file to those of the files before it: missing values for files that do not
/// have them, of a type that holds the values of all.
pub(super) fn add(all: &Schema, path: &Path, file: &Schema) -> Result<Schema> {
    let mut fields: Vec<Field> = all.fields().iter().map(|field| field.as_ref().clone()).collect();
    for field in &mut fields {
        let Ok(other) = file.field_with_name(field.name()) else {
            field.set_nullable(true);
            continue;
        };
        let Some(wide) = common(field.data_type(), other.data_type()) else {
            return Err(Error::SchemaDiffers {
                path: path.to_owned(),
                expected: columns(&Arc::new(all.clone())),
                got: columns(&Arc::new(file.clone())),
            });
        };
        let is_nullable = field.is_nullable() || other.is_nullable();
        *field = field.clone().with_data_type(wide).with_nullable(is_nullable);
    }
    let is_new = |field: &&Arc<Field>| all.field_with_name(field.name()).is_err();
    let new = file.fields().iter().filter(is_new);
    fields.extend(new.map(|field| field.as_ref().clone().with_nullable(true)));
    Ok(Schema::new(fields))
}

/// A type for the values of both.
fn common(one: &DataType, other: &DataType) -> Option<DataType> {
    let is_number = |of: &DataType| of.is_integer() || of.is_floating();
    let is_text = |of: &DataType| matches!(of, DataType::Utf8 | DataType::LargeUtf8);
    Some(match (one, other) {
        (one, other) if one == other => one.clone(),
        (DataType::Null, of) | (of, DataType::Null) => of.clone(),
        (DataType::UInt64, of) | (of, DataType::UInt64) if of.is_signed_integer() => return None,
        (one, other) if one.is_unsigned_integer() && other.is_unsigned_integer() => {
            DataType::UInt64
        }
        (one, other) if one.is_integer() && other.is_integer() => DataType::Int64,
        (one, other) if is_number(one) && is_number(other) => DataType::Float64,
        (one, other) if is_text(one) && is_text(other) => DataType::LargeUtf8,
        _ => return None,
    })
}

/// The columns at `wanted` of the unified ones: where a file has them.
pub(super) fn own(unified: &Schema, file: &Schema, wanted: &[usize]) -> Vec<usize> {
    let index = |at: &usize| file.index_of(unified.field(*at).name()).ok();
    wanted.iter().filter_map(index).collect()
}

/// The rows of a file with the columns that `schema` names.
pub(super) fn conform(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let column = |field: &Arc<Field>| match batch.column_by_name(field.name()) {
        Some(column) => cast(column, field.data_type()),
        None => Ok(new_null_array(field.data_type(), batch.num_rows())),
    };
    let columns = schema.fields().iter().map(column).collect::<Result<_, _>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &options)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_text_have_a_common_type_and_others_have_none() {
        use DataType as T;
        assert_eq!(common(&T::Int8, &T::Int32), Some(T::Int64));
        assert_eq!(common(&T::UInt8, &T::UInt64), Some(T::UInt64));
        assert_eq!(common(&T::UInt64, &T::Int8), None);
        assert_eq!(common(&T::Float32, &T::Int64), Some(T::Float64));
        assert_eq!(common(&T::Utf8, &T::Null), Some(T::Utf8));
        assert_eq!(common(&T::Utf8, &T::LargeUtf8), Some(T::LargeUtf8));
        assert_eq!(common(&T::Utf8, &T::Int64), None);
    }
}
