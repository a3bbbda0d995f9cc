//! Functions on record batches that have a name, so that a description can mean them.

use crate::error::{Error, Result};
use crate::scan::BatchMap;
use arrow::record_batch::RecordBatch;
use mobula_core::BoxError;
use std::sync::Arc;

/// A function that [`Dataset::map_batches`](crate::Dataset::map_batches) can name. Worker
/// processes are the same binary, so they find it too.
///
/// ```
/// use arrow::record_batch::RecordBatch;
/// use mobula_core::BoxError;
///
/// fn first_half(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
///     Ok(batch.slice(0, batch.num_rows() / 2))
/// }
/// mobula_data::inventory::submit! { mobula_data::BatchFn::new("first_half", first_half) }
/// ```
#[derive(Debug)]
pub struct BatchFn {
    name: &'static str,
    function: fn(&RecordBatch) -> Result<RecordBatch, BoxError>,
}

inventory::collect!(BatchFn);

impl BatchFn {
    /// Gives `function` a name. It is also called with an empty batch, to learn its columns, and
    /// must return the same for the same rows.
    pub const fn new(
        name: &'static str,
        function: fn(&RecordBatch) -> Result<RecordBatch, BoxError>,
    ) -> Self {
        Self { name, function }
    }
}

pub(crate) fn lookup(name: &str) -> Result<BatchMap> {
    let all = || inventory::iter::<BatchFn>.into_iter();
    let Some(found) = all().find(|f| f.name == name) else {
        let registered = all().map(|f| f.name.to_owned()).collect();
        return Err(Error::NotRegistered { name: name.to_owned(), registered });
    };
    Ok(Arc::new(|batch| {
        (found.function)(batch)
            .map_err(|source| Error::BatchFn { name: found.name.to_owned(), source })
    }))
}
