//! What the footer of a Parquet file says.

use super::{ColumnInfo, FileInfo, RowGroupInfo};
use crate::error::Result;
use crate::source::file::Stamped;
use crate::source::parquet::footer;
use arrow::array::{Array, ArrayRef};
use datafusion::common::ScalarValue;
use datafusion::parquet::arrow::arrow_reader::ArrowReaderMetadata;
use datafusion::parquet::arrow::arrow_reader::statistics::StatisticsConverter;
use datafusion::parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use serde_json::Value;
use std::cmp::Ordering;
use std::fmt::Display;

/// Adds it to what is known of the file.
pub(super) fn add(info: &mut FileInfo) -> Result<()> {
    let (footer, _) = footer::read(&Stamped::new(&info.path)?)?;
    let groups = footer.metadata().row_groups();
    info.row_groups = groups.iter().map(row_group).collect();
    for (index, column) in info.columns.iter_mut().enumerate() {
        stored(column, &chunks(&footer, index));
        // Nested columns have no statistics as a whole.
        let (arrow, parquet) = (footer.schema(), footer.parquet_schema());
        if let Ok(statistics) = StatisticsConverter::try_new(&column.name, arrow, parquet) {
            values(column, &statistics, groups);
        }
    }
    Ok(())
}

fn row_group(group: &RowGroupMetaData) -> RowGroupInfo {
    RowGroupInfo {
        rows: count(group.num_rows()),
        bytes: count(group.compressed_size()),
        uncompressed_bytes: count(group.total_byte_size()),
    }
}

/// Sizes are signed in Parquet; a negative one is damage, and says nothing.
fn count(number: i64) -> u64 {
    number.try_into().unwrap_or(0)
}

/// The chunks of all leaves of a column, in all row groups.
fn chunks(footer: &ArrowReaderMetadata, column: usize) -> Vec<&ColumnChunkMetaData> {
    let schema = footer.parquet_schema();
    let leaves = (0..schema.num_columns()).filter(|l| schema.get_column_root_idx(*l) == column);
    let leaves: Vec<_> = leaves.collect();
    let groups = footer.metadata().row_groups().iter();
    groups.flat_map(|group| leaves.iter().map(|leaf| group.column(*leaf))).collect()
}

fn stored(column: &mut ColumnInfo, chunks: &[&ColumnChunkMetaData]) {
    let sum = |size: fn(&ColumnChunkMetaData) -> i64| chunks.iter().map(|c| count(size(c))).sum();
    column.bytes = Some(sum(ColumnChunkMetaData::compressed_size));
    column.uncompressed_bytes = Some(sum(ColumnChunkMetaData::uncompressed_size));
    column.compression = distinct(chunks.iter().map(|chunk| codec(&chunk.compression())));
    column.encodings = distinct(chunks.iter().flat_map(|chunk| chunk.encodings()));
}

/// Without the level that writers chose, which the file does not have.
fn codec(compression: &impl Display) -> String {
    let name = compression.to_string();
    name.split_once('(').map_or(name.as_str(), |(name, _)| name).to_owned()
}

fn distinct(names: impl Iterator<Item = impl Display>) -> Vec<String> {
    let mut names: Vec<_> = names.map(|name| name.to_string()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn values(
    column: &mut ColumnInfo,
    statistics: &StatisticsConverter<'_>,
    groups: &[RowGroupMetaData],
) {
    if let Ok(nulls) = statistics.row_group_null_counts(groups) {
        column.nulls = (nulls.null_count() == 0).then(|| nulls.values().iter().sum());
    }
    let most = |of: ArrayRef, order| json(&extreme(&of, order)?);
    column.min = statistics.row_group_mins(groups).ok().and_then(|m| most(m, Ordering::Less));
    column.max = statistics.row_group_maxes(groups).ok().and_then(|m| most(m, Ordering::Greater));
}

/// The value of the row groups that is `order` of all others; none if one does not say its own.
fn extreme(groups: &ArrayRef, order: Ordering) -> Option<ScalarValue> {
    if groups.null_count() > 0 {
        return None;
    }
    let values = (0..groups.len()).map(|i| ScalarValue::try_from_array(groups, i).ok());
    values.reduce(|most, value| {
        let (most, value) = (most?, value?);
        Some(if value.partial_cmp(&most) == Some(order) { value } else { most })
    })?
}

fn json(value: &ScalarValue) -> Option<Value> {
    let text = value.to_string();
    let number =
        value.data_type().is_numeric() || value.data_type() == arrow::datatypes::DataType::Boolean;
    let parsed = number.then(|| serde_json::from_str(&text).ok()).flatten();
    (!value.is_null()).then(|| parsed.unwrap_or(Value::String(text)))
}
