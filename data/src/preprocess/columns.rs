//! From a batch to a batch: a column changed in place, or several joined into one.

use super::{Preprocessor, Transform};
use crate::error::{Error, Result};
use arrow::array::ArrayRef;
use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use arrow::record_batch::RecordBatch;
use std::sync::Arc;

/// A fitted preprocessor that changes one column in place.
pub(super) trait PerColumn: Clone {
    fn column(&self) -> &str;
    fn apply(&self, array: &ArrayRef) -> Result<ArrayRef>;

    /// The categories or terms, if it encodes any.
    fn classes(&self) -> Option<Vec<String>> {
        None
    }
}

/// A list of such, each for its column, is a [`Transform`], which JSON has under `$name`.
macro_rules! transform_each {
    ($name:literal, $fitted:ty) => {
        #[typetag::serde(name = $name)]
        impl $crate::Transform for Vec<$fitted> {
            fn transform(
                &self,
                batch: &arrow::record_batch::RecordBatch,
            ) -> $crate::Result<arrow::record_batch::RecordBatch> {
                $crate::preprocess::columns::each(batch, self)
            }

            fn without(&self, column: &str) -> $crate::Preprocessor {
                $crate::preprocess::columns::others(self, column)
            }

            fn classes(&self, column: &str) -> Option<Vec<String>> {
                self.iter().find(|fitted| fitted.column() == column)?.classes()
            }
        }
    };
}
pub(super) use transform_each;

/// Changes each of the columns in place.
pub(super) fn each<P: PerColumn>(batch: &RecordBatch, columns: &[P]) -> Result<RecordBatch> {
    let schema = batch.schema_ref();
    let (mut fields, mut arrays) = (schema.fields().to_vec(), batch.columns().to_vec());
    for fitted in columns {
        let index = index_of(schema, fitted.column())?;
        arrays[index] = fitted.apply(&arrays[index])?;
        retype(&mut fields[index], arrays[index].data_type());
    }
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?)
}

pub(super) fn retype(field: &mut FieldRef, data_type: &DataType) {
    if field.data_type() != data_type {
        *field = Arc::new(Field::new(field.name(), data_type.clone(), field.is_nullable()));
    }
}

/// The same preprocessor without one column.
pub(super) fn others<P: PerColumn>(columns: &[P], column: &str) -> Preprocessor
where
    Vec<P>: Transform + 'static,
{
    let kept = columns.iter().filter(|c| c.column() != column).cloned();
    Preprocessor::new(kept.collect::<Vec<P>>())
}

/// A batch where the columns `used` are gone, and `output` comes last.
pub(super) fn join<'a>(
    batch: &RecordBatch,
    used: impl Iterator<Item = &'a str> + Clone,
    output: &str,
    joined: ArrayRef,
) -> Result<RecordBatch> {
    let columns = batch.schema_ref().fields().iter().zip(batch.columns());
    let kept = columns.filter(|(field, _)| {
        field.name() != output && !used.clone().any(|column| column == field.name())
    });
    let (mut fields, mut arrays): (Vec<_>, Vec<_>) =
        kept.map(|(field, array)| (field.clone(), array.clone())).unzip();
    fields.push(Arc::new(Field::new(output, joined.data_type().clone(), false)));
    arrays.push(joined);
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?)
}

pub(super) fn column_of<'a>(batch: &'a RecordBatch, column: &str) -> Result<&'a ArrayRef> {
    Ok(batch.column(index_of(batch.schema_ref(), column)?))
}

pub(super) fn index_of(schema: &Schema, column: &str) -> Result<usize> {
    schema.index_of(column).map_err(|_| Error::no_such_column(column, schema))
}
