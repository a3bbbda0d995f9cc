//! The crate through its public interface.

mod avro;
#[cfg(feature = "backend")]
mod backend;
mod collate;
mod dataset;
mod formats;
mod frame;
mod functions;
mod memory;
mod mutations;
mod own_source;
mod partitioned;
mod parts;
mod persist;
mod preprocess;
mod resample;
mod sklearn;
mod sources;
mod sql;
#[cfg(feature = "sqlite")]
mod sqlite;
mod stream;
mod tensors;
mod typed;
mod webdataset;
mod write;

use arrow::array::{ArrayRef, AsArray, FixedSizeListArray, Int64Array, UInt8Array};
use arrow::datatypes::{DataType, Field, Int64Type};
use arrow::record_batch::RecordBatch;
use mobula_data::{Dataset, Error};
use std::path::PathBuf;
use std::sync::Arc;

/// The data of the examples.
fn example(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples/data").join(name);
    path.to_str().expect("UTF-8").to_owned()
}

fn digits() -> Dataset {
    Dataset::read_parquet(example("digits-*.parquet")).expect("digits")
}

/// A batch with the columns given.
fn batch<const N: usize>(columns: [(&str, ArrayRef); N]) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.map(|(name, c)| (name, c, true)))
        .expect("a record batch")
}

/// `rows` rows with their number in column `id`, in batches of the sizes given, over and over.
fn numbered(rows: i64, sizes: &[i64]) -> Dataset {
    let (mut batches, mut start) = (Vec::new(), 0);
    for size in sizes.iter().cycle() {
        let end = (start + size).min(rows);
        let ids: ArrayRef = Arc::new((start..end).map(Some).collect::<Int64Array>());
        batches.push(batch([("id", ids)]));
        start = end;
        if start == rows {
            break;
        }
    }
    Dataset::from_batches(batches).expect("dataset")
}

fn ids(dataset: &Dataset) -> Vec<i64> {
    let rows = dataset.collect().expect("collect");
    rows.column_by_name("id").expect("id").as_primitive::<Int64Type>().values().to_vec()
}

/// A `FixedSizeList<UInt8>` column.
fn lists(width: i32, values: Vec<u8>) -> ArrayRef {
    let item = Arc::new(Field::new("item", DataType::UInt8, true));
    let values = Arc::new(UInt8Array::from(values));
    Arc::new(FixedSizeListArray::try_new(item, width, values, None).expect("lists"))
}

/// What an error says.
fn message<T>(result: Result<T, impl Into<mobula_core::Error>>) -> String {
    let error: mobula_core::Error = result.err().expect("an error").into();
    mobula_core::error::chain(&error)
}

/// An error's own type.
fn failure<T>(result: Result<T, Error>) -> Error {
    result.err().expect("an error")
}
